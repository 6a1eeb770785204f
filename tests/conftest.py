"""Fixtures that several test files share."""

import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from shike_core.data.sources import Source, load_source

settings.register_profile("shike", deadline=None)  # shared machines stall now and then
settings.load_profile("shike")

SHARED = Path(__file__).parents[2] / "shared"
SHARED_DATA = SHARED / "data"
REFERENCE = {
    "small": Path(__file__).parent / "reference" / "shike_resnet32_c100_e3_small.npz",
    "full": SHARED / "reference" / "shike_resnet32_c100_e3.npz",
}
"""Figures computed with the authors' code; reference/make_small.py says how the small one came."""


@pytest.fixture(scope="session")
def cifar100_dir(tmp_path_factory) -> Path:
    """The directory of the real CIFAR-100 files, if this machine has them."""
    archive = SHARED_DATA / "cifar-100-python.tar.xz"
    if directory := os.environ.get("SHIKE_TEST_CIFAR100"):
        return Path(directory)
    if not archive.is_file():
        pytest.skip("the real CIFAR-100 is not here; SHIKE_TEST_CIFAR100 can name its directory")
    directory = tmp_path_factory.mktemp("cifar100")
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    return directory / "cifar-100-python"


@pytest.fixture(scope="session")
def cifar100(cifar100_dir) -> Source:
    """The real CIFAR-100."""
    return load_source("cifar100", cifar100_dir)


@pytest.fixture(scope="session", params=REFERENCE)
def reference(request) -> dict[str, np.ndarray]:
    """Figures computed with the authors' code: one expert of the three, then all of them."""
    path = REFERENCE[request.param]
    if not path.is_file():
        pytest.skip("the full reference file is not in ../shared; the small one is checked")
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def digits() -> Source:
    """The real handwritten digits."""
    return load_source("digits")


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Path]:
    """The root of a file system of 64 KiB."""
    mount = tmp_path / "full_disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)

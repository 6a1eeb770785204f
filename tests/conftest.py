"""Fixtures that several test files share."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import settings

from shike_core.data.sources import Source, load_source

# Before torch is imported: its threads and those of another test at the same time get in each
# other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, and no deadlines: shared machines stall now and then.
settings.load_profile("ci")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As a shell does to what it starts in the background; tested programs would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent
SHARED = ROOT.parents[1] / "shared"
SHARED_DATA = SHARED / "data"
REFERENCE = {
    "small": ROOT / "reference" / "shike_resnet32_c100_e3_small.npz",
    "full": SHARED / "reference" / "shike_resnet32_c100_e3.npz",
}
"""Figures computed with the authors' code; reference/make_small.py says how the small one came."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that several processes end together.

    Where images of containers have to be built, one process does that at the very beginning, and
    the others need them late.
    """
    order = (
        *("docker/test_images.py", "test_distributed.py", "test_stages.py"),
        *("components", "pipelines", "server", "docker", "test_train.py", "benchmarks"),
    )
    places = {ROOT / name: place for place, name in enumerate(order)}

    def place(item: pytest.Item) -> int:
        return places.get(item.path, places.get(item.path.parent, len(places)))

    items.sort(key=place)


def pytest_runtest_setup() -> None:
    """The same first weights and images in every run: what passes here passes there."""
    import torch  # after OMP_NUM_THREADS is set

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cifar100_dir(tmp_path_factory) -> Path:
    """The directory of the real CIFAR-100 files, if this machine has them."""
    archive = SHARED_DATA / "cifar-100-python.tar.xz"
    if directory := os.environ.get("SHIKE_TEST_CIFAR100"):
        return Path(directory)
    if not archive.is_file():
        pytest.skip("the real CIFAR-100 is not here; SHIKE_TEST_CIFAR100 can name its directory")
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # several processes; one of them unpacks for all
        directory = directory.parent
    files = directory / "cifar-100-python"
    with FileLock(directory / "cifar100.lock"):
        if not files.exists():
            with tarfile.open(archive) as tar, TemporaryDirectory(dir=directory) as temporary:
                tar.extractall(temporary, filter="data")
                (Path(temporary) / files.name).rename(files)
    return files


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


@dataclass
class MlflowServer:
    """A real tracking server in a process of its own, which can be killed and started again."""

    port: int
    log: Path
    command: list[str]
    settings: dict[str, str] = field(default_factory=dict, repr=False)
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, unless it runs, and wait until it answers."""
        if self.process is not None:
            return
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command,
                env=environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", **self.settings),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 180
        while not self.answers():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def answers(self) -> bool:
        try:
            with urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except (URLError, OSError):
            return False

    def kill(self) -> None:
        """End it and its workers at once, as a node that fails would."""
        if self.process is not None:
            with suppress(ProcessLookupError):  # it ended by itself
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def environment(**more: str) -> dict[str, str]:
    """The environment of a process started by a test: none of our settings but those given."""
    # Variables of the make that runs the tests would be those of a make that a test runs.
    ours = ("MLFLOW_", "SHIKE_", "MAKE", "MFLAGS", "ARGS")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # or each process compiles torch's sources anew
    return kept | {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"} | more


@pytest.fixture(scope="session")
def process_environment() -> Callable[..., dict[str, str]]:
    """`environment`, for test files."""
    return environment


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A port of this machine that nobody listens on."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory, free_port) -> Iterator[Callable[..., MlflowServer]]:
    """Makes servers, not yet started; all are ended with the session."""
    servers = []

    def make(store: str, artifacts: Path) -> MlflowServer:
        port, log = free_port(), tmp_path_factory.mktemp("mlflow_server") / "log.txt"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
        command += ["--artifacts-destination", str(artifacts), "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        servers.append(MlflowServer(port, log, command))
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def empty_mlflow_database(tmp_path_factory) -> Path:
    """A database with MLflow's tables, which take seconds to make; to be copied."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow_database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(empty_mlflow_database, tmp_path, monkeypatch) -> str:
    """An MLflow store of the test's own, which MLFLOW_TRACKING_URI names."""
    shutil.copyfile(empty_mlflow_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator:
    """A headless Chromium."""
    chromium, driver = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
    if not (chromium.exists() and driver.exists()):
        pytest.skip("needs chromium and its driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(chromium)
    for argument in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "window-size=1400,1000", f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    started = webdriver.Chrome(options=options, service=Service(str(driver)))
    started.set_page_load_timeout(120)
    yield started
    started.quit()

"""The real images, built once, and containers with as few rights as a careful cluster gives."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
TAG = "test"


@dataclass(frozen=True)
class Images:
    """Runs and looks into the images of this tree."""

    revision: str
    """The commit they were made from, with a suffix if the tree differs from it."""

    names = ("data", "register", "mlflow", "train", "evaluate")

    def name(self, image: str) -> str:
        return f"shike-python-{image}:{TAG}"

    def command(self, image: str, *arguments: str, options: tuple[str, ...] = ()) -> list[str]:
        """For a user that the image does not know, with no right but to write to /tmp."""
        user = os.getuid() or 12345  # of the files that a container leaves in a test's folder
        rights = ["--user", f"{user}:0", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL"]
        rights += ["--security-opt", "no-new-privileges", "--env", "OMP_NUM_THREADS=1"]
        return ["docker", "run", *rights, *options, self.name(image), *arguments]

    def run(
        self, image: str, *arguments: str, folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A container without a network; a folder of this machine is its /mnt."""
        options = ["--rm", "--network", "none"]
        if folder is not None:
            folder.chmod(0o777)
            options += ["--volume", f"{folder}:/mnt"]
        return subprocess.run(
            self.command(image, *arguments, options=tuple(options)),
            capture_output=True,
            text=True,
            check=False,
        )

    def python(self, image: str, program: str) -> Any:
        """What a program that runs in a container prints, as JSON."""
        done = self.run(image, "python", "-c", program)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def inspect(self, name: str) -> dict[str, Any]:
        """What the engine knows of an image."""
        return json.loads(_output("docker", "image", "inspect", name))[0]

    @contextmanager
    def background(
        self, image: str, *arguments: str, options: tuple[str, ...] = ()
    ) -> Iterator[str]:
        """The id of a container that runs until it ends or the block does."""
        container = _output(*self.command(image, *arguments, options=("--detach", *options)))
        try:
            yield container.strip()
        finally:
            _output("docker", "rm", "--force", "--volumes", container.strip())

    def history(self, name: str) -> list[str]:
        """How the layers of an image were made, the oldest first."""
        text = _output(
            *("docker", "history", "--no-trunc", "--human=false", "--format", "{{.CreatedBy}}"),
            name,
        )
        return text.splitlines()[::-1]


@pytest.fixture(scope="session")
def engine() -> None:
    """A container engine, or the test is skipped."""
    if shutil.which("docker") is None:
        pytest.skip("there is no docker client")
    done = subprocess.run(["docker", "version"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no container engine answers: {done.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="session")
def images(engine, tmp_path_factory) -> Images:
    """All images of this tree; minutes, if the engine has none of their layers yet."""
    command = [sys.executable, str(ROOT / "docker" / "build.py"), "--allow-dirty", "--tag", TAG]
    # Two processes that test at the same time would build the same layers twice.
    with FileLock(tmp_path_factory.getbasetemp().parent / "images.lock"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, "\n".join((done.stdout + done.stderr).splitlines()[-30:])
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD").strip()
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain")
    return Images(f"{commit}-dirty" if changed else commit)


@pytest.fixture(scope="session")
def tag(images) -> str:
    """Of the images of this tree."""
    return TAG


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

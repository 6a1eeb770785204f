"""How steps run on this machine: as processes, or each in its own container."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError
from urllib.request import urlopen

import psutil
from docker.errors import APIError, DockerException, ImageNotFound
from kfp import local

import docker
from components.checks import NVIDIA_DEVICES
from shike_core.data.listed import is_remote
from shike_core.environment import CPU_SETTINGS
from shike_core.errors import ShikeError

RunnerName = Literal["subprocess", "docker"]
LABEL = "shike.run"
HANDED_DOWN = ("MLFLOW_", "SHIKE_", "AWS_", "OMP_", *CPU_SETTINGS)
"""Beginnings of the environment variables that a container gets from this process."""
SERVER_START_S = 180.0
_CLOSING = "close_runs"
"""Stands in the command of the step that every pipeline ends with, however it ends."""


class RunnerError(ShikeError):
    """The machine cannot run steps in the way that was asked for."""


@dataclass(frozen=True)
class Runner:
    """A way to run steps.

    Attributes:
        for_kfp: what `kfp.local` takes.
        stop: ask the steps that run to end by themselves, each once and the closing one never;
            takes the number of the signal that this process received.
    """

    for_kfp: Any
    stop: Callable[[int], None]


def subprocess_runner() -> Runner:
    """Each step is a process with this interpreter."""
    told: set[psutil.Process] = set()

    def stop(number: int) -> None:
        for step in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                if step in told or _CLOSING in step.cmdline():
                    continue
                told.add(step)
                if number == signal.SIGINT:  # the terminal has told its processes
                    continue
                for process in [*step.children(recursive=True), step]:
                    with suppress(psutil.NoSuchProcess):
                        process.terminate()

    return Runner(local.SubprocessRunner(use_venv=False), stop)


def docker_runner(run_id: str, home: Path, data_dir: str) -> Runner:
    """Each step is a container: nothing of it may be written but the run's own directories.

    Args:
        run_id: labels the containers.
        home: where runs, checkpoints and artifacts are kept; the same path in the containers.
        data_dir: folder with the source's files, a table's file, a URL, or empty; cannot be
            written there.

    Raises:
        RunnerError: there is no engine, or no such folder.
    """
    is_here = bool(data_dir) and not is_remote(data_dir)
    if is_here and not Path(data_dir).exists():
        raise RunnerError(f"there is no {data_dir}; give the folder with the source's files")
    client = _engine()
    mounts = [docker.types.Mount(str(home), str(home), type="bind")]
    if is_here:
        if Path(data_dir).is_file():  # a table, whose paths start at its folder
            data_dir = str(Path(data_dir).parent)
        mounts.append(docker.types.Mount(data_dir, data_dir, type="bind", read_only=True))
    gpus = [docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])]
    runner = local.DockerRunner(
        labels={LABEL: run_id},
        mounts=mounts,
        network_mode="host",  # or a server on 127.0.0.1 is out of reach
        environment={k: v for k, v in os.environ.items() if k.startswith(HANDED_DOWN)},
        user=f"{os.getuid()}:{os.getgid()}",  # what they write belongs to who started them
        read_only=True,
        tmpfs={"/tmp": ""},
        shm_size="2g",
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        device_requests=gpus if any(NVIDIA_DEVICES.glob("nvidia[0-9]*")) else [],
    )

    told: set[str] = set()

    def stop(number: int) -> None:
        mine = {"label": f"{LABEL}={run_id}"}
        for container in client.containers.list(filters=mine, ignore_removed=True):
            if container.id in told or _CLOSING in container.attrs["Config"]["Cmd"]:
                continue
            with suppress(APIError):  # it does not run yet, or not any more
                # The first process is a shell, which does not pass signals on.
                container.exec_run(["sh", "-c", "kill -TERM -1"])
                told.add(container.id)

    return Runner(runner, stop)


def require_images(names: set[str]) -> None:
    """Look for images in the engine.

    Raises:
        RunnerError: there is no engine, or it lacks one of them.
    """
    client, missing = _engine(), []
    for name in sorted(names):
        try:
            client.images.get(name)
        except ImageNotFound:
            missing.append(name)
    if missing:
        raise RunnerError(
            f"the container engine has no image {', '.join(missing)}; build them (make images), or "
            "name the tag of others (make run RUNNER=docker TAG=...)"
        )


def _engine() -> docker.DockerClient:
    try:
        client = docker.from_env()
        client.ping()
    except DockerException as error:
        raise RunnerError(
            f"no container engine answers ({error}); start one, or run without RUNNER=docker"
        ) from error
    return client


@contextmanager
def tracking_server(home: Path) -> Iterator[None]:
    """Let MLFLOW_TRACKING_URI name a server; one is started if it names a database.

    Containers cannot share a database file safely. Artifacts are files below `home`, which is the
    same path in containers, so that later runs without them find everything.

    Raises:
        RunnerError: the server does not start.
    """
    store = os.environ["MLFLOW_TRACKING_URI"]
    if store.startswith("http"):
        yield
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--default-artifact-root", str(home / "mlartifacts"), "--no-serve-artifacts"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    log = home / "mlflow-server.log"
    with log.open("w") as output:
        # A session of its own: Ctrl-C is for the steps, which still have to tell the server.
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ
            | {
                "MLFLOW_BACKEND_STORE_URI": store,  # an argument would show its password to all
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            },
        )
    os.environ["MLFLOW_TRACKING_URI"] = uri = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + SERVER_START_S
        while not _answers(uri):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RunnerError(f"the MLflow server did not start; see {log}")
            time.sleep(0.2)
        yield
    finally:
        os.environ["MLFLOW_TRACKING_URI"] = store
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _answers(uri: str) -> bool:
    try:
        with urlopen(f"{uri}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False

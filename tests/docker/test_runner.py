"""The whole pipeline, each step in its own container, against a server on this machine."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

ROOT = Path(__file__).parents[2]
TINY = [
    *("--train.num-experts", "2", "--train.width", "4", "--train.warmup-epochs", "1"),
    *("--train.stage1-epochs", "2", "--train.stage2-epochs", "1", "--train.device", "cpu"),
]

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]  # it may have to build the images


@dataclass
class Local:
    """A call of ``python -m pipelines.run_local``, and its MLflow run."""

    home: Path
    code: int
    out: str
    err: str

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.home}/mlflow.db")

    @property
    def run(self) -> Run:
        experiment = self.client.get_experiment_by_name("digits-lt")
        (run,) = self.client.search_runs([experiment.experiment_id])
        return run

    def found(self, name: str) -> Path:
        (path,) = (self.home / "runs").glob(f"**/{name}")
        return path


def call(home: Path, environment: dict[str, str], *arguments: str) -> Local:
    command = [sys.executable, "-m", "pipelines.run_local", "--home", str(home), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return Local(home, done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def new_home(empty_mlflow_database, tmp_path_factory) -> Callable[[], Path]:
    """Makes homes whose database has its tables already."""

    def make() -> Path:
        home = tmp_path_factory.mktemp("home")
        shutil.copyfile(empty_mlflow_database, home / "mlflow.db")
        return home

    return make


@pytest.fixture(scope="module")
def in_containers(tag, new_home, process_environment) -> Local:
    return call(new_home(), process_environment(), "--runner", "docker", "--tag", tag, *TINY)


@pytest.fixture(scope="module")
def in_processes(new_home, process_environment) -> Local:
    return call(new_home(), process_environment(), *TINY)


def test_each_step_ran_in_its_container(in_containers, tag):
    assert in_containers.code == 0, in_containers.out + in_containers.err
    log = in_containers.found("log.txt").read_text()
    for name in ("data", "train", "evaluate", "register"):
        assert f"Found image 'shike-python-{name}:{tag}'" in log
    assert "Found image" not in in_containers.out


def test_the_run_came_to_its_end(in_containers):
    run = in_containers.run
    assert run.info.status == "FINISHED"
    assert run.data.tags["registered_version"] == "1"
    version = in_containers.client.get_model_version_by_alias("shike-digits-lt", "champion")
    assert version.run_id == run.info.run_id
    assert len(json.loads(in_containers.found("history.json").read_text())) == 3
    assert "<html" in in_containers.found("evaluation/report.html").read_text()
    stored = {
        entry.path for entry in in_containers.client.list_artifacts(run.info.run_id, "evaluation")
    }
    assert "evaluation/report.json" in stored


@pytest.mark.slow
def test_containers_and_processes_give_the_same(in_containers, in_processes):
    assert in_processes.code == 0, in_processes.out + in_processes.err
    here, there = in_processes.run.data, in_containers.run.data
    for key in ("subset_digest", "test_digest", "training_digest", "weights_digest"):
        assert there.tags[key] == here.tags[key]
    assert there.params == here.params | {"train.device": "cpu"}
    for key, value in here.metrics.items():
        if key.startswith("test/"):
            assert there.metrics[key] == pytest.approx(value, abs=1e-6), key


def test_a_failing_container_fails_the_run(tag, new_home, process_environment):
    rates = ["--train.stage1-learning-rate", "1e9", "--train.stage1-warmup-start", "1e9"]
    arguments = ["--runner", "docker", "--tag", tag, *TINY, *rates]
    done = call(new_home(), process_environment(), *arguments)
    assert done.code not in (0, None)
    assert "the loss is not finite at epoch 0" in done.out + done.err
    assert done.run.info.status == "FAILED"
    assert "registered_version" not in done.run.data.tags


def test_ctrl_c_stops_the_container_which_keeps_its_checkpoint(tag, new_home, process_environment):
    home = new_home()
    command = [sys.executable, "-m", "pipelines.run_local", "--home", str(home)]
    command += ["--runner", "docker", "--tag", tag, *TINY, "--train.stage1-epochs", "5000"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=process_environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        for line in process.stdout:
            if re.match(r"epoch +\d+/", line):
                break
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert time.monotonic() - start < 60
    kept = list((home / "checkpoints").glob("*/checkpoint.pt"))
    assert len(kept) == 1
    assert Local(home, 130, "", "").run.info.status == "KILLED"
    left = subprocess.run(
        ["docker", "ps", "--quiet", "--filter", "label=shike.run"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert left.stdout == ""


def test_an_image_that_is_not_there_is_told_before_anything_runs(
    engine, tmp_path, process_environment
):
    done = call(tmp_path, process_environment(), "--runner", "docker", "--tag", "never-built")
    assert done.code not in (0, None)
    (line,) = done.err.splitlines()
    assert "no image shike-python-data:never-built" in line
    assert "make images" in line
    assert not (tmp_path / "runs").exists()

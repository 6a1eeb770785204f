"""The ways to run steps on this machine; whole runs in containers are in tests/docker."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from mlflow import MlflowClient

from pipelines import runners
from pipelines.runners import (
    RunnerError,
    docker_runner,
    require_images,
    subprocess_runner,
    tracking_server,
)

ROOT = Path(__file__).parents[2]


def test_without_an_engine_there_is_one_line(monkeypatch, free_port):
    monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{free_port()}")
    with pytest.raises(RunnerError, match=r"no container engine answers .*without RUNNER=docker"):
        require_images({"shike-python-data:nowhere"})


def test_nothing_runs_without_an_engine(tmp_path, free_port, process_environment):
    command = [sys.executable, "-m", "pipelines.run_local", "--runner", "docker"]
    done = subprocess.run(
        [*command, "--home", str(tmp_path / "home"), "--tag", "nowhere"],
        cwd=ROOT,
        env=process_environment(DOCKER_HOST=f"tcp://127.0.0.1:{free_port()}"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode not in (0, None)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no container engine answers")
    assert not (tmp_path / "home" / "runs").exists()


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(RunnerError, match=r"there is no /nowhere/data; give the folder with the"):
        docker_runner("run", tmp_path, "/nowhere/data")


def test_a_step_is_told_to_stop_once_and_the_closing_one_never(tmp_path):
    """Steps are shells, as KFP starts them; each writes down what it was told."""
    script = 'trap "echo told >> $0" TERM; echo ready > $0; while :; do sleep 0.1; done'
    runner, started = subprocess_runner(), {}

    def start(name: str, *arguments: str) -> None:
        command = ["sh", "-c", script, str(tmp_path / name), *arguments]
        started[name] = subprocess.Popen(command)
        while not (tmp_path / name).exists():
            time.sleep(0.01)

    try:
        start("on the terminal")
        runner.stop(signal.SIGINT)  # which the terminal has sent it as well
        start("later")
        start("closing", "--function_to_execute", "close_runs")
        deadline = time.monotonic() + 60
        while "told" not in (tmp_path / "later").read_text() and time.monotonic() < deadline:
            runner.stop(signal.SIGTERM)
            time.sleep(0.3)
        runner.stop(signal.SIGTERM)
        time.sleep(0.5)  # a shell looks at signals every 0.1 s
        told = {name: (tmp_path / name).read_text().count("told") for name in started}
    finally:
        for process in started.values():
            process.kill()
            process.wait()
    assert told == {"on the terminal": 0, "later": 1, "closing": 0}


def test_a_database_gets_a_server_for_the_time_of_the_run(store, tmp_path, monkeypatch):
    with tracking_server(tmp_path):
        uri = os.environ["MLFLOW_TRACKING_URI"]
        assert uri.startswith("http://127.0.0.1:")
        client = MlflowClient(uri)
        experiment = client.get_experiment(client.create_experiment("seen by both"))
        assert experiment.artifact_location.startswith(str(tmp_path / "mlartifacts"))
    assert os.environ["MLFLOW_TRACKING_URI"] == store
    assert MlflowClient(store).get_experiment_by_name("seen by both") is not None
    with pytest.raises(URLError):
        urlopen(f"{uri}/health", timeout=5)


def test_a_server_that_is_given_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking.example")
    with tracking_server(tmp_path):
        assert os.environ["MLFLOW_TRACKING_URI"] == "https://tracking.example"


def test_a_server_that_does_not_start_names_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://store")
    server = tracking_server(tmp_path)
    with pytest.raises(RunnerError, match=r"did not start; see .*mlflow-server\.log"):
        server.__enter__()
    assert "nonsense" in (tmp_path / "mlflow-server.log").read_text()


def test_a_container_gets_settings_and_nothing_else(monkeypatch):
    for name in ("MLFLOW_TRACKING_PASSWORD", "SHIKE_KFP_RUN_ID", "OMP_NUM_THREADS"):
        assert name.startswith(runners.HANDED_DOWN)
    for name in ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "SSH_AUTH_SOCK"):
        assert not name.startswith(runners.HANDED_DOWN)

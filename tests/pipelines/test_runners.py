"""The ways to run steps on this machine; whole runs in containers are in tests/docker."""

import os
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from mlflow import MlflowClient

from pipelines import runners
from pipelines.runners import RunnerError, require_images, tracking_server

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

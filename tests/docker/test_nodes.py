"""A training on two nodes: containers of the train image, which the SDK of Kubeflow starts."""

import json
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from components import train_job
from components.train_job import TrainJobError
from shike_core import stages
from shike_core.config import SubsetConfig, TrainConfig

CONFIG = TrainConfig(
    stage1_epochs=2,
    stage1_learning_rate=0.02,
    stage1_warmup_start=0.02,
    stage2_epochs=1,
    stage2_learning_rate=0.05,
    stage2_warmup_start=0.05,
    warmup_epochs=1,
    batch_size=30,
    num_experts=2,
    width=4,
    auto_augment=False,
    precision="float32",
    device="cpu",
    checkpoint_every=1,
)

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]  # it may have to build the images


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path) -> None:
    """Where the SDK keeps a folder for each job."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def nodes(images) -> dict[str, str]:
    return {"backend": "container", "image": images.name("train")}


@pytest.fixture(scope="module")
def subset(tmp_path_factory) -> Path:
    """Real digits, 383 to train on."""
    path = tmp_path_factory.mktemp("subset")
    rule = SubsetConfig(dataset="digits", imbalance_factor=20, validation_per_class=10)
    stages.build_subset(rule, None, path, lambda metrics, step: None)
    return path


def listed(*command: str) -> list[str]:
    return subprocess.run(
        ["docker", *command], capture_output=True, text=True, check=True
    ).stdout.split()


def nothing_left() -> bool:
    of_jobs = ("--filter", "name=shike-", "--filter", "label=trainer.kubeflow.org/trainjob-name")
    names = ("--format", "{{.Names}}")
    left = [*listed("ps", "--all", *of_jobs, *names), *listed("network", "ls", "-q", *of_jobs)]
    return left == []


def test_two_nodes_train_what_two_processes_train(subset, tmp_path, nodes, capfd):
    logged, out = [], tmp_path / "out"

    def log(metrics, step) -> None:
        logged.append((dict(metrics), step))

    report = train_job.train(CONFIG, subset, out, log, tmp_path / "kept", 2, nodes)
    stages.train(replace(CONFIG, processes=2), subset, tmp_path / "here", lambda *line: None)
    assert report["processes"] == 2
    assert [step for _, step in logged] == [0, 1, 2]
    ours = json.loads((out / "history.json").read_text())
    assert [metrics for metrics, _ in logged] == ours
    theirs = json.loads((tmp_path / "here" / "history.json").read_text())
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() == their.keys()
        assert our["train/loss"] == pytest.approx(their["train/loss"], rel=1e-4)
    assert (out / "checkpoint.pt").stat().st_size > 10_000
    assert nothing_left()
    assert "submitted TrainJob shike-" in capfd.readouterr().out


@pytest.mark.slow
def test_a_node_that_is_killed_ends_all_with_a_message(subset, tmp_path, nodes):
    config = replace(CONFIG, stage1_epochs=1000, checkpoint_every=1)
    killed = threading.Event()

    def log(metrics, step) -> None:
        if not killed.is_set():
            killed.set()
            (second,) = listed("ps", "-q", "--filter", "name=-node-1")
            listed("kill", second)

    with pytest.raises(TrainJobError) as told:
        train_job.train(config, subset, tmp_path / "out", log, tmp_path / "kept", 2, nodes)
    message = str(told.value)
    assert message.startswith("training on 2 nodes failed: node-1 ended without a message, killed")
    assert "run the same command again to go on from the last checkpoint" in message
    assert "Traceback" not in message
    assert list((tmp_path / "kept").glob("*/checkpoint.pt"))
    assert nothing_left()


@pytest.mark.slow
def test_a_loss_that_diverges_is_told_once(subset, tmp_path, nodes):
    config = replace(CONFIG, stage1_learning_rate=1e30, stage1_warmup_start=1e30)
    with pytest.raises(TrainJobError, match="failed: the loss is not finite at epoch 0, step") as e:
        train_job.train(config, subset, tmp_path / "out", print, tmp_path / "kept", 2, nodes)
    assert "\n" not in str(e.value)
    assert nothing_left()

"""A training on nodes that the SDK of Kubeflow Trainer starts: in a process, for real."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from components import train_job
from components.train_job import Nodes, Shared, TrainJobError
from shike_core import checkpoint as checkpoints
from shike_core import stages
from shike_core.config import TrainConfig
from shike_core.data.manifest import read_info
from shike_core.errors import InterruptedTraining

ROOT = Path(__file__).parents[2]
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
PROCESS = Nodes(backend="process")


@pytest.fixture(autouse=True)
def _few_settings(monkeypatch) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])  # the process backend changes it
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


class Log(list):
    """What was logged: metrics, and their steps."""

    def __call__(self, metrics, step) -> None:
        self.append((dict(metrics), step))

    @property
    def steps(self) -> list[int]:
        return [step for _, step in self]


def folder_of(config: TrainConfig, subset: Path, checkpoint_dir: Path) -> Path:
    return checkpoint_dir / stages.training_digest(config, read_info(subset)["digest"])


def without_speed(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in m.items() if k != "train/images_per_second"} for m in history]


def nothing_left(name: str = "shike-") -> bool:
    threads = [thread for thread in threading.enumerate() if thread.name.startswith(name)]
    folders = list(Path(tempfile.gettempdir()).glob(f"{name}*/bin/python"))
    return not threads and not folders


# ---- one node, in a process


def test_a_node_trains_what_this_process_trains(subset, tmp_path):
    there, here = Log(), Log()
    kept, out = tmp_path / "kept", tmp_path / "there"
    report = train_job.train_on_nodes(CONFIG, subset, out, there, kept, 1, PROCESS)
    stages.train(CONFIG, subset, tmp_path / "here", here)
    ours, theirs = (checkpoints.load(tmp_path / n / "checkpoint.pt") for n in ("there", "here"))
    assert all(torch.equal(ours.model[name], value) for name, value in theirs.model.items())
    assert there.steps == [0, 1, 2]
    assert without_speed([m for m, _ in there]) == without_speed([m for m, _ in here])
    assert [m for m, _ in there] == json.loads((out / "history.json").read_text())
    assert report == json.loads((out / "train.json").read_text())
    assert report["processes"] == 1
    assert report["config"] == asdict(CONFIG)
    assert not (folder_of(CONFIG, subset, kept) / "subset").exists()
    assert nothing_left()


def test_a_training_that_is_done_is_not_done_again(subset, tmp_path, monkeypatch):
    kept, out = tmp_path / "kept", tmp_path / "out"
    stages.train(CONFIG, subset, folder_of(CONFIG, subset, kept), Log())
    monkeypatch.setattr(train_job.ProcessEngine, "submit", None)
    log = Log()
    train_job.train_on_nodes(CONFIG, subset, out, log, kept, 1, PROCESS)
    assert log.steps == [0, 1, 2]
    assert checkpoints.load(out / "checkpoint.pt").epoch == 3


def test_nodes_go_on_where_a_training_in_one_process_was_stopped(subset, tmp_path):
    kept = tmp_path / "kept"

    def stop(metrics, step) -> None:
        if step == 0:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(InterruptedTraining):
        stages.train(CONFIG, subset, tmp_path / "lost", stop, kept)
    log = Log()
    report = train_job.train_on_nodes(CONFIG, subset, tmp_path / "out", log, kept, 1, PROCESS)
    assert report["epochs_in_this_call"] < 3
    assert log.steps == [0, 1, 2]


def test_a_loss_that_diverges_is_told_in_the_words_of_the_node(subset, tmp_path, capfd):
    config = replace(CONFIG, stage1_learning_rate=1e30, stage1_warmup_start=1e30)
    with pytest.raises(
        TrainJobError, match=r"^training on 1 nodes failed: the loss is not finite at epoch 0"
    ):
        train_job.train_on_nodes(config, subset, tmp_path / "out", Log(), tmp_path, 1, PROCESS)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert nothing_left()

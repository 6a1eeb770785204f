"""A training on nodes that the SDK of Kubeflow Trainer starts: in a process, for real."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from components import boundary, train_job
from components.train_job import Nodes, Shared, TrainJobError
from shike_core import checkpoint as checkpoints
from shike_core import stages
from shike_core.config import TrainConfig
from shike_core.data.manifest import read_info
from shike_core.errors import ArtifactError, DivergedError, InterruptedTraining, PeerError

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
    shared = Shared(folder_of(CONFIG, subset, kept))
    shared.folder.mkdir(parents=True)
    stages.train(CONFIG, subset, shared.folder, shared.log)
    monkeypatch.setattr(train_job.ProcessEngine, "submit", None)
    log = Log()
    train_job.train_on_nodes(CONFIG, subset, out, log, kept, 1, PROCESS)
    assert log.steps == [0, 1, 2]
    assert checkpoints.load(out / "checkpoint.pt").epoch == 3


@pytest.mark.slow
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


STEP = """
import json, sys
from pathlib import Path
from components import boundary, train_job
from shike_core.config import TrainConfig

config, subset, out, kept = sys.argv[1:]
with boundary.readable_errors():
    train_job.train_on_nodes(
        TrainConfig(**json.loads(config)), Path(subset), Path(out),
        lambda metrics, step: print("epoch", step, flush=True),
        Path(kept), 1, train_job.Nodes(backend="process"),
    )
"""
"""A step as a program of its own."""


def test_a_step_that_is_told_to_stop_keeps_what_its_node_has_done(
    subset, tmp_path, process_environment
):
    config = replace(CONFIG, stage1_epochs=1000, checkpoint_every=1000)
    arguments = [json.dumps(asdict(config)), str(subset), str(tmp_path / "out"), str(tmp_path)]
    environment = process_environment() | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", STEP, *arguments], env=environment, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("epoch 1"):
                break
        process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        _, error = process.communicate(timeout=60)
    assert time.monotonic() - told < 30
    assert process.returncode == 128 + signal.SIGTERM
    (line,) = [line for line in error.splitlines() if line.startswith("stopped: ")]
    checkpoint = folder_of(config, subset, tmp_path) / "checkpoint.pt"
    assert f"by signal 15 with the last checkpoint of its nodes in {checkpoint}" in line
    assert "Traceback" not in error
    state = checkpoints.load(checkpoint)
    assert state.epoch >= 2
    assert not list(tmp_path.glob("shike-*"))  # the environment of the job


# ---- what is refused, each in one line


def test_several_nodes_are_no_process(subset, tmp_path):
    with pytest.raises(TrainJobError, match="a process is one node, and num_nodes is 2; use"):
        train_job.train(CONFIG, subset, tmp_path, Log(), tmp_path, 2, {"backend": "process"})


def test_several_nodes_share_a_folder(subset, tmp_path):
    with pytest.raises(TrainJobError, match=r"checkpoint_dir is empty; compile .* ReadWriteMany"):
        train_job.train(CONFIG, subset, tmp_path, Log(), None, 2, {"backend": "process"})


def test_a_pipeline_for_one_node_cannot_have_two_in_the_form(subset, tmp_path):
    with pytest.raises(TrainJobError, match=r"compiled for one node.* with --num-nodes"):
        train_job.train(CONFIG, subset, tmp_path, Log(), tmp_path, 2, {})


@pytest.mark.parametrize(
    ("num_nodes", "nodes", "told"),
    [
        (0, {}, "num_nodes must be at least 1, got 0"),
        (1, {"image": "i"}, "num_nodes=1 would train in this pod, .* compile .* --num-nodes 1"),
        (2, {"gpus": 2}, r"nodes must have the fields backend, .*, got \{'gpus': 2\}"),
        (2, {"backend": "slurm"}, "must be one of kubernetes, container, process, got 'slurm'"),
    ],
)
def test_parameters_that_cannot_be(subset, tmp_path, num_nodes, nodes, told):
    with pytest.raises(ValueError, match=told):
        train_job.train(CONFIG, subset, tmp_path, Log(), tmp_path, num_nodes, nodes)


def test_without_kubeflow_one_node_trains_and_two_are_told_what_is_missing(
    subset, tmp_path, monkeypatch, capsys
):
    for name in ("kubeflow", "kubeflow.trainer"):  # importing it fails
        monkeypatch.setitem(sys.modules, name, None)
    config = replace(CONFIG, stage1_epochs=1)
    train_job.train(config, subset, tmp_path, Log(), tmp_path, 1, {})
    assert (tmp_path / "train.json").exists()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, boundary.readable_errors():
        train_job.train(config, subset, tmp_path, Log(), tmp_path, 2, {"backend": "container"})
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs the package kubeflow" in line
    assert "extra nodes, or set num_nodes to 1" in line


# ---- the shared folder


def test_an_epoch_that_nodes_repeat_or_a_crash_tore_is_read_once(tmp_path):
    shared = Shared(tmp_path)
    assert list(shared.metrics()) == []
    shared.log({"train/loss": 2.0}, 0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[{"train/lo')
    shared.log({"train/loss": 2.0}, 0)
    shared.log({"train/loss": 1.0}, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[{"train/loss": 0.5}, 2')
    log = Log()
    follow = train_job._Follower(None, shared, log)
    follow.log_new(shared.metrics())
    follow.log_new(shared.metrics())
    assert log == [({"train/loss": 2.0}, 0), ({"train/loss": 1.0}, 1)]


def test_a_node_that_only_lost_another_does_not_tell_why(tmp_path):
    shared = Shared(tmp_path)
    (tmp_path / "errors").mkdir()
    with pytest.raises(PeerError), shared.errors_of("0"):
        raise PeerError("another of the 2 processes has ended")
    assert shared.error() is None
    with pytest.raises(DivergedError), shared.errors_of("1"):
        raise DivergedError(3, 4, {"loss": float("inf")})
    assert shared.error().startswith("the loss is not finite at epoch 3, step 4 (loss inf)")
    with shared.errors_of("1"):
        pass  # a node that was started again
    assert shared.error() is None


def test_what_a_stopped_step_left_is_laid_out_anew(subset, tmp_path):
    shared = Shared(tmp_path / "shared")
    assert not shared.offers(CONFIG)
    shared.offer(CONFIG, subset)
    assert shared.offers(CONFIG)
    assert not shared.offers(replace(CONFIG, seed=1))
    names = sorted(path.name for path in subset.iterdir())
    assert sorted(path.name for path in shared.subset.iterdir()) == names
    shared.log({}, 0)
    shared.stop.write_text("15")
    assert not shared.offers(CONFIG)
    shared.offer(CONFIG, subset)
    assert shared.offers(CONFIG)
    assert list(shared.metrics()) == []


def test_a_full_volume_is_told(subset, full_disk):
    with pytest.raises(ArtifactError, match=r"cannot lay out a training .* free some space there"):
        Shared(full_disk / "shared").offer(CONFIG, subset)

"""Several processes that train together: real ones, on real digits and photographs."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from shike_core import checkpoint as checkpoints
from shike_core import distributed, stages
from shike_core.config import SubsetConfig, TrainConfig
from shike_core.errors import (
    ArtifactError,
    CheckpointError,
    DeviceError,
    DivergedError,
    InterruptedTraining,
)

CONFIG = TrainConfig(
    stage1_epochs=1,
    stage1_learning_rate=0.02,
    stage1_warmup_start=0.02,
    stage2_epochs=1,
    stage2_learning_rate=0.05,
    stage2_warmup_start=0.05,
    warmup_epochs=1,
    batch_size=30,
    num_experts=2,
    width=4,
    crop_padding=1,
    flip=False,
    auto_augment=False,
    cutout_size=0,
    precision="float32",
    device="cpu",
    checkpoint_every=1,
)
ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "photographs"


def slow(value: object) -> Any:
    """A parameter that only the slow tests try."""
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def one_thread():
    """Steps as small as these only wait for each other on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def subset(tmp_path_factory) -> Path:
    """Real digits, 383 to train on, with a validation split."""
    path = tmp_path_factory.mktemp("subset")
    config = SubsetConfig(dataset="digits", imbalance_factor=20, validation_per_class=10)
    stages.build_subset(config, None, path, log_nothing)
    return path


@dataclass
class Run:
    out: Path
    report: dict[str, Any]
    logged: list[tuple[dict[str, float], int]]

    @property
    def weights(self) -> dict[str, Tensor]:
        return checkpoints.load(self.out / stages.CHECKPOINT).model


@pytest.fixture(scope="module")
def run(subset, tmp_path_factory) -> Callable[[TrainConfig], Run]:
    """Trainings that nobody stopped, each made once."""
    made: dict[TrainConfig, Run] = {}

    def train(config: TrainConfig) -> Run:
        if config not in made:
            out, logged = tmp_path_factory.mktemp("run"), []
            report = stages.train(config, subset, out, lambda *line: logged.append(line))
            assert not training_processes()
            made[config] = Run(out, report, logged)
        return made[config]

    return train


def training_processes() -> list[multiprocessing.Process]:
    """Those started to train that have not ended; other tests may have left others."""
    return [c for c in multiprocessing.active_children() if c.name.startswith("rank ")]


def log_nothing(metrics, step) -> None:
    """Where a test has no use for the metrics."""


def measured(run: Run) -> list[dict[str, float]]:
    """The history without what depends on the clock."""
    history = json.loads((run.out / "history.json").read_text())
    return [{k: v for k, v in m.items() if k != "train/images_per_second"} for m in history]


# ---- what is computed


@pytest.mark.filterwarnings("ignore:the last of 3 batches")
@pytest.mark.parametrize("batch_size", [30, slow(191)])
def test_two_processes_compute_what_one_does_that_takes_each_batch_in_halves(run, batch_size):
    # 383 images: 12 batches of 15 + 15 and one of 12 + 11; 2 of 96 + 95 and one of a single image
    config = replace(CONFIG, batch_size=batch_size)
    two = run(replace(config, processes=2))
    one = run(replace(config, processes=1, micro_batch_size=-(-batch_size // 2)))
    ours, theirs = measured(two), measured(one)
    assert len(ours) == len(theirs) == 2
    for epoch, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert our.keys() == their.keys()
        for name in our.keys() - {"validation/accuracy", "train/accuracy"}:
            assert our[name] == pytest.approx(their[name], rel=1e-3), (epoch, name)
        assert our["train/accuracy"] == pytest.approx(their["train/accuracy"], abs=2 / 383)
    assert two.report["calibration_temperature"] == pytest.approx(
        one.report["calibration_temperature"], rel=0.05
    )
    weights = two.weights
    for name, value in one.weights.items():
        if "running_" in name:  # those of the first process, which saw the first halves
            assert not torch.equal(weights[name], value)
        elif "num_batches_tracked" not in name:
            torch.testing.assert_close(weights[name], value, rtol=1e-2, atol=2e-4)


def test_the_whole_batch_at_once_gives_another_training_because_of_batch_norm(run):
    ours, theirs = (measured(run(replace(CONFIG, processes=n))) for n in (2, 1))
    assert ours[0]["train/loss"] != pytest.approx(theirs[0]["train/loss"], rel=1e-3)


def test_the_first_process_logs_for_all_and_here(run):
    two = run(replace(CONFIG, processes=2))
    assert [step for _, step in two.logged] == [0, 1]
    assert [m for m, _ in two.logged] == json.loads((two.out / "history.json").read_text())
    assert two.report == json.loads((two.out / "train.json").read_text())
    assert two.report["processes"] == 2
    assert two.report["images"] == 383
    names = sorted(path.name for path in two.out.iterdir())
    assert names == ["checkpoint.pt", "history.json", "train.json"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Real photographs in a subset of files; their two classes mean nothing."""
    if not PHOTOGRAPHS.is_dir():
        pytest.skip("the photographs are not in ../shared")
    root = tmp_path_factory.mktemp("photographs")
    for index, path in enumerate(sorted(PHOTOGRAPHS.iterdir())[:80]):
        place = root / "images" / ("test" if index < 8 else "train") / str(index % 2)
        place.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.thumbnail((64, 64))
            image.save(place / path.name)
    rule = SubsetConfig(dataset="image_folder", imbalance_factor=0, validation_per_class=5)
    stages.build_subset(rule, root / "images", root / "subset", log_nothing, workers=1)
    return root / "subset"


def test_two_processes_that_decode_their_own_shares(photographs, tmp_path):
    config = replace(
        CONFIG, crop="resized", crop_size=24, crop_padding=0, flip=True, batch_size=24, workers=1
    )
    runs = []
    for name, change in (("two", {"processes": 2}), ("one", {"micro_batch_size": 12})):
        report = stages.train(replace(config, **change), photographs, tmp_path / name, log_nothing)
        runs.append(Run(tmp_path / name, report, []))
    two, one = runs
    assert two.report["seconds_waiting_for_data"] > 0
    for our, their in zip(measured(two), measured(one), strict=True):
        assert our["train/loss"] == pytest.approx(their["train/loss"], rel=1e-2)
    assert not training_processes()


# ---- stopping and going on


@pytest.mark.parametrize("processes", [1, slow(2), slow(3)])
def test_a_training_stopped_with_two_processes_goes_on_with_any_number(
    subset, run, tmp_path, processes
):
    # Of what depends on BatchNorm nothing happens after the stop, so all end alike.
    config = replace(CONFIG, stage2_epochs=3, stage2_batch_norm="eval", batch_size=24)
    config = replace(config, checkpoint_every=10)
    whole = run(replace(config, processes=2))
    stopped = tmp_path / "stopped"

    def log(metrics, step) -> None:
        if step == 1:
            signal.raise_signal(signal.SIGTERM)  # while the third epoch goes on

    with pytest.raises(InterruptedTraining, match="stopped by signal 15 at epoch 2, step") as told:
        stages.train(replace(config, processes=2), subset, stopped, log)
    assert told.value.signal_number == signal.SIGTERM
    assert not training_processes()
    state = checkpoints.load(stopped / stages.CHECKPOINT)
    assert state.epoch == 2
    assert 0 < state.step < 15  # in the middle
    logged: list[int] = []
    report = stages.train(
        replace(config, processes=processes),
        subset, stopped, lambda metrics, step: logged.append(step),
    )  # fmt: skip
    assert logged == [0, 1, 2, 3]
    assert report["epochs_in_this_call"] == 2
    ours = Run(stopped, report, [])
    for our, their in zip(measured(ours), measured(whole), strict=True):
        assert our == pytest.approx(their, rel=1e-4)
    exact = {"rtol": 0, "atol": 0} if processes == 2 else {"rtol": 1e-3, "atol": 1e-5}
    for name, value in whole.weights.items():
        torch.testing.assert_close(ours.weights[name], value, **exact)


# ---- failing


def test_a_loss_that_diverges_ends_all_with_its_error(subset, tmp_path):
    config = replace(
        CONFIG, processes=2, stage1_learning_rate=1e30, stage1_warmup_start=1e30, batch_size=100
    )
    with pytest.raises(DivergedError, match="the loss is not finite at epoch 0, step ") as told:
        stages.train(config, subset, tmp_path, log_nothing)
    assert told.value.epoch == 0
    assert not training_processes()
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_killed_ends_the_others(subset, tmp_path):
    def log(metrics, step) -> None:
        (second,) = (c for c in training_processes() if c.name == "rank 1")
        os.kill(second.pid, signal.SIGKILL)
        killed.append(time.monotonic())

    killed: list[float] = []
    config = replace(CONFIG, processes=2, stage1_epochs=100)
    with pytest.raises(DeviceError, match=r"one of 2 .*, rank 1, was killed \(SIGKILL\), most"):
        stages.train(config, subset, tmp_path, log)
    assert time.monotonic() - killed[0] < 10
    assert not training_processes()


def test_a_failure_of_one_process_alone_is_told_and_ends_the_others(subset, tmp_path):
    (tmp_path / "out").write_text("no directory")
    config = replace(CONFIG, processes=2)
    with pytest.raises(ArtifactError, match="out"):  # only the first one writes
        stages.train(config, subset, tmp_path / "out" / "x", log_nothing)
    assert not training_processes()


@pytest.mark.slow
def test_a_log_that_fails_ends_all(subset, tmp_path):
    def log(metrics, step) -> None:
        raise OSError("the server is gone")

    with pytest.raises(OSError, match="the server is gone"):
        stages.train(replace(CONFIG, processes=2), subset, tmp_path, log)
    assert not training_processes()


def test_processes_end_with_the_program_that_started_them(subset, tmp_path, process_environment):
    command = [sys.executable, "-m", "shike_core", "train", "--processes=2", *options(CONFIG)]
    command += ["--stage1-epochs=1000", "--subset", str(subset), "--out", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=process_environment(), cwd=ROOT
    ) as process:
        assert process.stdout.readline().startswith("epoch    1/")
        children = children_of(process.pid)
        assert len(children) >= 2
        process.kill()
    wait_for_end(children)


def test_side_by_side_and_together_contradict_each_other(subset, tmp_path):
    configs = [replace(CONFIG, processes=2), replace(CONFIG, seed=1)]
    with pytest.raises(ValueError, match=r"side by side share one process, but .* processes=2"):
        stages.train_together(configs, subset, [tmp_path] * 2, [log_nothing] * 2)


def test_batch_norm_over_all_processes_needs_a_gpu(subset, tmp_path):
    with pytest.raises(DeviceError, match=r"synchronised needs a GPU; use batch_norm=local"):
        stages.train(replace(CONFIG, batch_norm="synchronised"), subset, tmp_path, log_nothing)


def test_checkpoints_that_differ_between_nodes_are_refused(subset, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed.Group, "gather", lambda self, value: [value, (1, 5)])
    with pytest.raises(
        CheckpointError, match=r"different checkpoints .*\(0, 0\), \(1, 5\)\).*shar"
    ):
        stages.train(replace(CONFIG, processes=1), subset, tmp_path, log_nothing)


@pytest.mark.parametrize(
    ("asked", "batch_size", "gpus", "expected"),
    [(0, 128, 4, 4), (0, 3, 4, 3), (2, 128, 4, 2), (1, 128, 4, 1)],
)
def test_there_are_as_many_processes_as_gpus(monkeypatch, asked, batch_size, gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert distributed.processes_for(asked, batch_size, torch.device("cuda")) == expected


def test_on_a_cpu_there_is_one_process_unless_more_are_asked_for():
    assert distributed.processes_for(0, 128, torch.device("cpu")) == 1
    assert distributed.processes_for(3, 128, torch.device("cpu")) == 3


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="processes=2 need as many GPUs, and here is 1"):
        distributed.processes_for(2, 128, torch.device("cuda"))


# ---- torchrun


def test_torchrun_gives_the_same_checkpoint(subset, run, tmp_path, process_environment):
    config = replace(CONFIG, processes=2)
    process = torchrun(config, subset, tmp_path, process_environment)
    output, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    lines = output.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert len(lines) == 3  # one summary
    ours, theirs = Run(tmp_path, {}, []), run(config)
    assert measured(ours) == measured(theirs)
    kept = [checkpoints.load(x.out / stages.CHECKPOINT) for x in (ours, theirs)]
    assert kept[0].calibration_temperature == kept[1].calibration_temperature is not None
    assert not [n for n, v in theirs.weights.items() if not torch.equal(ours.weights[n], v)]


def test_one_process_of_torchrun_stays_one(subset, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "1")
    config = replace(CONFIG, processes=2, stage1_epochs=1, stage2_epochs=1)
    assert stages.train(config, subset, tmp_path, log_nothing)["processes"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGKILL)])
def test_torchrun_stops_all_when_it_is_told_to_or_when_one_is_killed(
    subset, tmp_path, process_environment, number
):
    config = replace(CONFIG, stage1_epochs=1000, checkpoint_every=1000)
    process = torchrun(config, subset, tmp_path, process_environment)
    assert process.stdout.readline().startswith("epoch    1/")
    children = children_of(process.pid)
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:
        os.kill(children[-1], number)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    wait_for_end(children)
    assert (tmp_path / stages.CHECKPOINT).exists() == (number == signal.SIGTERM)
    told = "stopped: stopped by signal 15 at epoch " if number == signal.SIGTERM else "error: anoth"
    ours = [line for line in error.splitlines() if line.startswith(told)]
    assert ours, error


def torchrun(config, subset, out, environment) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", "-m", "shike_core", "train"]
    command += [*options(config), "--subset", str(subset), "--out", str(out)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        cwd=ROOT,
    )  # fmt: skip


def options(config: TrainConfig) -> list[str]:
    """What differs from the defaults, as the command line takes it."""
    defaults, found = vars(TrainConfig()), []
    for name, value in vars(config).items():
        option = name.replace("_", "-")
        if name == "processes" or value == defaults[name]:
            continue
        found.append(f"--no-{option}" if value is False else f"--{option}={value}")
    return found


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def running(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        state = Path(f"/proc/{pid}/stat").read_text()
        return not re.search(r"\) Z ", state)
    return False


def wait_for_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(map(running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- on GPUs


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("batch_norm", ["local", "synchronised"])
def test_two_gpus_train_together(subset, tmp_path, batch_norm):
    config = replace(CONFIG, device="cuda", processes=2, batch_norm=batch_norm)
    stages.train(config, subset, tmp_path / "two", log_nothing)
    alone = replace(config, processes=1, micro_batch_size=15 * (batch_norm == "local"))
    stages.train(alone, subset, tmp_path / "one", log_nothing)
    two, one = (measured(Run(tmp_path / name, {}, [])) for name in ("two", "one"))
    for our, their in zip(two, one, strict=True):
        assert our["train/loss"] == pytest.approx(their["train/loss"], rel=2e-2)

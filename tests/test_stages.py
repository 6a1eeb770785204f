import base64
import io
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from shike_core import checkpoint as checkpoints
from shike_core import stages
from shike_core.calibration import fit_temperature
from shike_core.config import (
    EvaluateConfig,
    PredictConfig,
    RegisterConfig,
    SubsetConfig,
    TrainConfig,
)
from shike_core.data.listed import IMAGENET_MEAN, IMAGENET_STD
from shike_core.data.long_tail import cut
from shike_core.data.manifest import read_subset, write_subset
from shike_core.data.split import Source
from shike_core.data.views import EvaluationView
from shike_core.errors import (
    ArtifactError,
    CheckpointError,
    DatasetError,
    DeviceError,
    DivergedError,
    InterruptedTraining,
)
from shike_core.gate import shot_groups_digest
from shike_core.processes import STOP_SIGNALS

CONFIG = TrainConfig(
    stage1_epochs=2,
    stage2_epochs=2,
    warmup_epochs=1,
    batch_size=32,
    num_experts=2,
    width=4,
    crop_padding=1,
    flip=False,
    auto_augment=False,
    cutout_size=0,
    precision="float32",
    device="cpu",
    checkpoint_every=3,
)


def log_nothing(metrics, step) -> None:
    """Where a test has no use for the metrics."""


# ---- build_subset


def test_build_subset_on_the_real_digits(tmp_path, digits):
    logged = []
    config = SubsetConfig(dataset="digits", imbalance_factor=20, validation_per_class=10)
    report = stages.build_subset(config, None, tmp_path, lambda *line: logged.append(line))
    subset = read_subset(tmp_path, splits=("train", "test", "validation"))
    assert subset.info == report
    assert subset.class_counts.tolist() == [114, 81, 58, 41, 30, 21, 15, 11, 7, 5]
    assert np.bincount(subset.splits["validation"].labels).tolist() == [10] * 10
    assert (subset.splits["test"].images == digits.test.images).all()
    position = np.searchsorted(digits.train.source_index, subset.splits["train"].source_index)
    assert (subset.splits["train"].images == digits.train.images[position]).all()
    assert (subset.splits["train"].labels == digits.train.labels[position]).all()
    (metrics, step), *more = logged
    assert not more
    assert step == 0
    assert metrics["subset/train_images"] == 383
    assert metrics["subset/imbalance_factor"] == pytest.approx(114 / 5)


def test_build_subset_twice_gives_the_same(tmp_path):
    config = SubsetConfig(dataset="digits", selection="random", subset_seed=5)
    first, second = (
        stages.build_subset(config, None, tmp_path / name, log_nothing) for name in "ab"
    )
    assert first == second
    for name in ("train.parquet", "subset.json", "class_counts.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_build_subset_on_the_real_cifar100(tmp_path, cifar100_dir):
    config = SubsetConfig(dataset="cifar100", imbalance_factor=100, leakage="keep")
    report = stages.build_subset(config, cifar100_dir, tmp_path, log_nothing)
    assert report["sizes"] == {"train": 10847, "test": 10000}
    assert report["digest"] == "70ae3f795a53dbbfdd83f7623c4389d436b7841a26e18e7b25d2b61e7de89023"
    assert [len(labels) for labels in report["shot_groups"].values()] == [35, 35, 30]
    subset = read_subset(tmp_path)
    assert subset.class_counts[[0, 49, 99]].tolist() == [500, 51, 5]
    assert len(subset.splits["train"].images) == 10847


def test_build_subset_tells_a_class_left_without_images(tmp_path):
    config = SubsetConfig(dataset="digits", imbalance_factor=200)
    with pytest.raises(DatasetError, match=r"class 9 \(9\) is left without training images"):
        stages.build_subset(config, None, tmp_path / "out", log_nothing)
    assert not (tmp_path / "out").exists()


def test_build_subset_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file, not a directory"):
        stages.build_subset(SubsetConfig(dataset="digits"), None, tmp_path / "file", log_nothing)


@pytest.fixture
def folder(tmp_path, digits) -> Path:
    """Real digits as files: a folder for each of three classes, in train/ and test/."""
    return write_folder(tmp_path / "digits", digits)


def write_folder(root: Path, digits: Source) -> Path:
    for part, split, most in (("train", digits.train, 30), ("test", digits.test, 5)):
        for label in range(3):
            (root / part / str(label)).mkdir(parents=True)
            for i in np.flatnonzero(split.labels == label)[: most - 10 * label * (most > 5)]:
                Image.fromarray(split.images[i]).save(root / part / str(label) / f"{i:04d}.png")
    return root


FOLDER = SubsetConfig(dataset="image_folder", imbalance_factor=0)


@pytest.mark.parametrize("storage", ["packed", "referenced"])
def test_build_subset_of_images_in_files(tmp_path, folder, digits, storage):
    logged = []
    config = replace(FOLDER, storage=storage)
    report = stages.build_subset(
        config, str(folder), tmp_path / "out", lambda *line: logged.append(line), workers=1
    )
    subset = read_subset(tmp_path / "out")
    assert subset.info == report
    assert subset.class_counts.tolist() == [30, 20, 10]
    images = subset.splits["test"].images
    found = [np.asarray(Image.open(io.BytesIO(x))) for x in images.read(range(len(images)))]
    positions = [np.flatnonzero(digits.test.labels == label)[:5] for label in range(3)]
    assert (np.array(found) == digits.test.images[np.concatenate(positions)]).all()
    (metrics, step), *more = logged
    assert (metrics["subset/train_images"], step, more) == (60, 0, [])


def test_a_folder_of_small_images_trains_as_the_arrays_they_came_from(tmp_path, digits):
    rule = SubsetConfig(dataset="digits", imbalance_factor=20)
    splits, found, _ = cut(digits, rule)
    root, tree = tmp_path / "images", replace(digits, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    for name, split in splits.items():
        # Files come class by class.
        splits[name] = split = split.take(np.argsort(split.labels, kind="stable"))
        for i, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            path = root / name / digits.class_names[label] / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    write_subset(tmp_path / "arrays", splits, tree, rule, found)
    in_files = SubsetConfig(dataset="image_folder", imbalance_factor=0, image_size=8)
    stages.build_subset(in_files, root, tmp_path / "files", log_nothing, workers=1)
    reports = []
    for name in ("arrays", "files"):
        out = tmp_path / f"trained on {name}"
        config = replace(CONFIG, batch_size=33)  # 32 would leave one image for the last batch
        stages.train(config, tmp_path / name, out, log_nothing)
        reports.append(stages.evaluate(EvaluateConfig(), tmp_path / name, out, out, log_nothing))
    assert_same_training(tmp_path / "trained on files", tmp_path / "trained on arrays")
    assert reports[0]["metrics"] == reports[1]["metrics"]


def test_build_subset_of_files_twice_gives_the_same(tmp_path, folder):
    first, second = (
        stages.build_subset(FOLDER, folder, tmp_path / name, log_nothing, workers=workers)
        for name, workers in (("a", 1), ("b", 2))
    )
    assert first == second
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    assert len(files) == 7
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_build_subset_puts_shards_where_it_is_told(tmp_path, folder):
    place = str(tmp_path / "place")
    stages.build_subset(FOLDER, folder, tmp_path / "out", log_nothing, place, workers=1)
    assert len(list((tmp_path / "place").rglob("*.parquet"))) == 2
    assert len(read_subset(tmp_path / "out").splits["train"].images) == 60


@pytest.mark.parametrize(
    "changes", [{"dataset": "digits", "imbalance_factor": 2}, {"storage": "referenced"},
                {"image_size": 4}],
)  # fmt: skip
def test_build_subset_does_not_ignore_a_place_for_shards(tmp_path, folder, changes):
    config = replace(FOLDER, **changes)
    with pytest.raises(ValueError, match=r"shards_dir=/place is for images in files that are pack"):
        stages.build_subset(config, folder, tmp_path / "out", log_nothing, "/place")


def test_build_subset_with_files_that_cannot_be_read(tmp_path, folder):
    for path in (folder / "train" / "1").iterdir():
        path.write_bytes(b"<html>")
    message = r"^20 of 60 images \(33\.33%\) cannot be read, more than max_unreadable=0\.001 "
    with pytest.raises(DatasetError, match=message):
        stages.build_subset(FOLDER, folder, tmp_path / "out", log_nothing, workers=1)
    config = replace(FOLDER, max_unreadable=0.5)
    with pytest.raises(DatasetError, match=r"class 1 \(1\) is left without training images"):
        stages.build_subset(config, folder, tmp_path / "out", log_nothing, workers=1)
    head, *rows = (tmp_path / "out" / "unreadable.csv").read_text().splitlines()
    assert head == "split,path,reason"
    assert rows == sorted(rows)
    assert rows[0] == "train,train/1/0001.png,not an image that can be read"
    assert len(rows) == 20


def test_a_reader_that_leaves_early_is_one_line():
    command = [sys.executable, "-m", "shike_core", "train", "--help"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.close()  # as head does
        message = process.stderr.read()
    assert message == "error: nobody reads the output any more; the rest of it is lost\n"
    assert process.returncode == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_build_subset_stops_promptly_when_a_signal_comes(tmp_path, folder, number, code):
    for path in [*folder.rglob("*.png")]:
        for i in range(40):
            path.with_name(f"{path.stem}-{i}.png").hardlink_to(path)
    command = [sys.executable, "-m", "shike_core", "build-subset", "--dataset", "image_folder"]
    command += [
        "--imbalance-factor",
        "0",
        "--data-dir",
        str(folder),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--storage", "referenced", "--workers", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("pieces/train*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    sent = time.monotonic()
    os.killpg(process.pid, number)  # as a terminal does: the workers get it too
    out, err = process.communicate()
    assert time.monotonic() - sent < 10
    assert (process.returncode, out) == (code, "")
    assert err.startswith(f"stopped: stopped by signal {number} after ")
    assert len(err.splitlines()) == 1


# ---- train


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
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
    """A training that nobody stopped."""

    out: Path
    report: dict[str, Any]
    logged: list[tuple[dict[str, float], int]]
    random_before: Tensor
    random_after: Tensor


@pytest.fixture(scope="module")
def run(subset, tmp_path_factory) -> Run:
    out, logged = tmp_path_factory.mktemp("trained"), []
    before = torch.get_rng_state()
    report = stages.train(CONFIG, subset, out, lambda *line: logged.append(line))
    return Run(out, report, logged, before, torch.get_rng_state())


@pytest.fixture(scope="module")
def trained(run) -> Path:
    """What a training with `CONFIG` writes that nobody stops."""
    return run.out


def weights_in(directory: Path) -> dict[str, Tensor]:
    return checkpoints.load(directory / stages.CHECKPOINT).model


def assert_same_training(directory: Path, expected: Path, statistics: float = 0.0) -> None:
    """Weights equal bit for bit, and every measured figure of every epoch.

    Args:
        directory: what a training wrote.
        expected: what another wrote.
        statistics: error, absolute and relative, that BatchNorm's running statistics may have.
    """
    one, two = weights_in(directory), weights_in(expected)
    assert one.keys() == two.keys()
    counters = "num_batches_tracked"  # read by nobody, and not what counts
    for name in [name for name in one if not name.endswith(counters)]:
        allowed = statistics if name.endswith(("running_mean", "running_var")) else 0.0
        torch.testing.assert_close(one[name], two[name], rtol=allowed, atol=allowed, msg=name)
    histories = [read_json(path / "history.json") for path in (directory, expected)]
    for metrics in (*histories[0], *histories[1]):
        del metrics["train/images_per_second"]
        metrics.pop("train/data_wait", None)  # of images on disk; seconds
        for split in ("validation", "test"):  # when is up to checkpoint_every and watch
            metrics.pop(f"{split}/accuracy", None)
    assert histories[0] == histories[1]


def read_json(path: Path) -> Any:
    """Strict JSON, which has no NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{path} has {word}")

    return json.loads(path.read_text(), parse_constant=refuse)


class StopAt:
    """A log that sends this process a signal when an epoch is logged."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number
        self.steps: list[int] = []

    def __call__(self, metrics, step) -> None:
        self.steps.append(step)
        if step == self.step:
            signal.raise_signal(self.number)


def test_train_writes_and_logs_what_happened(run):
    out, report, logged = run.out, run.report, run.logged
    names = sorted(path.name for path in out.iterdir())
    assert names == ["checkpoint.pt", "history.json", "train.json"]
    assert read_json(out / "train.json") == report
    history = read_json(out / "history.json")
    assert [metrics for metrics, _ in logged] == history
    assert [step for _, step in logged] == [0, 1, 2, 3]
    # every third epoch, and the last of either stage
    assert [m["epoch"] for m in history if "validation/accuracy" in m] == [1, 2, 3]
    assert report["final"] == history[-1]
    assert report["epochs"] == report["epochs_in_this_call"] == 4
    assert report["images"] == 383
    assert (report["device"], report["precision"]) == ("cpu", "float32")
    kept = checkpoints.load_trained(out / stages.CHECKPOINT)
    assert kept.config == CONFIG
    assert kept.class_counts == (114, 81, 58, 41, 30, 21, 15, 11, 7, 5)
    assert kept.class_names == tuple("0123456789")
    assert kept.history == history
    sizes = {name: value.numel() for name, value in kept.model.named_parameters()}
    heads = 2 * 10 * 16  # experts, classes, features
    assert report["parameters"] == sum(sizes.values())
    assert report["parameters_deployed"] == sum(sizes.values()) - heads


def test_train_does_not_touch_the_generator_of_its_caller(run):
    assert torch.equal(run.random_before, run.random_after)


def test_train_warns_of_a_last_batch_of_a_few_images(subset, tmp_path):
    config = replace(CONFIG, batch_size=382, stage1_epochs=1, stage2_epochs=1)  # of 383 images
    with pytest.warns(
        UserWarning, match=r"last of 2 batches .* 1 of 382 images.* batch_size to 383"
    ):
        stages.train(config, subset, tmp_path, log_nothing)


def test_train_refuses_images_that_are_too_small_for_the_network(subset, folder, tmp_path):
    large = replace(CONFIG, network="resnet50", width=8)
    with pytest.raises(DatasetError, match="network=resnet50 leaves nothing of images of 8 x 8"):
        stages.train(large, subset, tmp_path / "out", log_nothing)
    stages.build_subset(FOLDER, folder, tmp_path / "files", log_nothing)
    for config in (large, replace(large, batch_size=1)):
        with pytest.raises(DatasetError, match="are files of different sizes: set crop=resized"):
            stages.train(config, tmp_path / "files", tmp_path / "out", log_nothing)
    crops = replace(large, crop="resized", crop_size=17)
    message = "crop_size=17, but half of .* 8 pixels or less .* crop_size to at most 16"
    with pytest.raises(DatasetError, match=message):
        stages.train(crops, tmp_path / "files", tmp_path / "out", log_nothing)


@pytest.mark.parametrize("changes", [{"batch_size": 19}, {"micro_batch_size": 1}], ids=str)
def test_train_refuses_steps_of_one_image_of_one_pixel(changes, digits, tmp_path):
    rule = SubsetConfig(dataset="digits", imbalance_factor=20, image_size=4, num_classes=2)
    report = stages.build_subset(rule, None, tmp_path / "subset", log_nothing)
    assert report["sizes"]["train"] % 19 == 1
    with pytest.raises(DatasetError, match=r"4 pixels or less resnet32 makes one pixel a channel"):
        stages.train(replace(CONFIG, **changes), tmp_path / "subset", tmp_path / "o", log_nothing)
    config = replace(CONFIG, stage1_epochs=1, stage2_epochs=1, batch_size=67)
    assert stages.train(config, tmp_path / "subset", tmp_path / "o", log_nothing)["epochs"] == 2


def test_a_training_that_diverges_costs_the_others_no_result(subset, tmp_path):
    configs = [CONFIG, replace(CONFIG, stage1_warmup_start=1e30)]
    outs = [tmp_path / "sound", tmp_path / "broken"]
    with pytest.raises(DivergedError):
        stages.train_together(configs, subset, outs, [log_nothing] * 2)
    assert {path.name for path in outs[0].iterdir()} == {
        stages.CHECKPOINT, "history.json", "train.json",
    }  # fmt: skip
    assert read_json(outs[0] / "train.json")["calibration_temperature"] is not None
    assert not outs[1].exists()


@pytest.fixture
def heard_by_whoever_runs_the_tests() -> Iterator[None]:
    """All signals, also where the tests were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_train_stays_when_it_was_started_to_outlive_its_terminal(subset, tmp_path, trained):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        stages.train(CONFIG, subset, tmp_path, StopAt(1, signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert_same_training(tmp_path, trained)


@pytest.mark.parametrize(
    ("number", "epoch"), [(signal.SIGTERM, 0), (signal.SIGINT, 1), (signal.SIGHUP, 2)]
)
def test_train_goes_on_after_a_signal(
    number, epoch, subset, tmp_path, trained, heard_by_whoever_runs_the_tests
):
    before = [signal.getsignal(n) for n in STOP_SIGNALS]
    with pytest.raises(InterruptedTraining, match=rf"stopped by signal {number:d}") as caught:
        stages.train(CONFIG, subset, tmp_path, StopAt(epoch, number))
    assert caught.value.signal_number == number
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == before
    assert [path.name for path in tmp_path.iterdir()] == [stages.CHECKPOINT]
    log = StopAt(-1)
    report = stages.train(CONFIG, subset, tmp_path, log)
    assert log.steps == [0, 1, 2, 3]  # the epochs already done come first
    assert report["epochs_in_this_call"] == 4 - (epoch + 1)
    assert_same_training(tmp_path, trained)


def test_train_of_a_finished_training_only_writes_its_results(subset, tmp_path, trained):
    checkpoint = (trained / stages.CHECKPOINT).read_bytes()
    (tmp_path / stages.CHECKPOINT).write_bytes(checkpoint)
    log = StopAt(-1)
    report = stages.train(CONFIG, subset, tmp_path, log)
    assert log.steps == [0, 1, 2, 3]
    assert report["epochs_in_this_call"] == 0
    assert (tmp_path / stages.CHECKPOINT).read_bytes() == checkpoint
    for name in ("history.json", "train.json"):
        assert (tmp_path / name).exists()


FORGETFUL = replace(CONFIG, stage1_epochs=1, stage2_epochs=9, batch_size=16)
"""A stage 2 of 216 steps."""


@pytest.fixture(scope="module")
def balanced(subset, tmp_path_factory) -> Path:
    """What a training with `FORGETFUL` writes."""
    out = tmp_path_factory.mktemp("balanced")
    stages.train(FORGETFUL, subset, out, log_nothing)
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {"stage2_logit_adjustment": 1.5, "stage2_scale": 20.0},
        {"stage2_learning_rate": 0.01, "stage2_warmup_start": 0.001, "checkpoint_every": 1},
        {"stage2_epochs": 10},
    ],
    ids=str,
)
def test_another_stage2_on_the_same_stage1_is_as_if_trained_at_once(
    changes, subset, tmp_path, balanced
):
    config = replace(FORGETFUL, **changes)
    at_once, after = tmp_path / "at once", tmp_path / "after"
    stages.train(config, subset, at_once, log_nothing)
    stages.take_stage1(balanced / stages.CHECKPOINT, config, subset, after)
    report = stages.train(config, subset, after, log_nothing)
    assert report["epochs_in_this_call"] == config.stage2_epochs
    # What was there before has been forgotten, but rounding can keep two statistics, each updated
    # with the same batches, one last digit apart.
    assert_same_training(after, at_once, statistics=1e-6)
    kept = [checkpoints.load(path / stages.CHECKPOINT) for path in (after, at_once)]
    assert kept[0].training_digest == kept[1].training_digest
    temperatures = [state.calibration_temperature for state in kept]
    assert temperatures[0] == pytest.approx(temperatures[1], rel=1e-5)


def test_stage1_is_taken_exactly_from_a_training_without_stage2(subset, tmp_path, trained):
    only_stage1 = replace(CONFIG, stage2_epochs=0)
    stages.train(only_stage1, subset, tmp_path / "stage 1", log_nothing)
    kept = tmp_path / "kept"
    stages.take_stage1(
        tmp_path / "stage 1" / stages.CHECKPOINT, CONFIG, subset, tmp_path / "out", kept
    )
    report = stages.train(CONFIG, subset, tmp_path / "out", log_nothing, kept)
    assert report["epochs_in_this_call"] == 2
    assert_same_training(tmp_path / "out", trained)


def test_a_training_that_has_begun_takes_no_other_stage1(subset, tmp_path, balanced):
    shutil.copytree(balanced, tmp_path / "out")
    before = (tmp_path / "out" / stages.CHECKPOINT).read_bytes()
    stages.take_stage1(tmp_path / "not read", FORGETFUL, subset, tmp_path / "out")
    assert (tmp_path / "out" / stages.CHECKPOINT).read_bytes() == before


def test_another_trainings_checkpoint_does_not_give_way_to_a_stage1(
    subset, tmp_path, balanced, trained
):
    longer = replace(FORGETFUL, stage1_epochs=9)  # more than all epochs of the other
    with pytest.raises(InterruptedTraining):
        stages.train(longer, subset, tmp_path / "longer", StopAt(8))
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    before = (out / stages.CHECKPOINT).read_bytes()
    with pytest.raises(CheckpointError, match="belongs to another training"):
        stages.take_stage1(tmp_path / "longer" / stages.CHECKPOINT, longer, subset, out)
    assert (out / stages.CHECKPOINT).read_bytes() == before


def test_a_training_in_its_own_stage1_takes_the_finished_one(subset, tmp_path, trained):
    other, out = tmp_path / "stage 1", tmp_path / "out"
    stages.train(replace(CONFIG, stage2_epochs=0), subset, other, log_nothing)
    with pytest.raises(InterruptedTraining):
        stages.train(CONFIG, subset, out, StopAt(0))
    taken = [stages.take_stage1(other / stages.CHECKPOINT, CONFIG, subset, out) for _ in range(2)]
    assert taken == [True, False]
    assert stages.train(CONFIG, subset, out, log_nothing)["epochs_in_this_call"] == 2
    assert_same_training(out, trained)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"momentum": 0.5, "stage2_epochs": 10}, CheckpointError,
         r"stage 1 of .*checkpoint.pt is another one \(momentum 0.9 there, 0.5 here\); give a"),
        ({"stage2_epochs": 0}, ValueError, "stage2_epochs=0 leaves nothing to train"),
        ({"stage2_batch_norm": "eval"}, ValueError, "which stage2_batch_norm=eval keeps; train bo"),
        ({"stage2_epochs": 4}, ValueError, r"which 96 steps \(not 100\) do not quite forget; tra"),
    ],
    ids=str,
)  # fmt: skip
def test_a_stage1_that_does_not_fit_is_refused(changes, error, message, subset, tmp_path, balanced):
    config = replace(FORGETFUL, **changes)
    with pytest.raises(error, match=message):
        stages.take_stage1(balanced / stages.CHECKPOINT, config, subset, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stage1_that_is_not_finished_is_refused(subset, tmp_path):
    with pytest.raises(InterruptedTraining):
        stages.train(CONFIG, subset, tmp_path / "cut", StopAt(0))
    with pytest.raises(CheckpointError, match=r"holds 1 of 2 epochs of stage 1; go on with that"):
        stages.take_stage1(tmp_path / "cut" / "checkpoint.pt", CONFIG, subset, tmp_path / "out")


def test_stage1_from_on_the_command_line(subset, tmp_path, balanced):
    changed = {
        field: value for field, value in asdict(FORGETFUL).items()
        if value != asdict(TrainConfig())[field]
    }  # fmt: skip
    options = []
    for field, value in changed.items():
        option = field.replace("_", "-")
        options += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [
            f"--{option}", str(value)
        ]  # fmt: skip
    command = [
        sys.executable, "-m", "shike_core", "train", *options, "--stage2-logit-adjustment", "1.5",
        "--subset", str(subset), "--out", str(tmp_path / "out"),
        "--stage1-from", str(balanced / stages.CHECKPOINT),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "out" / "train.json")["epochs_in_this_call"] == 9
    command[-1] = str(tmp_path / "nothing")
    command[command.index(str(tmp_path / "out"))] = str(tmp_path / "other")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: there is no checkpoint {tmp_path / 'nothing'}; train first, or check the path\n"
    )


def test_train_keeps_its_checkpoint_where_it_is_told(subset, tmp_path, trained):
    kept = tmp_path / "kept"
    with pytest.raises(InterruptedTraining):
        stages.train(CONFIG, subset, tmp_path / "lost", StopAt(1), kept)
    assert not (tmp_path / "lost").exists()
    digest = stages.training_digest(CONFIG, read_subset(subset, splits=()).digest)
    assert [path.relative_to(kept) for path in kept.rglob("*.*")] == [Path(digest, "checkpoint.pt")]
    report = stages.train(CONFIG, subset, tmp_path / "out", log_nothing, kept)
    assert report["epochs_in_this_call"] == 2
    assert report["training_digest"] == digest
    assert_same_training(tmp_path / "out", trained)

    other = replace(CONFIG, seed=1)  # has a folder of its own
    with pytest.raises(InterruptedTraining):
        stages.train(other, subset, tmp_path / "other", StopAt(0), kept)
    assert len(list(kept.iterdir())) == 2
    stages.discard_checkpoint(digest, kept)
    (left,) = kept.iterdir()
    assert left.name == stages.training_digest(other, read_subset(subset, splits=()).digest)
    stages.discard_checkpoint(digest, kept)  # nothing is left to discard
    stages.discard_checkpoint(digest, None)
    assert left.exists()


def test_a_training_is_known_by_what_decides_its_weights():
    digest = stages.training_digest(CONFIG, "subset")
    for same in ({"device": "auto"}, {"checkpoint_every": 3}):
        assert stages.training_digest(replace(CONFIG, **same), "subset") == digest
    others = {
        stages.training_digest(replace(CONFIG, **change), "subset")
        for change in ({"seed": 1}, {"momentum": 0.8}, {"precision": "bfloat16"}, {"flip": True})
    }
    assert len({digest, *others, stages.training_digest(CONFIG, "another")}) == 6


DRIVER = """
import json, os, sys, threading
from pathlib import Path
from components.boundary import readable_errors
from shike_core import stages
from shike_core.config import TrainConfig

config, subset, out, number, after = json.loads(sys.argv[1])

def log(metrics, step):
    if step == after:  # the next epoch has begun by then
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()

with readable_errors():
    stages.train(TrainConfig(**config), Path(subset), Path(out), log)
"""


@pytest.fixture(scope="module")
def longer() -> TrainConfig:
    """Epochs of 24 steps, long enough to be stopped in the middle."""
    return replace(CONFIG, batch_size=16, checkpoint_every=1)


@pytest.fixture(scope="module")
def trained_longer(longer, subset, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trained_longer")
    stages.train(longer, subset, path, log_nothing)
    return path


@pytest.fixture
def stopped(subset, tmp_path, process_environment):
    """Starts a process that trains and gets a signal; gives what came out of it."""

    def start(config: TrainConfig, number: int, after: int) -> subprocess.CompletedProcess[str]:
        arguments = [vars(config), str(subset), str(tmp_path), int(number), after]
        return subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps(arguments)],
            cwd=Path(__file__).parents[1], env=process_environment(), capture_output=True,
            text=True, check=False, timeout=300,
        )  # fmt: skip

    return start


@pytest.mark.parametrize(
    ("number", "code", "after"),
    [(signal.SIGTERM, 143, 1), pytest.param(signal.SIGINT, 130, 0, marks=pytest.mark.slow)],
)
def test_a_process_told_to_stop_writes_a_checkpoint_and_exits_as_a_shell_reports_it(
    number, code, after, longer, subset, stopped, tmp_path, trained_longer
):
    config = replace(longer, checkpoint_every=100)  # so that the signal causes the checkpoint
    process = stopped(config, number, after)
    assert process.returncode == code, process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"stopped: stopped by signal {number:d} at epoch {after + 1}, step ")
    state = checkpoints.load(tmp_path / stages.CHECKPOINT)
    assert f"epoch {state.epoch}, step {state.step}; wrote {tmp_path}" in line
    stages.train(config, subset, tmp_path, log_nothing)
    assert_same_training(tmp_path, trained_longer)


def test_a_process_killed_in_the_middle_of_an_epoch_leaves_what_the_next_one_needs(
    longer, subset, stopped, tmp_path, trained_longer
):
    for after in (1, 2):
        process = stopped(longer, signal.SIGKILL, after)
        assert process.returncode == -signal.SIGKILL, process.stderr
        state = checkpoints.load(tmp_path / stages.CHECKPOINT)
        # of the epoch logged last, or of the one before if its own was just being written
        assert (state.epoch, state.step) in {(after + 1, 0), (after, 0)}
    assert not (tmp_path / "train.json").exists()
    report = stages.train(longer, subset, tmp_path, log_nothing)
    assert report["epochs_in_this_call"] == 4 - state.epoch
    assert_same_training(tmp_path, trained_longer)


SAVES = """
import os, random, signal, sys, time
from dataclasses import asdict
from pathlib import Path
import torch
from shike_core import checkpoint as checkpoints
from shike_core.config import TrainConfig

path = Path(sys.argv[1])
texts = {name: "" for name in ("training_digest", "subset_digest")}
lists = {name: [] for name in ("class_names", "class_counts", "mean", "std", "image_size")}
states = [
    checkpoints.Checkpoint(
        config=asdict(TrainConfig()), epoch=version, **texts, **lists,
        model={str(i): torch.full((100_000,), float(version)) for i in range(10)},
    )
    for version in range(5)
]
random.seed(0)
loaded = 0
for attempt in range(12):
    child = os.fork()
    if not child:
        while True:
            for state in states:
                checkpoints.save(state, path)
    time.sleep(random.uniform(0.02, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if path.exists():
        state = checkpoints.load(path)
        assert all(bool((part == state.epoch).all()) for part in state.model.values())
        assert len(state.model) == 10
        loaded += 1
print(loaded, len(list(path.parent.glob(".partial-*"))))
"""


def test_a_checkpoint_is_whole_or_not_there_when_its_writer_is_killed(
    tmp_path, process_environment
):
    process = subprocess.run(
        [sys.executable, "-c", SAVES, str(tmp_path / "checkpoint.pt")],
        cwd=Path(__file__).parents[1], env=process_environment(), capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    loaded, cut_short = map(int, process.stdout.split())
    assert loaded > 0
    assert cut_short > 0  # files that a kill left half-written, under names that nobody reads


def test_train_refuses_the_checkpoint_of_another_configuration(subset, tmp_path, trained):
    checkpoint = (trained / stages.CHECKPOINT).read_bytes()
    (tmp_path / stages.CHECKPOINT).write_bytes(checkpoint)
    other = replace(CONFIG, momentum=0.5, seed=7, checkpoint_every=1)
    with pytest.raises(CheckpointError) as caught:
        stages.train(other, subset, tmp_path, log_nothing)
    assert "(momentum 0.9 there, 0.5 here; seed 0 there, 7 here)" in str(caught.value)
    assert (tmp_path / stages.CHECKPOINT).read_bytes() == checkpoint


def test_train_says_what_a_checkpoint_of_an_older_version_lacks(subset, tmp_path, trained):
    state = checkpoints.load(trained / stages.CHECKPOINT)
    del state.config["stage2_logit_adjustment"]
    state.training_digest = "of the older version"
    checkpoints.save(state, tmp_path / stages.CHECKPOINT)
    with pytest.raises(
        CheckpointError, match=r"\(stage2_logit_adjustment not known there, 1.0 here\)"
    ):
        stages.train(CONFIG, subset, tmp_path, log_nothing)


def test_train_refuses_the_checkpoint_of_another_subset(tmp_path, trained):
    config = SubsetConfig(dataset="digits", imbalance_factor=10)
    info = stages.build_subset(config, None, tmp_path / "subset", log_nothing)
    kept = checkpoints.load(trained / stages.CHECKPOINT)
    expected = f"subset {kept.subset_digest[:12]} there, {info['digest'][:12]} here"
    with pytest.raises(CheckpointError, match=expected):
        stages.train(CONFIG, tmp_path / "subset", trained, log_nothing)


class Executed:
    """Pickled, it would write a file when read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("damage", ["truncated", "random", "empty", "code"])
def test_no_stage_uses_a_damaged_checkpoint(damage, subset, tmp_path, trained):
    whole = (trained / stages.CHECKPOINT).read_bytes()
    content = {
        "truncated": whole[: len(whole) // 2],
        "random": np.random.default_rng(0).bytes(5000),
        "empty": b"",
        "code": pickle.dumps({"format": 1, "model": Executed(tmp_path / "executed")}),
    }[damage]
    (tmp_path / stages.CHECKPOINT).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        stages.train(CONFIG, subset, tmp_path, log_nothing)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        stages.evaluate(EvaluateConfig(device="cpu"), subset, tmp_path, tmp_path / "o", log_nothing)
    assert [path.name for path in tmp_path.iterdir()] == [stages.CHECKPOINT]


def test_a_diverging_training_can_be_looked_at_afterwards(subset, tmp_path):
    config = replace(CONFIG, stage1_learning_rate=1e20, checkpoint_every=1)
    with pytest.raises(DivergedError, match="not finite at epoch 1, step ") as caught:
        stages.train(config, subset, tmp_path, log_nothing)
    assert caught.value.epoch == 1
    state = checkpoints.load(tmp_path / stages.CHECKPOINT)
    assert (state.epoch, state.step, len(state.history)) == (1, 0, 1)
    assert all(value.isfinite().all() for value in state.model.values())


def test_a_disk_that_fills_up_costs_no_finished_epoch(subset, full_disk, trained):
    size = f"remount,size={4 * (trained / stages.CHECKPOINT).stat().st_size}"
    subprocess.run(["mount", "-o", size, str(full_disk)], check=True)
    with pytest.raises(InterruptedTraining):
        stages.train(CONFIG, subset, full_disk, StopAt(0))
    kept = (full_disk / stages.CHECKPOINT).read_bytes()
    with suppress(OSError):  # as much of it as fits
        (full_disk / "other").write_bytes(bytes(10**8))
    with pytest.raises(ArtifactError, match=r"checkpoint\.pt: the disk is full: free some space"):
        stages.train(CONFIG, subset, full_disk, log_nothing)
    assert (full_disk / stages.CHECKPOINT).read_bytes() == kept
    assert {path.name for path in full_disk.iterdir()} == {stages.CHECKPOINT, "other"}
    (full_disk / "other").unlink()
    stages.train(CONFIG, subset, full_disk, log_nothing)
    assert_same_training(full_disk, trained)


def test_train_below_a_file(subset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file, not a directory"):
        stages.train(CONFIG, subset, tmp_path / "file", log_nothing)


def test_train_without_a_subset(tmp_path):
    with pytest.raises(DatasetError):
        stages.train(CONFIG, tmp_path, tmp_path / "out", log_nothing)
    assert not (tmp_path / "out").exists()


# ---- evaluate


@pytest.fixture(scope="module")
def evaluated(subset, trained, tmp_path_factory) -> tuple[Path, list[tuple[Any, int]]]:
    """What `evaluate` writes about `trained`, and what it logs."""
    path, logged = tmp_path_factory.mktemp("evaluated"), []
    config = EvaluateConfig(device="cpu", eval_batch_size=100)
    stages.evaluate(config, subset, trained, path, lambda *line: logged.append(line))
    return path, logged


def test_evaluate_writes_everything(evaluated, subset, trained):
    path, logged = evaluated
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    plots = {file for file in files if file.startswith("plots/")}
    assert files - plots == {"model.pt2", "predictions.parquet", "report.json", "report.html"}
    assert plots
    assert all((path / file).read_bytes().startswith(b"\x89PNG") for file in plots)
    report = read_json(path / "report.json")
    assert logged == [(report["metrics"], CONFIG.epochs)]
    assert all(math.isfinite(value) for value in report["metrics"].values())
    assert report["trained_on_this_subset"] is True
    assert report["test_digest"] == read_subset(subset, splits=()).test_digest
    assert report["history"] == read_json(trained / "history.json")
    assert report["train"]["parameters"] == read_json(trained / "train.json")["parameters"]
    assert 0 <= report["export"]["largest_difference"] < 1e-4


def test_the_page_shows_the_test_images_themselves(evaluated, subset):
    report = read_json(evaluated[0] / "report.json")
    page = (evaluated[0] / "report.html").read_text()
    test = read_subset(subset, splits=("test",)).splits["test"]
    rows = [of for row in report["examples"] for kind in ("right", "wrong") for of in row[kind]]
    assert len(report["examples"]) == 5
    assert rows
    for of in rows:
        buffer = io.BytesIO()
        Image.fromarray(test.images[of["row"]]).save(buffer, "PNG")
        assert base64.b64encode(buffer.getvalue()).decode() in page


def test_evaluate_agrees_with_numpy(evaluated, subset):
    path, _ = evaluated
    table = pq.read_table(path / "predictions.parquet")
    labels = table["label"].to_numpy()
    experts = np.stack(
        [np.stack(table[f"logits_expert_{i}"].to_numpy()) for i in (0, 1)], axis=1
    ).astype(np.float64)  # (images, num_experts, num_classes)
    test = read_subset(subset, splits=("test",)).splits["test"]
    assert (labels == test.labels).all()
    assert (table["source_index"].to_numpy() == test.source_index).all()
    ensemble = experts.mean(axis=1)
    assert (table["predicted"].to_numpy() == ensemble.argmax(axis=1)).all()
    report = read_json(path / "report.json")

    groups = {"many_shot": [0], "medium_shot": [1, 2, 3, 4, 5], "few_shot": [6, 7, 8, 9]}
    expected = {}
    for prefix, logits in (
        ("test/", ensemble),
        ("test/expert_0/", experts[:, 0]),
        ("test/expert_1/", experts[:, 1]),
    ):
        right = logits.argmax(axis=1) == labels
        by_class = [right[labels == label].mean() for label in range(10)]
        rank = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(axis=1)
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        confidence = (probabilities / probabilities.sum(axis=1, keepdims=True)).max(axis=1)
        bins = np.ceil(confidence * 15)
        gaps = [abs((right - confidence)[bins == b].sum()) for b in range(1, 16)]
        expected |= {
            f"{prefix}accuracy": right.mean(),
            f"{prefix}top5_accuracy": (rank < 5).mean(),
            f"{prefix}mean_class_accuracy": np.mean(by_class),
            f"{prefix}expected_calibration_error": sum(gaps) / len(labels),
        }
        for name, members in groups.items():
            expected[f"{prefix}{name}/accuracy"] = right[np.isin(labels, members)].mean()
    del report["metrics"]["test/scaled/expected_calibration_error"]  # of its own test
    assert report["metrics"] == pytest.approx(expected, abs=1e-6)
    confusion = np.zeros((10, 10), dtype=int)
    np.add.at(confusion, (labels, ensemble.argmax(axis=1)), 1)
    assert report["confusion_matrix"]["matrix"] == confusion.tolist()
    rows = report["per_class"]
    assert [row["test_images"] for row in rows] == np.bincount(labels).tolist()
    assert [row["accuracy"] for row in rows] == pytest.approx(
        confusion.diagonal() / confusion.sum(axis=1)
    )


def test_a_training_with_a_validation_part_is_calibrated_on_it(subset, run, evaluated):
    """The temperature is the one that makes the validation labels likeliest, found by search."""
    data = read_subset(subset, splits=("validation",))
    images = torch.tensor(data.splits["validation"].images).permute(0, 3, 1, 2)
    labels = torch.tensor(data.splits["validation"].labels)
    trained = checkpoints.load_trained(run.out / stages.CHECKPOINT)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (trained.mean, trained.std))
    with torch.no_grad():
        logits = trained.model((images / 255 - mean) / std, stage=2).mean(dim=1)
    tried = torch.logspace(-1.3, 1.3, 400).tolist()
    costs = [float(torch.nn.functional.cross_entropy(logits / t, labels)) for t in tried]
    temperature = trained.calibration_temperature
    assert temperature == pytest.approx(tried[int(np.argmin(costs))], rel=0.02)
    assert run.report["calibration_temperature"] == temperature
    assert trained.image_size == (8, 8)
    report = read_json(evaluated[0] / "report.json")
    assert report["calibration"]["temperature"] == temperature
    of_all = report["calibration"]["groups"]["all"]
    error, scaled = "expected_calibration_error", "scaled_expected_calibration_error"
    assert of_all[error] == pytest.approx(report["metrics"]["test/expected_calibration_error"])
    assert of_all[scaled] == report["metrics"]["test/scaled/expected_calibration_error"]


def test_a_training_without_a_validation_part_is_not_calibrated(tmp_path):
    subset = tmp_path / "subset"
    stages.build_subset(SubsetConfig(dataset="digits"), None, subset, log_nothing)
    config = replace(CONFIG, stage1_epochs=1, stage2_epochs=1)
    report = stages.train(config, subset, tmp_path / "out", log_nothing)
    assert report["calibration_temperature"] is None
    evaluated = stages.evaluate(
        EvaluateConfig(), subset, tmp_path / "out", tmp_path / "evaluated", log_nothing
    )
    assert evaluated["calibration"]["temperature"] is None
    assert "test/scaled/expected_calibration_error" not in evaluated["metrics"]


def test_held_out_images_that_are_all_right_tell_no_temperature(
    subset, tmp_path, trained, monkeypatch
):
    state = checkpoints.load(trained / stages.CHECKPOINT)
    checkpoints.save(replace(state, calibration_temperature=None), tmp_path / stages.CHECKPOINT)

    def as_if_all_were_right(logits, labels) -> float:
        right = torch.nn.functional.one_hot(labels, logits.shape[1])
        return fit_temperature(5.0 * right, labels)

    monkeypatch.setattr("shike_core.calibration.fit_temperature", as_if_all_were_right)
    with pytest.warns(
        UserWarning, match="classified rightly, which tells no temperature: the model"
    ):
        report = stages.train(CONFIG, subset, tmp_path, log_nothing)
    assert report["calibration_temperature"] is None


def test_a_finished_training_of_before_is_calibrated_when_it_is_called_again(
    subset, tmp_path, trained
):
    state = checkpoints.load(trained / stages.CHECKPOINT)
    checkpoints.save(replace(state, calibration_temperature=None), tmp_path / stages.CHECKPOINT)
    report = stages.train(CONFIG, subset, tmp_path, log_nothing)
    assert report["epochs_in_this_call"] == 0
    assert report["calibration_temperature"] == pytest.approx(state.calibration_temperature)


def test_predict_agrees_with_the_evaluation(evaluated, subset, trained, tmp_path):
    table = pq.read_table(subset / "test.parquet").slice(0, 70).to_pydict()
    for i, image in enumerate(table["image"]):
        (tmp_path / f"{i:02}.png").write_bytes(image["bytes"] if isinstance(image, dict) else image)
    stored = pq.read_table(evaluated[0] / "predictions.parquet").slice(0, 70).to_pydict()
    config = PredictConfig(device="cpu", top=3)
    answers = list(stages.predict(config, trained, [str(tmp_path)]))
    temperature = checkpoints.load(trained / stages.CHECKPOINT).calibration_temperature
    assert [Path(row["image"]).name for row in answers] == [f"{i:02}.png" for i in range(70)]
    for i, row in enumerate(answers):
        logits = np.array([stored["logits_expert_0"][i], stored["logits_expert_1"][i]])
        assert row["label"] == stored["predicted"][i]
        assert row["calibrated"]
        of_ensemble = np.exp(logits.mean(axis=0) / temperature)
        expected = np.sort(of_ensemble / of_ensemble.sum())[::-1][:3]
        got = [best["probability"] for best in row["top"]]
        np.testing.assert_allclose(got, expected, atol=1e-4)
        assert [e["class"] for e in row["experts"]] == [str(z.argmax()) for z in logits]
    in_file = stages.predict(config, trained / stages.CHECKPOINT, [str(tmp_path / "05.png")])
    assert next(in_file)["label"] == answers[5]["label"]


def test_evaluate_uses_the_stage2_heads_in_eval_mode(evaluated, subset, trained):
    path, _ = evaluated
    model = checkpoints.load_trained(trained / stages.CHECKPOINT)
    data = read_subset(subset, splits=("test",))
    pixels = torch.tensor(data.splits["test"].images[:50]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
    with torch.no_grad():
        logits = model.model((pixels - mean) / std, stage=2)
    table = pq.read_table(path / "predictions.parquet")[:50]
    for i in (0, 1):
        found = np.stack(table[f"logits_expert_{i}"].to_numpy())
        np.testing.assert_allclose(found, logits[:, i].numpy(), rtol=1e-3, atol=1e-3)


def test_evaluate_refuses_an_unfinished_training(subset, tmp_path):
    with pytest.raises(InterruptedTraining):
        stages.train(CONFIG, subset, tmp_path, StopAt(1))
    with pytest.raises(CheckpointError, match="holds 2 of 4 epochs; go on with the training"):
        stages.evaluate(EvaluateConfig(device="cpu"), subset, tmp_path, tmp_path / "o", log_nothing)
    assert not (tmp_path / "o").exists()


def test_evaluate_without_enough_memory_names_the_batch_to_try(
    subset, tmp_path, trained, monkeypatch
):
    def too_much(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("shike_core.evaluate.predict", too_much)
    with pytest.raises(DeviceError, match=r"eval_batch_size=40 \(CUDA .* try eval_batch_size=20$"):
        stages.evaluate(
            EvaluateConfig(device="cpu", eval_batch_size=40), subset, trained, tmp_path, log_nothing
        )


def test_evaluate_without_a_checkpoint(subset, tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        stages.evaluate(EvaluateConfig(device="cpu"), subset, tmp_path, tmp_path / "o", log_nothing)


# ---- images in files, decoded while they are trained on

STREAMED = replace(
    CONFIG, crop="resized", crop_size=16, crop_padding=0, flip=True, color_jitter=0.2, batch_size=25
)


@pytest.fixture(scope="module")
def files(tmp_path_factory, digits) -> Path:
    """Real digits in a subset of files: 60 images of three classes to train on, 15 to test."""
    root = tmp_path_factory.mktemp("files")
    write_folder(root / "digits", digits)
    rule = replace(FOLDER, validation_per_class=2)
    stages.build_subset(rule, root / "digits", root / "subset", log_nothing, workers=1)
    return root / "subset"


@pytest.fixture(scope="module")
def streamed(files, tmp_path_factory) -> Run:
    out, logged = tmp_path_factory.mktemp("streamed"), []
    before = torch.get_rng_state()
    config = replace(STREAMED, workers=2)
    report = stages.train(config, files, out, lambda *line: logged.append(line))
    return Run(out, report, logged, before, torch.get_rng_state())


def test_train_on_images_in_files(streamed):
    report, history = streamed.report, read_json(streamed.out / "history.json")
    assert report["images"] == 54  # 60 without 2 of each class for validation
    assert torch.equal(streamed.random_before, streamed.random_after)
    assert [m["epoch"] for m in history if "validation/accuracy" in m] == [1, 2, 3]
    waits = [m["train/data_wait"] for m in history]
    assert all(0 < wait <= 1 for wait in waits)
    seconds = [report["images"] / m["train/images_per_second"] for m in history]
    waited = sum(wait * taken for wait, taken in zip(waits, seconds, strict=True))
    assert report["seconds_waiting_for_data"] == pytest.approx(waited)
    assert not multiprocessing.active_children()


def test_train_on_images_in_memory_has_nothing_to_wait_for(run):
    assert run.report["seconds_waiting_for_data"] is None
    assert not [m for m, _ in run.logged if "train/data_wait" in m]


def test_train_on_files_goes_on_in_an_epoch_with_another_number_of_workers(
    files, tmp_path, streamed, monkeypatch
):
    @contextmanager
    def stopping():  # at the third look: after the second step of the second epoch
        looks = iter(range(100))
        yield lambda: signal.SIGTERM if next(looks) == 5 else None

    config = replace(STREAMED, workers=1)
    with monkeypatch.context() as patched:
        patched.setattr(stages, "stop_signals", stopping)
        with pytest.raises(InterruptedTraining, match="at epoch 1, step 2"):
            stages.train(config, files, tmp_path, log_nothing)
    assert not multiprocessing.active_children()
    stages.train(config, files, tmp_path, log_nothing)
    assert_same_training(tmp_path, streamed.out)


def test_several_trainings_on_files_are_each_as_alone(files, tmp_path, streamed):
    configs = [STREAMED, replace(STREAMED, seed=1, crop_size=12, batch_size=20)]
    together = [tmp_path / "first", tmp_path / "second"]
    stages.train_together(configs, files, together, [log_nothing] * 2, watch="test")
    stages.train(configs[1], files, tmp_path / "alone", log_nothing)
    assert_same_training(together[0], streamed.out)
    assert_same_training(together[1], tmp_path / "alone")
    assert "test/accuracy" in read_json(together[1] / "history.json")[-1]
    assert not multiprocessing.active_children()


def test_evaluate_on_images_in_files(files, streamed, tmp_path):
    report = stages.evaluate(
        EvaluateConfig(device="cpu", eval_batch_size=4, flip=True, workers=1),
        files, streamed.out, tmp_path, log_nothing,
    )  # fmt: skip
    table = pq.read_table(tmp_path / "predictions.parquet").to_pydict()
    assert table["label"] == [0] * 5 + [1] * 5 + [2] * 5
    subset = read_subset(files, splits=("test",))
    assert report["test_digest"] == subset.test_digest
    shown = [EvaluationView(16)(x, 0) for x in subset.splits["test"].images.read(range(15))]
    images = torch.tensor(np.stack(shown)).permute(0, 3, 1, 2)
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert program(images).argmax(dim=1).tolist() == table["predicted"]
    assert not multiprocessing.active_children()


def test_a_kind_of_crop_that_is_not_for_the_images_is_refused(files, subset, tmp_path, trained):
    with pytest.raises(DatasetError, match=r"crop=padded is not .*set crop=resized"):
        stages.train(CONFIG, files, tmp_path, log_nothing)
    with pytest.raises(DatasetError, match=r"crop=resized is not .*set crop=padded"):
        stages.train(STREAMED, subset, tmp_path, log_nothing)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_signal_to_the_whole_group_stops_a_training_on_files_without_a_traceback(
    files, tmp_path, process_environment, number, code
):
    options = {name: getattr(STREAMED, name) for name in ("crop", "crop_size", "width", "device")}
    options |= {"cutout_size": 0, "batch_size": 5, "stage1_epochs": 1000, "workers": 2}
    command = [sys.executable, "-m", "shike_core", "train", "--no-auto-augment"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command += ["--subset", str(files), "--out", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=process_environment(), cwd=Path(__file__).parents[1],
    ) as process:  # fmt: skip
        assert process.stdout.readline().startswith("epoch    1/")
        os.killpg(process.pid, number)  # as a terminal, or timeout(1), does
        _, error = process.communicate(timeout=120)
    assert process.returncode == code
    assert len(error.splitlines()) == 1, error
    assert error.startswith(f"stopped: stopped by signal {number:d} at epoch ")
    assert (tmp_path / stages.CHECKPOINT).exists()


# ---- compare_with_champion

REGISTER = RegisterConfig(model_name="digits")


def test_compare_reads_what_evaluate_wrote(evaluated):
    report = read_json(evaluated[0] / "report.json")
    alone = stages.compare_with_champion(REGISTER, evaluated[0], None)
    assert alone.alias == "champion"
    assert alone.candidate == {
        "test_digest": report["test_digest"],
        "weights_digest": report["export"]["weights_digest"],
        "metrics": report["metrics"],
        "shot_groups": shot_groups_digest(report["per_class"]),
    }
    better = alone.candidate | {
        "version": "3",
        "weights_digest": "another",
        "metrics": {key: value + 0.02 for key, value in report["metrics"].items()},
    }
    beaten = stages.compare_with_champion(REGISTER, evaluated[0], better)
    assert beaten.alias == "challenger"
    near = replace(REGISTER, max_accuracy_drop=0.03, max_few_shot_drop=0.03)
    assert stages.compare_with_champion(near, evaluated[0], better).alias == "champion"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read.*No such file"),
        (b"", "cannot be read"),
        (b'{"metrics": ', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"{}", "'test_digest' is wrong or missing"),
        (b"[]", "is not the report of an evaluation"),
        (b'{"test_digest": "t", "export": {}, "metrics": {}}', "'weights_digest' is wrong or"),
    ],
)
def test_compare_refuses_what_is_no_report(content, message, tmp_path):
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"report\.json .*{message}.*evaluate"):
        stages.compare_with_champion(REGISTER, tmp_path, None)

"""Heads trained anew on real digits, against those that the training itself has made."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import heads
from shike_core import stages
from shike_core.checkpoint import load_trained
from shike_core.config import SubsetConfig
from shike_core.data.manifest import Subset, read_subset
from shike_core.recipes import recipe_named

CPU = torch.device("cpu")
CONFIG = replace(
    recipe_named("digits-lt").train, stage1_epochs=4, stage2_epochs=4, warmup_epochs=1, width=4,
    num_experts=2, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a subset and a training on it."""
    folder = tmp_path_factory.mktemp("heads")
    rule = SubsetConfig(dataset="digits", imbalance_factor=20, validation_per_class=10)
    stages.build_subset(rule, None, folder / "subset", lambda metrics, step: None)
    stages.train(CONFIG, folder / "subset", folder / "run", lambda metrics, step: None)
    return folder


def call(place: Path, out: Path, *more: str) -> int:
    paths = [str(place / "subset"), str(place / "run" / "checkpoint.pt"), "--out", str(out)]
    return heads.main([*paths, "--device", "cpu", *more])


def subset_of(place: Path) -> Subset:
    return read_subset(place / "subset", splits=("train", "test", "validation"))


def test_the_heads_are_those_of_the_training(place) -> None:
    trained = load_trained(place / "run" / "checkpoint.pt")
    epochs = heads.stage2_features(trained, subset_of(place), CPU)
    assert len(epochs) == 4
    made = heads.trained_heads(trained.config, trained, epochs)
    for ours, theirs in zip(
        made.stage2_heads.parameters(), trained.model.stage2_heads.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_unused_images_are_neither_trained_on_nor_tested(place, digits) -> None:
    data = subset_of(place)
    unused = heads.unused_images(data, None)
    known = {image.tobytes() for split in data.splits.values() for image in split.images}
    assert not known & {image.tobytes() for image in unused.images}
    assert len(known | {image.tobytes() for image in unused.images}) == len(
        {image.tobytes() for split in (digits.train, digits.test) for image in split.images}
    )
    position = np.searchsorted(digits.train.source_index, unused.source_index)
    assert (digits.train.labels[position] == unused.labels).all()


def test_settings_of_stage_2_are_compared(place, tmp_path, capsys) -> None:
    variants = ["rescaled", "smoothed+stage2_logit_adjustment=2.0"]
    assert call(place, tmp_path / "h.json", "--variants", *variants, "--seeds", "0", "1") == 0
    report = json.loads((tmp_path / "h.json").read_text())
    assert list(report["heads"]) == ["its own", "as they are", *variants]
    assert report["machine"]["versions"]["torch"] == torch.__version__
    own, again, _, adjusted = report["heads"].values()
    assert own["difference"] == own["standard_error"] == 0
    assert call(place, tmp_path / "s.json", "--seeds", "0") == 0  # the seed of the training
    same = json.loads((tmp_path / "s.json").read_text())["heads"]["as they are"]
    assert abs(same["difference"]) < 0.01
    for row in report["heads"].values():
        assert row["difference"] == pytest.approx(row["accuracy"] - own["accuracy"])
        sizes = {name: len(x) for name, x in subset_of(place).info["shot_groups"].items()}
        total = sum(sizes[name] * value for name, value in row["shot_groups"].items())
        assert row["accuracy"] == pytest.approx(total / 10)
        assert 0 < row["expected_calibration_error"] < 1
    assert adjusted["shot_groups"]["few_shot"] > again["shot_groups"]["few_shot"]
    assert adjusted["standard_error"] > 0
    lines = capsys.readouterr().out.splitlines()[:6]
    assert lines[0].split() == ["heads", "all", *own["shot_groups"], "ECE", "difference"]
    assert len(lines) == 6


def test_figures_by_hand(place) -> None:
    data = subset_of(place)
    trained = load_trained(place / "run" / "checkpoint.pt")
    judge = heads.Judge(trained, data, heads.unused_images(data, None), CPU)
    judge.labels = np.array([0, 0, 0, 0, 9])
    judge.present, judge.weights = np.array([0, 9]), np.array([0.125] * 4 + [0.5])
    judge.own = heads.Measured(np.array([1.0, 0, 0, 0, 1]), np.ones(5))
    better = heads.Measured(np.array([1.0, 1, 0, 0, 1]), np.array([0.99, 0.99, 0.5, 0.5, 0.9]))
    row = judge.measure([better])
    assert row["accuracy"] == pytest.approx((0.5 + 1) / 2)
    assert row["difference"] == pytest.approx(0.25 / 2)
    assert row["standard_error"] == pytest.approx((0.25 / 4 / 4) ** 0.5)
    assert row["shot_groups"] == {"many_shot": 0.5, "few_shot": 1.0}
    # Two images 0.01 too unsure, two 0.5 too sure, one 0.1 too unsure.
    expected = 2 * 0.125 * 0.01 + 2 * 0.125 * 0.5 + 0.5 * 0.1
    assert row["expected_calibration_error"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("no-dkt", "no-dkt changes dkt_weight, which the features depend on; train it with"),
        ("stage2_epochs=5", "stage2_epochs=5 changes stage2_epochs"),
        ("rescale", "unknown variant 'rescale'"),
        ("stage2_scale=-1", "stage2_scale must be at least 0"),
    ],
)
def test_a_variant_of_something_else_is_one_line(variant, message, place, tmp_path, capsys) -> None:
    assert call(place, tmp_path / "h.json", "--variants", variant) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "h.json").exists()


def test_a_training_on_another_subset_is_refused(place, tmp_path, capsys) -> None:
    rule = SubsetConfig(dataset="digits", imbalance_factor=10)
    stages.build_subset(rule, None, tmp_path / "subset", lambda metrics, step: None)
    (tmp_path / "run").symlink_to(place / "run")
    assert call(tmp_path, tmp_path / "h.json") == 2
    assert "was not trained on" in capsys.readouterr().err


def test_a_subset_that_uses_all_leaves_nothing(tmp_path) -> None:
    rule = SubsetConfig(dataset="digits", imbalance_factor=0, leakage="keep")
    stages.build_subset(rule, None, tmp_path, lambda metrics, step: None)
    with pytest.raises(ValueError, match="uses all training images of its source"):
        heads.unused_images(read_subset(tmp_path), None)
    rule = SubsetConfig(dataset="digits", image_size=4)
    stages.build_subset(rule, None, tmp_path, lambda metrics, step: None)
    with pytest.raises(ValueError, match="not for digits with image_size=4"):
        heads.unused_images(read_subset(tmp_path), None)

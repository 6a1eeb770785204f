import numpy as np
import pytest

from shike_core import stages
from shike_core.config import SubsetConfig
from shike_core.data.manifest import read_subset
from shike_core.errors import ArtifactError, DatasetError


def log_nothing(metrics, step) -> None:
    """Where a test has no use for the metrics."""


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

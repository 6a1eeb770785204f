"""What is prepared for a measurement, and what is measured in small."""

import json

import numpy as np
import pytest

from benchmarks import measure
from benchmarks.settings import Settings, quick
from shike_core.config import SubsetConfig
from shike_core.data.long_tail import cut
from shike_core.data.manifest import read_subset, write_subset

SMALL = quick("cpu", threads=1)


@pytest.mark.parametrize("count", [0, 12, 100, 1000])
def test_at_least_one_image_of_each_class_is_taken_and_the_rest_evenly(count) -> None:
    labels = np.repeat(np.arange(10), 200 // np.arange(1, 11))
    np.random.default_rng(0).shuffle(labels)
    chosen = measure.spread(labels, count)
    assert len(set(chosen)) == len(chosen) == min(max(count, 10), len(labels))
    assert set(labels[chosen]) == set(range(10))
    if count == 100:  # of 583
        taken = np.bincount(labels[chosen])
        assert abs(taken - np.bincount(labels) * 100 / 583).max() < 8


def test_generated_images_are_a_subset_as_any_other(tmp_path) -> None:
    prepared = measure.prepare(SMALL, None, tmp_path)
    subset = read_subset(tmp_path)
    images = SMALL.steps * SMALL.batch_size
    assert prepared == {"images": images, "classes": 10, "image_size": [32, 32]}
    assert subset.splits["train"].images.shape == (images, 32, 32, 3)
    assert subset.class_counts.min() >= 1
    assert subset.class_counts[0] > 2 * subset.class_counts[-1]


def test_a_part_of_a_real_subset_keeps_its_classes_and_statistics(digits, tmp_path) -> None:
    rule = SubsetConfig(dataset="digits", imbalance_factor=20)
    splits, identical, _ = cut(digits, rule)
    write_subset(tmp_path / "whole", splits, digits, rule, identical)
    measure.prepare(SMALL, tmp_path / "whole", tmp_path / "part")
    whole, part = read_subset(tmp_path / "whole"), read_subset(tmp_path / "part")
    assert len(part.splits["train"].labels) == SMALL.steps * SMALL.batch_size
    assert (part.class_names, part.mean, part.std) == (whole.class_names, whole.mean, whole.std)
    assert part.class_counts.min() >= 1


def test_a_missing_subset_is_told_in_one_line(tmp_path, monkeypatch) -> None:
    job = {
        "settings": {"threads": 1},
        "directory": str(tmp_path),
        "subset": str(tmp_path / "none"),
        "parts": ["prepare"],
    }
    monkeypatch.setattr("sys.argv", ["measure", json.dumps(job)])
    with pytest.raises(SystemExit, match=r"error: there is no .*subset\.json"):
        measure.main()


def test_the_defaults_are_the_authors_batch_and_network() -> None:
    config = measure.train_config(Settings(threads=1))
    assert (config.batch_size, config.width, config.num_experts) == (128, 16, 3)
    assert measure.SHARE_OF_STAGE1 == 0.9


def test_heads_of_more_classes_take_longer() -> None:
    few, many = (measure.heads_seconds(SMALL, classes) for classes in (2, 20_000))
    assert 0 < few < many

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shike_core.config import SubsetConfig
from shike_core.data.listed import ImageFiles
from shike_core.data.long_tail import (
    class_order,
    counts_by_rank,
    cut,
    drop_leaked,
    find_identical,
    hold_out,
    imbalance_measures,
    keep_classes,
    select,
    shot_groups,
    shrink,
    squares,
)
from shike_core.data.manifest import write_subset
from shike_core.data.sources import Source, Split
from shike_core.errors import DatasetError

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "photographs"


def split_of(labels: list[int], first: int) -> Split:
    """Images of 2 x 2 pixels, each with a number of its own in the upper left corner."""
    images = np.zeros((len(labels), 2, 2, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(first, first + len(labels))
    return Split(images, np.array(labels, dtype=np.int64), np.arange(len(labels)))


def source_of(train: list[int], test: list[int]) -> Source:
    names = tuple("abcdefghij"[: max(train) + 1])
    return Source("tiny", split_of(train, 0), split_of(test, 200), names, (0.5,) * 3, (0.25,) * 3)


def in_files(source: Source) -> Source:
    """The same images in files that are not there."""

    def files(name: str, split: Split) -> Split:
        paths = np.array([f"{name}/{i}.jpg" for i in range(len(split.labels))], dtype=object)
        return replace(split, images=ImageFiles("/nowhere", paths))

    return replace(source, train=files("train", source.train), test=files("test", source.test))


def rule(**changes) -> SubsetConfig:
    return SubsetConfig(**{"dataset": "digits", "imbalance_factor": 4} | changes)


@pytest.mark.parametrize(
    ("num_classes", "n_max", "totals"),
    [
        (100, 500, {10: 19573, 50: 12608, 100: 10847, 200: 9502}),
        (10, 5000, {10: 20431, 50: 13996, 100: 12406, 200: 11203}),
    ],
)
def test_the_published_sizes(num_classes, n_max, totals):
    for imbalance_factor, total in totals.items():
        counts = counts_by_rank(num_classes, n_max, imbalance_factor)
        assert counts.sum() == total
        assert counts[0] == n_max
        assert counts[-1] == n_max // imbalance_factor


def test_a_size_that_is_whole_loses_no_image_to_rounding():
    for num_classes in range(2, 200):
        for imbalance_factor in (3, 7, 10, 49, 50, 100, 200, 256, 1000):
            assert counts_by_rank(num_classes, 7 * imbalance_factor, imbalance_factor)[-1] == 7
    assert counts_by_rank(4, 1000, 1000).tolist() == [1000, 100, 10, 1]


def test_the_step_profile():
    assert counts_by_rank(4, 100, 10, "step").tolist() == [100, 100, 10, 10]
    assert counts_by_rank(5, 105, 10, "step").tolist() == [105, 105, 10, 10, 10]


@given(
    st.integers(2, 300),
    st.integers(1, 5000),
    st.floats(1, 1000),
    st.sampled_from(["exp", "step"]),
)
def test_sizes_fall_and_are_rounded_down(num_classes, n_max, imbalance_factor, profile):
    counts = counts_by_rank(num_classes, n_max, imbalance_factor, profile)
    assert counts.shape == (num_classes,)
    assert counts.dtype == np.int64
    assert counts[0] == n_max
    assert (np.diff(counts) <= 0).all()
    for rank, count in enumerate(counts):
        part = rank / (num_classes - 1) if profile == "exp" else float(rank >= num_classes // 2)
        exact = n_max / imbalance_factor**part
        assert exact - 1 - 1e-6 < count <= exact + 1e-6


@given(st.integers(2, 50), st.integers(1, 500))
def test_without_imbalance_all_classes_are_equal(num_classes, n_max):
    assert counts_by_rank(num_classes, n_max, 1).tolist() == [n_max] * num_classes


def test_selecting_the_first():
    labels = np.array([1, 0, 1, 1, 0, 0, 1])
    assert select(labels, np.array([2, 3]), "first", 0).tolist() == [0, 1, 2, 3, 4]
    assert select(labels, np.array([1, 0]), "first", 0).tolist() == [1]


def test_the_random_selection_is_the_fields_usual_one():
    labels = np.random.default_rng(0).integers(5, size=300)
    counts = [40, 20, 10, 5, 1]
    np.random.seed(7)
    expected = []
    for label, count in enumerate(counts):
        of_class = np.where(labels == label)[0]
        np.random.shuffle(of_class)
        expected += of_class[:count].tolist()
    assert select(labels, np.array(counts), "random", 7).tolist() == sorted(expected)


def test_the_random_selection_is_the_same_on_every_machine():
    chosen = select(np.zeros(10, dtype=np.int64), np.array([3]), "random", 0)
    assert chosen.tolist() == [2, 4, 8]  # numpy's frozen stream shuffles 0..9 to 2, 8, 4, ...


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.lists(st.integers(0, 60), min_size=5, max_size=5),
    st.sampled_from(["first", "random"]),
    st.integers(0, 2**32 - 1),
)
def test_selections_have_no_image_twice_and_repeat(labels, wanted, selection, seed):
    labels = np.array(labels)
    counts = np.minimum(wanted, np.bincount(labels, minlength=5))
    chosen = select(labels, counts, selection, seed)
    assert (np.diff(chosen) > 0).all()
    assert np.bincount(labels[chosen], minlength=5).tolist() == counts.tolist()
    assert select(labels, counts, selection, seed).tolist() == chosen.tolist()


@given(st.integers(2, 6), st.integers(1, 10), st.data())
def test_holding_out_splits_the_pool_evenly(num_classes, size, data):
    labels = np.array(data.draw(st.permutations(list(range(num_classes)) * size)))
    per_class = data.draw(st.integers(0, size))
    stays, held = hold_out(labels, per_class, num_classes, seed=3)
    assert np.sort(np.concatenate([stays, held])).tolist() == list(range(len(labels)))
    assert np.bincount(labels[held], minlength=num_classes).tolist() == [per_class] * num_classes


def test_the_order_of_the_classes():
    assert class_order(4, "label", 3).tolist() == [0, 1, 2, 3]
    shuffled = class_order(100, "shuffled", 3)
    assert sorted(shuffled.tolist()) == list(range(100))
    assert shuffled.tolist() == class_order(100, "shuffled", 3).tolist()
    assert shuffled.tolist() != class_order(100, "shuffled", 4).tolist()
    assert shuffled.tolist() != list(range(100))


def test_shot_groups_at_their_borders():
    groups = shot_groups([500, 101, 100, 20, 19, 1])
    assert {name: labels.tolist() for name, labels in groups.items()} == {
        "many_shot": [0, 1],
        "medium_shot": [2, 3],
        "few_shot": [4, 5],
    }


def test_empty_shot_groups_are_left_out():
    assert list(shot_groups([50, 60])) == ["medium_shot"]


def test_shot_groups_of_cifar100_lt():
    groups = shot_groups(counts_by_rank(100, 500, 100))
    assert [len(labels) for labels in groups.values()] == [35, 35, 30]


def test_imbalance_measures_by_hand():
    measures = imbalance_measures([1, 2, 1])
    assert measures["imbalance_factor"] == 2
    # Differences of all ordered pairs add up to 4; over 2 * 3 classes * 4 images.
    assert measures["gini"] == pytest.approx(4 / 24)
    assert measures["normalised_entropy"] == pytest.approx(1.5 / np.log2(3))
    assert measures["head_half_share"] == pytest.approx(2 / 4)


@given(st.integers(2, 100), st.integers(1, 1000))
def test_equal_classes_have_no_imbalance(num_classes, count):
    measures = imbalance_measures([count] * num_classes)
    assert measures["imbalance_factor"] == 1
    assert measures["gini"] == 0
    assert measures["normalised_entropy"] == pytest.approx(1)
    assert measures["head_half_share"] == pytest.approx((num_classes // 2) / num_classes)


def test_a_subset_by_hand():
    source = source_of([0, 1, 2] * 4, [0, 1, 2])
    splits, found, _ = cut(source, rule())
    assert list(splits) == ["train", "test"]
    assert splits["train"].labels.tolist() == [0, 1, 2, 0, 1, 0, 0]  # 4, 2 and 1 of the classes
    assert splits["train"].source_index.tolist() == [0, 1, 2, 3, 4, 6, 9]
    assert splits["train"].images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 6, 9]
    assert splits["test"] is source.test
    assert found["train_in_test"] == found["train_repeats"] == 0


def test_the_smallest_class_decides_how_large_the_largest_is():
    source = source_of([0] * 9 + [1] * 5 + [2] * 8, [0, 1, 2])
    train = cut(source, rule())[0]["train"]
    assert np.bincount(train.labels).tolist() == [5, 2, 1]


def test_the_largest_class_can_be_chosen():
    source = source_of([0] * 9 + [1] * 5 + [2] * 8, [0, 1, 2])
    assert np.bincount(cut(source, rule(), n_max=8)[0]["train"].labels).tolist() == [8, 4, 2]


def test_a_shuffled_order_decides_which_class_is_large():
    source = source_of([0, 1, 2, 3] * 16, [0, 1, 2, 3])
    config = rule(class_order="shuffled", subset_seed=1, imbalance_factor=8)
    counts = np.bincount(cut(source, config)[0]["train"].labels)
    order = class_order(4, "shuffled", 1)
    assert counts[order].tolist() == [16, 8, 4, 2]
    assert counts.tolist() != [16, 8, 4, 2]


@pytest.mark.parametrize("selection", ["first", "random"])
def test_validation_images_come_out_of_the_training_pool_only(selection):
    source = source_of([0, 1, 2] * 10, [0, 1, 2])
    splits, found, _ = cut(source, rule(selection=selection, validation_per_class=2))
    train, validation = splits["train"], splits["validation"]
    assert np.bincount(train.labels).tolist() == [8, 4, 2]
    assert np.bincount(validation.labels).tolist() == [2, 2, 2]
    assert not set(train.source_index) & set(validation.source_index)
    assert (source.train.labels[validation.source_index] == validation.labels).all()
    assert found["train_in_validation"] == found["validation_in_test"] == 0


def test_another_seed_draws_other_images():
    source = source_of([0, 1] * 50, [0, 1])
    drawn = {
        tuple(cut(source, rule(selection="random", subset_seed=seed))[0]["train"].source_index)
        for seed in (0, 0, 1, 2)
    }
    assert len(drawn) == 3


def test_more_images_than_a_class_has():
    source = source_of([0] * 9 + [1] * 3, [0, 1])
    with pytest.raises(DatasetError, match=r"class 1 \(b\) has 3 images, but 5 are asked for"):
        cut(source, rule(imbalance_factor=1), n_max=5)
    with pytest.raises(DatasetError, match=r"class 1 \(b\) has 3 images, but 4 .*at most 3 per"):
        cut(source, rule(validation_per_class=4))


def test_a_class_left_without_images():
    source = source_of([0, 1, 2] * 4, [0, 1, 2])
    with pytest.raises(DatasetError, match=r"class 2 \(c\) is left .*lower imbalance_factor"):
        cut(source, rule(imbalance_factor=5))
    with pytest.raises(DatasetError, match=r"class 0 \(a\) is left without .*3 of 3 classes"):
        cut(source, rule(validation_per_class=4))


def test_a_source_that_is_long_tailed_already_can_stay_as_it_is():
    source = source_of([2, 0, 0, 1, 0, 1], [0, 1, 2])
    splits, found, _ = cut(source, rule(imbalance_factor=0, subset_seed=3))
    assert splits["train"].labels.tolist() == [2, 0, 0, 1, 0, 1]
    assert splits["train"].source_index.tolist() == [0, 1, 2, 3, 4, 5]
    assert found["train_dropped"] == 0


def test_such_a_source_gives_up_validation_images_if_asked():
    source = source_of([0] * 5 + [1] * 3, [0, 1])
    splits, _, _ = cut(source, rule(imbalance_factor=0, validation_per_class=2))
    assert np.bincount(splits["train"].labels).tolist() == [3, 1]
    assert np.bincount(splits["validation"].labels).tolist() == [2, 2]
    with pytest.raises(DatasetError, match=r"class 1 \(b\) is left .*lower validation_per_class"):
        cut(source, rule(imbalance_factor=0, validation_per_class=3))


def test_a_rule_that_a_long_tailed_source_cannot_follow():
    source = source_of([0] * 9 + [1] * 5 + [2] * 2, [0, 1, 2])
    message = r"class 1 .*; its classes have 2 to 9 images already: imbalance_factor=0 leaves them"
    with pytest.raises(DatasetError, match=message):
        cut(source, rule(imbalance_factor=100))
    splits, _, _ = cut(source, rule(imbalance_factor=2))
    assert np.bincount(splits["train"].labels).tolist() == [2, 1, 1]


def test_the_validation_part_of_a_source_is_taken_unless_another_is_asked_for():
    source = replace(source_of([0, 1, 2] * 4, [0, 1, 2]), validation=split_of([2, 1, 0, 1], 100))
    splits, found, _ = cut(source, rule())
    assert splits["validation"] is source.validation
    assert found["train_in_validation"] == 0
    splits, _, _ = cut(source, rule(validation_per_class=1, imbalance_factor=2))
    assert splits["validation"].images.max() < 100
    splits, _, _ = cut(source, rule(num_classes=2))
    assert splits["validation"].labels.tolist() == [1, 0, 1]
    assert splits["validation"].source_index.tolist() == [1, 2, 3]


def test_an_empty_validation_part_is_none():
    source = replace(source_of([0, 1, 2] * 4, [0, 1, 2]), validation=split_of([2, 2], 100))
    assert "validation" not in cut(source, rule(num_classes=2))[0]


def without_test(source: Source) -> Source:
    return replace(source, test=source.train.take(np.arange(0)))


def test_a_source_without_a_test_part_gives_one_up():
    source = without_test(source_of([0] * 9 + [1] * 5 + [2] * 3, [0]))
    config = rule(imbalance_factor=0, test_per_class=2)
    splits, _, _ = cut(source, config)
    test = splits["test"]
    assert np.bincount(splits["train"].labels).tolist() == [7, 3, 1]
    assert np.bincount(test.labels).tolist() == [2, 2, 2]
    everything = np.concatenate([splits["train"].source_index, test.source_index])
    assert np.sort(everything).tolist() == list(range(17))
    assert (source.train.images[test.source_index] == test.images).all()
    assert (cut(source, config)[0]["test"].source_index == test.source_index).all()
    others = cut(source, replace(config, subset_seed=1))[0]["test"].source_index
    assert others.tolist() != test.source_index.tolist()


def test_test_images_are_drawn_apart_from_validation_images():
    source = without_test(source_of([0] * 50 + [1] * 50, [0]))
    splits, _, _ = cut(source, rule(imbalance_factor=0, test_per_class=5, validation_per_class=5))
    _, held = hold_out(source.train.labels, 5, 2, 0)
    assert splits["test"].source_index.tolist() != held.tolist()
    drawn = [set(splits[name].source_index.tolist()) for name in ("train", "validation", "test")]
    assert [len(positions) for positions in drawn] == [80, 10, 10]
    assert len(set.union(*drawn)) == 100


def test_test_images_must_come_from_somewhere():
    source = source_of([0] * 4 + [1] * 4, [0, 1])
    with pytest.raises(DatasetError, match=r"tiny has 2 test images of its own, but test_per_cla"):
        cut(source, rule(test_per_class=1))
    with pytest.raises(DatasetError, match=r"tiny has no test images; set test_per_class to"):
        cut(without_test(source), rule())
    with pytest.raises(DatasetError, match=r"class 0 \(a\) has 4 images, but 5 .*at most 4 per"):
        cut(without_test(source), rule(test_per_class=5))
    with pytest.raises(DatasetError, match=r"class 0 \(a\) is left .* or test_per_class"):
        cut(without_test(source), rule(test_per_class=4, imbalance_factor=0))


def test_files_are_cut_like_pixels_and_not_read():
    source = source_of([0, 1, 2] * 10, [0, 1, 2])
    config = rule(selection="random", validation_per_class=2, num_classes=3)
    pixels, _, _ = cut(source, config)
    files, found, _ = cut(in_files(source), config)
    assert found is None
    for name, split in files.items():
        part = "test" if name == "test" else "train"
        assert split.images.root == "/nowhere"
        assert split.images.paths.tolist() == [f"{part}/{i}.jpg" for i in split.source_index]
        assert (split.labels == pixels[name].labels).all()
        assert (split.source_index == pixels[name].source_index).all()


def test_fewer_classes_by_hand():
    source = source_of([3, 0, 1, 2] * 4, [2, 1, 0, 3, 1, 0])
    splits, _, _ = cut(source, rule(num_classes=3))
    train, test = splits["train"], splits["test"]
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 0, 0]  # 4, 2 and 1, as of a source of three
    assert train.source_index.tolist() == [1, 2, 3, 5, 6, 9, 13]
    assert train.images[:, 0, 0, 0].tolist() == [1, 2, 3, 5, 6, 9, 13]
    assert test.labels.tolist() == [2, 1, 0, 1, 0]
    assert test.source_index.tolist() == [0, 1, 2, 4, 5]
    assert test.images[:, 0, 0, 0].tolist() == [200, 201, 202, 204, 205]


def test_a_class_left_out_has_no_say():
    source = source_of([0] * 8 + [1] * 4 + [2], [0, 1, 2, 0, 1, 2])
    splits, _, _ = cut(source, rule(num_classes=2, imbalance_factor=2))
    assert np.bincount(splits["train"].labels).tolist() == [4, 2]  # not 1 of each
    source = with_copies(source, {0: 2, 1: 5, 8: 4})
    found = cut(source, rule(num_classes=2, imbalance_factor=2))[1]
    assert found["train_test_pairs"] == [[8, 4]]


@pytest.mark.parametrize("order", ["label", "shuffled"])
def test_fewer_classes_are_a_source_of_their_own(order):
    config = rule(selection="random", class_order=order, validation_per_class=2, subset_seed=3)
    kept = [label for label in [0, 1, 2, 3, 4] * 10 if label < 4]
    of_four, _, _ = cut(source_of(kept, [0, 1, 2, 3]), config)
    of_five, _, _ = cut(
        source_of([0, 1, 2, 3, 4] * 10, [0, 1, 2, 3, 4]), replace(config, num_classes=4)
    )
    for name in ("train", "validation", "test"):
        assert of_five[name].labels.tolist() == of_four[name].labels.tolist()
    assert sorted(np.bincount(of_five["train"].labels), reverse=True) == [8, 5, 3, 2]
    # Position 4 * i + label of one is position 5 * i + label of the other.
    turn, label = np.divmod(of_four["train"].source_index, 4)
    assert of_five["train"].source_index.tolist() == (5 * turn + label).tolist()


def test_all_classes_by_number_are_all_classes():
    source = source_of([0, 1, 2] * 4, [0, 1, 2])
    everything = keep_classes(source, 3)
    assert everything.class_names == source.class_names
    for split in ("train", "test"):
        for field in ("images", "labels", "source_index"):
            kept, original = (getattr(getattr(s, split), field) for s in (everything, source))
            assert (kept == original).all()


def test_more_classes_than_there_are():
    source = source_of([0, 1, 2] * 4, [0, 1, 2])
    with pytest.raises(DatasetError, match=r"tiny has 3 classes, but num_classes is 4; .*most 3"):
        cut(source, rule(num_classes=4))


def test_shrinking_by_hand():
    red = [[0, 4, 10, 10], [8, 12, 10, 10], [255, 255, 0, 0], [255, 255, 1, 1]]
    green = [[100] * 4] * 4
    blue = [[0, 200, 0, 200]] * 4
    image = np.array([red, green, blue], dtype=np.uint8).transpose(1, 2, 0)  # (4, 4, 3)
    small = shrink(np.stack([image, image[::-1]]), 2)
    assert small.shape == (2, 2, 2, 3)
    assert small.dtype == np.uint8
    assert small[0, :, :, 0].tolist() == [[6, 10], [255, 1]]  # a half is rounded up
    assert small[0, :, :, 1].tolist() == [[100, 100]] * 2
    assert small[0, :, :, 2].tolist() == [[100, 100]] * 2
    assert small[1, :, :, 0].tolist() == [[255, 1], [6, 10]]


def test_shrinking_by_no_whole_number_counts_every_pixel_once():
    row = np.array([30, 60, 90, 7, 9], dtype=np.uint8)
    image = np.broadcast_to(row[np.newaxis, :, np.newaxis], (1, 5, 5, 3))
    assert shrink(image, 2)[0, :, :, 0].tolist() == [[60, 8]] * 2


@given(st.integers(1, 8), st.integers(0, 255), st.integers(0, 2**32 - 1))
def test_shrunk_images_stay_in_range(size, value, seed):
    plain = np.full((1, 8, 8, 3), value, dtype=np.uint8)
    assert (shrink(plain, size) == value).all()
    noise = np.random.default_rng(seed).integers(256, size=(3, 8, 8, 3), dtype=np.uint8)
    small = shrink(noise, size)
    assert small.shape == (3, size, size, 3)
    assert (small >= noise.min(axis=(1, 2), keepdims=True)).all()
    assert (small <= noise.max(axis=(1, 2), keepdims=True)).all()
    assert (shrink(noise, 8) == noise).all()


def test_shrinking_agrees_with_means_of_blocks_of_real_images(cifar100):
    images = cifar100.test.images[:200]
    means = images.reshape(200, 8, 4, 8, 4, 3).mean(axis=(2, 4))
    # Rows are rounded before columns, so a mean can be off by half a level twice.
    assert np.abs(shrink(images, 8) - means).max() <= 1


@pytest.mark.parametrize(("shape", "size", "most"), [((8, 8), 9, 8), ((4, 6), 5, 4)])
def test_images_are_never_enlarged(shape, size, most):
    images = np.zeros((1, *shape, 3), dtype=np.uint8)
    message = rf"{shape[1]} x {shape[0]} pixels, but image_size is {size}; .*ask for at most {most}"
    with pytest.raises(DatasetError, match=message):
        shrink(images, size)


def test_a_subset_of_small_images(digits):
    config = SubsetConfig(dataset="digits", imbalance_factor=20, validation_per_class=3)
    large, _, _ = cut(digits, config)
    small, _, _ = cut(digits, replace(config, image_size=4))
    assert list(small) == ["train", "test", "validation"]
    for name, split in small.items():
        assert split.images.shape[1:] == (4, 4, 3)
        assert (split.images == shrink(large[name].images, 4)).all()
        assert (split.labels == large[name].labels).all()
        assert (split.source_index == large[name].source_index).all()
    with pytest.raises(DatasetError, match=r"images are 8 x 8 pixels, but image_size is 16"):
        cut(digits, replace(config, image_size=16))


def test_images_that_shrinking_makes_identical_are_found():
    train, test = (
        replace(split, images=np.repeat(np.repeat(split.images, 4, axis=1), 4, axis=2))
        for split in (split_of([0, 1] * 4, 0), split_of([0, 1], 200))
    )
    train.images[2] = test.images[0]
    train.images[2, 0, 0, 0] -= 1  # too little to change a mean
    source = Source("tiny", train, test, ("a", "b"), (0.5,) * 3, (0.25,) * 3)
    assert cut(source, rule())[1]["train_in_test"] == 0
    splits, found, _ = cut(source, rule(image_size=4, leakage="drop"))
    assert splits["train"].source_index.tolist() == [0, 1, 4, 6]
    assert found["train_dropped"] == 1


def with_copies(source: Source, train_from_test: dict[int, int]) -> Source:
    images = source.train.images.copy()
    for i, j in train_from_test.items():
        images[i] = source.test.images[j]
    return replace(source, train=replace(source.train, images=images))


def test_identical_images_are_counted_and_kept():
    source = with_copies(source_of([0, 1, 2] * 4, [0, 1, 2]), {3: 2, 4: 1, 6: 2, 11: 0})
    splits, found, _ = cut(source, rule())
    assert len(splits["train"].labels) == 7
    assert found == {
        "train_in_test": 3,  # image 11 is not in the subset
        "train_test_pairs": [[3, 2], [4, 1], [6, 2]],
        "train_repeats": 1,
        "train_dropped": 0,
    }


def test_identical_images_can_be_dropped_from_train():
    source = with_copies(source_of([0, 1, 2] * 4, [0, 1, 2]), {3: 2, 4: 1, 6: 2})
    splits, found, _ = cut(source, rule(leakage="drop"))
    assert splits["train"].source_index.tolist() == [0, 1, 2, 9]
    assert len(splits["test"].labels) == 3
    assert (found["train_dropped"], found["train_in_test"], found["train_test_pairs"]) == (3, 0, [])


def test_identical_images_can_be_refused():
    source = with_copies(source_of([0, 1, 2] * 4, [0, 1, 2]), {3: 2})
    with pytest.raises(DatasetError, match=r"1 training images are .*3 = 2\); set leakage to"):
        cut(source, rule(leakage="refuse"))
    clean = source_of([0, 1, 2] * 4, [0, 1, 2])
    assert cut(clean, rule(leakage="refuse"))[1]["train_in_test"] == 0


def test_dropping_may_not_empty_a_class():
    source = with_copies(source_of([0, 1, 2] * 4, [0, 1, 2]), {2: 2})
    with pytest.raises(DatasetError, match=r"class 2 \(c\) is left .*set leakage to keep"):
        cut(source, rule(leakage="drop"))


def test_identical_images_with_a_validation_split():
    splits = {"train": split_of([0, 0], 0), "validation": split_of([0, 0], 1)}
    splits["test"] = split_of([0, 0], 2)
    contents = {"train": [b"0", b"1"], "validation": [b"1", b"2"], "test": [b"2", b"3"]}
    found = find_identical(contents, splits)
    assert found["train_in_validation"] == 1
    assert found["validation_in_test"] == 1
    assert found["train_in_test"] == 0


@pytest.mark.parametrize(("leakage", "stays"), [("keep", [0, 1, 2, 3]), ("drop", [1, 3])])
def test_identical_files_are_known_by_digests_of_their_content(leakage, stays):
    source = in_files(source_of([0, 0, 1, 1], [0, 1]))
    splits = {"train": source.train, "test": source.test}
    contents = {"train": [b"a", b"b", b"c", b"b"], "test": [b"c", b"a"]}
    positions, found = drop_leaked(contents, splits, leakage, source.class_names)
    assert positions.tolist() == stays
    if leakage == "keep":
        assert found["train_test_pairs"] == [[0, 1], [2, 0]]
    kept = {"keep": (2, 1, 0), "drop": (0, 1, 2)}[leakage]
    assert tuple(found[k] for k in ("train_in_test", "train_repeats", "train_dropped")) == kept


def test_identical_images_of_the_real_cifar100(cifar100):
    found = cut(cifar100, rule(dataset="cifar100", imbalance_factor=1))[1]
    rows = [
        np.ascontiguousarray(split.images).reshape(len(split.labels), -1).view("V3072")[:, 0]
        for split in (cifar100.train, cifar100.test)
    ]
    assert found["train_in_test"] == np.isin(rows[0], rows[1]).sum() == 10
    assert found["train_repeats"] == len(rows[0]) - len(np.unique(rows[0])) == 14
    assert len(found["train_test_pairs"]) == 10
    for i, j in found["train_test_pairs"]:
        assert (cifar100.train.images[i] == cifar100.test.images[j]).all()
    found = cut(cifar100, rule(dataset="cifar100", imbalance_factor=100))[1]
    assert (found["train_in_test"], found["train_repeats"]) == (4, 6)


@pytest.fixture
def photographs() -> ImageFiles:
    """Real photographs: one of them grey, all of their own shape."""
    if not PHOTOGRAPHS.is_dir():
        pytest.skip("the photographs are not in ../shared")
    names = sorted(path.name for path in PHOTOGRAPHS.iterdir())
    return ImageFiles(str(PHOTOGRAPHS), np.array(names, dtype=object))


def test_photographs_become_small_squares_of_their_middle(photographs):
    photographs = photographs[np.arange(0, 200, 20)]
    pixels, wrong = squares(photographs, 32)
    assert pixels.shape == (10, 32, 32, 3)
    assert not wrong
    for small, name in zip(pixels, photographs.paths, strict=True):
        image = np.asarray(Image.open(Path(photographs.root, name)).convert("RGB"))
        side = min(image.shape[:2])
        top, left = ((length - side) // 2 for length in image.shape[:2])
        middle = image[top : top + side, left : left + side]
        assert (small == shrink(middle[np.newaxis], 32)[0]).all()


def test_grey_transparent_and_turned_photographs(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([grey] * 3 + [grey * 0])).save(tmp_path / "transparent.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    Image.fromarray(grey).save(tmp_path / "turned.png", exif=exif)
    paths = np.array(["grey.png", "transparent.png", "turned.png"], dtype=object)
    pixels, wrong = squares(ImageFiles(str(tmp_path), paths), 8)
    assert not wrong
    for image in pixels:
        assert (image == grey[..., np.newaxis]).all()


def test_images_of_more_than_8_bits_are_refused(tmp_path):
    values = np.arange(64).reshape(8, 8) * 1000  # Pillow would make most of it white
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "32.tiff")
    paths = np.array(["16.png", "float.tiff", "32.tiff"], dtype=object)
    pixels, wrong = squares(ImageFiles(str(tmp_path), paths), 8)
    assert not pixels.any()
    for i, mode in enumerate(["I;16", "F", "I"]):
        assert wrong[i] == (
            f"values of more than 8 bits (mode {mode}); save it with 8 bits a channel"
        )


def photographed(root: Path, sizes: dict[str, tuple[int, int]]) -> np.ndarray:
    """Write images of a colour of their own; their paths."""
    for i, (name, size) in enumerate(sizes.items()):
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", size, (i, 2 * i, 255 - i)).save(root / name)
    return np.array(list(sizes), dtype=object)


def test_a_subset_of_small_images_of_files(tmp_path):
    names = [f"train/{i}.png" for i in range(12)] + [f"test/{i}.png" for i in range(3)]
    paths = photographed(tmp_path, dict.fromkeys(names, (9, 6)))
    (tmp_path / "train/3.png").write_bytes((tmp_path / "train/3.png").read_bytes()[:45])
    (tmp_path / "test/1.png").unlink()
    (tmp_path / "train/6.png").write_bytes((tmp_path / "test/2.png").read_bytes())
    labels = np.array([0, 1, 2] * 4)
    source = Source(
        "tiny",
        Split(ImageFiles(str(tmp_path), paths[:12]), labels, np.arange(12)),
        Split(ImageFiles(str(tmp_path), paths[12:]), labels[:3], np.arange(3)),
        ("a", "b", "c"),
        (0.5,) * 3,
        (0.25,) * 3,
    )
    config = rule(imbalance_factor=0, image_size=4, leakage="drop", max_unreadable=0.2)
    splits, found, unreadable = cut(source, config)
    assert splits["train"].source_index.tolist() == [0, 1, 2, 4, 5, 7, 8, 9, 10, 11]
    assert splits["test"].source_index.tolist() == [0, 2]
    assert splits["train"].images.shape == (10, 4, 4, 3)
    assert splits["train"].images[:, 3, 3, 1].tolist() == [0, 2, 4, 8, 10, 14, 16, 18, 20, 22]
    assert found["train_dropped"] == 1
    assert [(image.split, image.path) for image in unreadable] == [
        ("train", "train/3.png"),
        ("test", "test/1.png"),
    ]
    info = write_subset(tmp_path / "subset", splits, source, config, found, unreadable)
    assert info["unreadable"] == {"train": 1, "test": 1}
    listed = pd.read_csv(tmp_path / "subset" / "unreadable.csv")
    assert listed[["split", "path"]].values.tolist() == [
        ["train", "train/3.png"],
        ["test", "test/1.png"],
    ]
    assert listed["reason"].str.len().min() > 0
    write_subset(tmp_path / "subset", splits, source, config, found)
    assert not (tmp_path / "subset" / "unreadable.csv").exists()
    message = r"2 of 15 images .* max_unreadable \(0\.1\) .*train/3\.png \(.+\), test/1"
    with pytest.raises(DatasetError, match=message):
        cut(source, replace(config, max_unreadable=0.1))
    with pytest.raises(
        DatasetError, match=r"train/0\.png in .* has 9 x 6 pixels, but image_size is"
    ):
        cut(source, replace(config, image_size=7))


def test_unreadable_images_may_not_empty_a_class(tmp_path):
    paths = photographed(tmp_path, {f"train/{i}.png": (4, 4) for i in range(4)})
    (tmp_path / "train/2.png").write_bytes(b"no image")
    files = ImageFiles(str(tmp_path), paths)
    train = Split(files, np.array([0, 0, 1, 0]), np.arange(4))
    source = Source("tiny", train, train.take(np.array([0])), ("a", "b"), (0.5,) * 3, (0.25,) * 3)
    with pytest.raises(DatasetError, match=r"class 1 \(b\) is left .*cannot be read.*train/2\.png"):
        cut(source, rule(imbalance_factor=0, image_size=4, max_unreadable=0.9))


def test_a_program_is_no_image(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    pixels, wrong = squares(ImageFiles(str(tmp_path), np.array(["a.jpg"], dtype=object)), 4)
    assert list(wrong) == [0]
    assert not pixels.any()

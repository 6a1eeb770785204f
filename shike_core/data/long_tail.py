"""How a long-tailed subset is cut out of a balanced source: class sizes, selection, shot groups.

Everything random comes from numpy's legacy ``RandomState``, whose streams are frozen: the same
rule selects the same images on every machine and with every version.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from shike_core.config import ClassOrder, Profile, Selection, SubsetConfig
from shike_core.data.sources import Images, Labels, Source, Split
from shike_core.errors import DatasetError

MANY_SHOT_ABOVE = 100
FEW_SHOT_BELOW = 20
PAIRS_SHOWN = 10

Counts = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int64]


def counts_by_rank(
    num_classes: int, n_max: int, imbalance_factor: float, profile: Profile = "exp"
) -> Counts:
    """Class sizes from the largest class to the smallest.

    ``exp``: ``floor(n_max * imbalance_factor ** (-rank / (num_classes - 1)))``. ``step``: the
    first half of the classes has n_max images, the rest n_max / imbalance_factor, rounded down.

    Args:
        num_classes: at least 2.
        n_max: images of the largest class.
        imbalance_factor: at least 1.
        profile: the shape of the tail.

    Returns:
        Image counts (num_classes,), not increasing; 0 is possible.
    """
    rank = np.arange(num_classes)
    exponent = rank / (num_classes - 1) if profile == "exp" else rank >= num_classes // 2
    sizes = n_max * float(imbalance_factor) ** -exponent.astype(np.float64)
    # A size that is whole in exact arithmetic must not lose an image to rounding.
    return np.floor(sizes * (1 + 1e-12)).astype(np.int64)


def class_order(num_classes: int, order: ClassOrder, seed: int) -> Labels:
    """The classes from the largest to be to the smallest: labels (num_classes,)."""
    if order == "label":
        return np.arange(num_classes, dtype=np.int64)
    return np.random.RandomState(seed).permutation(num_classes).astype(np.int64)


def select(labels: Labels, class_counts: Counts, selection: Selection, seed: int) -> Indices:
    """Choose the images of each class.

    ``first`` takes the first of each class in file order, as the authors do. ``random`` is the
    field's usual rule: one generator shuffles the images of class 0, then of class 1 and so on,
    and the first of each shuffled class are taken.

    Args:
        labels: of the images to choose from (n,).
        class_counts: images wanted of each class (C,).
        selection: the rule.
        seed: of the random rule.

    Returns:
        Positions in labels, ascending.
    """
    generator = np.random.RandomState(seed)
    chosen = []
    for label, count in enumerate(class_counts):
        candidates = np.flatnonzero(labels == label)
        if selection == "random":
            generator.shuffle(candidates)
        chosen.append(candidates[:count])
    return np.sort(np.concatenate(chosen))


def hold_out(
    labels: Labels, per_class: int, num_classes: int, seed: int
) -> tuple[Indices, Indices]:
    """Draw a balanced validation part.

    Args:
        labels: of the training pool (n,).
        per_class: images of each class to hold out.
        num_classes: C.
        seed: of the draw, which is independent of the other draws with the same seed.

    Returns:
        Positions that stay and positions held out, both ascending; together they are all.
    """
    generator = np.random.RandomState([seed, 1])
    held = [
        generator.permutation(np.flatnonzero(labels == label))[:per_class]
        for label in range(num_classes)
    ]
    is_held = np.zeros(len(labels), dtype=bool)
    is_held[np.concatenate(held)] = True
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def shot_groups(class_counts: Sequence[int] | Counts) -> dict[str, Labels]:
    """Group the classes by their number of training images.

    Args:
        class_counts: training images of each class (C,).

    Returns:
        The labels of many_shot (> 100), medium_shot (20..100) and few_shot (< 20); a group
        without classes is left out.
    """
    counts = np.asarray(class_counts, dtype=np.int64)
    members = {
        "many_shot": counts > MANY_SHOT_ABOVE,
        "medium_shot": (counts >= FEW_SHOT_BELOW) & (counts <= MANY_SHOT_ABOVE),
        "few_shot": counts < FEW_SHOT_BELOW,
    }
    return {name: np.flatnonzero(member) for name, member in members.items() if member.any()}


def imbalance_measures(class_counts: Sequence[int] | Counts) -> dict[str, float]:
    """Describe how unequal class sizes are.

    Args:
        class_counts: training images of each class (C,), none of them 0.

    Returns:
        ``imbalance_factor``: largest over smallest class, as it came out.
        ``gini``: Gini coefficient of the class sizes, 0 for equal ones.
        ``normalised_entropy``: entropy of the labels over log C, 1 for equal sizes.
        ``head_half_share``: fraction of the images in the larger half of the classes.
    """
    counts = np.sort(np.asarray(class_counts, dtype=np.int64))
    num_classes, total = len(counts), int(counts.sum())
    share = counts / total
    weights = 2 * np.arange(1, num_classes + 1) - num_classes - 1
    return {
        "imbalance_factor": float(counts[-1] / counts[0]),
        "gini": float(weights @ counts / (num_classes * total)),
        "normalised_entropy": float(-(share * np.log(share)).sum() / np.log(num_classes)),
        "head_half_share": float(share[num_classes - num_classes // 2 :].sum()),
    }


def keep_classes(source: Source, num_classes: int) -> Source:
    """A source without the classes of higher labels.

    Args:
        source: the balanced images.
        num_classes: how many classes stay.

    Raises:
        DatasetError: the source has fewer classes.
    """
    if num_classes > (present := len(source.class_names)):
        raise DatasetError(
            f"{source.name} has {present} classes, but num_classes is {num_classes}; "
            f"ask for at most {present}, or for 0 to take all"
        )
    train, test = (
        split.take(np.flatnonzero(split.labels < num_classes))
        for split in (source.train, source.test)
    )
    return replace(source, train=train, test=test, class_names=source.class_names[:num_classes])


def shrink(images: Images, size: int) -> Images:
    """Shrink images to squares: each new pixel is the mean of the old ones centred in it.

    A box filter, because it keeps values in their range and the images as bright as the source's
    mean says. LANCZOS mixes in pixels from beyond with negative weights: the edges of images this
    small ring and are clipped.

    Args:
        images: ``(n, height, width, 3)``.
        size: pixels a side.

    Returns:
        ``(n, size, size, 3)``.

    Raises:
        DatasetError: the images are smaller.
    """
    height, width = images.shape[1:3]
    if size > (most := min(height, width)):
        raise DatasetError(
            f"the source's images are {width} x {height} pixels, but image_size is {size}; they "
            f"are never enlarged: ask for at most {most}, or for 0 to leave them as they are"
        )
    shrunk = np.empty((len(images), size, size, 3), dtype=np.uint8)
    for target, image in zip(shrunk, images, strict=True):
        target[:] = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))
    return shrunk


def cut(
    source: Source, config: SubsetConfig, n_max: int | None = None
) -> tuple[dict[str, Split], dict[str, Any]]:
    """Cut a long-tailed subset out of a source.

    Args:
        source: the balanced images.
        config: the rule.
        n_max: images of the largest class; None takes what the smallest class kept has after the
            validation images are held out.

    Returns:
        The splits train, test and, if the rule asks for it, validation; and what was found about
        identical images, see `find_identical`.

    Raises:
        DatasetError: the source has fewer classes or smaller images than the rule asks for, a
            class has too few images or is left without any, or the rule refuses training images
            that are also test images.
    """
    if config.num_classes:
        source = keep_classes(source, config.num_classes)
    names, pool = source.class_names, source.train
    available = np.bincount(pool.labels, minlength=len(names))
    stays = np.arange(len(pool.labels))
    splits = {"train": pool, "test": source.test}
    if config.validation_per_class:
        _check_available(available, np.full(len(names), config.validation_per_class), names)
        stays, held = hold_out(
            pool.labels, config.validation_per_class, len(names), config.subset_seed
        )
        available = available - config.validation_per_class
        splits["validation"] = pool.take(held)
    order = class_order(len(names), config.class_order, config.subset_seed)
    wanted = np.zeros(len(names), dtype=np.int64)
    wanted[order] = counts_by_rank(
        len(names),
        int(available.min()) if n_max is None else n_max,
        config.imbalance_factor,
        config.profile,
    )
    _check_available(available, wanted, names)
    _check_no_empty_class(
        wanted, names, "lower imbalance_factor or validation_per_class, or take a larger source"
    )
    chosen = select(pool.labels[stays], wanted, config.selection, config.subset_seed)
    splits["train"] = pool.take(stays[chosen])
    if config.image_size:
        splits = {
            name: replace(split, images=shrink(split.images, config.image_size))
            for name, split in splits.items()
        }
    return _handle_leakage(splits, config, names)


def find_identical(splits: dict[str, Split]) -> dict[str, Any]:
    """Count images that are identical pixel for pixel.

    Args:
        splits: train, test and perhaps validation.

    Returns:
        ``train_in_test``: training images that are also in test, ``train_test_pairs`` the source
        indices of the first of them, each with that of the (first) identical test image;
        ``train_repeats``: training images identical to an earlier one; with a validation split
        also ``train_in_validation`` and ``validation_in_test``.
    """
    seen = {name: _first_by_content(split.images) for name, split in splits.items()}
    pairs = _pairs(splits["train"], seen["test"])
    source_pairs = [
        [int(splits["train"].source_index[i]), int(splits["test"].source_index[j])]
        for i, j in pairs[:PAIRS_SHOWN]
    ]
    found = {
        "train_in_test": len(pairs),
        "train_test_pairs": source_pairs,
        "train_repeats": len(splits["train"].labels) - len(seen["train"]),
    }
    if "validation" in splits:
        found["train_in_validation"] = len(_pairs(splits["train"], seen["validation"]))
        found["validation_in_test"] = len(_pairs(splits["validation"], seen["test"]))
    return found


def _handle_leakage(
    splits: dict[str, Split], config: SubsetConfig, names: Sequence[str]
) -> tuple[dict[str, Split], dict[str, Any]]:
    found = find_identical(splits) | {"train_dropped": 0}
    leaked = found["train_in_test"]
    if not leaked or config.leakage == "keep":
        return splits, found
    if config.leakage == "refuse":
        shown = ", ".join(f"{i} = {j}" for i, j in found["train_test_pairs"])
        raise DatasetError(
            f"{leaked} training images are identical to a test image (index in the training "
            f"source = index in the test source: {shown}{', ...' * (leaked > PAIRS_SHOWN)}); "
            "set leakage to drop or keep"
        )
    train = splits["train"]
    clean = np.ones(len(train.labels), dtype=bool)
    clean[[i for i, _ in _pairs(train, _first_by_content(splits["test"].images))]] = False
    train = train.take(np.flatnonzero(clean))
    _check_no_empty_class(
        np.bincount(train.labels, minlength=len(names)),
        names,
        "all of its images were dropped as identical to test images: set leakage to keep",
    )
    splits = splits | {"train": train}
    return splits, find_identical(splits) | {"train_dropped": leaked}


def _first_by_content(images: Images) -> dict[bytes, int]:
    """Position of the first image of each content."""
    first: dict[bytes, int] = {}
    for i, key in enumerate(_contents(images)):
        first.setdefault(key, i)
    return first


def _pairs(split: Split, others: dict[bytes, int]) -> list[tuple[int, int]]:
    keys = _contents(split.images)
    return [(i, others[key]) for i, key in enumerate(keys) if key in others]


def _contents(images: Images) -> list[bytes]:
    return [hashlib.sha256(image.tobytes()).digest() for image in images]


def _check_available(available: Counts, wanted: Counts, names: Sequence[str]) -> None:
    if (short := np.flatnonzero(wanted > available)).size:
        label = int(short[0])
        raise DatasetError(
            f"class {label} ({names[label]}) has {available[label]} images, but {wanted[label]} "
            f"are asked for (too many for {short.size} of {len(names)} classes); ask for at most "
            f"{available.min()} per class"
        )


def _check_no_empty_class(class_counts: Counts, names: Sequence[str], advice: str) -> None:
    if (empty := np.flatnonzero(class_counts == 0)).size:
        label = int(empty[0])
        raise DatasetError(
            f"class {label} ({names[label]}) is left without training images "
            f"({empty.size} of {len(names)} classes are; the largest has {class_counts.max()}); "
            f"{advice}"
        )

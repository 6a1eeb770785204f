"""How a long-tailed subset is cut out of a source: class sizes, selection, shot groups.

Everything random comes from numpy's legacy ``RandomState``, whose streams are frozen: the same
rule selects the same images on every machine and with every version.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from shike_core.config import ClassOrder, Leakage, Profile, Selection, SubsetConfig
from shike_core.data.listed import IMAGE_FORMATS, ImageFiles, as_rgb, shown
from shike_core.data.split import Images, Labels, Source, Split
from shike_core.data.unreadable import Unreadable
from shike_core.errors import DatasetError

MANY_SHOT_ABOVE = 100
FEW_SHOT_BELOW = 20
PAIRS_SHOWN = 10
FILES_AT_A_TIME = 4096
VALIDATION_DRAW, TEST_DRAW = 1, 2

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
    for candidates, count in zip(_positions(labels, len(class_counts)), class_counts, strict=True):
        if selection == "random":
            generator.shuffle(candidates)
        chosen.append(candidates[:count])
    return np.sort(np.concatenate(chosen))


def hold_out(
    labels: Labels, per_class: int, num_classes: int, seed: int, draw: int = VALIDATION_DRAW
) -> tuple[Indices, Indices]:
    """Draw a balanced part to validate or to test on.

    Args:
        labels: of the training pool (n,).
        per_class: images of each class to hold out.
        num_classes: C.
        seed: of the draw, which is independent of the other draws with the same seed.
        draw: which of them it is.

    Returns:
        Positions that stay and positions held out, both ascending; together they are all.
    """
    generator = np.random.RandomState([seed, draw])
    held = [
        generator.permutation(candidates)[:per_class]
        for candidates in _positions(labels, num_classes)
    ]
    is_held = np.zeros(len(labels), dtype=bool)
    is_held[np.concatenate(held)] = True
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def _positions(labels: Labels, num_classes: int) -> list[Indices]:
    """Where the images of each class are, ascending; in one pass, for thousands of classes."""
    ends = np.bincount(labels, minlength=num_classes).cumsum()
    return np.split(np.argsort(labels, kind="stable"), ends[:-1])[:num_classes]


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
        source: the images.
        num_classes: how many classes stay.

    Raises:
        DatasetError: the source has fewer classes.
    """
    if num_classes > (present := len(source.class_names)):
        raise DatasetError(
            f"{source.name} has {present} classes, but num_classes is {num_classes}; "
            f"ask for at most {present}, or for 0 to take all"
        )

    def kept(split: Split) -> Split:
        return split.take(np.flatnonzero(split.labels < num_classes))

    return replace(
        source,
        train=kept(source.train),
        test=kept(source.test),
        validation=kept(source.validation) if source.validation else None,
        class_names=source.class_names[:num_classes],
    )


def with_test_part(source: Source, per_class: int, seed: int) -> Source:
    """A source with images to test on: its own, or some held out of those to train on.

    Args:
        source: the images.
        per_class: images of each class to hold out; 0 for a source that has test images.
        seed: of the draw.

    Raises:
        DatasetError: the source has no test images and none are to be held out, or it has some
            and others are to be held out, or a class has too few.
    """
    if present := len(source.test.labels):
        if per_class:
            raise DatasetError(
                f"{source.name} has {present} test images of its own, but test_per_class is "
                f"{per_class}; set it to 0"
            )
        return source
    if not per_class:
        raise DatasetError(
            f"{source.name} has no test images; set test_per_class to hold out so many images of "
            "each class, or give it a test part: a folder test, or rows of split test"
        )
    names, pool = source.class_names, source.train
    available = np.bincount(pool.labels, minlength=len(names))
    _check_available(available, np.full(len(names), per_class), names)
    stays, held = hold_out(pool.labels, per_class, len(names), seed, TEST_DRAW)
    return replace(source, train=pool.take(stays), test=pool.take(held))


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


def squares(files: ImageFiles, size: int) -> tuple[Images, dict[int, str]]:
    """Decode files, cut the square out of the middle of each image and shrink it as `shrink` does.

    As in torchvision's loader, by which published results came about, an orientation noted in
    the file is ignored and transparency is dropped.

    Args:
        files: in any format Pillow knows.
        size: pixels a side.

    Returns:
        ``(n, size, size, 3)``, black where a file cannot be read; and by the position of such a
        file what is wrong with it.

    Raises:
        DatasetError: an image is smaller.
    """
    pixels = np.zeros((len(files), size, size, 3), dtype=np.uint8)

    def fill(position: int) -> str:
        try:
            content = io.BytesIO(files.read(position))
            with Image.open(content, formats=IMAGE_FORMATS) as image:
                width, height = image.size
                if (side := min(image.size)) >= size:
                    left, top = (width - side) // 2, (height - side) // 2
                    pixels[position] = np.asarray(
                        as_rgb(image).resize(
                            (size, size),
                            Image.Resampling.BOX,
                            box=(left, top, left + side, top + side),
                        )
                    )
                    return ""
        except (DatasetError, MemoryError):
            raise
        except Exception as error:  # a damaged image raises nearly anything
            return str(error) or type(error).__name__
        raise DatasetError(
            f"{files.paths[position]} in {files.root} has {width} x {height} pixels, but "
            f"image_size is {size}; images are never enlarged: ask for fewer pixels, or take out "
            "the small images"
        )

    wrong: dict[int, str] = {}
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), FILES_AT_A_TIME):  # a task takes a kibibyte of its own
            rows = range(start, min(start + FILES_AT_A_TIME, len(files)))
            wrong |= {
                row: text for row, text in zip(rows, pool.map(fill, rows), strict=True) if text
            }
    return pixels, wrong


def cut(
    source: Source, config: SubsetConfig, n_max: int | None = None
) -> tuple[dict[str, Split], dict[str, Any] | None, list[Unreadable]]:
    """Cut a long-tailed subset out of a source.

    Args:
        source: the images; in memory, or in files that stay files unless the rule gives a size.
        config: the rule.
        n_max: images of the largest class; None takes what the smallest class kept has after test
            and validation images are held out. It has no say if classes stay as large as they are.

    Returns:
        The splits train, test and, if the rule or the source has it, validation; what was found
        about identical images, see `drop_leaked`, or None for images that stay in files: their
        content is not known yet; and the files that were left out when images were decoded.

    Raises:
        DatasetError: the source has fewer classes or smaller images than the rule asks for, a
            class has too few images or is left without any, there are no test images, too many
            files cannot be read, or the rule refuses training images that are also test images.
    """
    if config.num_classes:
        source = keep_classes(source, config.num_classes)
    source = with_test_part(source, config.test_per_class, config.subset_seed)
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
    elif source.validation is not None and len(source.validation.labels):
        splits["validation"] = source.validation
    if config.imbalance_factor:
        stays = stays[_long_tail(pool.labels[stays], available, config, n_max, names)]
    else:
        check_no_empty_class(available, names, "lower validation_per_class or test_per_class")
    splits["train"] = pool.take(stays)
    unreadable: list[Unreadable] = []
    if config.image_size:
        splits, unreadable = _shrink_all(splits, config, names)
    contents = {
        name: [hashlib.sha256(image.tobytes()).digest() for image in split.images]
        for name, split in splits.items()
        if isinstance(split.images, np.ndarray)
    }
    if not contents:
        return splits, None, []
    clean, found = drop_leaked(contents, splits, config.leakage, names)
    if len(clean) < len(splits["train"].labels):
        splits["train"] = splits["train"].take(clean)
    return splits, found, unreadable


def find_identical(
    contents: Mapping[str, Sequence[bytes]], splits: Mapping[str, Split]
) -> dict[str, Any]:
    """Count images of identical content.

    Args:
        contents: digests of the content of each image (n,), of train, test and perhaps validation.
        splits: the same ones.

    Returns:
        ``train_in_test``: training images that are also in test, ``train_test_pairs`` the source
        indices of the first of them, each with that of the (first) identical test image;
        ``train_repeats``: training images identical to an earlier one; with a validation split
        also ``train_in_validation`` and ``validation_in_test``.
    """
    first = {name: _first_of_each(digests) for name, digests in contents.items()}
    pairs = _pairs(contents["train"], first["test"])
    source_pairs = [
        [int(splits["train"].source_index[i]), int(splits["test"].source_index[j])]
        for i, j in pairs[:PAIRS_SHOWN]
    ]
    found = {
        "train_in_test": len(pairs),
        "train_test_pairs": source_pairs,
        "train_repeats": len(contents["train"]) - len(first["train"]),
    }
    if "validation" in contents:
        found["train_in_validation"] = len(_pairs(contents["train"], first["validation"]))
        found["validation_in_test"] = len(_pairs(contents["validation"], first["test"]))
    return found


def drop_leaked(
    contents: Mapping[str, Sequence[bytes]],
    splits: Mapping[str, Split],
    leakage: Leakage,
    class_names: Sequence[str],
) -> tuple[Indices, dict[str, Any]]:
    """Deal with training images that are also test images, as the rule says.

    Args:
        contents: digests of the content of each image (n,), of train, test and perhaps validation.
        splits: the same ones.
        leakage: the rule.
        class_names: of all classes.

    Returns:
        Positions of the training images that stay, ascending; and what `find_identical` finds
        among all that stays, with ``train_dropped``, the number of those that do not.

    Raises:
        DatasetError: the rule refuses such images, or a class is left without any.
    """
    train, found = splits["train"], find_identical(contents, splits)
    clean, leaked = np.ones(len(train.labels), dtype=bool), found["train_in_test"]
    if not leaked or leakage == "keep":
        return np.flatnonzero(clean), found | {"train_dropped": 0}
    if leakage == "refuse":
        pairs = ", ".join(f"{i} = {j}" for i, j in found["train_test_pairs"])
        raise DatasetError(
            f"{leaked} training images are identical to a test image (index in the training "
            f"source = index in the test source: {pairs}{', ...' * (leaked > PAIRS_SHOWN)}); "
            "set leakage to drop or keep"
        )
    clean[[i for i, _ in _pairs(contents["train"], _first_of_each(contents["test"]))]] = False
    stays = np.flatnonzero(clean)
    check_no_empty_class(
        np.bincount(train.labels[stays], minlength=len(class_names)),
        class_names,
        "all of its images were dropped as identical to test images: set leakage to keep",
    )
    cleaned = find_identical(
        {**contents, "train": [contents["train"][i] for i in stays.tolist()]},
        {**splits, "train": train.take(stays)},
    )
    return stays, cleaned | {"train_dropped": leaked}


def _long_tail(
    labels: Labels,
    available: Counts,
    config: SubsetConfig,
    n_max: int | None,
    names: Sequence[str],
) -> Indices:
    """Choose the images of a long tail out of those available: positions in labels, ascending."""
    order = class_order(len(names), config.class_order, config.subset_seed)
    wanted = np.zeros(len(names), dtype=np.int64)
    wanted[order] = counts_by_rank(
        len(names),
        int(available.min()) if n_max is None else n_max,
        config.imbalance_factor,
        config.profile,
    )
    _check_available(available, wanted, names)
    advice = "lower imbalance_factor or validation_per_class, or take a larger source"
    if available.min() < available.max():
        advice += (
            f"; its classes have {available.min()} to {available.max()} images already: "
            "imbalance_factor=0 leaves them as they are"
        )
    check_no_empty_class(wanted, names, advice)
    return select(labels, wanted, config.selection, config.subset_seed)


def _shrink_all(
    splits: Mapping[str, Split], config: SubsetConfig, names: Sequence[str]
) -> tuple[dict[str, Split], list[Unreadable]]:
    """Every image as a small square in memory, and the files that were left out."""
    shrunk = dict(splits)
    wrong: list[Unreadable] = []
    for name, split in splits.items():
        if isinstance(split.images, np.ndarray):
            shrunk[name] = replace(split, images=shrink(split.images, config.image_size))
        elif isinstance(split.images, ImageFiles):
            pixels, of_split = squares(split.images, config.image_size)
            shrunk[name] = replace(split, images=pixels)
            if of_split:
                readable = np.delete(np.arange(len(pixels)), list(of_split))
                shrunk[name] = shrunk[name].take(readable)
            wrong += [
                Unreadable(name, split.images.paths[i], reason) for i, reason in of_split.items()
            ]
    total = sum(len(split.labels) for split in splits.values())
    files = shown([f"{image.path} ({image.reason})" for image in wrong])
    if len(wrong) > config.max_unreadable * total:
        raise DatasetError(
            f"{len(wrong)} of {total} images cannot be read, more than max_unreadable "
            f"({config.max_unreadable:g}) allows; replace them or raise it: {files}"
        )
    check_no_empty_class(
        np.bincount(shrunk["train"].labels, minlength=len(names)),
        names,
        f"its images cannot be read, replace them: {files}",
    )
    return shrunk, wrong


def _first_of_each(digests: Sequence[bytes]) -> dict[bytes, int]:
    """Position of the first image of each content."""
    first: dict[bytes, int] = {}
    for i, digest in enumerate(digests):
        first.setdefault(digest, i)
    return first


def _pairs(digests: Sequence[bytes], others: Mapping[bytes, int]) -> list[tuple[int, int]]:
    return [(i, others[digest]) for i, digest in enumerate(digests) if digest in others]


def _check_available(available: Counts, wanted: Counts, names: Sequence[str]) -> None:
    if (short := np.flatnonzero(wanted > available)).size:
        label = int(short[0])
        raise DatasetError(
            f"class {label} ({names[label]}) has {available[label]} images, but {wanted[label]} "
            f"are asked for (too many for {short.size} of {len(names)} classes); ask for at most "
            f"{available.min()} per class"
        )


def check_no_empty_class(class_counts: Counts, names: Sequence[str], advice: str) -> None:
    """Refuse classes without training images.

    Args:
        class_counts: training images of each class (C,).
        names: of the classes.
        advice: what to do about it, for the message.

    Raises:
        DatasetError: there is such a class.
    """
    if (empty := np.flatnonzero(class_counts == 0)).size:
        label = int(empty[0])
        raise DatasetError(
            f"class {label} ({names[label]}) is left without training images "
            f"({empty.size} of {len(names)} classes are; the largest has {class_counts.max()}); "
            f"{advice}"
        )

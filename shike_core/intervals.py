"""How sure a difference is: intervals and tests on counts of right answers, without torch.

Everything here speaks of the test images: how far a figure could move with other images of the
same kind. Another seed, or another draw of the training images, moves it as well.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
"""Resamplings of a bootstrap; the ends of its interval are then good to about 2 % of its width."""


class Interval(NamedTuple):
    """Ends of a 95 % interval, as fractions."""

    low: float
    high: float


class Difference(NamedTuple):
    """How the accuracies of two classifiers on the same images differ, second less first."""

    difference: float
    """Of the accuracies, as a fraction."""
    low: float
    """Lower end of its 95 % interval, by the paired bootstrap."""
    high: float
    """Upper end."""
    p_value: float
    """Two-sided, of the exact McNemar test: that chance alone makes them differ so much."""
    only_first: int
    """Images that only the first classifier has right."""
    only_second: int
    """Images that only the second classifier has right."""


def wilson_interval(right: int, images: int) -> Interval:
    """95 % interval of an accuracy (Wilson 1927); inside 0 and 1, and usable for few images.

    Args:
        right: images classified rightly.
        images: of them all.

    Raises:
        ValueError: there are no images, or more are right than there are.
    """
    if not 0 <= right <= images or images < 1:
        raise ValueError(f"{right} of {images} images cannot be right; give at least one image")
    z = 1.959963984540054  # of the normal distribution, two-sided 95 %
    share, spread = right / images, z * z / images
    centre = (share + spread / 2) / (1 + spread)
    half_width = z / (1 + spread) * (share * (1 - share) / images + spread / (4 * images)) ** 0.5
    return Interval(max(centre - half_width, 0.0), min(centre + half_width, 1.0))


def paired_difference(
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
    classes: NDArray[np.int64],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Compare two classifiers by the images that one has right and the other wrong.

    The bootstrap draws images within each class (Efron and Tibshirani 1993, chapter 8), because
    the number of test images of a class is fixed by design. The test is McNemar's (1947), exact.

    Args:
        first: whether the first classifier is right on each image, (images,).
        second: the same of the second one, on the same images.
        classes: label of each image, (images,).
        seed: of the resampling.
        resamples: their number.

    Raises:
        ValueError: the three have different lengths, or there are no images.
    """
    if not len(first) == len(second) == len(classes) or not len(classes):
        raise ValueError(
            f"{len(first)}, {len(second)} answers and {len(classes)} labels are not of the same "
            "images; give one of each for every image, and at least one image"
        )
    gains = second.astype(np.int64) - first
    worse, better = int((gains < 0).sum()), int((gains > 0).sum())
    generator = np.random.default_rng(seed)
    total = np.zeros(resamples, dtype=np.int64)
    # Within a class only how many lose, stay the same and gain matters: one multinomial draw. Those
    # of classes with the same counts add up to one of as many images.
    for counts, alike in zip(
        *np.unique(_outcomes(gains, classes), axis=0, return_counts=True), strict=True
    ):
        images = counts.sum()
        drawn = generator.multinomial(images * alike, counts / images, size=resamples)
        total += drawn[:, 2] - drawn[:, 0]
    low, high = np.quantile(total / len(gains), (0.025, 0.975))
    return Difference(
        float(gains.mean()), float(low), float(high), mcnemar(worse, better), worse, better
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of the exact McNemar test (1947).

    Args:
        only_first: images that only the first classifier has right.
        only_second: images that only the second one has right.
    """
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return float(binomtest(only_second, discordant).pvalue) if discordant else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests so that one false alarm among them stays unlikely.

    Holm 1979: the smallest times their number, the next times one less, and so on, never falling.
    """
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min((len(p_values) - rank) * p_values[place], 1.0))
        adjusted[place] = worst
    return adjusted


def _outcomes(gains: NDArray[np.int64], classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Images of each class that are there, by gain -1, 0 and 1: (classes, 3)."""
    _, place = np.unique(classes, return_inverse=True)
    cells = np.bincount(3 * place + gains + 1, minlength=3 * (place.max() + 1))
    return cells.reshape(-1, 3)

"""Intervals and tests against figures worked out in other ways."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from shike_core.intervals import holm, mcnemar, paired_difference, wilson_interval


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_against_scipy(counts) -> None:
    right, images = counts
    ours = wilson_interval(right, images)
    theirs = binomtest(right, images).proportion_ci(method="wilson")
    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert 0 <= ours.low <= right / images + 1e-12 <= ours.high + 2e-12 <= 1 + 4e-12


@pytest.mark.parametrize(("right", "images"), [(0, 0), (2, 1), (-1, 3)])
def test_wilson_of_impossible_counts(right, images) -> None:
    with pytest.raises(ValueError, match="give at least one image"):
        wilson_interval(right, images)


def test_the_test_of_mcnemar_by_hand() -> None:
    first = np.array([True] * 6 + [False] * 4)
    second = np.array([True] * 5 + [False] + [True] * 4)
    found = paired_difference(first, second, np.zeros(10, np.int64))
    assert (found.only_first, found.only_second) == (1, 4)
    assert found.difference == pytest.approx(0.3)
    assert found.p_value == mcnemar(1, 4) == pytest.approx(12 / 32)  # of 5: 0, 1, 4 or 5 heads


def test_the_bootstrap_against_drawing_images_one_by_one() -> None:
    generator = np.random.default_rng(1)
    classes = np.repeat(np.arange(3), (40, 25, 10))
    first, second = generator.random(75) < 0.6, generator.random(75) < 0.7
    found = paired_difference(first, second, classes, seed=3)
    means = []
    for _ in range(4000):
        drawn = [
            generator.choice(np.flatnonzero(classes == c), (classes == c).sum()) for c in (0, 1, 2)
        ]
        drawn = np.concatenate(drawn)
        means.append(second[drawn].mean() - first[drawn].mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.02)


def test_equal_answers_have_no_difference() -> None:
    answers = np.array([True, False, True])
    found = paired_difference(answers, answers, np.array([0, 0, 1]))
    assert found == (0, 0, 0, 1, 0, 0)


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    classes, covered = np.repeat(np.arange(10), 30), 0
    for i in range(300):
        first = generator.random(300) < 0.5
        second = np.where(generator.random(300) < 0.3, generator.random(300) < 0.8, first)
        found = paired_difference(first, second, classes, seed=i, resamples=1000)
        covered += found.low <= 0.3 * (0.8 - 0.5) <= found.high
    assert 0.91 <= covered / 300 <= 0.99


def test_the_same_seed_gives_the_same_interval() -> None:
    generator = np.random.default_rng(2)
    answers = generator.random((2, 50)) < 0.5
    classes = generator.integers(0, 5, 50)
    assert paired_difference(*answers, classes) == paired_difference(*answers, classes)


def test_answers_on_different_images() -> None:
    with pytest.raises(ValueError, match="3, 2 answers and 3 labels"):
        paired_difference(np.ones(3, bool), np.ones(2, bool), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="at least one image"):
        paired_difference(np.ones(0, bool), np.ones(0, bool), np.zeros(0, np.int64))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []

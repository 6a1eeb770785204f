"""Metrics against numbers by hand, written-out loops and scikit-learn."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    balanced_accuracy_score,
    top_k_accuracy_score,
)
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from torch import Tensor

from shike_core.metrics import (
    accuracy,
    confusion_matrix,
    ensemble_logits,
    expected_calibration_error,
    group_accuracy,
    per_class_accuracy,
    reliability,
    top_k_accuracy,
)

LOGITS = torch.tensor(
    [
        [3.0, 2.0, 1.0, 0.0],  # taken for 0
        [0.0, 1.0, 3.0, 2.0],  # taken for 2
        [0.0, 1.0, 2.0, 3.0],  # taken for 3
        [1.0, 5.0, 1.0, 1.0],  # taken for 1
        [2.0, 3.0, 0.0, 1.0],  # taken for 1
    ]
)
TARGETS = torch.tensor([0, 3, 3, 1, 0])


def random_problem(seed: int, images: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, classes, generator=generator)
    return logits, torch.randint(classes, (images,), generator=generator)


problems = st.builds(random_problem, st.integers(0, 10**6), st.integers(1, 40), st.integers(2, 8))


def test_accuracy_by_hand() -> None:
    assert accuracy(LOGITS, TARGETS).item() == pytest.approx(3 / 5)


@pytest.mark.parametrize(("k", "expected"), [(1, 3 / 5), (2, 1.0), (4, 1.0), (5, 1.0)])
def test_top_k_accuracy_by_hand_is_capped_by_the_number_of_classes(k: int, expected: float) -> None:
    assert top_k_accuracy(LOGITS, TARGETS, k).item() == pytest.approx(expected)


def test_equal_logits_count_in_the_order_of_the_labels() -> None:
    logits, targets = torch.zeros(4, 4), torch.arange(4)
    assert [top_k_accuracy(logits, targets, k).item() for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1]
    assert accuracy(logits, targets).item() == 0.25


def test_per_class_accuracy_leaves_out_classes_without_test_images() -> None:
    table = per_class_accuracy(LOGITS, TARGETS)
    assert table.labels.tolist() == [0, 1, 3]
    assert table.accuracy.tolist() == [0.5, 1.0, 0.5]
    assert table.num_images.tolist() == [2, 1, 2]


def test_group_accuracy_counts_images_and_leaves_out_groups_without_any() -> None:
    groups = {
        "many_shot": torch.tensor([0, 1]),
        "medium_shot": torch.tensor([2]),
        "few_shot": torch.tensor([3]),
    }
    found = group_accuracy(LOGITS, TARGETS, groups)
    assert {name: value.item() for name, value in found.items()} == {
        "many_shot": pytest.approx(2 / 3),
        "few_shot": 0.5,
    }


def test_confusion_matrix_has_targets_in_rows() -> None:
    matrix = confusion_matrix(LOGITS.argmax(dim=1), TARGETS, 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]


def test_ensemble_logits_is_the_mean_over_experts() -> None:
    logits = torch.tensor([[[1.0, 5.0], [3.0, -5.0]]])
    assert ensemble_logits(logits).tolist() == [[2.0, 0.0]]


def with_confidence(probability: float) -> list[float]:
    """Logits of two classes that give class 0 this probability."""
    return [math.log(probability / (1 - probability)), 0.0]


def test_calibration_by_hand() -> None:
    """Five bins of 0.2: 0.6 belongs to the bin that ends there, 0.95 and 0.85 to the last one."""
    logits = torch.tensor([with_confidence(p) for p in (0.55, 0.7, 0.95, 0.85)]).double()
    targets = torch.tensor([1, 0, 0, 1])
    table = reliability(logits, targets, num_bins=5)
    assert table.lower.tolist() == pytest.approx([0.4, 0.6, 0.8])
    assert table.upper.tolist() == pytest.approx([0.6, 0.8, 1.0])
    assert table.confidence.tolist() == pytest.approx([0.55, 0.7, 0.9])
    assert table.accuracy.tolist() == [0.0, 1.0, 0.5]
    assert table.num_images.tolist() == [1, 1, 2]
    by_hand = (1 * 0.55 + 1 * 0.3 + 2 * 0.4) / 4
    assert expected_calibration_error(logits, targets, 5).item() == pytest.approx(by_hand)


def test_a_bin_holds_its_upper_edge() -> None:
    """Two equal logits give exactly one half."""
    table = reliability(torch.zeros(1, 2), torch.tensor([0]), num_bins=2)
    assert (table.lower.item(), table.upper.item()) == (0.0, 0.5)


def test_certain_and_right_is_perfectly_calibrated() -> None:
    logits = 1000 * torch.eye(3)
    assert expected_calibration_error(logits, torch.arange(3), 15).item() == 0
    assert expected_calibration_error(logits, torch.tensor([1, 2, 0]), 15).item() == 1


@settings(deadline=None)
@given(problem=problems, num_bins=st.integers(1, 20))
def test_calibration_equals_the_loop_over_images(
    problem: tuple[Tensor, Tensor], num_bins: int
) -> None:
    logits, targets = problem
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    gaps = [0.0] * num_bins
    for p, right in zip(confidence.tolist(), (predicted == targets).tolist(), strict=True):
        gaps[min(math.ceil(p * num_bins), num_bins) - 1] += right - p
    slow = sum(abs(gap) for gap in gaps) / len(targets)
    assert expected_calibration_error(logits, targets, num_bins).item() == pytest.approx(slow)
    assert reliability(logits, targets, num_bins).num_images.sum() == len(targets)


@settings(deadline=None)
@given(problem=problems)
def test_accuracies_agree_with_each_other(problem: tuple[Tensor, Tensor]) -> None:
    logits, targets = problem
    classes = logits.shape[1]
    overall = accuracy(logits, targets).item()
    by_k = [top_k_accuracy(logits, targets, k).item() for k in range(1, classes + 1)]
    assert by_k[0] == overall
    assert by_k == sorted(by_k)
    assert by_k[-1] == 1
    table = per_class_accuracy(logits, targets)
    weighted = (table.accuracy * table.num_images).sum() / len(targets)
    assert weighted.item() == pytest.approx(overall)
    matrix = confusion_matrix(logits.argmax(dim=1), targets, classes)
    assert matrix.sum() == len(targets)
    assert matrix.trace().item() / len(targets) == pytest.approx(overall)
    everything = {"all": torch.arange(classes)}
    assert group_accuracy(logits, targets, everything)["all"].item() == overall


@pytest.mark.parametrize("seed", range(5))
def test_agreement_with_scikit_learn(seed: int) -> None:
    logits, targets = random_problem(seed, images=200, classes=7)
    predicted = logits.argmax(dim=1)
    labels = list(range(7))
    theirs = sklearn_confusion_matrix(targets, predicted, labels=labels)
    assert confusion_matrix(predicted, targets, 7).tolist() == theirs.tolist()
    assert per_class_accuracy(logits, targets).accuracy.mean().item() == pytest.approx(
        balanced_accuracy_score(targets, predicted)
    )
    for k in (1, 3, 5):
        assert top_k_accuracy(logits, targets, k).item() == pytest.approx(
            top_k_accuracy_score(targets, logits, k=k, labels=labels)
        )


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), "do not belong together"),
        (torch.zeros(2, 4, 3), torch.zeros(2, dtype=torch.int64), "do not belong together"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), "no test images"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "labels from 0 to 2"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), "from -1 to 0"),
    ],
)
def test_input_that_cannot_be_measured(logits: Tensor, targets: Tensor, message: str) -> None:
    for measure in (accuracy, per_class_accuracy):
        with pytest.raises(ValueError, match=message):
            measure(logits, targets)
    with pytest.raises(ValueError, match=message):
        top_k_accuracy(logits, targets, 1)
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(logits, targets, 15)


def test_zero_guesses_or_zero_bins_are_refused() -> None:
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        top_k_accuracy(LOGITS, TARGETS, 0)
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        reliability(LOGITS, TARGETS, 0)

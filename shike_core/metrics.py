"""How right and how honest a classifier is: pure functions on logits and integer targets.

Every function works on any device and returns fractions, never percent. What has no test image (a
class, a shot group, a confidence bin) is left out of the answer, so that no number is ever NaN.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class ClassAccuracy(NamedTuple):
    """Accuracy of each class that has test images, in the order of the labels."""

    labels: Tensor
    """Class labels, int64 (tested classes,)."""
    accuracy: Tensor
    """Fraction of the class's test images that are classified rightly, float64."""
    num_images: Tensor
    """Test images of the class, int64."""


class Reliability(NamedTuple):
    """How often the classifier is right at each level of confidence; empty bins are left out."""

    lower: Tensor
    """Lower edge of the bin, exclusive, float64 (filled bins,)."""
    upper: Tensor
    """Upper edge of the bin, inclusive, float64."""
    confidence: Tensor
    """Mean probability of the predicted class, float64."""
    accuracy: Tensor
    """Fraction of the bin's images that are classified rightly, float64."""
    num_images: Tensor
    """Test images in the bin, int64."""


def ensemble_logits(logits: Tensor) -> Tensor:
    """Mean over the experts: (batch, num_experts, num_classes) to (batch, num_classes)."""
    return logits.mean(dim=1)


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Fraction of images whose largest logit is the target's; the lowest label wins a tie.

    Args:
        logits: (batch, num_classes).
        targets: class labels, (batch,).
    """
    return _correct(logits, targets).double().mean()


def top_k_accuracy(logits: Tensor, targets: Tensor, k: int) -> Tensor:
    """Fraction of images whose target is among the k largest logits.

    With k = 1 this is `accuracy`, ties included.

    Args:
        logits: (batch, num_classes).
        targets: class labels, (batch,).
        k: guesses allowed; all classes if there are fewer than k.
    """
    _check(logits, targets)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    of_target = logits.gather(1, targets[:, None])  # (batch, 1)
    labels = torch.arange(logits.shape[1], device=logits.device)
    tied_before = (logits == of_target) & (labels < targets[:, None])
    rank = ((logits > of_target) | tied_before).sum(dim=1)  # (batch,)
    return (rank < k).double().mean()


def per_class_accuracy(logits: Tensor, targets: Tensor) -> ClassAccuracy:
    """Accuracy of each class that has test images; its mean is the balanced accuracy.

    Args:
        logits: (batch, num_classes).
        targets: class labels, (batch,).
    """
    correct = _correct(logits, targets)
    count = torch.bincount(targets, minlength=logits.shape[1])  # (num_classes,)
    hits = torch.bincount(targets[correct], minlength=logits.shape[1])
    labels = count.nonzero().squeeze(1)
    return ClassAccuracy(labels, hits[labels].double() / count[labels], count[labels])


def group_accuracy(
    logits: Tensor, targets: Tensor, groups: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Accuracy over the test images of each group of classes; a group without any is left out.

    Args:
        logits: (batch, num_classes).
        targets: class labels, (batch,).
        groups: class labels of each group, such as the shot groups.
    """
    correct = _correct(logits, targets)
    members = {name: torch.isin(targets, labels) for name, labels in groups.items()}
    return {name: correct[m].double().mean() for name, m in members.items() if m.any()}


def confusion_matrix(predicted: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Count the images of each target (rows) by what they were taken for (columns).

    Args:
        predicted: class labels, (batch,).
        targets: class labels, (batch,).
        num_classes: rows and columns of the matrix.

    Returns:
        int64 (num_classes, num_classes).
    """
    cells = torch.bincount(targets * num_classes + predicted, minlength=num_classes**2)
    return cells.view(num_classes, num_classes)


def reliability(logits: Tensor, targets: Tensor, num_bins: int) -> Reliability:
    """Sort the images into bins of equal width by the probability of the predicted class.

    Args:
        logits: (batch, num_classes).
        targets: class labels, (batch,).
        num_bins: bins between 0 and 1; each holds its upper edge and not its lower one.
    """
    correct = _correct(logits, targets)
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    confidence = logits.double().softmax(dim=1).amax(dim=1)  # (batch,)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=logits.device)
    # Only the inner edges decide: rounding may lift a probability a little above 1.
    bins = torch.bucketize(confidence, edges[1:-1])  # (batch,)
    count = torch.bincount(bins, minlength=num_bins)  # (num_bins,)
    filled = count.nonzero().squeeze(1)

    def mean(values: Tensor) -> Tensor:
        return torch.bincount(bins, values, minlength=num_bins)[filled] / count[filled]

    return Reliability(
        lower=edges[filled],
        upper=edges[filled + 1],
        confidence=mean(confidence),
        accuracy=mean(correct.double()),
        num_images=count[filled],
    )


def expected_calibration_error(logits: Tensor, targets: Tensor, num_bins: int) -> Tensor:
    """Mean distance between confidence and accuracy over the bins, weighted by their images.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3.

    Args:
        logits: (batch, num_classes).
        targets: class labels, (batch,).
        num_bins: confidence bins of equal width.
    """
    table = reliability(logits, targets, num_bins)
    distance = (table.accuracy - table.confidence).abs()
    return (distance * table.num_images).sum() / table.num_images.sum()


def _correct(logits: Tensor, targets: Tensor) -> Tensor:
    _check(logits, targets)
    return logits.argmax(dim=1) == targets  # (batch,)


def _check(logits: Tensor, targets: Tensor) -> None:
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and targets of shape {tuple(targets.shape)} "
            "do not belong together; give (batch, num_classes) and (batch,)"
        )
    if not len(targets):
        raise ValueError("there are no test images, so nothing can be measured; give at least one")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"targets run from {low} to {high}, but the logits are for {logits.shape[1]} classes; "
            f"give labels from 0 to {logits.shape[1] - 1}"
        )

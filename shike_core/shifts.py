"""Test-agnostic evaluation: how accurate a model is where classes are not equally frequent.

A balanced test set stands for every other mix of its classes: its images are weighted so that
classes count as often as they would. As in Zhang et al., Self-Supervised Aggregation of Diverse
Experts for Test-Agnostic Long-Tailed Recognition, NeurIPS 2022, section 5: forward long-tailed as
the training data, uniform, and backward, where the classes rare in training are frequent.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FACTORS = (2, 5, 10, 25, 50)
"""Images of the most frequent class over those of the rarest one."""


def class_priors(class_counts: NDArray[np.int64], factor: float) -> NDArray[np.float64]:
    """How frequent each class is, exponentially from the one largest in training to the smallest.

    Args:
        class_counts: training images of each class, (num_classes,).
        factor: of the first class over the last; below 1 the tail is frequent, 1 is uniform.

    Returns:
        Shares that sum to 1, (num_classes,). Classes of equal size go by label.
    """
    rank = np.empty(len(class_counts))
    rank[np.argsort(-class_counts, kind="stable")] = np.arange(len(class_counts))
    priors = factor ** (-rank / max(len(class_counts) - 1, 1))
    shares: NDArray[np.float64] = priors / priors.sum()
    return shares


def accuracy_under_shifts(
    logits: Tensor,
    targets: Tensor,
    class_counts: NDArray[np.int64],
    logit_adjustment: float = 1.0,
) -> list[dict[str, Any]]:
    """Accuracy of a classifier under each distribution, and if it were told of it.

    Told of the priors, a model trained to be balanced adds their logarithm to its logits, and one
    that has learnt how frequent classes were takes that out as well (post-hoc correction; Menon et
    al., Long-tail Learning via Logit Adjustment, ICLR 2021, equation 9).

    Args:
        logits: of the ensemble, ``(images, num_classes)``.
        targets: class labels, ``(images,)``; classes without any are left out of the mix.
        class_counts: training images of each class, ``(num_classes,)``.
        logit_adjustment: times the logarithm of `class_counts` that the loss added to the logits:
            1 for balanced softmax, 0 for cross-entropy.

    Returns:
        From forward through uniform to backward: ``name``, ``factor``, ``accuracy`` and
        ``corrected_accuracy``, as fractions.
    """
    sizes = torch.from_numpy(class_counts).double().clamp(min=1)
    balanced = logits.double() - (1 - logit_adjustment) * sizes.log()
    tested, images = torch.unique(targets, return_counts=True)
    names = [*(("forward", f) for f in reversed(FACTORS)), ("uniform", 1)]
    names += [("backward", f) for f in FACTORS]
    rows = []
    for name, factor in names:
        shares = class_priors(
            class_counts[tested.numpy()], 1 / factor if name == "backward" else factor
        )
        priors = torch.zeros(logits.shape[1], dtype=torch.float64)
        priors[tested] = torch.from_numpy(shares)
        weight = torch.zeros_like(priors)  # of an image of each class
        weight[tested] = priors[tested] / images
        corrected = balanced + priors.log()  # a class that never comes is never answered
        right, right_corrected = (
            float(((z.argmax(dim=1) == targets) * weight[targets]).sum())
            for z in (logits, corrected)
        )
        rows.append(
            {
                "name": name,
                "factor": factor,
                "accuracy": right,
                "corrected_accuracy": right_corrected,
            }
        )
    return rows

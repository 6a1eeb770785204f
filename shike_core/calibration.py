"""Temperature scaling: one number that makes a model's confidence honest and changes no answer.

Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 4.2.
"""

import math

from torch import Tensor

LARGEST = 20.0
"""Temperatures are sought up to here, and down to 1 over it."""
_HALVINGS = 60


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature T with which ``softmax(logits / T)`` makes the targets most likely.

    The negative log-likelihood is convex in 1/T, so its only minimum lies where its slope, the mean
    over the images of the expected logit less the target's, changes sign.

    Args:
        logits: of the ensemble, ``(images, num_classes)``.
        targets: class labels, ``(images,)``; of images that were not trained on, or the model
            would seem surer than it may be.

    Returns:
        T between 1/`LARGEST` and `LARGEST`; an end is reached if the model is right on every
        image, or no better than chance.

    Raises:
        ValueError: there are no images, or the shapes do not belong together.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or not len(targets):
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and targets of shape {tuple(targets.shape)} "
            "give no temperature; give (images, num_classes) and (images,), of one image at least"
        )
    logits = logits.double()
    of_target = logits.gather(1, targets[:, None]).squeeze(1)  # (images,)

    def slope(log_temperature: float) -> float:
        probabilities = (logits / math.exp(log_temperature)).softmax(dim=1)
        return float(((probabilities * logits).sum(dim=1) - of_target).mean())

    low, high = -math.log(LARGEST), math.log(LARGEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        # Too sure: the expected logit is above the target's, and a higher temperature is needed.
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.exp((low + high) / 2)

"""Learning rates by epoch."""

import math

from shike_core.config import Schedule


def learning_rate(
    epoch: int,
    *,
    epochs: int,
    peak: float,
    warmup_start: float,
    warmup_epochs: int,
    schedule: Schedule = "cosine",
) -> float:
    """Linear warm-up, then the way down; constant within an epoch.

    Args:
        epoch: index within the stage, from 0.
        epochs: length of the stage.
        peak: reached right after the warm-up.
        warmup_start: rate of epoch 0.
        warmup_epochs: epochs before the peak.
        schedule: half a cosine from the end of the warm-up down to zero, or ``step``: a tenth of
            the peak after a third of the stage, a hundredth after two thirds, counted from its
            beginning. A warm-up that lasts longer than that hides the higher steps.
    """
    if epoch < warmup_epochs:
        return warmup_start + (peak - warmup_start) * epoch / warmup_epochs
    if schedule == "step":
        return float(peak / 10 ** (3 * epoch // epochs))
    done = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return 0.5 * peak * (1 + math.cos(math.pi * done))

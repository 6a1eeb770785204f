"""Learning rates by epoch."""

import math


def learning_rate(
    epoch: int, *, epochs: int, peak: float, warmup_start: float, warmup_epochs: int
) -> float:
    """Linear warm-up, then half a cosine down to zero; constant within an epoch.

    Args:
        epoch: index within the stage, from 0.
        epochs: length of the stage.
        peak: reached right after the warm-up.
        warmup_start: rate of epoch 0.
        warmup_epochs: epochs before the peak.
    """
    if epoch < warmup_epochs:
        return warmup_start + (peak - warmup_start) * epoch / warmup_epochs
    done = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return 0.5 * peak * (1 + math.cos(math.pi * done))

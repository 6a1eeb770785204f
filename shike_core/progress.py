"""What a person sees while a stage runs: a bar on a terminal, plain lines otherwise."""

import time
from collections.abc import Callable, Mapping
from typing import TextIO

from tqdm import tqdm

SHOWN = ("train/loss", "train/accuracy", "lr", "train/images_per_second", "validation/accuracy")


def console_log(epochs: int, stream: TextIO) -> Callable[[Mapping[str, float], int], None]:
    """A log that shows epoch, loss and time left.

    Args:
        epochs: how many there will be; step ``epochs - 1`` is the last.
        stream: a bar is drawn if it is a terminal, otherwise a line is printed for each epoch.
    """
    return _bar(epochs, stream) if stream.isatty() else _lines(epochs, stream)


def format_metrics(metrics: Mapping[str, float]) -> str:
    """The metrics worth a line, always in the same order."""
    return "  ".join(f"{key} {metrics[key]:.4g}" for key in SHOWN if key in metrics)


def _bar(epochs: int, stream: TextIO) -> Callable[[Mapping[str, float], int], None]:
    bar = tqdm(total=epochs, unit="epoch", file=stream, dynamic_ncols=True, desc="training")

    def log(metrics: Mapping[str, float], step: int) -> None:
        bar.set_postfix_str(f"loss {metrics.get('train/loss', float('nan')):.3f}", refresh=False)
        bar.update(step + 1 - bar.n)
        if bar.n >= epochs:
            bar.close()

    return log


def _lines(epochs: int, stream: TextIO) -> Callable[[Mapping[str, float], int], None]:
    previous = time.monotonic()

    def log(metrics: Mapping[str, float], step: int) -> None:
        nonlocal previous
        now = time.monotonic()
        # By the last epoch: a mean would count those of a resumed training, which took no time.
        left = (now - previous) * (epochs - step - 1)
        previous = now
        line = f"epoch {step + 1:>{len(str(epochs))}}/{epochs}  {format_metrics(metrics)}"
        print(line + f"  left {left:.0f} s" * (left >= 1), file=stream, flush=True)

    return log

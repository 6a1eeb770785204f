"""What every step does around its stage: errors for people, and progress on the terminal."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shike_core.errors import Interrupted, ShikeError
from shike_core.progress import console_log

PROGRESS_TERMINAL = "SHIKE_PROGRESS_TERMINAL"
"""Names the terminal of the person who started a local run; its steps have pipes for output."""


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn errors a person should read into one line on standard error and an exit code.

    Raises:
        SystemExit: 2 for wrong input, 128 plus the signal's number after an interruption.
    """
    try:
        yield
    except Interrupted as stop:
        print(f"stopped: {stop}", file=sys.stderr, flush=True)
        raise SystemExit(128 + stop.signal_number) from None
    except (ShikeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    except OSError as error:
        what = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
        advice = "; free some space or choose another place" if error.errno else ""
        print(f"error: {what}{advice}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def console(epochs: int) -> Callable[[Mapping[str, float], int], None]:
    """Progress on the terminal of whoever started the run, plain lines if there is none.

    Where nobody looks any more, as the terminal was closed, nothing is shown.
    """
    terminal = os.environ.get(PROGRESS_TERMINAL)
    # The terminal stays open as long as the step runs.
    stream = Path(terminal).open("w") if terminal else sys.stdout  # noqa: SIM115
    show = console_log(epochs, stream)

    def log(metrics: Mapping[str, float], step: int) -> None:
        with suppress(OSError):
            show(metrics, step)

    return log


def print_metrics(metrics: Mapping[str, float], step: int) -> None:
    """A log for steps that report once."""
    print("  ".join(f"{key} {value:g}" for key, value in metrics.items()), flush=True)


def print_lines(lines: Iterable[str]) -> None:
    """What a step has to say."""
    for line in lines:
        print(line, flush=True)


def show_in_kfp(report: Mapping[str, Any], metrics: Any, confusion: Any) -> None:
    """Fill KFP's metric artifacts from the evaluation's report."""
    for key, value in report["metrics"].items():
        metrics.log_metric(key, value)
    display = report["confusion_display"]
    confusion.log_confusion_matrix(display["labels"], display["matrix"])


def keep_weights(place: Path | None) -> None:
    """Let pretrained weights that a step downloads stay where its checkpoints do.

    Unless TORCH_HOME names a place, or this user has one that outlives the step.
    """
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch"
    if place is not None and not usual.is_dir():
        os.environ.setdefault("TORCH_HOME", str(place / "torch"))


def optional_path(text: str) -> Path | None:
    """A path parameter of a pipeline, where empty means none."""
    return Path(text) if text else None

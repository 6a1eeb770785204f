"""Errors told from the user's side: each message says what is wrong, what was found, what to do.

``ValueError`` is raised where a configuration is built; the classes here are raised where a caller
can act on them. The command line turns a ``ShikeError`` into one line and exit code 2.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any, NoReturn


class ShikeError(Exception):
    """Base of every error a user of this package is meant to read."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Python would call the class with the message, which is not what all of them take.
        return _arrived, (type(self), self.args), self.__dict__


def _arrived(kind: type[ShikeError], arguments: tuple[Any, ...]) -> ShikeError:
    """An error that another process has sent."""
    return kind.__new__(kind, *arguments)


class DatasetError(ShikeError):
    """The images, their labels or the subset directory are missing, corrupt or contradictory."""


class CheckpointError(ShikeError):
    """A checkpoint is missing, unreadable, or belongs to another configuration."""


class ArtifactError(ShikeError):
    """A result could not be written: no space, no permission, not a directory."""


class ComparisonError(ShikeError):
    """Evaluations are missing, damaged, or cannot be compared with each other."""


class DeviceError(ShikeError):
    """The hardware asked for is not there or cannot do what is asked."""


class PeerError(DeviceError):
    """Another of the processes that train together has ended; its own message says why."""


class ExportError(ShikeError):
    """The exported program does not give the checkpoint's answers."""


class DivergedError(ShikeError):
    """The loss is no longer finite.

    Attributes:
        epoch: index of the epoch, counted over both stages.
        step: index of the step within the epoch.
        terms: each term of the loss at that step.
    """

    def __init__(self, epoch: int, step: int, terms: Mapping[str, float]) -> None:
        self.epoch, self.step, self.terms = epoch, step, dict(terms)
        shown = ", ".join(f"{name} {value:g}" for name, value in self.terms.items())
        super().__init__(
            f"the loss is not finite at epoch {epoch}, step {step} ({shown}); the last good "
            "checkpoint is kept. Lower learning_rate, or train with precision=float32."
        )


class Interrupted(ShikeError):
    """Work was asked to stop by a signal, and what was done is kept.

    Attributes:
        signal_number: the signal received; the exit code is 128 plus this, as a shell reports it.
    """

    def __init__(self, signal_number: int, kept: str) -> None:
        self.signal_number = signal_number
        super().__init__(
            f"stopped by signal {signal_number} {kept}. Run the same command again to go on from "
            "there."
        )


class InterruptedTraining(Interrupted):
    """Training has written a checkpoint to go on from."""

    def __init__(self, signal_number: int, epoch: int, step: int, checkpoint: str) -> None:
        super().__init__(signal_number, f"at epoch {epoch}, step {step}; wrote {checkpoint}")


class InterruptedPacking(Interrupted):
    """Packing images has kept the pieces that are finished."""

    def __init__(self, signal_number: int, done: int, total: int) -> None:
        super().__init__(signal_number, f"after {done} of {total} images")


def exit_without_reader() -> NoReturn:
    """End the process in one line when whoever reads its output has left, as ``| head`` does."""
    # Python would write once more what it still holds, and fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit("error: nobody reads the output any more; the rest of it is lost")

"""What can be wrong before anything is computed; every check answers in seconds."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components import tracking
from shike_core.config import EvaluateConfig, RegisterConfig
from shike_core.data.sources import where_images_come_from
from shike_core.errors import ShikeError

GIB = 1024**3
SHARED_MEMORY = Path("/dev/shm")
NVIDIA_DEVICES = Path("/dev")
BY_HAND = "preflight"
"""Kind of an MLflow run that only shows that one can be written."""


class PreflightError(ShikeError):
    """Something that a run needs is missing."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run needs of the place it runs in."""

    dataset: str
    """Where the images come from."""
    data_dir: str = ""
    """Folder that has the source's official files, or empty."""
    checkpoint_dir: str = ""
    """Folder that outlives a step, or empty."""
    device: str = "auto"
    """cuda needs a GPU."""
    shared_memory: str = ""
    """Of /dev/shm, as in 2Gi; empty means any."""
    free_disk_gib: float = 1.0
    """Free space where a step writes."""
    code: str = ""
    """Commit that the pipeline was compiled from; empty means any."""
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the evaluation, fields of `EvaluateConfig`."""
    register: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the gate, fields of `RegisterConfig`; empty means that there is none."""


def check(needs: Needs, kind: str) -> list[str]:
    """Run every check, and write to the tracking server what was found.

    Args:
        needs: of the run.
        kind: of the MLflow run that is opened, see `tracking.open_run`; or `BY_HAND`.

    Returns:
        A line for each check.

    Raises:
        PreflightError: lists all that is wrong.
    """
    checks: dict[str, Callable[[], str]] = {
        "code": lambda: same_code(needs.code),
        "settings": lambda: later_settings_hold(needs.evaluate, needs.register),
        "data": lambda: where_images_come_from(needs.dataset, needs.data_dir or None),
        "disk": lambda: enough_disk(Path(tempfile.gettempdir()), needs.free_disk_gib),
        "checkpoints": lambda: checkpoints_can_be_kept(_path(needs.checkpoint_dir)),
        "shared memory": lambda: enough_shared_memory(needs.shared_memory),
        "GPU": lambda: gpu_visible(needs.device),
    }
    found, wrong = run_checks(checks)
    # The server comes last, so that it is told how the other checks ended.
    written, not_written = run_checks(
        {"tracking": lambda: tracking_server_takes(f"{needs.dataset}-lt", kind, [*found, *wrong])}
    )
    wrong += not_written
    if wrong:
        count = f"{len(wrong)} of {len(checks) + 1} checks failed"
        raise PreflightError("\n  - ".join([f"{count}, nothing was started:", *wrong]))
    return found + written


def run_checks(checks: dict[str, Callable[[], str]]) -> tuple[list[str], list[str]]:
    """Run checks by name; a line for each that went well, and one for each that did not."""
    found, wrong = [], []
    for name, run in checks.items():
        try:
            found.append(f"{name}: {run()}")
        except (ShikeError, ValueError, OSError) as error:
            wrong.append(f"{name}: {error}")
    return found, wrong


def tracking_server_takes(experiment: str, kind: str, lines: Iterable[str]) -> str:
    """Write tags and a file to the run of this pipeline run."""
    run = tracking.open_run(experiment, kind)
    ended = "FAILED"
    try:
        run.store_text("\n".join(lines), "preflight.txt")
        ended = "FINISHED"
    finally:
        if kind == BY_HAND:  # no step follows that would close it
            run.finish(ended)
    return f"run {run.run_id} takes tags and files"


def same_code(expected: str) -> str:
    """Whether this image has the code that the pipeline was compiled from."""
    here = os.environ.get(tracking.GIT_COMMIT, "")
    commit = here.removesuffix("-dirty")  # who allowed that knows it, and it stands in the result
    if expected and commit and not (expected.startswith(commit) or commit.startswith(expected)):
        raise PreflightError(
            f"this image holds commit {here}, the pipeline was compiled from {expected}; build the "
            "images of that commit, or compile the pipeline again"
        )
    return here or "of an unknown commit"


def later_settings_hold(evaluate: Mapping[str, Any], register: Mapping[str, Any]) -> str:
    """Whether the steps after a training of hours would take what they are given."""
    EvaluateConfig(**evaluate)
    if register:
        RegisterConfig(**register)
    return "of evaluation and gate are possible"


def enough_disk(place: Path, needed_gib: float) -> str:
    """Whether a folder has so much free space."""
    free = shutil.disk_usage(place).free / GIB
    if free < needed_gib:
        raise PreflightError(
            f"{place} has {free:.1f} GiB free, {needed_gib:g} GiB are needed; free some space or "
            "ask for more ephemeral storage"
        )
    return f"{free:.1f} GiB free in {place}"


def checkpoints_can_be_kept(place: Path | None) -> str:
    """Whether the folder for checkpoints can be written."""
    if place is None:
        return "none are kept, a step that is stopped begins anew"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place):
            pass
    except OSError as error:
        raise PreflightError(
            f"{place} cannot be written by user {os.getuid()} ({error.strerror}); mount a volume "
            "there that this user may write, or empty step2_checkpoint_dir"
        ) from error
    return enough_disk(place, 0.5)


def enough_shared_memory(asked: str) -> str:
    """Whether /dev/shm has the size that was asked for."""
    size = shutil.disk_usage(SHARED_MEMORY).total / GIB if SHARED_MEMORY.is_dir() else 0.0
    if asked and size < 0.99 * gib(asked):
        raise PreflightError(
            f"{SHARED_MEMORY} has {size:.2f} GiB, {asked} were asked for; mount a memory volume "
            "there (docker run: --shm-size)"
        )
    return f"{size:.2f} GiB"


def gpu_visible(device: str) -> str:
    """Whether a GPU that must be there is: in a pod that holds none, only the train step knows."""
    if device != "cuda":
        return f"not demanded (device {device})"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "demanded; the train step looks for it"
    if not any(NVIDIA_DEVICES.glob("nvidia[0-9]*")):
        raise PreflightError(
            "device cuda is demanded, but this machine shows no NVIDIA GPU; give device auto or "
            "cpu, or run where there is one (docker run: --gpus all)"
        )
    return "there"


def gib(quantity: str) -> float:
    """A Kubernetes quantity of memory, as in 512Mi, 2Gi or 2G, in GiB.

    Raises:
        ValueError: it is none.
    """
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "K": 1e3, "M": 1e6, "G": 1e9}
    number = quantity.rstrip("KMGTi")
    unit = quantity[len(number) :]
    try:
        return float(number) * (units[unit] if unit else 1) / GIB
    except (KeyError, ValueError):
        raise ValueError(
            f"{quantity!r} is no amount of memory; write it as in 512Mi or 2Gi"
        ) from None


def _path(text: str) -> Path | None:
    return Path(text) if text else None

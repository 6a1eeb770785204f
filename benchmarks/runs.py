"""Trainings of one recipe with several seeds, and what they reach: what the scripts here share."""

import argparse
import ast
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision

from shike_core import stages
from shike_core.checkpoint import load_trained
from shike_core.config import Device, TrainConfig
from shike_core.data.manifest import Subset, read_subset
from shike_core.data.stream import open_tables
from shike_core.device import resolve_device
from shike_core.errors import InterruptedTraining, ShikeError
from shike_core.evaluate import measure, predict

ROOT = Path(__file__).parents[1]
EVAL_BATCH_SIZE = 500
CALIBRATION_BINS = 15
OUT_OF_TIME = 75
"""Exit code by which many programs ask to be called again."""
Split = Literal["test", "validation"]
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train, and where."""

    name: str
    """Of the recipe."""
    config: TrainConfig
    """The seed in it does not count."""
    seeds: Sequence[int]
    subset: Path
    """Directory written by the stage build_subset."""
    work: Path
    """Checkpoints; the same job goes on from them."""
    split: Split = "test"
    """What is measured: the test images once, at the end, or those held out of training."""
    watch: Split = "validation"
    """What is measured with each checkpoint, if there is such a split."""
    print_every: int = 10
    """Epochs that a line on the screen stands for."""


def train_seeds(job: Job, seconds: float) -> Result:
    """Train and measure every seed: on a GPU side by side, otherwise one after the other.

    Args:
        job: what.
        seconds: after which to stop with checkpoints.

    Returns:
        What `gpu_headline` documents, without what is about the machine.

    Raises:
        InterruptedTraining: time was up, or somebody asked to stop; the same job goes on.
        ShikeError: as `shike_core.stages.train_together`.
    """
    configs = [replace(job.config, seed=seed) for seed in job.seeds]
    outs = [job.work / job.name.replace("/", "-") / f"seed-{seed}" for seed in job.seeds]
    logs = [line_per_range(f"{job.name} seed {s}", job.print_every) for s in job.seeds]
    with stopped_after(seconds):
        reports = stages.train_together(configs, job.subset, outs, logs, watch=job.watch)
    data = read_subset(job.subset, splits=(job.split,))
    device = resolve_device(job.config.device)
    runs = [
        _measured(seed, out, data, job.split, device, report)
        for seed, out, report in zip(job.seeds, outs, reports, strict=True)
    ]
    together = len(runs) if device.type == "cuda" else 1
    accuracies = [run["test_accuracy" if job.split == "test" else "accuracy"] for run in runs]
    return {
        "recipe": job.name,
        "config": reports[0]["config"] | {"seed": None},
        "split": job.split,
        "subset_digest": data.digest,
        "test_digest": data.test_digest,
        "side_by_side": together,
        "seconds_per_run": max(run["seconds"]["training"] for run in runs) / together,
        "compile_seconds": sum(report["seconds_of_preparation"] for report in reports),
        "accuracy_mean": statistics.mean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "seeds": runs,
    }


def _measured(
    seed: int,
    out: Path,
    data: Subset,
    split: Split,
    device: torch.device,
    report: Mapping[str, Any],
) -> Result:
    started = time.perf_counter()
    trained = load_trained(out / stages.CHECKPOINT, device)
    (table,) = open_tables(data.splits[split], [trained.config], device)
    logits, mirrored = (
        predict(trained.model, table, trained.mean, trained.std, EVAL_BATCH_SIZE, flip)
        for flip in (False, True)
    )
    metrics = measure(
        logits,
        torch.tensor(data.splits[split].labels),
        np.array(trained.class_counts),
        data.class_names,
        CALIBRATION_BINS,
        mirrored,
    )["metrics"]
    found = {key.removeprefix("test/"): value for key, value in metrics.items()}
    prefix = "test_" if split == "test" else ""
    images_trained = report["images"]
    per_stage = {
        f"stage{stage}": sum(
            images_trained / epoch["train/images_per_second"]
            for epoch in trained.history
            if epoch["stage"] == stage
        )
        for stage in (1, 2)
    }
    return {
        "seed": seed,
        f"{prefix}accuracy": found["accuracy"],
        "shot_groups": {
            group: found[f"{group}/accuracy"]
            for group in ("many_shot", "medium_shot", "few_shot")
            if f"{group}/accuracy" in found
        },
        "experts": [
            found[f"expert_{index}/accuracy"] for index in range(trained.config.num_experts)
        ],
        "expected_calibration_error": found["expected_calibration_error"],
        "flip_accuracy": found["flip/accuracy"],
        "training_digest": report["training_digest"],
        "device": report["device"],
        "precision": report["precision"],
        "acceleration": report["acceleration"],
        "seconds": {
            **per_stage,
            "training": sum(per_stage.values()),
            "evaluation": time.perf_counter() - started,
        },
        "curve": [
            {key: epoch[key] for key in epoch if key in _CURVE}
            for index, epoch in enumerate(trained.history)
            if (index + 1) % 10 == 0 or index + 1 == len(trained.history)
        ],
    }


_CURVE = ("epoch", "train/loss", "train/accuracy", "validation/accuracy", "test/accuracy")


def line_per_range(name: str, every: int) -> Callable[[Mapping[str, float], int], None]:
    """A log that prints one line for so many epochs."""
    first = 0

    def log(metrics: Mapping[str, float], epoch: int) -> None:
        nonlocal first
        if (epoch + 1) % every:
            return
        watched = [f"{key} {metrics[key]:.4f}" for key in _CURVE[3:] if key in metrics]
        print(
            f"{name}: epochs {first}-{epoch}  loss {metrics['train/loss']:.4f}  "
            f"train accuracy {metrics['train/accuracy']:.4f}  lr {metrics['lr']:.4f}  "
            f"{metrics['train/images_per_second']:.0f} images/s  {'  '.join(watched)}".rstrip(),
            flush=True,
        )
        first = epoch + 1

    return log


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Ask this process to stop, as a cluster would, when the time is over."""
    ended = threading.Event()

    def stop() -> None:
        ended.wait(max(0.0, seconds))
        # Before the training listens to signals, one would kill it.
        while not ended.is_set() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            ended.wait(0.1)
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Thread(target=stop, daemon=True)
    timer.start()
    try:
        yield
    finally:
        ended.set()
        timer.join()


def with_epochs(config: TrainConfig, epochs: int) -> TrainConfig:
    """The same recipe in more or fewer epochs: stages, warm-up and averaging keep their shares.

    Args:
        config: of the recipe.
        epochs: of both stages together.
    """
    share = epochs / config.epochs
    stage2 = max(1, round(share * config.stage2_epochs)) if config.stage2_epochs else 0
    return replace(
        config,
        stage1_epochs=epochs - stage2,
        stage2_epochs=stage2,
        warmup_epochs=min(config.warmup_epochs, round(share * config.warmup_epochs)),
        averaging_epochs=share * config.averaging_epochs,
    )


def with_changes(config: TrainConfig, changes: Sequence[str]) -> TrainConfig:
    """Set fields from texts such as ``batch_size=64``.

    Raises:
        ValueError: a text that is no such setting, or a value the field does not take.
    """
    names = {field.name for field in fields(TrainConfig)}
    values: dict[str, Any] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in names:
            raise ValueError(f"{change!r} is no FIELD=VALUE of TrainConfig: {', '.join(names)}")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text  # such as bfloat16
    return replace(config, **values)


def machine(device: Device) -> Result:
    """Hardware, versions and state of the code."""
    resolved = resolve_device(device)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if resolved.type == "cuda":
        name, peak = torch.cuda.get_device_name(resolved), torch.cuda.max_memory_allocated(resolved)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "device": name,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if resolved.type == "cuda" else None,
        },
        "commit": commit.stdout.strip() or None,
        "peak_memory_bytes": peak,
    }


def exit_code(train: Callable[[], None]) -> int:
    """Run what trains; an error a person should read becomes one line.

    Returns:
        0, 2 for an error a user can mend, `OUT_OF_TIME` for a training that can go on.
    """
    try:
        train()
    except InterruptedTraining as interruption:
        print(interruption, file=sys.stderr)
        return OUT_OF_TIME
    except (ShikeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """What every script that trains takes."""
    parser.add_argument("subset", type=Path, help="directory written by build-subset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of both stages; default: the recipe's")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="changes",
                        help="other values for the training")  # fmt: skip
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints; go on from them")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--minutes", type=float, default=9.0,
                        help="then stop with checkpoints; the same command goes on")  # fmt: skip
    parser.add_argument("--print-every", type=int, default=10, help="epochs a line stands for")


def configured(config: TrainConfig, arguments: argparse.Namespace) -> TrainConfig:
    """A recipe's training with what the command line says."""
    if arguments.epochs:
        config = with_epochs(config, arguments.epochs)
    return with_changes(replace(config, device=arguments.device), arguments.changes)

"""Trainings of one recipe with several seeds, and what they reach: what the scripts here share."""

import argparse
import ast
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision

from shike_core import stages
from shike_core.checkpoint import load, load_trained
from shike_core.config import Device, TrainConfig
from shike_core.data.manifest import Subset, read_subset
from shike_core.data.stream import open_tables
from shike_core.device import peak_memory, resolve_device
from shike_core.errors import CheckpointError, InterruptedTraining, ShikeError
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


def train_seeds(job: Job, seconds: float, side_by_side: int) -> Result:
    """`train_jobs` for one job.

    Raises:
        InterruptedTraining: time was up, or somebody asked to stop; the same job goes on.
        ShikeError: as `shike_core.stages.train_together`.
    """
    (result,) = train_jobs([job], seconds, side_by_side)
    if isinstance(result, ShikeError):
        raise result
    return result


def train_jobs(jobs: Sequence[Job], seconds: float, side_by_side: int) -> list[Result | ShikeError]:
    """Train and measure all seeds of some jobs: on a GPU some side by side.

    Args:
        jobs: of one subset and device, which watch the same split.
        seconds: after which to stop with checkpoints.
        side_by_side: most trainings at the same time.

    Returns:
        For each job what `gpu_headline` documents, without what is about the machine, or, if
        one of its trainings failed, the error of the last training that did.

    Raises:
        InterruptedTraining: time was up, or somebody asked to stop; the same jobs go on.
        DeviceError: there is no such device.
    """
    first = jobs[0]
    device = resolve_device(first.config.device)
    at_once = side_by_side if device.type == "cuda" else 1
    runs = [_Run(job, seed) for job in jobs for seed in job.seeds]
    failure: ShikeError | None = None
    deadline = time.monotonic() + seconds
    for start in range(0, len(runs), at_once):
        # Each asked anew: one that was finished before, or fails, does not hear of the time.
        with stopped_after(deadline - time.monotonic()):
            failure = _train(runs[start : start + at_once], first) or failure
    data = read_subset(first.subset, splits=(first.split,))
    for run in runs:
        if run.report:
            run.result = _measured(run, data, device)
    results: list[Result | ShikeError] = []
    for job in jobs:
        of_job = [run for run in runs if run.job is job]
        if all(run.result for run in of_job):
            results.append(_result(job, of_job, data))
        elif failure:
            results.append(failure)
    return results


@dataclass(eq=False)
class _Run:
    """One training of a job, as far as it has come."""

    job: Job
    seed: int
    report: Mapping[str, Any] = field(default_factory=dict)
    result: Result = field(default_factory=dict)

    @property
    def out(self) -> Path:
        name = self.job.name.replace("/", "-")
        return self.job.work / name / f"seed-{self.seed}"

    @property
    def finished(self) -> bool:
        path = self.out / stages.CHECKPOINT
        return path.exists() and load(path).finished


def _train(runs: Sequence[_Run], first: Job) -> ShikeError | None:
    """Train all of them at the same time; the error of one that fails."""
    failure = None
    try:
        for run in runs:
            _take_stage1(run)
        reports = _reports(runs, first)
    except InterruptedTraining:
        raise
    except ShikeError as error:  # the others have been trained to their end
        failure, runs = error, [run for run in runs if run.finished]
        reports = _reports(runs, first) if runs else []
    for run, report in zip(runs, reports, strict=True):
        run.report = report
    return failure


def _take_stage1(run: _Run) -> None:
    """Spare a training the stage 1 that another one of that seed has made in the same folder."""
    if not run.job.config.stage2_epochs:
        return
    config = replace(run.job.config, seed=run.seed)
    for other in sorted(run.job.work.glob(f"*/seed-{run.seed}/{stages.CHECKPOINT}")):
        with suppress(CheckpointError, ValueError):  # of another stage 1
            stages.take_stage1(other, config, run.job.subset, run.out)


def _reports(runs: Sequence[_Run], first: Job) -> list[stages.Report]:
    return stages.train_together(
        [replace(run.job.config, seed=run.seed) for run in runs],
        first.subset,
        [run.out for run in runs],
        [line_per_range(f"{run.job.name} seed {run.seed}", run.job.print_every) for run in runs],
        watch=first.watch,
    )


def _result(job: Job, runs: Sequence[_Run], data: Subset) -> Result:
    """What a job has come to."""
    accuracies = [
        run.result["test_accuracy" if job.split == "test" else "accuracy"] for run in runs
    ]
    costs = [run.result.pop("costs") for run in runs]
    return {
        "recipe": job.name,
        "config": runs[0].report["config"] | {"seed": None},
        "split": job.split,
        "subset_digest": data.digest,
        "test_digest": data.test_digest,
        "side_by_side": max(cost["side_by_side"] for cost in costs),
        "seconds_per_run": statistics.mean(cost["seconds"] for cost in costs),
        "compile_seconds": sum(cost["preparation_seconds"] for cost in costs),
        "peak_memory_bytes": max(cost["peak_memory_bytes"] for cost in costs),
        "accuracy_mean": statistics.mean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "seeds": [run.result for run in runs],
    }


def _measured(run: _Run, data: Subset, device: torch.device) -> Result:
    started = time.perf_counter()
    split, report = run.job.split, run.report
    trained = load_trained(run.out / stages.CHECKPOINT, device)
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
        logit_adjustment=trained.config.logit_adjustment,
    )["metrics"]
    found = {key.removeprefix("test/"): value for key, value in metrics.items()}
    prefix = "test_" if split == "test" else ""
    images_trained = report["images"]
    costs = load(run.out / stages.CHECKPOINT).costs
    seconds = [images_trained / epoch["train/images_per_second"] for epoch in trained.history]
    per_stage = {
        f"stage{stage}": sum(
            of_epoch
            for of_epoch, epoch in zip(seconds, trained.history, strict=True)
            if epoch["stage"] == stage
        )
        for stage in (1, 2)
    }
    return {
        "seed": run.seed,
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
        "device": _each(costs, "device", report),
        "precision": report["precision"],
        "acceleration": _each(costs, "acceleration", report),
        "fallbacks": list(
            dict.fromkeys(reason for cost in costs for reason in cost.get("fallbacks", ()))
        ),
        "seconds": {
            **per_stage,
            "training": sum(per_stage.values()),
            "evaluation": time.perf_counter() - started,
        },
        "costs": _total(costs, seconds, device),
        "curve": [
            {key: epoch[key] for key in epoch if key in _CURVE}
            for index, epoch in enumerate(trained.history)
            if (index + 1) % 10 == 0 or index + 1 == len(trained.history)
        ],
    }


def _each(costs: Sequence[Result], key: str, report: Mapping[str, Any]) -> str:
    """What its epochs were trained with, not the call that reads it: joined, if that changed."""
    return " ".join(dict.fromkeys(cost.get(key, report[key]) for cost in costs))


def _total(costs: Sequence[Result], seconds: Sequence[float], device: torch.device) -> Result:
    """What one training has cost, whatever the number of calls.

    Args:
        costs: of its epochs, see `shike_core.checkpoint.Checkpoint`.
        seconds: of its epochs.
        device: of what comes after them.
    """
    widths = [cost.get("trainings", 1) for cost in costs]
    return {
        "side_by_side": int(max(widths)),
        "seconds": sum(of_epoch / n for of_epoch, n in zip(seconds, widths, strict=True)),
        "preparation_seconds": sum(cost.get("preparation_seconds", 0.0) for cost in costs),
        "peak_memory_bytes": int(
            max([peak_memory(device), *(cost.get("peak_memory_bytes", 0) for cost in costs)])
        ),
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
    """The same recipe in more or fewer epochs: stages and averaging keep their shares.

    A warm-up keeps its epochs, since it takes steps for a network to settle, not a share of them:
    with one epoch instead of five three experts start so badly that it shows to the end
    (docs/results.md). Only where that is more than a twentieth of the epochs, half of a stage 2 of
    a tenth of them, is it fewer, but not below its share; so it is the same in all variants.

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
        warmup_epochs=min(
            config.warmup_epochs, max(round(share * config.warmup_epochs), epochs // 20)
        ),
        averaging_epochs=share * config.averaging_epochs,
    )


def with_changes(config: TrainConfig, changes: Sequence[str]) -> TrainConfig:
    """Set fields from texts such as ``batch_size=64``.

    Raises:
        ValueError: a text that is no such setting, or a value the field does not take.
    """
    names = [field.name for field in fields(TrainConfig)]
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
    commit = ""
    with suppress(OSError):  # no git on this machine
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    if resolved.type == "cuda":
        name = torch.cuda.get_device_name(resolved)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if resolved.type == "cuda" else None,
        },
        "commit": commit or None,
        "peak_memory_bytes": peak_memory(resolved),
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
    """What every script that trains on one subset takes."""
    parser.add_argument("subset", type=Path, help="directory written by build-subset")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints; go on from them")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    training_arguments(parser)


def training_arguments(parser: argparse.ArgumentParser) -> None:
    """How the trainings are made, and for how long."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of both stages; default: the recipe's")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="changes",
                        help="other values for the training")  # fmt: skip
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--minutes", type=float, default=8.0,
                        help="then stop with checkpoints; the same command goes on; measuring what "
                             "is trained comes after them")  # fmt: skip
    parser.add_argument("--print-every", type=int, default=10, help="epochs a line stands for")
    parser.add_argument("--side-by-side", type=int, default=3,
                        help="most trainings at the same time on a GPU")  # fmt: skip


def configured(config: TrainConfig, arguments: argparse.Namespace) -> TrainConfig:
    """A recipe's training with what the command line says.

    Raises:
        ValueError: a seed is given twice, or a value that is none.
    """
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise ValueError(
            f"--seeds {' '.join(map(str, arguments.seeds))} repeats one, which would count as two "
            "trainings; give each once"
        )
    if arguments.epochs:
        config = with_epochs(config, arguments.epochs)
    return with_changes(replace(config, device=arguments.device), arguments.changes)

"""How fast a GPU trains in each way of running a step, alone and several trainings side by side.

    python -m benchmarks.gpu_engine SUBSET --side-by-side 1 3 6 12 \
        --accelerations none cuda-graph --out benchmarks/results/gpu-engine.json

Every case trains the recipe for a few epochs from the beginning. The first three epochs of a
stage do not count: in them convolutions are chosen, steps compiled and recorded, that of the last,
smaller batch in the third. A case that fails is printed and left out.

The file written holds ``machine`` as in `gpu_headline` and ``cases``, a list with
``acceleration``, ``side_by_side``, ``preparation_seconds`` of all trainings together,
``peak_memory_bytes`` and, of both stages, ``images_per_second`` of all trainings together,
``milliseconds_per_step`` and ``seconds_per_run``: of the whole recipe at this speed, without
preparation. ``data_images_per_second`` is that of making batches alone.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.runs import ROOT, exit_code, machine
from shike_core import stages
from shike_core.config import TrainConfig
from shike_core.data.loader import steps_per_epoch
from shike_core.data.manifest import Subset, read_subset
from shike_core.data.stream import open_tables
from shike_core.device import resolve_device
from shike_core.errors import ShikeError
from shike_core.recipes import recipe_named
from shike_core.stages import write_json

NOT_COUNTED = 3
"""Epochs of a stage."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; the exit code is that of `exit_code`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subset", type=Path, help="directory written by build-subset")
    parser.add_argument("--recipe", default="cifar100-lt", help="or RECIPE/VARIANT")
    parser.add_argument("--accelerations", nargs="+", default=["none", "cuda-graph", "compile"],
                        choices=["none", "cuda-graph", "compile"])  # fmt: skip
    parser.add_argument("--side-by-side", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--epochs", type=int, default=3, help="that count, of either stage")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-engine.json",
                        help="the JSON file to write")  # fmt: skip
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Measure every case, write after each of them, print a line for each."""
    config = replace(recipe_named(options.recipe).train, device=options.device)
    found: dict[str, Any] = {"recipe": options.recipe, "cases": []}
    data = read_subset(options.subset, splits=("train",))
    found["data_images_per_second"] = data_speed(config, data)
    print(f"data alone: {found['data_images_per_second']:.0f} images/s", flush=True)
    for acceleration in options.accelerations:
        for count in options.side_by_side:
            changed = replace(config, acceleration=acceleration)
            try:
                case = measured(changed, options.subset, count, options.epochs)
            except (ShikeError, RuntimeError) as error:
                print(f"{acceleration}, {count} side by side: {error}", flush=True)
                continue
            found["cases"].append(case)
            write_json({"machine": machine(options.device)} | found, options.out)
            print(line(case), flush=True)


def measured(config: TrainConfig, subset: Path, count: int, epochs: int) -> dict[str, Any]:
    """Some trainings of a few epochs, seeds 0 and up.

    Args:
        config: of the recipe; its epochs decide what a whole run would take.
        subset: directory written by build-subset.
        count: trainings at the same time.
        epochs: of each stage that count.
    """
    stage2 = NOT_COUNTED + epochs if config.stage2_epochs else 0
    short = replace(
        config, stage1_epochs=NOT_COUNTED + epochs, stage2_epochs=stage2, checkpoint_every=10**6
    )
    histories: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    on_gpu = resolve_device(config.device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as directory:
        reports = stages.train_together(
            [replace(short, seed=seed) for seed in range(count)],
            subset,
            [Path(directory) / str(seed) for seed in range(count)],
            [partial(_keep, history) for history in histories],
        )
    steps = steps_per_epoch(reports[0]["images"], config.batch_size)
    case: dict[str, Any] = {
        "acceleration": reports[0]["acceleration"],
        "fallbacks": reports[0]["fallbacks"],
        "precision": reports[0]["precision"],
        "side_by_side": count,
        "preparation_seconds": sum(report["seconds_of_preparation"] for report in reports),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "seconds_per_run": 0.0,
    }
    for stage, whole in ((1, config.stage1_epochs), (2, config.stage2_epochs)):
        of_stage = [[e for e in history if e["stage"] == stage] for history in histories]
        speeds = [
            len(counted) / sum(1 / epoch["train/images_per_second"] for epoch in counted)
            for epochs_of in of_stage
            if (counted := epochs_of[NOT_COUNTED:])
        ]
        if not speeds:
            continue
        total = sum(speeds) if on_gpu else sum(speeds) / count
        seconds = reports[0]["images"] / total  # of an epoch of one training
        case[f"stage{stage}"] = {
            "images_per_second": total,
            "milliseconds_per_step": 1000 * seconds / steps,
        }
        case["seconds_per_run"] += whole * seconds
    return case


def _keep(history: list[dict[str, Any]], metrics: Mapping[str, float], epoch: int) -> None:
    history.append(dict(metrics) | {"epoch": epoch})


def data_speed(config: TrainConfig, data: Subset, epochs: int = 3) -> float:
    """Images a second when nothing but batches is made."""
    device = resolve_device(config.device)
    (table,) = open_tables(data.splits["train"], [config], device)
    seconds = []
    for epoch in range(epochs + 1):
        started = time.perf_counter()
        for _ in table.training_batches(config, data.mean, data.std, epoch=epoch):
            pass
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    table.close()
    return epochs * len(table) / sum(seconds[1:])


def line(case: dict[str, Any]) -> str:
    """A case as a line of text."""
    speeds = "  ".join(
        f"stage {stage}: {case[key]['images_per_second']:.0f} images/s, "
        f"{case[key]['milliseconds_per_step']:.2f} ms a step"
        for stage in (1, 2)
        if (key := f"stage{stage}") in case
    )
    memory = case["peak_memory_bytes"]
    peak = f"  {memory / 2**30:.2f} GiB" if memory else ""
    return (
        f"{case['acceleration']}, {case['side_by_side']} side by side: {speeds}  "
        f"{case['seconds_per_run']:.1f} s a run (prepared in {case['preparation_seconds']:.1f} s)"
        f"{peak}"
    )


if __name__ == "__main__":
    sys.exit(main())

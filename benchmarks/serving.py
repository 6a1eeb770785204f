"""Latency and throughput of the exported program against the checkpoint it came from, by batch.

For each batch size both answer the same images in turns; a latency is that of one call, a rate the
images of a call over its median latency.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks import runs
from shike_core.checkpoint import load_trained
from shike_core.data.augment import normalise
from shike_core.errors import ShikeError
from shike_core.export import DeployedModel, folded, save_program
from shike_core.files import atomic_write
from shike_core.stages import CHECKPOINT

WARM_UP = 3
Result = dict[str, Any]


def measure(checkpoint: Path, batch_sizes: tuple[int, ...], seconds: float) -> list[Result]:
    """Time both forms.

    Args:
        checkpoint: directory written by train, or the checkpoint in it.
        batch_sizes: images per call.
        seconds: spent on each form at each size, at least; five calls at least as well.

    Returns:
        A row for each size.

    Raises:
        CheckpointError: it cannot be used.
        ValueError: it does not say which size of image it is for.
    """
    path = checkpoint / CHECKPOINT if checkpoint.is_dir() else checkpoint
    trained = load_trained(path)
    if trained.image_size is None:
        raise ValueError(f"{path} does not say which size of image it is for")
    generator = torch.Generator().manual_seed(0)
    shape = (max(batch_sizes), 3, *trained.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    temperature = trained.calibration_temperature
    deployed = DeployedModel(trained.model, trained.mean, trained.std, temperature).eval()
    model = trained.model.to(memory_format=torch.channels_last)  # as the engine has it

    def ask_checkpoint(pixels: Tensor) -> Tensor:
        logits: Tensor = model(normalise(pixels, trained.mean, trained.std), stage=2)
        return (logits.mean(dim=1) / (temperature or 1.0)).softmax(dim=1)

    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        program = save_program(folded(deployed), images[:2].clone(), Path(directory))
        forms = {"checkpoint": ask_checkpoint, "program": program}
        return [_row(forms, images[:size], seconds) for size in batch_sizes]


def _row(forms: dict[str, Callable[[Tensor], Tensor]], images: Tensor, seconds: float) -> Result:
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for ask in forms.values():
        for _ in range(WARM_UP):
            ask(images)
    while min(sum(times) for times in taken.values()) < seconds or len(taken["program"]) < 5:
        for name, ask in forms.items():
            start = time.perf_counter()
            ask(images)
            taken[name].append(time.perf_counter() - start)
    row: Result = {"batch_size": len(images), "calls": len(taken["program"])}
    for name, times in taken.items():
        median = statistics.median(times)
        row[name] = {
            "median_ms": 1000 * median,
            "p95_ms": 1000 * sorted(times)[int(0.95 * (len(times) - 1))],
            "images_per_second": len(images) / median,
        }
    ratios = [a / b for a, b in zip(taken["checkpoint"], taken["program"], strict=True)]
    row["speedup"] = statistics.median(ratios)
    return row


def as_table(rows: list[Result]) -> str:
    """The rows in Markdown."""
    lines = [
        "| images a call | checkpoint, ms | program, ms (95 %) | program, images/s | "
        "checkpoint's time over program's |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        program = row["program"]
        lines.append(
            f"| {row['batch_size']} | {row['checkpoint']['median_ms']:.1f} | "
            f"{program['median_ms']:.1f} ({program['p95_ms']:.1f}) | "
            f"{program['images_per_second']:.0f} | {row['speedup']:.2f} |"
        )
    return "\n".join(lines)


def main(
    checkpoint: tyro.conf.Positional[Path],
    out: Path | None = None,
    batch_sizes: tuple[int, ...] = (1, 8, 32, 128),
    seconds: float = 5.0,
) -> None:
    """Time the exported program against the checkpoint, on the CPU.

    Args:
        checkpoint: directory written by train, or the checkpoint in it.
        out: JSON file to write.
        batch_sizes: images per call.
        seconds: for each form and size.
    """
    try:
        rows = measure(checkpoint, batch_sizes, seconds)
    except (ShikeError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(as_table(rows))
    if out is not None:
        report = {**runs.machine("cpu"), "threads": torch.get_num_threads(), "rows": rows}
        with atomic_write(out) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.serving")

"""Memory of stage 1's losses, up to the 8142 classes of iNaturalist 2018.

    python -m benchmarks.distillation_memory --out benchmarks/results/distillation-memory.json

Of one forward and backward pass of `shike_core.losses.stage1_loss` on float32 logits: the most that
tensors take at one time, above the logits themselves. On a CPU it is the sum of what torch's
profiler reports of every allocation, so it is exact and the same on any machine; on a GPU it is
what the allocator counts. One of batch, experts and classes varies, the others have the last of
their values.

The file written holds:

- ``device``, ``versions``, ``commit``;
- ``points``: for each its ``batch_size``, ``num_experts`` and ``num_classes``; ``bytes`` of the
  whole loss, and ``cross_entropy_bytes`` of the same without distillation;
- ``fit``: by least squares, ``bytes`` as so many float32 for each logit of an expert
  (``per_logit``) and for each of a class (``per_class``: the teacher's, which the experts share),
  and the ``largest_deviation`` of a point from it, a fraction.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.runs import Result, exit_code, machine
from shike_core.device import resolve_device
from shike_core.losses import stage1_loss
from shike_core.stages import write_json

FLOAT = 4
"""Bytes of a float32."""


class Point(NamedTuple):
    """The shape of a batch of logits."""

    batch_size: int
    num_experts: int
    num_classes: int


def points(
    batch_sizes: Sequence[int], experts: Sequence[int], classes: Sequence[int]
) -> list[Point]:
    """All points that have two of their values last in their list."""
    last = Point(batch_sizes[-1], experts[-1], classes[-1])
    varied = [
        *(last._replace(batch_size=value) for value in batch_sizes),
        *(last._replace(num_experts=value) for value in experts),
        *(last._replace(num_classes=value) for value in classes),
    ]
    return list(dict.fromkeys(varied))


def loss_bytes(point: Point, device: torch.device, dkt_weight: float, mutual_weight: float) -> int:
    """The most that the loss and its gradient take at one time, above the logits."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(point, generator=generator).to(device).requires_grad_()
    targets = torch.randint(point.num_classes, point[:1], generator=generator).to(device)

    def run() -> None:
        stage1_loss(
            logits,
            targets,
            kl_reduction="batchmean",
            dkt_weight=dkt_weight,
            mutual_weight=mutual_weight,
        ).total.backward()

    return gpu_peak(run, device) if device.type == "cuda" else cpu_peak(run)


def cpu_peak(run: Callable[[], None]) -> int:
    """The highest sum of all allocations and releases so far, while something runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return int(np.cumsum([event["args"]["Bytes"] for event in changes]).max())


def gpu_peak(run: Callable[[], None], device: torch.device) -> int:
    """By how much the allocator's peak is above what was allocated before."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def measure(shapes: Iterable[Point], device: torch.device) -> list[Result]:
    """All of the loss, and cross-entropy alone, at each point."""
    return [
        point._asdict()
        | {
            "bytes": loss_bytes(point, device, dkt_weight=0.1, mutual_weight=0.01),
            "cross_entropy_bytes": loss_bytes(point, device, dkt_weight=0.0, mutual_weight=0.0),
        }
        for point in shapes
    ]


def fit(rows: Sequence[Result]) -> Result:
    """Bytes as a multiple of batch x classes x experts and one of batch x classes."""
    measured = np.array([row["bytes"] for row in rows])
    shared = np.array([FLOAT * row["batch_size"] * row["num_classes"] for row in rows])
    terms = np.stack([shared * [row["num_experts"] for row in rows], shared], axis=1)
    # Each row counts by its own size, or only the largest would decide.
    factors, *_ = np.linalg.lstsq(terms / measured[:, None], np.ones(len(rows)))
    return {
        "per_logit": float(factors[0]),
        "per_class": float(factors[1]),
        "largest_deviation": float(np.abs(terms @ factors / measured - 1).max()),
    }


def table(rows: Sequence[Result], fitted: Result) -> str:
    """The points for a terminal, as Markdown."""
    lines = [
        "| batch | experts | classes | logits, MiB | loss, MiB | cross-entropy alone, MiB "
        "| loss over logits |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        logits = FLOAT * row["batch_size"] * row["num_experts"] * row["num_classes"]
        sizes = (logits, row["bytes"], row["cross_entropy_bytes"])
        cells = [row["batch_size"], row["num_experts"], row["num_classes"]]
        cells += [f"{size / 2**20:.2f}" for size in sizes]
        lines.append("| " + " | ".join(map(str, cells)) + f" | {row['bytes'] / logits:.2f} |")
    return "\n".join(
        [
            *lines,
            "",
            f"batch x classes x ({fitted['per_logit']:.2f} x experts + {fitted['per_class']:.2f}) "
            f"float32, within {100 * fitted['largest_deviation']:.1f} %",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; the exit code is that of `exit_code`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 2, 6, 3])
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 365, 1000, 8142])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Measure, write, print the table."""
    shapes = points(options.batch_sizes, options.experts, options.classes)
    rows = measure(shapes, resolve_device(options.device))
    fitted = fit(rows)
    write_json(machine(options.device) | {"points": rows, "fit": fitted}, options.out)
    print(table(rows, fitted))


if __name__ == "__main__":
    sys.exit(main())

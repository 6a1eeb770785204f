"""Training steps of the large networks: images per second and memory, against the plain network.

    python -m benchmarks.scale --out build/scale.json

A step is forward, backward and update of stage 1 on a batch that is already on the device, in the
number format that ``precision=auto`` means there. Plain form is torchvision's network with
cross-entropy, in the same format and memory layout. All forms of a network, image size and batch
take their turns in one process, and ratios are taken within a round; each peak of memory is that
of a process of its own. What the file already has is not measured again, so a call that was stopped
goes on. Without ``--quick`` the sizes suit the device: a GPU gets the batches of the recipes.

The file written holds ``date``, ``device``, ``versions``, ``commit`` and ``cases``, a list with
``network``, ``size``, ``batch_size``, ``precision`` and, by form (``plain``, ``shike``, on a GPU
also ``plain-compile``, ``shike-cuda-graph`` and ``shike-compile``), ``images_per_second``,
``ratios`` to plain form, ``peak_memory_bytes`` and ``start_seconds`` (building, compiling and
recording).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import torchvision
from torch import nn
from torch.nn import functional

from benchmarks import runs
from benchmarks.ceilings import seconds
from benchmarks.figures import ratios, summary
from benchmarks.forms import Engine, random_batch, warmed
from benchmarks.tables import table
from shike_core.config import Acceleration, Device, Network, TrainConfig
from shike_core.device import resolve_device, resolve_precision
from shike_core.errors import ShikeError
from shike_core.recipes import imagenet_lt
from shike_core.stages import write_json

ROOT = Path(__file__).parents[1]
CLASSES = 1000
IMAGENET_LT_IMAGES = 115_846
CALLS_TO_COMPILE = 3
COMPILED: Acceleration = "compile"
Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A network on images of a size."""

    network: Network
    size: int
    batch_size: int


CASES: Mapping[str, tuple[Case, ...]] = {
    "cuda": (
        Case("resnet50", 224, 256),
        *(Case("resnet50", 224, batch_size) for batch_size in (32, 64, 128, 512)),
        *(Case("resnet50", size, 256) for size in (128, 160, 288)),
        Case("resnext50_32x4d", 224, 256),
        Case("resnet152", 224, 128),
    ),
    "cpu": (
        Case("resnet50", 224, 8),
        *(Case("resnet50", 224, batch_size) for batch_size in (2, 4, 16)),
        *(Case("resnet50", size, 8) for size in (64, 128)),
        Case("resnext50_32x4d", 224, 8),
        Case("resnet152", 224, 8),
    ),
}
QUICK = (Case("resnet50", 32, 2),)


def forms_on(device: torch.device) -> dict[str, Acceleration]:
    """The forms to measure, and how their steps run."""
    forms: dict[str, Acceleration] = {"plain": "none", "shike": "none"}
    if device.type == "cuda":
        forms |= {"plain-compile": "compile", "shike-cuda-graph": "cuda-graph"}
        forms |= {"shike-compile": "compile"}
    return forms


def make_update(
    case: Case, form: str, acceleration: Acceleration, device: Device
) -> Callable[[], object]:
    """A step of a form, whose first calls, which are slow, are over."""
    config = training(case, acceleration, device)
    if form.startswith("shike"):
        return Engine("auto").update(config, CLASSES, case.size)
    resolved = resolve_device(device)
    dtype = resolve_precision("auto", resolved)
    model: nn.Module = getattr(torchvision.models, case.network)(num_classes=CLASSES)
    model = model.to(resolved).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True
    )
    images, targets = random_batch(config, CLASSES, case.size)
    images = images.contiguous(memory_format=torch.channels_last)

    def loss() -> torch.Tensor:
        with torch.autocast(resolved.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(images)
        return functional.cross_entropy(logits.float(), targets)

    forward = torch.compile(loss) if acceleration == COMPILED else loss

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward().backward()
        optimizer.step()

    return warmed(update, CALLS_TO_COMPILE if acceleration == COMPILED else 1)


def training(case: Case, acceleration: Acceleration, device: Device) -> TrainConfig:
    """The recipe for ImageNet-LT with another network, batch and size."""
    return replace(
        imagenet_lt().train,
        network=case.network,
        crop_size=case.size,
        batch_size=case.batch_size,
        acceleration=acceleration,
        device=device,
    )


# ---- in a process of its own


def speed(case: Case, device: Device, rounds: int) -> Result:
    """Images per second of all forms, in turns."""
    resolved = resolve_device(device)
    updates, start_seconds = {}, {}
    for form, acceleration in forms_on(resolved).items():
        started = time.perf_counter()
        updates[form] = make_update(case, form, acceleration, device)
        start_seconds[form] = time.perf_counter() - started
    repeats = 1 if resolved.type == "cpu" else 10
    rates: dict[str, list[float]] = {form: [] for form in updates}

    def run(form: str) -> None:
        for _ in range(repeats):
            updates[form]()

    for _ in range(rounds):
        for form in updates:
            taken = seconds(partial(run, form), resolved)
            rates[form].append(repeats * case.batch_size / taken)
    return {
        "precision": str(resolve_precision("auto", resolved)).removeprefix("torch."),
        "images_per_second": {form: summary(x) for form, x in rates.items()},
        "ratios": ratios({"step": rates})["step"],
        "start_seconds": start_seconds,
    }


def memory(case: Case, device: Device, form: str) -> int:
    """Peak bytes of two steps of a form: allocated on a GPU, resident of a process otherwise."""
    resolved = resolve_device(device)
    make_update(case, form, forms_on(resolved)[form], device)()
    if resolved.type == "cuda":
        return torch.cuda.max_memory_allocated(resolved)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one_job(text: str) -> None:
    """Measure what the JSON says, print JSON."""
    job = json.loads(text)
    case = Case(**job["case"])
    torch.set_num_threads(job["threads"])
    torch.backends.cudnn.benchmark = True
    try:
        found: Any = (
            memory(case, job["device"], job["form"])
            if job["form"]
            else speed(case, job["device"], job["rounds"])
        )
    except ShikeError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {case} needs more memory than the device has: {error}")
    print(json.dumps(found))


# ---- in the program


def measure(
    cases: Iterable[Case], device: Device, rounds: int, threads: int, known: list[Result]
) -> Iterable[Result]:
    """Measure cases one by one; those that are known are handed on.

    Raises:
        SystemExit: a process failed; its message stands above.
    """
    by_case = {(x["network"], x["size"], x["batch_size"]): x for x in known}
    for case in cases:
        if found := by_case.get((case.network, case.size, case.batch_size)):
            yield found
            continue
        job = {"case": asdict(case), "device": device, "rounds": rounds, "threads": threads}
        found = asdict(case) | run_job(job | {"form": ""})
        found["peak_memory_bytes"] = {
            form: run_job(job | {"form": form}) for form in found["images_per_second"]
        }
        yield found


def run_job(job: Mapping[str, Any]) -> Any:
    """What `one_job` prints, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--job", json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(f"error: measuring {job['case']} failed; see the message above")
    return json.loads(done.stdout.splitlines()[-1])


def render(report: Result) -> str:
    """A table of all forms, and the time that a whole training would take."""
    epochs = imagenet_lt().train.epochs
    rows = [
        ["network", "pixels", "batch", "form", "images/s", "times plain", "memory, GiB",
         f"ImageNet-LT, {epochs} epochs, hours (computed)"],
    ]  # fmt: skip
    for case in report["cases"]:
        for form, rate in case["images_per_second"].items():
            ratio = case["ratios"].get(form)
            hours = epochs * IMAGENET_LT_IMAGES / rate["median"] / 3600
            rows.append(
                [
                    case["network"], str(case["size"]), str(case["batch_size"]), form,
                    f"{rate['median']:,.1f}", f"{ratio['median']:.2f}" if ratio else "",
                    f"{case['peak_memory_bytes'][form] / 2**30:.2f}", f"{hours:,.1f}",
                ]
            )  # fmt: skip
    return f"{report['device']}; torch {report['versions']['torch']}\n\n{table(rows)}"


def main() -> None:
    """Command line of ``python -m benchmarks.scale``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--device", default="auto", choices=get_args(Device))
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (default: 5)")
    parser.add_argument("--threads", type=int, default=cores, help=f"default: all {cores} cores")
    parser.add_argument("--quick", action="store_true", help="one small case, to see that it works")
    parser.add_argument("--out", type=Path, required=True, help="file to write as JSON")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    if "--job" in sys.argv:
        one_job(sys.argv[sys.argv.index("--job") + 1])
        return
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        device = resolve_device(options.device)
    except ShikeError as error:
        sys.exit(f"error: {error}")
    cases = QUICK if options.quick else CASES[device.type]
    machine = runs.machine(options.device)
    known = json.loads(options.out.read_text())["cases"] if options.out.exists() else []
    report = {"date": time.strftime("%Y-%m-%d %H:%M:%S%z"), **machine, "cases": []}
    for found in measure(cases, options.device, options.rounds, options.threads, known):
        report["cases"].append(found)
        write_json(report, options.out)
        print(f"{found['network']}, {found['size']} pixels, batch {found['batch_size']}: done",
              flush=True)  # fmt: skip
    print(render(report))


if __name__ == "__main__":
    main()

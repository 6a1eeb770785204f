"""One process of `benchmarks.bench`: takes a job as JSON, prints what it measured as JSON.

Each form's peak of memory needs a process of its own, and the settings of the allocator and of the
threads must be in the environment before torch is loaded.
"""

import gc
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import ceilings as limits
from benchmarks import loading, runs
from benchmarks.ceilings import best_seconds, seconds
from benchmarks.forms import Form, Plain, engines
from benchmarks.settings import SHARE_OF_STAGE1, Settings
from shike_core.checkpoint import build_model
from shike_core.config import SubsetConfig, TrainConfig
from shike_core.data.loader import ImageTable
from shike_core.data.long_tail import counts_by_rank
from shike_core.data.manifest import Subset, read_info, read_subset, write_subset
from shike_core.data.sources import CIFAR_MEAN, CIFAR_STD, Labels, Source, Split
from shike_core.device import cpu_has_bfloat16, resolve_device, resolve_precision
from shike_core.errors import ShikeError
from shike_core.losses import stage1_loss

IMAGE_SIZE = 32
GPU_STEPS = 10
"""Times the steps of an epoch on a GPU, where they are that much shorter."""
NEVER = 10**6
Result = dict[str, Any]


def machine(settings: Settings) -> Result:
    """What is measured on, and with what."""
    device = resolve_device(settings.device)
    known = runs.machine(settings.device)
    return {
        "commit": known["commit"],
        "versions": known["versions"],
        "hardware": {
            "name": known["device"],
            "type": device.type,
            "cores": len(os.sched_getaffinity(0)),
            "bfloat16": cpu_has_bfloat16(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "auto_precision": engines(device)[-1].precision,
        },
    }


def prepare(settings: Settings, source: Path | None, directory: Path) -> Result:
    """Write the images to train on: a part of a subset, or generated ones.

    Args:
        settings: how many.
        source: a subset of which at least one image of each class is taken, otherwise in its
            own proportions; None generates images with the class sizes of CIFAR100-LT.
        directory: where the project's own writer puts them.
    """
    gpu = resolve_device(settings.device).type == "cuda"
    count = settings.steps * settings.batch_size * (GPU_STEPS if gpu else 1)
    if source is None:
        data = generated(count, settings.num_classes)
    else:
        subset = read_subset(source)
        chosen = spread(subset.splits["train"].labels, count)
        data = Source(
            name="benchmark",
            train=subset.splits["train"].take(chosen),
            test=subset.splits["test"].take(np.arange(1)),
            class_names=subset.class_names,
            mean=subset.mean,
            std=subset.std,
        )
    splits = {"train": data.train, "test": data.test}
    info = write_subset(
        directory, splits, data, SubsetConfig(dataset="cifar100"), identical_images={}
    )
    return {
        "images": info["sizes"]["train"],
        "classes": len(data.class_names),
        "image_size": info["image_size"],
    }


def generated(count: int, num_classes: int) -> Source:
    """Coloured blocks with labels of an exponential profile; only their sizes matter."""
    class_counts = counts_by_rank(num_classes, n_max=500, imbalance_factor=100)
    labels = np.repeat(np.arange(num_classes), class_counts)
    labels = labels[spread(labels, count)]
    blocks = np.random.default_rng(0).integers(256, size=(len(labels), 8, 8, 3), dtype=np.uint8)
    images = blocks.repeat(IMAGE_SIZE // 8, axis=1).repeat(IMAGE_SIZE // 8, axis=2)
    train = Split(images, labels, np.arange(len(labels)))
    return Source(
        name="benchmark",
        train=train,
        test=train.take(np.arange(1)),
        class_names=tuple(f"class {label}" for label in range(num_classes)),
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
    )


def spread(labels: Labels, count: int) -> Labels:
    """Positions of about `count` images: the first of each class, and evenly spaced others."""
    _, first = np.unique(labels, return_index=True)
    others = np.setdiff1d(np.arange(len(labels)), first)
    wanted = min(max(count - len(first), 0), len(others))
    evenly = np.linspace(0, len(others) - 1, wanted).astype(np.int64)
    return np.sort(np.concatenate([first, others[evenly]]))


def train_config(settings: Settings, **more: Any) -> TrainConfig:
    """The authors' recipe in the sizes of the benchmark."""
    config = TrainConfig(
        width=settings.width, batch_size=settings.batch_size, device=settings.device
    )
    return replace(config, **more)


def speed(settings: Settings, directory: Path) -> Result:
    """Images per second of every form and part, in turns.

    Returns:
        ``plain_workers``: whole training of the plain form with each number of workers, once;
        ``forms``; and ``runs``: for each part and form a value for each round.
    """
    config = train_config(settings)
    device = resolve_device(config.device)
    subset = read_subset(directory, splits=("train",))
    tried = {}
    for workers in sorted({0, settings.threads}):
        say(f"plain form with {workers} workers")
        tried[workers] = training_rates(Plain(workers), config, directory, subset)["training"]
    forms: list[Form] = [Plain(max(tried, key=tried.__getitem__)), *engines(device)]
    parts = {form.name: Parts(form, config, subset, settings) for form in forms}
    for part in parts.values():
        part.data()  # the first call is slow
    taken: dict[str, dict[str, list[float]]] = {}
    for turn in range(settings.rounds):
        say(f"round {turn + 1} of {settings.rounds}")
        for form in forms:
            add(taken, "data", form, parts[form.name].data())
        for form in forms:
            add(taken, "update", form, parts[form.name].update())
        for form in forms:
            for name, rate in training_rates(form, config, directory, subset).items():
                add(taken, name, form, rate)
    return {"plain_workers": tried, "forms": [form.name for form in forms], "runs": taken}


def _shape(directory: Path) -> tuple[int, int]:
    """Classes, and pixels on a side."""
    info = read_info(directory)
    return len(info["class_names"]), info["image_size"][0]


def add(taken: dict[str, dict[str, list[float]]], part: str, form: Form, rate: float) -> None:
    """Note one figure."""
    taken.setdefault(part, {}).setdefault(form.name, []).append(rate)


class Parts:
    """What is timed apart from whole training, ready to be run."""

    def __init__(self, form: Form, config: TrainConfig, subset: Subset, settings: Settings) -> None:
        self.device = resolve_device(config.device)
        self.epoch = form.data(config, subset)
        self.run = form.update(config, len(subset.class_names), subset.info["image_size"][0])
        self.images = len(subset.splits["train"].labels)
        self.batch_size = config.batch_size
        self.settings = settings

    def data(self) -> float:
        """Images per second of the loader alone."""

        def run() -> None:
            for index in range(self.settings.data_epochs):
                for _ in self.epoch(index):
                    pass

        return self.settings.data_epochs * self.images / seconds(run, self.device)

    def update(self) -> float:
        """Images per second of forward, backward and update on a batch that is there."""

        def run() -> None:
            for _ in range(self.settings.updates):
                self.run()

        return self.settings.updates * self.batch_size / seconds(run, self.device)


def training_rates(
    form: Form, config: TrainConfig, directory: Path, subset: Subset
) -> dict[str, float]:
    """Images per second of whole training, with the loader and without evaluation.

    The second half of each stage is timed, so the start is not; the stages are then weighted as
    the recipe has them. Of the engine's checkpoints a CPU's are left out, which are one in minutes.
    """
    device = resolve_device(config.device)
    epochs = form.epochs_between_logs(device)
    config = replace(
        config,
        stage1_epochs=2 * epochs,
        stage2_epochs=2 * epochs,
        checkpoint_every=NEVER if device.type == "cpu" else epochs,
    )
    gc.collect()
    ends: list[float] = []
    form.train(config, directory, lambda metrics, step: ends.append(time.perf_counter()))
    images = epochs * len(subset.splits["train"].labels)
    halves = [ends[i * epochs - 1] for i in (1, 2, 3, 4)]
    stage1, stage2 = ((halves[i + 1] - halves[i]) / images for i in (0, 2))  # seconds of an image
    both = SHARE_OF_STAGE1 * stage1 + (1 - SHARE_OF_STAGE1) * stage2
    return {"training": 1 / both, "stage1": 1 / stage1, "stage2": 1 / stage2}


def growth(settings: Settings, directory: Path) -> Result:
    """How an update's cost grows with the batch, the experts and the classes.

    Returns:
        ``batch_size`` and ``num_experts``: images per second of forms for each value;
        ``num_classes``: seconds that the heads and losses of one batch take, forward and backward.
    """
    num_classes, size = _shape(directory)
    device = resolve_device(settings.device)
    forms: list[Form] = [Plain(0), engines(device)[-1]]

    def rates(config: TrainConfig) -> dict[str, float]:
        updates = {form.name: form.update(config, num_classes, size) for form in forms}
        taken: dict[str, list[float]] = {name: [] for name in updates}
        for _ in range(settings.growth_rounds):
            for name, run in updates.items():
                taken[name].append(seconds(run, device))
        return {name: config.batch_size / statistics.median(x) for name, x in taken.items()}

    say("growth with the batch and the experts")
    return {
        "batch_size": [
            {"value": value, **rates(train_config(settings, batch_size=value))}
            for value in settings.batch_sizes
        ],
        "num_experts": [
            {"value": value, **rates(train_config(settings, num_experts=value))}
            for value in settings.experts
        ],
        "num_classes": [
            {"value": value, "seconds": heads_seconds(settings, value)}
            for value in settings.classes
        ],
    }


def heads_seconds(settings: Settings, num_classes: int) -> float:
    """Time of stage 1's heads and losses for one batch, forward and backward."""
    config = train_config(settings)
    device = resolve_device(config.device)
    model = build_model(config, num_classes).to(device)
    shape = (config.batch_size, model.num_experts, model.feature_dim)
    features = torch.randn(shape, device=device, requires_grad=True)
    targets = torch.randint(num_classes, (config.batch_size,), device=device)

    def run() -> None:
        stage1_loss(model.classify(features, stage=1), targets).total.backward()

    return best_seconds(run, device, settings.kernel_seconds)


def ceilings(settings: Settings, directory: Path) -> Result:
    """The machine's best at the network's own convolutions, in each format, and at copying.

    Returns:
        ``convolutions``: for each format the shapes, see `benchmarks.ceilings`;
        ``network``: for each format and pass the ``seconds`` that a batch takes in all of them,
        and the floating point ``operations``; ``copy_bytes_per_second``, read and written.
    """
    say("ceilings")
    device = resolve_device(settings.device)
    config = train_config(settings)
    shapes = limits.convolutions_of(config, *_shape(directory))
    convolutions: dict[str, list[dict[str, Any]]] = {}
    network: dict[str, dict[str, dict[str, float]]] = {}
    for engine in engines(device):
        dtype = resolve_precision(engine.precision, device)
        rows = limits.measure_convolutions(shapes, device, dtype, settings.kernel_seconds)
        convolutions[engine.precision] = rows
        network[engine.precision] = limits.network_of(rows)
    return {
        "convolutions": convolutions,
        "network": network,
        "copy_bytes_per_second": limits.measure_copy(device, settings.copy_bytes),
    }


def memory(settings: Settings, directory: Path, form: str, workers: int) -> Result:
    """The peak of memory of one form's whole training, in a process of its own.

    Returns:
        Bytes: ``start``, when all is imported; ``peak``; ``worker``, the peak of the largest
        worker process, of which much is shared with the others; ``device``, the peak on a GPU.
    """
    say(f"memory of {form}")
    config = train_config(settings, stage1_epochs=1, stage2_epochs=1)
    device = resolve_device(config.device)
    forms: list[Form] = [Plain(workers), *engines(device)]
    chosen = {x.name: x for x in forms}[form]
    start = peak_bytes(resource.RUSAGE_SELF)
    chosen.train(config, directory, lambda metrics, step: None)
    gc.collect()  # ends the plain form's workers
    return {
        "start": start,
        "peak": peak_bytes(resource.RUSAGE_SELF),
        "worker": peak_bytes(resource.RUSAGE_CHILDREN) if form == "plain" and workers else 0,
        "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    }


def tables(settings: Settings) -> Result:
    """How the engine's data grows with the number of images; the first part of its process.

    Returns:
        ``images``: for each size ``images_per_second`` of an epoch of data; ``bytes``, by how
        much the peak of memory is above that before the first table; and ``table_bytes`` of them.
    """
    say("growth with the images")
    config = train_config(settings)
    dtype = resolve_precision("auto", resolve_device(config.device))
    epoch_rate(2 * config.batch_size, config, dtype)  # loads what the first use loads
    start = peak_bytes(resource.RUSAGE_SELF)
    return {
        "images": [
            {
                "value": count,
                "images_per_second": epoch_rate(count, config, dtype),
                "bytes": peak_bytes(resource.RUSAGE_SELF) - start,
                "table_bytes": 3 * IMAGE_SIZE**2 * count,
            }
            for count in sorted(settings.table_sizes)  # a peak does not fall again
        ]
    }


def epoch_rate(count: int, config: TrainConfig, dtype: torch.dtype) -> float:
    """Images per second of the engine's data alone, of one epoch of `count` images."""
    device = resolve_device(config.device)
    shape = (count, IMAGE_SIZE, IMAGE_SIZE, 3)
    images = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    table = ImageTable.from_arrays(images, np.zeros(count, dtype=np.int64), device)

    def run() -> None:
        for _ in table.training_batches(config, CIFAR_MEAN, CIFAR_STD, epoch=0, dtype=dtype):
            pass

    return count / seconds(run, device)


def peak_bytes(who: int) -> int:
    """The largest memory so far of this process, or of the largest of its ended children."""
    return 1024 * resource.getrusage(who).ru_maxrss


def say(text: str) -> None:
    """Tell the person who waits."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Do the job that stands in the first argument."""
    job = json.loads(sys.argv[1])
    settings = Settings(**job["settings"])
    directory = Path(job["directory"])
    torch.set_num_threads(settings.threads)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    parts: dict[str, Callable[[], Result]] = {
        "machine": lambda: machine(settings),
        "prepare": lambda: prepare(settings, job["subset"] and Path(job["subset"]), directory),
        "speed": lambda: speed(settings, directory),
        "growth": lambda: growth(settings, directory),
        "ceilings": lambda: ceilings(settings, directory),
        "memory": lambda: memory(settings, directory, job["form"], job["workers"]),
        "tables": lambda: tables(settings),
        "loading": lambda: loading.measure(
            job["photographs"] and Path(job["photographs"]),
            directory / "loading",
            images=settings.photographs,
            workers=settings.threads,
            rounds=settings.rounds,
        ),
    }
    try:
        print(json.dumps({name: parts[name]() for name in job["parts"]}))
    except (ShikeError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

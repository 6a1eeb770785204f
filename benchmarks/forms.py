"""The two forms of the recipe behind one interface, so that they are measured alike."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.plain import Log
from shike_core import stages
from shike_core.acceleration import TrainingStep, compile_parts, compiled
from shike_core.checkpoint import build_model
from shike_core.config import Precision, TrainConfig
from shike_core.data.manifest import Subset, read_subset
from shike_core.data.stream import open_tables
from shike_core.device import resolve_acceleration, resolve_device, resolve_precision
from shike_core.losses import stage1_loss

Epoch = Callable[[int], Iterable[tuple[Tensor, Tensor]]]


class Form(Protocol):
    """What is measured of a form."""

    @property
    def name(self) -> str:
        """In the tables and in the file."""

    def data(self, config: TrainConfig, subset: Subset) -> Epoch:
        """The batches of an epoch, ready for the network."""

    def update(self, config: TrainConfig, num_classes: int, size: int) -> Callable[[], object]:
        """Forward, backward and update of stage 1 on one batch of ``size x size`` pixels."""

    def train(self, config: TrainConfig, directory: Path, log: Log) -> None:
        """Both stages, from the subset on disk."""

    def epochs_between_logs(self, device: torch.device) -> int:
        """After every so many epochs of a stage `log` is called right at the epoch's end."""


@dataclass(frozen=True)
class Plain:
    """Float32, eager, image by image."""

    workers: int
    name: str = "plain"

    def data(self, config: TrainConfig, subset: Subset) -> Epoch:
        """See `Form`."""
        loader = plain.make_loader(config, subset, self.workers)
        return lambda _: loader

    def update(self, config: TrainConfig, num_classes: int, size: int) -> Callable[[], object]:
        """See `Form`."""
        device = resolve_device(config.device)
        model = build_model(config, num_classes).to(device).train()
        model.stage2_heads.requires_grad_(False)
        optimizer = plain.make_optimizer(config, model)
        images, targets = random_batch(config, num_classes, size)
        return warmed(lambda: plain.stage1_update(model, optimizer, config, images, targets), 1)

    def train(self, config: TrainConfig, directory: Path, log: Log) -> None:
        """See `Form`."""
        plain.train_plain(
            config, read_subset(directory, splits=("train",)), log, workers=self.workers
        )

    def epochs_between_logs(self, device: torch.device) -> int:
        """See `Form`."""
        return 1


@dataclass(frozen=True)
class Engine:
    """`shike_core` in a number format."""

    precision: Precision

    @property
    def name(self) -> str:
        """See `Form`."""
        return f"engine-{self.precision}"

    def data(self, config: TrainConfig, subset: Subset) -> Epoch:
        """See `Form`."""
        device = resolve_device(config.device)
        dtype = resolve_precision(self.precision, device)
        (table,) = open_tables(subset.splits["train"], [config], device)
        return lambda epoch: table.training_batches(
            config, subset.mean, subset.std, epoch=epoch, dtype=dtype
        )

    def update(self, config: TrainConfig, num_classes: int, size: int) -> Callable[[], object]:
        """See `Form`."""
        device = resolve_device(config.device)
        dtype = resolve_precision(self.precision, device)
        model = build_model(config, num_classes).to(device).train()
        model = model.to(memory_format=torch.channels_last)
        model.stage2_heads.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(
            trained, lr=0.1, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
        )

        acceleration = resolve_acceleration(config.acceleration, device, dtype)
        loss_of = stage1_loss
        if acceleration == "compile":
            compile_parts(model.parts)
            loss_of = compiled(stage1_loss)

        def forward(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                features = model.features(images).float()
            loss = loss_of(model.classify(features, stage=1), targets)
            return loss.total, torch.stack(loss).detach()

        def descend(loss: Tensor) -> None:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        step = TrainingStep(forward, descend, acceleration, config.batch_size)
        images, targets = random_batch(config, num_classes, size)
        images = images.to(dtype).contiguous(memory_format=torch.channels_last)
        first_calls = 1 if acceleration == "none" else TrainingStep.CALLS_BEFORE_RECORDING + 1
        return warmed(lambda: step(images, targets), first_calls)

    def train(self, config: TrainConfig, directory: Path, log: Log) -> None:
        """See `Form`."""
        with TemporaryDirectory() as out:
            stages.train(replace(config, precision=self.precision), directory, Path(out), log)

    def epochs_between_logs(self, device: torch.device) -> int:
        """See `Form`: on a GPU an epoch is read while the next one runs, unless it is saved."""
        return 1 if device.type == "cpu" else TrainConfig().checkpoint_every


def engines(device: torch.device) -> list[Engine]:
    """The engine in float32, and in what ``precision="auto"`` means here if that is another."""
    automatic = str(resolve_precision("auto", device)).removeprefix("torch.")
    formats: list[Precision] = ["float32", "bfloat16", "float16"]
    return [Engine(name) for name in formats if name in ("float32", automatic)]


def warmed(run: Callable[[], object], calls: int) -> Callable[[], object]:
    """A function whose first calls, which are slow, are over."""
    for _ in range(calls):
        run()
    return run


def random_batch(config: TrainConfig, num_classes: int, size: int) -> tuple[Tensor, Tensor]:
    """Images float32 ``(batch, 3, size, size)`` and labels ``(batch,)``, without meaning."""
    device = resolve_device(config.device)
    images = torch.randn(config.batch_size, 3, size, size, device=device)
    return images, torch.randint(num_classes, (config.batch_size,), device=device)

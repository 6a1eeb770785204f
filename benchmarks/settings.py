"""How much `benchmarks.bench` measures."""

from dataclasses import dataclass

from shike_core.config import Device, TrainConfig

SHARE_OF_STAGE1 = TrainConfig().stage1_epochs / TrainConfig().epochs
"""Of the authors' epochs; all epochs have as many images."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and repetitions; the defaults are meant for ten minutes on two cores."""

    device: Device = "auto"
    threads: int
    """Of each form; also the worker processes that the plain form may use."""
    rounds: int = 4
    """Repetitions, in each of which all forms take their turns."""
    width: int = 16
    """Channels of the network's first stage."""
    batch_size: int = 128
    num_classes: int = 100
    """Of generated images."""
    steps: int = 8
    """Steps of an epoch, in whole training and in data only."""
    data_epochs: int = 3
    """Epochs of data in a round."""
    updates: int = 3
    """Updates in a round."""
    batch_sizes: tuple[int, ...] = (32, 64, 128, 256)
    experts: tuple[int, ...] = (1, 2, 3, 4, 5)
    classes: tuple[int, ...] = (10, 100, 365, 1000, 8142)
    table_sizes: tuple[int, ...] = (2500, 10_847, 50_000)
    """Up to the images of CIFAR100-LT, and of CIFAR itself."""
    growth_rounds: int = 2
    """Repetitions of what shows how the cost grows."""
    kernel_seconds: float = 0.06
    """Least time for one kernel's ceiling; the best of the calls in it counts."""
    copy_bytes: int = 2**28
    """Of the array that is copied, more than a cache holds."""
    photographs: int = 400
    """Of an epoch from disk."""


def quick(device: Device, threads: int) -> Settings:
    """Everything once and small, to see that it works; the figures say nothing."""
    return Settings(
        device=device,
        threads=threads,
        rounds=2,
        width=2,
        batch_size=16,
        num_classes=10,
        steps=2,
        data_epochs=1,
        updates=1,
        batch_sizes=(8, 16),
        experts=(1, 2),
        classes=(10, 100),
        table_sizes=(1000, 3000),
        growth_rounds=1,
        kernel_seconds=0.0,
        copy_bytes=2**24,
        photographs=8,
    )

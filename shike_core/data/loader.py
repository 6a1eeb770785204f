"""Images in memory on the training device, and the batches drawn from them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shike_core.config import TrainConfig
from shike_core.data.augment import augment, normalise


@dataclass(frozen=True)
class ImageTable:
    """A split as tensors: images uint8 ``(n, 3, h, w)``, labels int64 ``(n,)``."""

    images: Tensor
    labels: Tensor

    @classmethod
    def from_arrays(
        cls,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64],
        device: str | torch.device = "cpu",
    ) -> "ImageTable":
        """Take over images ``(n, h, w, 3)`` and labels ``(n,)``; channels last in memory."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device)
        return cls(pixels.permute(0, 3, 1, 2), torch.tensor(labels, device=device))

    def __len__(self) -> int:
        return len(self.labels)


def seeded_generator(*identity: object) -> torch.Generator:
    """A CPU generator whose stream depends on nothing but the values given.

    One for each step makes a training resumable anywhere without storing generator states.
    """
    digest = hashlib.sha256(repr(identity).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Steps of an epoch; the last one may be smaller, no image is left out."""
    return -(-images // batch_size)


def training_batches(
    table: ImageTable,
    config: TrainConfig,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    epoch: int,
    first_step: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The augmented batches of one epoch, each image once (instance-balanced sampling).

    Args:
        table: the training split.
        config: batch size, augmentation, seed.
        mean: of each channel, for values 0 to 1.
        std: of each channel, for values 0 to 1.
        epoch: counted over both stages; decides order and augmentation together with the seed.
        first_step: steps to leave out, when a training resumes inside the epoch.

    Yields:
        Normalised images float32 ``(batch, 3, h, w)`` in channels-last memory, labels ``(batch,)``.
    """
    order = torch.randperm(len(table), generator=seeded_generator(config.seed, epoch))
    for step in range(first_step, steps_per_epoch(len(table), config.batch_size)):
        rows = order[step * config.batch_size : (step + 1) * config.batch_size]
        rows = rows.to(table.labels.device)
        generator = seeded_generator(config.seed, epoch, step)
        images = augment(table.images[rows], config, generator)
        images = normalise(images, mean, std).contiguous(memory_format=torch.channels_last)
        yield images, table.labels[rows]

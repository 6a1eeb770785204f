"""Images of a split, and the batches of an epoch made from them on the training device."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shike_core.config import TrainConfig
from shike_core.data.augment import Draws, augment, normalise
from shike_core.device import upload

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**31}
"""Memory for the pixels of the images augmented together, as float32: what a processor's cache
affords, or on a GPU a whole epoch of small images, because there each call costs the same."""
SHARE_OF_MEMORY = 0.5
"""Share of a GPU's free memory that a split may fill; the rest is for the network."""


@dataclass(frozen=True)
class ImageTable:
    """A split as tensors: images uint8 ``(n, 3, h, w)``, labels int64 ``(n,)``."""

    images: Tensor
    """On the training device, or on the CPU if that one has no room."""
    labels: Tensor
    """On the training device."""

    @classmethod
    def from_arrays(
        cls,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64],
        device: str | torch.device = "cpu",
    ) -> "ImageTable":
        """Take over images ``(n, h, w, 3)`` and labels ``(n,)``; channels last in memory.

        Images that do not fit stay in the computer's memory, with a warning: they are then
        streamed to the device batch by batch.
        """
        device = torch.device(device)
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if pixels.nbytes <= SHARE_OF_MEMORY * free:
                pixels = pixels.to(device)
            else:
                warn_of_streaming(pixels.nbytes, free)
        return cls(pixels, torch.tensor(labels, device=device))

    @property
    def device(self) -> torch.device:
        """Where batches are made."""
        return self.labels.device

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Tensor:
        """The images of some rows, uint8 ``(len(rows), 3, h, w)`` on the training device.

        Args:
            rows: indices on the CPU.
        """
        if self.images.device == self.device:
            return self.images[upload(rows, self.device)]
        return upload(self.images[rows], self.device)


def warn_of_streaming(size: int, free: int) -> None:
    """Say that images of `size` bytes stay outside a device with `free` bytes."""
    warnings.warn(
        f"the images take {size / 2**30:.1f} GiB and the device has {free / 2**30:.1f} GiB free, "
        f"of which they may fill {SHARE_OF_MEMORY:.0%}; they stay in the computer's memory and "
        "are streamed to the device, which is slower",
        stacklevel=3,
    )


def seeded_generator(*identity: object) -> torch.Generator:
    """A CPU generator whose stream depends on nothing but the values given.

    One for each epoch makes a training resumable anywhere without storing generator states.
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
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The augmented batches of one epoch, each image once (instance-balanced sampling).

    Order and augmentation are drawn for the whole epoch at once; then images are augmented as
    many batches together as `CHUNK_BYTES` allows, which does not change them.

    Args:
        table: the training split.
        config: batch size, augmentation, seed.
        mean: of each channel, for values 0 to 1.
        std: of each channel, for values 0 to 1.
        epoch: counted over both stages; decides order and augmentation together with the seed.
        first_step: steps to leave out, when a training resumes inside the epoch.
        dtype: of the images; normalised in float32, then rounded.

    Yields:
        Normalised images ``(batch, 3, h, w)`` in channels-last memory, labels ``(batch,)``. With
        a consistency loss there are twice as many images: after the augmented ones the same,
        only cropped and mirrored.
    """
    height, width = table.images.shape[-2:]
    generator = seeded_generator(config.seed, epoch)
    order = torch.randperm(len(table), generator=generator)
    draws = Draws.of(config, (len(table), height, width), generator)
    views = [(config, draws)]
    if config.consistency_weight:
        weak = replace(config, auto_augment=False, cutout_size=0)
        views.append((weak, Draws.of(weak, (len(table), height, width), generator)))
    labels = table.labels[upload(order, table.device)]
    batch = config.batch_size
    bytes_per_batch = batch * table.images[0].numel() * 4
    chunk = batch * max(1, CHUNK_BYTES[table.device.type] // bytes_per_batch)
    for first in range(first_step * batch, len(table), chunk):
        rows = slice(first, first + chunk)
        images = table.take(order[rows])
        made = []
        for rule, drawn in views:
            view = normalise(augment(images, drawn[rows], rule), mean, std).to(dtype)
            made.append(view.contiguous(memory_format=torch.channels_last).split(batch))
        for *parts, targets in zip(*made, labels[rows].split(batch), strict=True):
            yield parts[0] if len(parts) == 1 else torch.cat(parts), targets

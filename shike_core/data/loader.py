"""Images of a split in memory, and the batches of an epoch made from them on the training device.

`Table` is what the engine sees of a split. There are two kinds: `ImageTable` here, and
`shike_core.data.stream.ImageStream`, whose images are decoded while they are trained on.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Protocol

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


class Table(Protocol):
    """A split that makes batches on a device."""

    @property
    def labels(self) -> Tensor:
        """Int64 ``(n,)``, on the device."""

    @property
    def device(self) -> torch.device:
        """Where batches are made."""

    def __len__(self) -> int: ...

    def training_batches(
        self,
        config: TrainConfig,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        epoch: int,
        first_step: int = 0,
        dtype: torch.dtype = torch.float32,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The augmented batches of one epoch, each image once (instance-balanced sampling).

        Args:
            config: batch size, augmentation, seed.
            mean: of each channel, for values 0 to 1.
            std: of each channel, for values 0 to 1.
            epoch: counted over both stages; decides order and augmentation together with the seed.
            first_step: steps to leave out, when a training resumes inside the epoch.
            dtype: of the images; normalised in float32, then rounded.
            part: ``(rank, processes)`` of a training by several processes: this one gets its share
                of every batch, see `shares`.

        Yields:
            Normalised images ``(batch, 3, h, w)`` in channels-last memory, labels ``(batch,)``.
        """

    def batches(self, size: int, part: tuple[int, int] = (0, 1)) -> Iterator[Tensor]:
        """All images for evaluation, in the split's order: uint8 ``(size, 3, h, w)`` each time.

        Args:
            size: images of a batch.
            part: ``(rank, processes)``: this process gets every so many-th batch, from its rank's.
        """

    def seconds_waited(self, epoch: int | None = None) -> float | None:
        """Time in which the device had nothing to train on; None if images are in memory.

        Args:
            epoch: whose batches it waited for; None means all so far.
        """

    def close(self) -> None:
        """End what makes batches in the background, if anything does."""


@dataclass(frozen=True)
class ImageTable:
    """A split as tensors: images uint8 ``(n, 3, h, w)``, labels int64 ``(n,)``; see `Table`."""

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

    def seconds_waited(self, epoch: int | None = None) -> None:
        """Nobody waits; see `Table.seconds_waited`."""

    def __len__(self) -> int:
        return len(self.labels)

    def close(self) -> None:
        """There is nothing to end; see `Table.close`."""

    def take(self, rows: Tensor) -> Tensor:
        """The images of some rows, uint8 ``(len(rows), 3, h, w)`` on the training device.

        Args:
            rows: indices on the CPU.
        """
        if self.images.device == self.device:
            return self.images[upload(rows, self.device)]
        return upload(self.images[rows], self.device)

    def batches(self, size: int, part: tuple[int, int] = (0, 1)) -> Iterator[Tensor]:
        """See `Table.batches`."""
        rank, processes = part
        for images in self.images.split(size)[rank::processes]:
            on_device = images.device == self.device
            yield images if on_device else upload(images, self.device)

    def training_batches(
        self,
        config: TrainConfig,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        epoch: int,
        first_step: int = 0,
        dtype: torch.dtype = torch.float32,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The augmented batches of one epoch; see `Table.training_batches`.

        Order and augmentation are drawn for the whole epoch at once; then images are augmented as
        many batches together as `CHUNK_BYTES` allows, which does not change them.

        With a consistency loss there are twice as many images as labels: after the augmented ones
        the same, only cropped and mirrored.
        """
        height, width = self.images.shape[-2:]
        generator = seeded_generator(config.seed, epoch)
        order = torch.randperm(len(self), generator=generator)
        draws = Draws.of(config, (len(self), height, width), generator)
        views = [(config, draws)]
        if config.consistency_weight:
            weak = replace(config, auto_augment=False, cutout_size=0)
            views.append((weak, Draws.of(weak, (len(self), height, width), generator)))
        steps = shares(len(self), config.batch_size, part)
        if part != (0, 1):
            mine = torch.cat([torch.arange(step.start, step.stop) for step in steps])
            order, views = order[mine], [(rule, drawn[mine]) for rule, drawn in views]
            ends = accumulate(step.stop - step.start for step in steps)
            steps = [slice(start, end) for start, end in pairwise((0, *ends))]
        labels = self.labels[upload(order, self.device)]
        bytes_per_batch = -(-config.batch_size // part[1]) * self.images[0].numel() * 4
        together = max(1, CHUNK_BYTES[self.device.type] // bytes_per_batch)
        for first in range(first_step, len(steps), together):
            chunk = steps[first : first + together]
            rows = slice(chunk[0].start, chunk[-1].stop)
            sizes = [step.stop - step.start for step in chunk]
            images = self.take(order[rows])
            made = []
            for rule, drawn in views:
                view = normalise(augment(images, drawn[rows], rule), mean, std, dtype)
                made.append(view.contiguous(memory_format=torch.channels_last).split(sizes))
            for *parts, targets in zip(*made, labels[rows].split(sizes), strict=True):
                yield parts[0] if len(parts) == 1 else torch.cat(parts), targets


def warn_of_streaming(size: int, free: int) -> None:
    """Say that images of `size` bytes stay outside a device with `free` bytes."""
    warnings.warn(
        f"the images take {size / 2**30:.1f} GiB and the device has {free / 2**30:.1f} GiB free, "
        f"of which they may fill {SHARE_OF_MEMORY:.0%}; they stay in the computer's memory and "
        "are streamed to the device, which is slower",
        stacklevel=3,
    )


def seed_of(*identity: object) -> int:
    """A seed of 63 bits that depends on nothing but the values given."""
    digest = hashlib.sha256(repr(identity).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seeded_generator(*identity: object) -> torch.Generator:
    """A CPU generator with the seed of the values given.

    One for each epoch makes a training resumable anywhere without storing generator states.
    """
    return torch.Generator().manual_seed(seed_of(*identity))


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Steps of an epoch; the last one may be smaller, no image is left out."""
    return -(-images // batch_size)


def shares(images: int, batch_size: int, part: tuple[int, int] = (0, 1)) -> list[slice]:
    """Where the images of each step stand in an epoch's order: a process's share of each batch.

    Put together, the shares are the batch; they differ by one image at most, the larger ones come
    first. A last batch with fewer images than processes is given whole to each of them: nobody is
    without images, and the mean of their gradients is that of the batch.

    Args:
        images: of the epoch.
        batch_size: of all processes together.
        part: rank of the process, from 0, and number of processes.
    """
    rank, processes = part
    found = []
    for start in range(0, images, batch_size):
        size = min(batch_size, images - start)
        each, left = divmod(size, processes)
        first = start + rank * each + min(rank, left)
        share = slice(first, first + each + (rank < left))
        found.append(share if each else slice(start, start + size))
    return found

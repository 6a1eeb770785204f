"""Images decoded while they are trained on: worker processes make crops, the device gets batches.

What happens to an image follows from seed, epoch and the image's row alone. So batches depend
neither on the number of workers nor on where in an epoch a training goes on, and no generator of
the program itself is touched.

Workers are forked from a server process that has imported what they need and nothing else. To fork
the program itself would be unsafe with its threads and with CUDA, and to start each worker from
nothing takes seconds. They stay from one epoch to the next.
"""

import math
import mmap
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shike_core.config import TrainConfig
from shike_core.data.augment import normalise
from shike_core.data.loader import ImageTable, Table, seed_of, shares
from shike_core.data.pack import available_workers
from shike_core.data.split import Split
from shike_core.data.storage import PackedImages, ReferencedImages, StoredImages
from shike_core.data.views import EvaluationView, TrainingView, View
from shike_core.device import upload
from shike_core.errors import DatasetError, DeviceError, ShikeError
from shike_core.processes import STOP_SIGNALS, end_with_program, without_main

PIECE = 32
"""Most images that a worker makes at a time: few, so that a batch is soon together."""
BATCHES_AHEAD = 2
"""Batches that are decoded in advance, and that a GPU may be behind the program."""

LESS_MEMORY = "give the container more memory, or set workers to fewer"

Rows = npt.NDArray[np.int64]


def open_tables(
    split: Split, configs: Sequence[TrainConfig], device: torch.device, programs: int = 1
) -> Sequence[Table]:
    """The table of a split for each of some trainings that run at the same time.

    Images in memory are held once for all of them; of images in files each has its own workers,
    ``config.workers`` or an equal part of those that the machine has room for.

    Args:
        split: of a subset.
        configs: one for each training; crop_size and workers matter.
        device: where batches are made.
        programs: on this machine that do the same at the same time, this one included.

    Raises:
        DatasetError: a kind of crop that is not for such images.
    """
    images = split.images
    in_memory = isinstance(images, np.ndarray)
    if wrong := {config.crop for config in configs} - {"padded" if in_memory else "resized"}:
        advice = (
            "have one size and are held in memory: set crop=padded, or build the subset of "
            "images in files and without image_size"
            if in_memory
            else "are files of different sizes: set crop=resized with auto_augment=False and "
            "cutout_size=0, or build the subset with image_size"
        )
        raise DatasetError(
            f"crop={wrong.pop()} is not for the images of this subset, which {advice}"
        )
    if isinstance(images, np.ndarray):
        return [ImageTable.from_arrays(images, split.labels, device)] * len(configs)
    assert isinstance(images, StoredImages), "what a source lists is no subset yet"
    labels = torch.tensor(split.labels, device=device)
    each = max(1, available_workers() // (len(configs) * programs))
    return [
        ImageStream(images, labels, config.crop_size, config.workers or each) for config in configs
    ]


class ImageStream:
    """A split whose images are decoded by worker processes; see `Table`.

    Args:
        images: encoded.
        labels: int64 ``(n,)`` on the device for which batches are made.
        crop_size: pixels a side of the images for evaluation.
        workers: most processes that decode at a time.
    """

    def __init__(self, images: StoredImages, labels: Tensor, crop_size: int, workers: int) -> None:
        self.images, self.labels = images, labels
        self._crop_size, self._count = crop_size, workers
        self._workers: Workers | None = None
        self._waits = Waits(labels.device)
        start_server()  # imports while the network is built

    @property
    def device(self) -> torch.device:
        """Where batches are made."""
        return self.labels.device

    def seconds_waited(self, epoch: int | None = None) -> float:
        """See `Table.seconds_waited`; of training batches, as far as the device has come."""
        return self._waits.seconds(epoch)

    def __len__(self) -> int:
        return len(self.labels)

    def close(self) -> None:
        """End the workers that stay between epochs; see `Table.close`."""
        self._workers = None

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

        One epoch at a time: the workers have begun it when the first batch is asked for.

        Raises:
            DatasetError: an image cannot be read.
            DeviceError: a worker was killed, or none can be started.
        """
        order = self.images.order(np.random.default_rng(seed_of(config.seed, epoch)))
        steps = shares(len(self), config.batch_size, part)[first_step:]
        rows = [order[step] for step in steps]
        labels = self.labels[upload(torch.from_numpy(order), self.device)]
        with self._waits.next(epoch):
            if self._workers is None:
                self._workers = self._start(max(map(len, rows), default=1), persistent=True)
            self._workers.begin(TrainingView(config, epoch), rows)
        for step in steps:
            with self._waits.next(epoch):
                images = self._workers.next_batch()
            images = normalise(images, mean, std, dtype)
            yield images.contiguous(memory_format=torch.channels_last), labels[step]

    def batches(self, size: int, part: tuple[int, int] = (0, 1)) -> Iterator[Tensor]:
        """See `Table.batches`; of each image its centre is shown, see `EvaluationView`.

        Raises:
            DatasetError: an image cannot be read.
            DeviceError: a worker was killed, or none can be started.
        """
        rank, processes = part
        rows = [np.arange(len(self))[step] for step in shares(len(self), size)[rank::processes]]
        if not rows:
            return
        workers = self._start(size, persistent=False)
        workers.begin(EvaluationView(self._crop_size), rows)
        for _ in rows:
            yield workers.next_batch()

    def _start(self, batch_size: int, *, persistent: bool) -> "Workers":
        count = max(1, min(self._count, -(-len(self) // PIECE)))
        return Workers(self.images, self.device, count, batch_size, persistent=persistent)


# ---- in the program


class Workers:
    """Processes that make views of images, in the order asked; they end with this object.

    Args:
        images: what they read.
        device: where batches are wanted.
        count: of processes.
        batch_size: largest batch, for as much work in advance as `BATCHES_AHEAD` says.
        persistent: whether they wait for more when they have done all.
    """

    def __init__(
        self,
        images: StoredImages,
        device: torch.device,
        count: int,
        batch_size: int,
        *,
        persistent: bool,
    ) -> None:
        pieces_ahead = BATCHES_AHEAD * len(_pieces(np.arange(batch_size)))
        self._count = count
        self._work = _Work()
        self._loader: DataLoader[Any] = DataLoader(
            Decoder(images),
            batch_sampler=self._work,
            num_workers=count,
            collate_fn=_unchanged,
            pin_memory=device.type == "cuda",
            worker_init_fn=_begin_worker,
            multiprocessing_context=multiprocessing.get_context("forkserver"),
            generator=torch.Generator(),  # or the program's own would move
            prefetch_factor=max(2, -(-pieces_ahead // count)),
            persistent_workers=persistent,
        )
        self._upload = Upload(device)
        self._sizes: deque[int] = deque()
        self._made: Iterator[Tensor | ShikeError] = iter(())

    def begin(self, view: "View", batches: Sequence[Rows]) -> None:
        """Let them make these batches; what is left of others is forgotten.

        Raises:
            DeviceError: they cannot be started.
        """
        self._work.pieces = ((view, rows) for batch in batches for rows in _pieces(batch))
        self._sizes = deque(len(_pieces(batch)) for batch in batches)
        try:
            with without_main():
                self._made = iter(self._loader)
        except OSError as error:
            raise DeviceError(
                f"{self._count} processes that decode images cannot be started ({error}); set "
                "workers to fewer, or raise the limits for processes and open files"
            ) from error

    def next_batch(self) -> Tensor:
        """Uint8 ``(batch, 3, h, w)``, on its way to the device.

        Raises:
            ShikeError: from a worker.
            DeviceError: a worker was killed.
        """
        pieces = [self._next() for _ in range(self._sizes.popleft())]
        return self._upload(pieces).permute(0, 3, 1, 2)

    def _next(self) -> Tensor:
        try:
            piece = next(self._made)
        except (RuntimeError, OSError, EOFError) as error:
            if str(error).startswith("Caught "):  # in a worker, which is still there
                raise
            told = (str(error) or type(error).__name__).splitlines()[0]
            raise DeviceError(
                f"one of {self._count} processes that decode images was killed, most often for "
                f"lack of memory ({told}); {LESS_MEMORY}"
            ) from error
        if isinstance(piece, ShikeError):
            raise piece
        return piece


class _Work:
    """What a loader hands out to its workers, anew for each epoch."""

    def __init__(self) -> None:
        self.pieces: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.pieces)


def _pieces(batch: Rows) -> list[Rows]:
    """A batch in parts of about the same size, at most `PIECE`; the empty one in one part."""
    return np.array_split(batch, max(1, -(-len(batch) // PIECE)))


def _unchanged(made: Any) -> Any:
    return made


class Upload:
    """Brings pixels to a device; to a GPU while it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, pieces: Sequence[Tensor]) -> Tensor:
        """One tensor of several, which for a GPU lie in pinned memory."""
        if self._stream is None:
            return torch.cat(list(pieces))
        here = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            pixels = torch.cat([piece.to(self._device, non_blocking=True) for piece in pieces])
        here.wait_stream(self._stream)
        pixels.record_stream(here)  # its memory is free when `here` has used it
        return pixels


class Waits:
    """Measures how long a device has nothing to do because a batch is missing.

    A GPU works on what was queued before, so its own clock says when it ran out of work. It is kept
    from falling behind by more than `BATCHES_AHEAD` batches, or they would fill its memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._gaps: deque[tuple[int, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds: defaultdict[int, float] = defaultdict(float)  # of each epoch

    @contextmanager
    def next(self, epoch: int) -> Iterator[None]:
        """Around what waits for an epoch's next batch."""
        start = time.perf_counter()
        if self._on_gpu:
            idle = _recorded_event()
            if len(self._gaps) >= BATCHES_AHEAD:
                self._gaps[-BATCHES_AHEAD][-1].synchronize()
            yield
            self._gaps.append((epoch, idle, _recorded_event()))
        else:
            yield
            self._seconds[epoch] += time.perf_counter() - start

    def seconds(self, epoch: int | None = None) -> float:
        """So far, in an epoch or in all."""
        while self._gaps and self._gaps[0][-1].query():
            of_epoch, idle, busy = self._gaps.popleft()
            self._seconds[of_epoch] += idle.elapsed_time(busy) / 1000
        return sum(self._seconds.values()) if epoch is None else self._seconds[epoch]


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def start_server() -> None:
    """Start the process that workers are forked from, unless it runs; does not wait for it."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    multiprocessing.resource_tracker.ensure_running()  # it would let the signals in again
    # A signal to the whole process group is for the program; the server inherits what is blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- in a worker


class Decoder(Dataset[Any]):
    """Makes views of stored images; what goes wrong is returned, to be raised in the program."""

    def __init__(self, images: StoredImages) -> None:
        self._images = images

    def __getitems__(self, work: tuple[View, Rows]) -> "Pixels | ShikeError":
        view, rows = work
        try:
            pixels = Pixels((len(rows), view.size, view.size, 3))
            for target, row, content in zip(
                pixels.array, rows.tolist(), self._images.read(rows.tolist()), strict=True
            ):
                target[:] = self._look(view, content, row)
        except ShikeError as error:
            return error
        except (OSError, MemoryError) as error:
            return DeviceError(
                f"there is no memory for {len(rows)} images ({error}); {LESS_MEMORY}"
            )
        return pixels

    def _look(self, view: View, content: bytes, row: int) -> Image.Image:
        try:
            return view(content, row)
        except Exception as error:  # a damaged image raises nearly anything
            told = str(error) or type(error).__name__
            raise DatasetError(
                f"{_where(self._images, row)} cannot be decoded ({told}), though it could when the "
                "subset was built; put it back as it was, or run build_subset again"
            ) from error


def _where(images: StoredImages, row: int) -> str:
    if isinstance(images, ReferencedImages):
        return f"{images.root}/{images.paths[row]}"
    assert isinstance(images, PackedImages)
    return f"row {images.row[row]} of {images.location}/{images.names[images.shard[row]]}"


class Pixels:
    """Uint8 pixels that a worker makes and that arrive in the program as a tensor.

    They lie in memory that has no name, which both processes see. Torch's own way goes through
    /dev/shm, of which a container has 64 MiB unless it is asked for more.

    Args:
        shape: of the array.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._file = os.memfd_create("images")
        os.ftruncate(self._file, max(1, math.prod(shape)))
        self.array = _mapped(self._file, shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (DupFd(self._file), self.array.shape)

    def __del__(self) -> None:
        os.close(self._file)


def _mapped(file: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(file, 0), np.uint8, math.prod(shape)).reshape(shape)


def _arrived(sent: Any, shape: tuple[int, ...]) -> Tensor:
    """The other end of `Pixels`."""
    file = sent.detach()
    try:
        return torch.from_numpy(_mapped(file, shape))
    finally:
        os.close(file)


def _begin_worker(_: int) -> None:
    """Live and die with the program, and not by signals that are meant for it."""
    os.setpgid(0, 0)  # a terminal sends signals to the program's whole process group
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # forgets one that came meanwhile
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # of odd metadata in images, once for each worker
    end_with_program()

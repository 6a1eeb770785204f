"""Images in files become shards and an index, on all cores; what cannot be read is told.

Every image is read and decoded once, so that a damaged one is found here and not in the middle of
a training. The work is cut into pieces, each of which becomes one shard, or, where images stay in
their files, a table without images. A piece is written whole or not at all and names its plan, so
a call that was stopped, even by a power cut, is taken up by the next one.
"""

import hashlib
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from shike_core.config import SubsetConfig
from shike_core.data.listed import (
    IMAGE_FORMATS,
    ImageFiles,
    absolute,
    as_rgb,
    file_system,
    is_remote,
)
from shike_core.data.split import Split
from shike_core.data.storage import (
    INDEX_SCHEMA,
    PLACE_SCHEMA,
    PLAN_KEY,
    SHARD_SCHEMA,
    UNREADABLE_KEY,
    read_columns,
    shard_metadata,
)
from shike_core.data.unreadable import UNREADABLE_FILE, Unreadable, write_unreadable
from shike_core.errors import ArtifactError, DatasetError, InterruptedPacking
from shike_core.files import atomic_write
from shike_core.processes import STOP_SIGNALS

JPEG_OPTIONS: dict[str, Any] = {"quality": 95, "subsampling": "4:4:4"}
"""How a shrunk image is written.

On 184 photographs of 500 x 375 pixels shrunk to a shorter side of 256 the loss is 40.9 dB (PSNR,
worst 36.3). With colours at half resolution (4:2:0) it is 37.6 dB (worst 30.1) in 0.77 of the
bytes; quality 98 has 45.7 dB in 1.5 times as many. For comparison, Lanczos and bicubic filters
differ by 45.2 dB.
"""
SHARDS = "shards"
"""Folder of the shards in a subset's directory."""
PIECES = "pieces"
"""Folder of the pieces of an index that is not complete, in a subset's directory."""
PIECE_FORMAT = 2
"""Of the file, and of what `prepare` makes of an image: pieces of another one are made anew."""
GROUP_IMAGES, GROUP_BYTES = 8, 2**22
"""A row group has at most so many images, and fewer if they are large: one costs all of it."""
PIECE_IMAGES = 2048
"""Files in a piece without images, at most."""
LEAST_PIECES, LEAST_IMAGES = 32, 256
"""A split has so many pieces at least, so that there is work for all cores, unless they would have
fewer images than this."""
SAMPLE = 32
"""Images of each split whose mean size tells how many go into a shard."""
PIECE_DRAW, SAMPLE_DRAW = 3, 4
UNREADABLE_SHOWN = 20
WORKER_BYTES = 2**28
"""Memory for one process, with room to spare."""
SECONDS_UNTIL_ABANDONED = 3600.0
"""A half-written file in a shared place that was not touched for so long is removed."""
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_LOOKS = 0.2

Positions = npt.NDArray[np.int64]
StopSignal = Callable[[], int | None]
"""Returns the number of a signal that asks to stop, or None."""
_stop: Connection
"""In a worker: has something to read when the others want no more of it."""


class _Stopped(Exception):
    """In a worker: the others want no more of it."""


@dataclass(frozen=True, eq=False)
class Packed:
    """What packing gave."""

    index: dict[str, pa.Table]
    """By split, its readable images in its own order: `INDEX_SCHEMA`, then `PLACE_SCHEMA`."""
    unreadable: list[Unreadable]
    root: str
    """Folder or URL of the files."""
    location: str
    """Folder or URL of the pieces."""
    group_size: int
    """Images in a row group of a shard."""
    rows: dict[str, int]
    """Of each piece, by its file name."""
    plans: dict[str, str]
    """Digest of the plan of each piece, by its file name."""
    contents: dict[str, str]
    """Digest of the files that each piece holds, by its file name."""


@dataclass(frozen=True, eq=False)
class Piece:
    """The plan of one piece: all that a worker needs to make it."""

    split: str
    number: int
    """Of the piece in its split."""
    files: ImageFiles
    positions: Positions
    """Of these files in the split."""
    columns: dict[str, list[Any]]
    """``label``, ``class_name`` and ``source_index`` of each file."""
    with_images: bool
    short_side: int
    group_size: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.split}-{self.number:05d}.parquet"

    @cached_property
    def plan(self) -> str:
        """Digest of everything that decides what the piece holds, but the files' content."""
        content = [
            PIECE_FORMAT, self.split, self.files.root, self.files.paths.tolist(), self.columns,
            self.with_images, self.short_side, self.group_size, JPEG_OPTIONS,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class Made:
    """A finished piece."""

    table: pa.Table
    """Its readable images without their bytes (`INDEX_SCHEMA`)."""
    unreadable: dict[int, str]
    """By position in the piece, what is wrong with the other files."""
    taken_over: bool
    """An earlier call had made it."""

    @property
    def content(self) -> str:
        """Digest of the files in it: with one that was repaired it is another."""
        files = b"".join(self.table["sha256"].to_pylist())
        return hashlib.sha256(files).hexdigest()[:16]


def pack(
    splits: Mapping[str, Split],
    class_names: Sequence[str],
    rule: SubsetConfig,
    directory: Path,
    *,
    shards_dir: str = "",
    workers: int = 0,
    stop_signal: StopSignal = lambda: None,
) -> Packed:
    """Read every image of a subset, pack it if the rule says so, and index it.

    Pieces that an earlier call left by the same plan are taken over, unless a file it could not
    read has been repaired; others are removed. Files are taken not to change between the calls.

    Args:
        splits: with images in files.
        class_names: of all labels.
        rule: of which ``storage``, ``short_side``, ``shard_mib``, ``max_unreadable`` and
            ``subset_seed`` matter here.
        directory: of the subset; receives the pieces, and ``unreadable.csv`` if there are such.
        shards_dir: folder or URL for the shards in place of the subset's directory. They get a
            folder of their own in it, named by a digest of the plan.
        workers: processes; 0 means as many as there are cores and memory for, 1 this one alone.
        stop_signal: asked again and again.

    Raises:
        DatasetError: more images than the rule allows cannot be read.
        ArtifactError: a piece cannot be written.
        InterruptedPacking: a signal came.
    """
    pieces = _plan(splits, class_names, rule)
    location = _location(pieces, directory, shards_dir)
    _remove_others(pieces, location, directory, bool(shards_dir))
    total = sum(len(piece.files) for piece in pieces)
    made: dict[int, Made] = {}
    done = unreadable = 0
    making = _make_all(pieces, location, workers or available_workers(), stop_signal)
    with _progress(total, sys.stderr) as show, closing(making):
        try:
            for i, result in making:
                made[i] = result
                done += len(pieces[i].files)
                unreadable += len(result.unreadable)
                show(len(pieces[i].files), result.taken_over)
                if unreadable > rule.max_unreadable * total:
                    break
        except _Stopped:
            raise InterruptedPacking(stop_signal() or signal.SIGTERM, done, total) from None
    wrong = [
        image
        for name in splits
        for _, image in sorted(
            (piece.positions[k], Unreadable(name, piece.files.paths[k], reason))
            for i, piece in enumerate(pieces)
            if piece.split == name and i in made
            for k, reason in made[i].unreadable.items()
        )
    ]
    write_unreadable(wrong, directory)
    if unreadable > rule.max_unreadable * total:
        raise DatasetError(_too_many(wrong, done, total, rule, directory))
    return Packed(
        index={name: _index(name, pieces, made) for name in splits},
        unreadable=wrong,
        root=pieces[0].files.root,
        location=location,
        group_size=pieces[0].group_size,
        rows={piece.name: len(made[i].table) for i, piece in enumerate(pieces)},
        plans={piece.name: piece.plan for piece in pieces},
        contents={piece.name: made[i].content for i, piece in enumerate(pieces)},
    )


def prepare(content: bytes, short_side: int = 0) -> tuple[bytes, int, int]:
    """Decode an image to the end, and shrink it if it is larger than asked.

    The file's own bytes stay if nothing is to be shrunk; an image is never enlarged. A shrunk one
    becomes an RGB JPEG: a JPEG is decoded at the smallest size of at least twice what is wanted,
    then the Lanczos filter, which averages over all pixels, makes the rest. As in torchvision's
    loader, an orientation noted in the file is ignored and transparency dropped.

    Args:
        content: of the file.
        short_side: pixels wanted for the shorter side; 0 leaves the image as it is.

    Returns:
        The bytes to store, and the image's width and height.

    Raises:
        ValueError: it is damaged, in none of `shike_core.data.listed.IMAGE_FORMATS`, larger than
            ``PIL.Image.MAX_IMAGE_PIXELS``, or its values are not of 8 bits.
    """
    if not content:
        raise ValueError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual but readable metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _prepare(content, short_side)
    except UnidentifiedImageError:
        raise ValueError("not an image that can be read") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged image raises nearly anything
        raise ValueError(str(error) or type(error).__name__) from error


def _prepare(content: bytes, short_side: int) -> tuple[bytes, int, int]:
    with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
        width, height = image.size
        factor = short_side / min(width, height)
        if not 0 < factor < 1:
            image.draft(image.mode, (1, 1))  # all of a JPEG is read, but fewer pixels are computed
            as_rgb(image)
            return content, width, height
        width, height = max(1, round(factor * width)), max(1, round(factor * height))
        # A JPEG decoded smaller may end with a part of a pixel.
        drafted = image.draft("RGB", (2 * width, 2 * height))
        box = drafted[1] if drafted else None
        shrunk = as_rgb(image).resize((width, height), Image.Resampling.LANCZOS, box)
    buffer = io.BytesIO()
    shrunk.save(buffer, "JPEG", **JPEG_OPTIONS)
    return buffer.getvalue(), width, height


def available_workers() -> int:
    """Processes that this machine, or this container's share of it, has cores and memory for."""
    limits = [len(os.sched_getaffinity(0))]
    control = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # not in a container, or no limit: "max"
        quota, period = (control / "cpu.max").read_text().split()
        limits.append(math.ceil(int(quota) / int(period)))
    with suppress(OSError, ValueError):
        limits.append(int((control / "memory.max").read_text()) // WORKER_BYTES - 4)
    return max(1, min(limits))


# ---- the plan


def _plan(
    splits: Mapping[str, Split], class_names: Sequence[str], rule: SubsetConfig
) -> list[Piece]:
    with_images = rule.storage == "packed"
    images, group_size = PIECE_IMAGES, PIECE_IMAGES
    if with_images:
        size = _typical_bytes(splits, rule)
        images = _power_of_two(rule.shard_mib * 2**20 / size)
        group_size = min(images, GROUP_IMAGES, _power_of_two(GROUP_BYTES / size))
    pieces = []
    for name, split in splits.items():
        files = _files(split)
        step = min(images, max(LEAST_IMAGES, _power_of_two(len(files) / LEAST_PIECES)))
        order = np.arange(len(files))
        if with_images and name == "train":  # neighbours are read together: a random draw
            order = np.random.RandomState([rule.subset_seed, PIECE_DRAW]).permutation(len(files))
        for number, start in enumerate(range(0, max(1, len(files)), step)):
            positions = order[start : start + step]
            labels = split.labels[positions].tolist()
            columns = {
                "label": labels,
                "class_name": [class_names[label] for label in labels],
                "source_index": split.source_index[positions].tolist(),
            }
            pieces.append(
                Piece(
                    name,
                    number,
                    files[positions],
                    positions,
                    columns,
                    with_images,
                    rule.short_side,
                    group_size,
                )
            )
    return pieces


def _files(split: Split) -> ImageFiles:
    """A split's images, with a root that holds wherever the subset is read."""
    assert isinstance(split.images, ImageFiles)
    return ImageFiles(absolute(split.images.root), split.images.paths)


def _typical_bytes(splits: Mapping[str, Split], rule: SubsetConfig) -> float:
    """Mean size of a stored image, from a few of each split."""
    sizes = []
    for split in splits.values():
        files = _files(split)
        generator = np.random.RandomState([rule.subset_seed, SAMPLE_DRAW])
        for position in generator.permutation(len(files))[:SAMPLE]:
            with suppress(ValueError):
                sizes.append(len(_examine(files, position, rule.short_side)[0]))
    return float(np.mean(sizes)) if sizes else 2.0**17


def _power_of_two(number: float) -> int:
    """The largest one that is not above: plans of nearly equal samples are equal."""
    return 1 << math.floor(math.log2(max(1, number)))


def _location(pieces: Sequence[Piece], directory: Path, shards_dir: str) -> str:
    if not shards_dir:
        return absolute(str(directory / (SHARDS if pieces[0].with_images else PIECES)))
    plans = " ".join(piece.plan for piece in pieces)
    return f"{absolute(shards_dir)}/{hashlib.sha256(plans.encode('ascii')).hexdigest()[:16]}"


def _remove_others(
    pieces: Sequence[Piece], location: str, directory: Path, is_shared: bool
) -> None:
    """Remove what earlier calls left, and nothing that another call may be writing now."""
    for folder in (directory / SHARDS, directory / PIECES):
        if not Path(location).is_relative_to(folder.absolute()):
            shutil.rmtree(folder, ignore_errors=True)
    if is_remote(location):
        return
    names = {piece.name for piece in pieces}
    youngest = time.time() - SECONDS_UNTIL_ABANDONED if is_shared else math.inf
    for path in Path(location).glob("*.parquet"):
        with suppress(OSError):
            if path.name not in names and path.stat().st_mtime < youngest:
                path.unlink()


# ---- one piece


def make_piece(piece: Piece, location: str, stopped: Callable[[], bool]) -> Made:
    """Read the images of a piece and write it, unless an earlier call has.

    Raises:
        ArtifactError: it cannot be written.
    """
    if earlier := _made_earlier(piece, location):
        return earlier
    schema = SHARD_SCHEMA if piece.with_images else INDEX_SCHEMA
    options: dict[str, Any] = {
        "compression": {name: "NONE" if name == "image" else "ZSTD" for name in schema.names},
        "use_dictionary": ["class_name", "split"],
        "write_statistics": False,
        "write_page_checksum": True,
    }
    tables, rows, unreadable = [], [], {}
    with (
        _writing(location, piece.name) as path,
        pq.ParquetWriter(path, schema, **options) as writer,
    ):
        for position in range(len(piece.files)):
            if stopped():
                raise _Stopped
            try:
                rows.append((position, *_examine(piece.files, position, piece.short_side)))
            except ValueError as error:
                unreadable[position] = str(error)
            if len(rows) == piece.group_size:
                tables.append(_write_group(writer, piece, rows))
                rows = []
        tables.append(_write_group(writer, piece, rows))
        writer.add_key_value_metadata(
            {PLAN_KEY: piece.plan.encode("ascii"), UNREADABLE_KEY: json.dumps(unreadable)}
        )
    return Made(pa.concat_tables(tables).combine_chunks(), unreadable, taken_over=False)


def _examine(
    files: ImageFiles, position: int, short_side: int
) -> tuple[bytes, bytes, int, int, int]:
    """What is stored of a file: the image, the file's SHA-256 and size, the image's shape.

    Raises:
        ValueError: it is missing or not an image, and why.
    """
    try:
        content = files.read(position)
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    image, width, height = prepare(content, short_side)
    return image, hashlib.sha256(content).digest(), len(content), width, height


def _write_group(
    writer: pq.ParquetWriter, piece: Piece, rows: Sequence[tuple[int, bytes, bytes, int, int, int]]
) -> pa.Table:
    """Write a row group; returned without the images."""
    positions = [row[0] for row in rows]
    columns = {name: [of[k] for k in positions] for name, of in piece.columns.items()} | {
        "split": [piece.split] * len(rows),
        "path": piece.files.paths[positions].tolist(),
        "sha256": [row[2] for row in rows],
        "bytes": [row[3] for row in rows],
        "width": [row[4] for row in rows],
        "height": [row[5] for row in rows],
    }
    index = pa.table(columns, INDEX_SCHEMA)
    table = index
    if piece.with_images:
        images = pa.array([row[1] for row in rows], pa.binary())
        table = index.add_column(0, SHARD_SCHEMA.field("image"), images)
    if rows:
        writer.write_table(table)
    return index


def _made_earlier(piece: Piece, location: str) -> Made | None:
    """The piece as an earlier call made it, if it did and would make the same now."""
    try:
        metadata = shard_metadata(location, piece.name).metadata
        if metadata[PLAN_KEY] != piece.plan.encode("ascii"):
            return None
        unreadable = {int(k): reason for k, reason in json.loads(metadata[UNREADABLE_KEY]).items()}
        table = read_columns(location, piece.name, INDEX_SCHEMA)
    except Exception:  # missing, damaged, of another program: it is made anew
        return None
    for position in unreadable:
        with suppress(ValueError):
            _examine(piece.files, position, piece.short_side)
            return None  # repaired meanwhile
    return Made(table, unreadable, taken_over=True)


@contextmanager
def _writing(location: str, name: str) -> Iterator[Path]:
    """A path to write a piece to, which gets its name, or goes to its URL, when it is whole."""
    if not is_remote(location):
        with atomic_write(Path(location, name)) as path:
            yield path
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, name)
        yield path
        system, folder = file_system(location)
        try:
            system.put_file(str(path), f"{folder}/{name}")
        except Exception as error:  # each kind of server has errors of its own
            raise ArtifactError(
                f"cannot write {location}/{name} ({type(error).__name__}: {error}); check the "
                "address and your access to it"
            ) from error


# ---- all pieces


def _make_all(
    pieces: Sequence[Piece], location: str, workers: int, stop_signal: StopSignal
) -> Generator[tuple[int, Made], None, None]:
    """Make all pieces; each is given with its position when it is finished.

    Raises:
        _Stopped: a signal came.
    """
    workers = min(workers, len(pieces))
    if workers == 1:
        for i, piece in enumerate(pieces):
            yield i, make_piece(piece, location, lambda: stop_signal() is not None)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of our threads
    # Pipes, as an event is never free again if a process is killed that holds its lock.
    stop, stopper = context.Pipe(duplex=False)
    parent, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (stop, parent))
    waiting = iter(enumerate(pieces))
    running: dict[Future[Made], int] = {}
    try:
        while True:
            for i, piece in islice(waiting, 2 * workers - len(running)):
                running[_submit(pool, piece, location)] = i
            if not running:
                return
            finished, _ = wait(running, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
            if stop_signal() is not None:
                raise _Stopped
            for future in finished:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        held.close()  # the pool's SIGTERM is blocked in its workers, and would wait for them
        reason = getattr(error.__cause__, "strerror", None) or "most likely for want of memory"
        raise ArtifactError(
            f"one of {workers} processes that read images was killed or could not be started "
            f"({reason}); run the same command again with fewer workers, it goes on from what is "
            "done"
        ) from error
    finally:
        stopper.send(None)
        pool.shutdown(cancel_futures=True)
        for end in (stop, stopper, parent, held):
            end.close()


def _submit(pool: ProcessPoolExecutor, piece: Piece, location: str) -> Future[Made]:
    """Queue a piece, for a worker that may be started here.

    Raises:
        BrokenProcessPool: another worker was killed, or none can be started.
    """
    try:
        with _signals_blocked():  # which the worker inherits
            return pool.submit(_make_in_worker, piece, location)
    except OSError as error:  # of a pool that breaks during the start: it closes its own pipes
        raise BrokenProcessPool from error


def _start_worker(stop: Connection, parent: Connection) -> None:
    global _stop
    _stop = stop
    threading.Thread(target=_end_with_parent, args=[parent], daemon=True).start()


def _end_with_parent(parent: Connection) -> None:
    """A worker whose parent was killed, or gave it up, would wait for ever."""
    parent.poll(None)  # until the other end is closed, as nothing is ever sent
    os._exit(1)


def _make_in_worker(piece: Piece, location: str) -> Made:
    return make_piece(piece, location, _stop.poll)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """A signal to the whole process group is for the parent, which ends its workers itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _index(name: str, pieces: Sequence[Piece], made: Mapping[int, Made]) -> pa.Table:
    """All readable images of a split in its order, each with its place."""
    tables, positions = [], []
    for i, piece in enumerate(pieces):
        if piece.split == name:
            table = made[i].table
            place = [np.full(len(table), piece.number), np.arange(len(table))]
            for field, column in zip(PLACE_SCHEMA, place, strict=True):
                table = table.append_column(field, pa.array(column, field.type))
            tables.append(table)
            positions.append(np.delete(piece.positions, list(made[i].unreadable)))
    return pa.concat_tables(tables).take(np.argsort(np.concatenate(positions)))


def _too_many(
    wrong: Sequence[Unreadable], done: int, total: int, rule: SubsetConfig, directory: Path
) -> str:
    shown = "; ".join(f"{image.path}: {image.reason}" for image in wrong[:UNREADABLE_SHOWN])
    return (
        f"{len(wrong)} of {done} images ({len(wrong) / done:.2%}) cannot be read, more than "
        f"max_unreadable={rule.max_unreadable:g} of all {total} allows ({shown}"
        f"{'; ...' * (len(wrong) > UNREADABLE_SHOWN)}; list: {directory / UNREADABLE_FILE}); "
        "check data_dir, repair or remove them, or raise max_unreadable"
    )


@contextmanager
def _progress(total: int, stream: TextIO) -> Iterator[Callable[[int, bool], None]]:
    """Shows how many images are done: a bar on a terminal, a line now and then otherwise."""
    from tqdm import tqdm  # reading a subset does without it

    started = said = time.monotonic()
    done = fresh = 0
    with tqdm(
        total=total,
        unit="image",
        desc="reading images",
        file=stream,
        dynamic_ncols=True,
        disable=not stream.isatty(),
    ) as bar:

        def show(images: int, taken_over: bool) -> None:
            nonlocal said, done, fresh
            bar.update(images)
            done, fresh, now = done + images, fresh + images * (not taken_over), time.monotonic()
            if bar.disable and now - said > SECONDS_BETWEEN_LINES:
                said, speed = now, fresh / (now - started)
                left = f"left {(total - done) / speed:.0f} s" if fresh else "of an earlier call"
                print(f"{done} of {total} images read  {left}", file=stream, flush=True)

        yield show

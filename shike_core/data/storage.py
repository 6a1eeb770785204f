"""Encoded images of a subset on disk: packed into shards, or left in the source's own files.

A shard is a Parquet table of whole images (columns: `SHARD_SCHEMA`), uncompressed and with a
checksum on every page, in row groups so small that a single image costs little to read. Its
metadata names the plan it was made by, see `shike_core.data.pack`. Shards lie in a folder or below
a URL that fsspec knows; one from a URL is fetched as a whole, once for each machine.
"""

import fcntl
import hashlib
import os
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shike_core.data.listed import ImageFiles, file_system, is_remote
from shike_core.errors import DatasetError

WINDOW = 4096
"""Images among which the order of an epoch mixes rows of shards."""
FILES_OPEN = 8
GROUPS_KEPT = 4
PLAN_KEY = b"shike_plan"
UNREADABLE_KEY = b"shike_unreadable"

INDEX_SCHEMA = pa.schema(
    [
        pa.field("label", pa.int64(), nullable=False),
        pa.field("class_name", pa.string(), nullable=False),
        pa.field("source_index", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),  # of the source's file
        pa.field("bytes", pa.int64(), nullable=False),  # of the source's file
        pa.field("width", pa.int32(), nullable=False),  # of the image as it is stored
        pa.field("height", pa.int32(), nullable=False),
    ]
)
PLACE_SCHEMA = pa.schema(
    [pa.field("shard", pa.int32(), nullable=False), pa.field("row", pa.int32(), nullable=False)]
)
SHARD_SCHEMA = pa.schema([pa.field("image", pa.binary(), nullable=False), *INDEX_SCHEMA])

Order = npt.NDArray[np.int64]


class StoredImages(ABC):
    """Encoded images (JPEG, PNG, ...) of one split.

    Cheap to send to worker processes: files are opened by the process and thread that reads.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def __getitem__(self, positions: Order) -> Self:
        """The images at some positions, in that order."""

    @abstractmethod
    def read(self, rows: Sequence[int]) -> list[bytes]:
        """The encoded images at some rows, in the order asked.

        Raises:
            DatasetError: one is missing, damaged or not what it was when the subset was built.
        """

    @abstractmethod
    def order(self, generator: np.random.Generator) -> Order:
        """All rows (n,) in an order for one epoch that suits the storage.

        Generator and storage alone decide it.
        """


@dataclass(frozen=True, eq=False)
class ReferencedImages(StoredImages):
    """Images in the source's own files."""

    root: str
    """Folder or URL."""
    paths: pa.StringArray
    """Relative to root (n,)."""
    sizes: npt.NDArray[np.int64]
    """Bytes of each file when the subset was built (n,)."""

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, positions: Order) -> Self:
        return replace(self, paths=self.paths.take(positions), sizes=self.sizes[positions])

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """See `StoredImages.read`."""
        paths = self.paths.take(pa.array(rows, pa.int64())).to_pylist()
        files = ImageFiles(self.root, np.array(paths, dtype=np.object_))
        return [self._read(files, i, int(row)) for i, row in enumerate(rows)]

    def _read(self, files: ImageFiles, position: int, row: int) -> bytes:
        where = f"{self.root}/{files.paths[position]}"
        try:
            content = files.read(position)
        except OSError as error:
            raise DatasetError(
                f"{where} cannot be read ({error}); the subset refers to it: put it back, or run "
                "build_subset again"
            ) from error
        if len(content) != self.sizes[row]:
            raise DatasetError(
                f"{where} has {len(content)} bytes, but had {self.sizes[row]} when the subset was "
                "built; put it back as it was, or run build_subset again"
            )
        return content

    def order(self, generator: np.random.Generator) -> Order:
        """A permutation; see `StoredImages.order`."""
        return np.argsort(generator.random(len(self)), kind="stable")


@dataclass(frozen=True, eq=False)
class PackedImages(StoredImages):
    """Images packed into shards."""

    location: str
    """Folder or URL of the shards."""
    names: tuple[str, ...]
    """File name of each shard."""
    plans: tuple[str, ...]
    """Digests of what each shard was made from; a copy of a shard with others is not taken."""
    group_size: int
    """Images in a row group."""
    shard: npt.NDArray[np.int32]
    """Which shard an image is in (n,)."""
    row: npt.NDArray[np.int32]
    """Its row there (n,)."""

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, positions: Order) -> Self:
        return replace(self, shard=self.shard[positions], row=self.row[positions])

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """See `StoredImages.read`."""
        positions = np.asarray(rows, dtype=np.int64)
        shard, row = self.shard[positions], self.row[positions]
        contents = [b""] * len(positions)
        for i in np.lexsort((row, shard)).tolist():  # so that a row group is read once
            contents[i] = self._read(int(shard[i]), int(row[i]))
        return contents

    def _read(self, shard: int, row: int) -> bytes:
        name, plan = self.names[shard], self.plans[shard]
        group, place = divmod(row, self.group_size)
        try:
            images = _row_group(self.location, name, plan, group, threading.get_native_id())
            content: bytes = images[place].as_py()
        except (OSError, IndexError, pa.ArrowException) as error:
            raise DatasetError(
                f"row {row} of {self.location}/{name} cannot be read ({error}); delete that file "
                "and run build_subset again, which makes it anew"
            ) from error
        return content

    def order(self, generator: np.random.Generator) -> Order:
        """Shard after shard, and in each its row groups, are drawn; rows are mixed in windows.

        So the disk is read about once in an epoch, and a shard can be fetched when its turn comes.
        Training images were put into the shards in a random order, so that even a single row group
        is a random draw from all of them. See `StoredImages.order`.
        """
        group = self.row // self.group_size
        of_shard = generator.random(len(self.names))[self.shard]
        of_group = generator.random((len(self.names), group.max(initial=0) + 1))[self.shard, group]
        rows = np.lexsort((self.row, of_group, of_shard))
        window = np.arange(len(rows)) // WINDOW
        return rows[np.lexsort((generator.random(len(rows)), window))]


def shard_metadata(location: str, name: str) -> pq.FileMetaData:
    """What a shard says about itself, without its images.

    Raises:
        OSError: it is missing or cannot be read.
        pyarrow.ArrowException: it is not a Parquet file.
    """
    if not is_remote(location):
        return pq.read_metadata(Path(location, name))
    system, folder = file_system(location)
    with system.open(f"{folder}/{name}", "rb") as file:
        return pq.read_metadata(file)


def read_columns(location: str, name: str, schema: pa.Schema) -> pa.Table:
    """Some columns of a shard.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: a column is missing or of another type, as a pyarrow.ArrowException or not.
    """
    if not is_remote(location):
        table = pq.read_table(Path(location, name), columns=schema.names, partitioning=None)
    else:
        system, folder = file_system(location)
        with system.open(f"{folder}/{name}", "rb") as file:
            table = pq.read_table(file, columns=schema.names)
    return table.select(schema.names).cast(schema).replace_schema_metadata()


# The last argument keeps processes and threads apart: a reader must not be shared by them.
@lru_cache(FILES_OPEN)
def _open_shard(location: str, name: str, plan: str, _reader: int) -> pq.ParquetFile:
    path = _fetched(location, name, plan) if is_remote(location) else Path(location, name)
    return pq.ParquetFile(path, memory_map=True, pre_buffer=False, page_checksum_verification=True)


@lru_cache(GROUPS_KEPT)
def _row_group(location: str, name: str, plan: str, group: int, reader: int) -> pa.ChunkedArray:
    file = _open_shard(location, name, plan, reader)
    return file.read_row_group(group, columns=["image"], use_threads=False)["image"]


def _fetched(location: str, name: str, plan: str) -> Path:
    """The copy of a remote shard on this machine; the first process that asks fetches it."""
    key = hashlib.sha256(f"{location}/{name} {plan}".encode()).hexdigest()
    folder = Path(tempfile.gettempdir(), f"shike-shards-{os.getuid()}")
    path = folder / f"{key}.parquet"
    try:
        system, remote = file_system(location)
        folder.mkdir(mode=0o700, exist_ok=True)
        # Not fsspec's own cache: it lets two processes write one file at the same time.
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                partial = path.with_suffix(".partial")
                system.get_file(f"{remote}/{name}", str(partial))
                partial.replace(path)
    except DatasetError:
        raise
    except Exception as error:  # each kind of server has errors of its own
        raise DatasetError(
            f"{location}/{name} cannot be fetched to {folder} ({type(error).__name__}: {error}); "
            "check the address, your access to it and the free space there"
        ) from error
    return path

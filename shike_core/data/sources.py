"""Where images come from: labelled sources that subsets are cut out of.

Images in files are the concern of `shike_core.data.listed`. The CIFAR files are pickles from
outside, so their checksums are compared first and they are read by an unpickler that can make
nothing but containers, text, numbers and numpy arrays.
"""

import hashlib
import importlib
import io
import lzma
import pickle
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from shike_core.config import Dataset
from shike_core.data.listed import DATASETS, find_listed, load_listed
from shike_core.data.split import Images, Labels, Source, Split
from shike_core.errors import DatasetError

__all__ = ["Images", "Labels", "Source", "Split", "load_source", "where_images_come_from"]

DIGITS_TEST_PER_CLASS = 50
ARCHIVE_SUFFIXES = (".tar.gz", ".tar.xz", ".tar")


@dataclass(frozen=True)
class CifarFiles:
    """The files of a data set in the layout of CIFAR's Python version."""

    folder: str
    """The directory they lie in, also inside the archive."""
    url: str
    """Address of the archive."""
    archive_md5: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    """The file with the names of the classes."""
    label_key: bytes
    names_key: bytes
    md5: Mapping[str, str]
    """Checksum of every file."""

    @property
    def archive(self) -> str:
        """File name of the archive."""
        return self.url.rpartition("/")[2]


CIFAR10_FILES = CifarFiles(
    folder="cifar-10-batches-py",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    archive_md5="c58f30108f718f92721af3b95e74349a",
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test=("test_batch",),
    meta="batches.meta",
    label_key=b"labels",
    names_key=b"label_names",
    md5={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
)
CIFAR100_FILES = CifarFiles(
    folder="cifar-100-python",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
    train=("train",),
    test=("test",),
    meta="meta",
    label_key=b"fine_labels",
    names_key=b"fine_label_names",
    md5={
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
)
CIFAR_FILES = {"cifar10": CIFAR10_FILES, "cifar100": CIFAR100_FILES}
PROBE_TIMEOUT_S = 10.0
# The values of the authors' recipe, for both CIFARs.
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)
CIFAR_SIZE = (32, 32)
# Measured over all pixels of the training pool.
DIGITS_MEAN = (0.3058, 0.3058, 0.3058)
DIGITS_STD = (0.3753, 0.3753, 0.3753)


def load_source(
    dataset: str, data_dir: Path | str | None = None, *, files: CifarFiles | None = None
) -> Source:
    """Load a source by name.

    Args:
        dataset: one of `shike_core.config.Dataset`.
        data_dir: for CIFAR where it lies, or is to be put: the directory of its files, the one
            above, or one with the official archive; None takes the user's cache. For images in
            files see `load_listed`. Not used for digits.
        files: another data set in CIFAR's layout; None takes the official files.

    Raises:
        DatasetError: files are missing and cannot be downloaded, or are damaged.
        ValueError: there is no source of that name.
    """
    if dataset == "digits":
        return _load_digits()
    if dataset in CIFAR_FILES:
        return _load_cifar(dataset, files or CIFAR_FILES[dataset], _folder(dataset, data_dir))
    if dataset in DATASETS:
        return load_listed(dataset, data_dir)
    raise _unknown(dataset)


def where_images_come_from(dataset: str, data_dir: Path | str | None = None) -> str:
    """Where `load_source` will find its files, found out in seconds: no image is read or checked.

    Args:
        dataset: as for `load_source`.
        data_dir: as for `load_source`.

    Raises:
        DatasetError: the files are not there, and there is no way to get them.
        ValueError: there is no source of that name.
    """
    if dataset == "digits":
        return "the digits come with scikit-learn"
    if dataset in CIFAR_FILES:
        return _find_cifar(dataset, _folder(dataset, data_dir))
    if dataset in DATASETS:
        return find_listed(dataset, data_dir)
    raise _unknown(dataset)


def _unknown(dataset: str) -> ValueError:
    return ValueError(f"unknown dataset {dataset!r}; choose one of {', '.join(get_args(Dataset))}")


def _folder(dataset: str, data_dir: Path | str | None) -> Path | None:
    if "://" in str(data_dir):
        raise DatasetError(
            f"{dataset} is read from a folder, but data_dir is {data_dir}; copy its files into one"
        )
    return Path(data_dir) if data_dir else None


def _find_cifar(dataset: str, data_dir: Path | None) -> str:
    files = CIFAR_FILES[dataset]
    if data_dir and (place := _find(files, data_dir)):
        return f"{dataset} in {place}"
    place = data_dir or _import("pooch", "install pooch").os_cache("shike")
    if not data_dir and (place / files.archive).is_file():
        return f"{dataset} in {place / files.archive}"
    try:
        with urllib.request.urlopen(_head(files.url), timeout=PROBE_TIMEOUT_S):
            pass
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place):
            pass
    except OSError as error:
        raise DatasetError(
            f"{place} has neither {files.folder} nor {files.archive}, and they cannot be put there "
            f"({error}); download {files.url} by hand and name the directory it is in as data_dir"
        ) from error
    return f"{dataset} will be downloaded from {files.url} to {place}"


def _head(url: str) -> urllib.request.Request:
    return urllib.request.Request(url, method="HEAD")


def _load_digits() -> Source:
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn.

    The last 50 images of each class in file order are the test set. The file goes writer by
    writer, so most of them are by people whose hand is not in the training pool.
    """
    module = _import("sklearn.datasets", "install scikit-learn to use the digits")
    digits = module.load_digits()
    grey = (digits.images.astype(np.int64) * 255 + 8) // 16  # 0..16 to 0..255, halves upwards
    images = np.repeat(grey.astype(np.uint8)[..., np.newaxis], 3, axis=-1)
    labels = digits.target.astype(np.int64)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        is_test[np.flatnonzero(labels == label)[-DIGITS_TEST_PER_CLASS:]] = True
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    return Source(
        name="digits",
        train=Split(images[train], labels[train], train),
        test=Split(images[test], labels[test], test),
        class_names=tuple(str(name) for name in digits.target_names),
        mean=DIGITS_MEAN,
        std=DIGITS_STD,
    )


def _load_cifar(name: str, files: CifarFiles, data_dir: Path | None) -> Source:
    contents = _read_verified(files, data_dir)
    meta = _unpickle(files.meta, contents[files.meta])
    try:
        class_names = tuple(text.decode("utf-8") for text in meta[files.names_key])
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{files.meta} holds no list of class names under {files.names_key!r}; "
            f"take the file from {files.url}"
        ) from error
    train, test = (
        _join([_read_batch(files, batch, contents[batch], len(class_names)) for batch in batches])
        for batches in (files.train, files.test)
    )
    return Source(name, train, test, class_names, CIFAR_MEAN, CIFAR_STD)


def _read_verified(files: CifarFiles, data_dir: Path | None) -> dict[str, bytes]:
    """Read every file from its directory or archive and compare the checksums."""
    place = (data_dir and _find(files, data_dir)) or _download(files, data_dir)
    try:
        contents = _read_directory(files, place) if place.is_dir() else _read_archive(files, place)
    except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise DatasetError(
            f"cannot read {place} ({error}); if it is truncated, delete it and download "
            f"{files.url} again"
        ) from error
    for name, expected in files.md5.items():
        if name not in contents:
            raise DatasetError(
                f"{place} has no file {name}; all of {', '.join(files.md5)} are needed: "
                f"take them from {files.url}"
            )
        got = hashlib.md5(contents[name], usedforsecurity=False).hexdigest()
        if got != expected:
            raise DatasetError(
                f"{name} in {place} has MD5 {got} ({len(contents[name])} bytes), expected "
                f"{expected}: it is truncated or changed; delete it and download {files.url} again"
            )
    return contents


def _find(files: CifarFiles, data_dir: Path) -> Path | None:
    stem = files.archive.removesuffix(ARCHIVE_SUFFIXES[0])
    archives = [data_dir / f"{stem}{suffix}" for suffix in ARCHIVE_SUFFIXES]
    if (data_dir / files.folder).is_dir():
        return data_dir / files.folder
    if present := [archive for archive in archives if archive.is_file()]:
        return present[0]
    return data_dir if any((data_dir / name).is_file() for name in files.md5) else None


def _read_directory(files: CifarFiles, directory: Path) -> dict[str, bytes]:
    present = [name for name in files.md5 if (directory / name).is_file()]
    return {name: (directory / name).read_bytes() for name in present}


def _read_archive(files: CifarFiles, archive: Path) -> dict[str, bytes]:
    """Read the files out of the archive in one pass; nothing is extracted to the disk."""
    contents = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            if folder == files.folder and name in files.md5 and member.isfile():
                file = tar.extractfile(member)
                contents[name] = file.read() if file else b""
    return contents


def _download(files: CifarFiles, data_dir: Path | None) -> Path:
    by_hand = f"download {files.url} by hand and name the directory it is in as data_dir"
    pooch = _import("pooch", f"install pooch, or {by_hand}")
    directory = data_dir or pooch.os_cache("shike")
    try:
        path = pooch.retrieve(
            files.url,
            known_hash=f"md5:{files.archive_md5}",
            fname=files.archive,
            path=directory,
            downloader=pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=30),
        )
    except (OSError, ValueError) as error:  # network errors are OSErrors, a wrong hash a ValueError
        raise DatasetError(
            f"{directory} has neither {files.folder} nor {files.archive}, and downloading it "
            f"failed ({error}); {by_hand}"
        ) from error
    return Path(path)


def _import(module: str, advice: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DatasetError(f"{module} is not installed; {advice}") from error


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in pickles of protocol 2; no other codec is let in."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the codec {encoding!r} is not allowed")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1_bytes,
    # numpy renamed its core; the official files have the old name.
    ("numpy.core.multiarray", "_reconstruct"): np.ndarray.__reduce__(np.empty(0))[0],
    ("numpy._core.multiarray", "_reconstruct"): np.ndarray.__reduce__(np.empty(0))[0],
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")
        return _ALLOWED[module, name]


def _unpickle(name: str, content: bytes) -> dict[bytes, Any]:
    try:
        loaded = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DatasetError(
            f"{name} is refused as a CIFAR file ({error}); take the official file"
        ) from error
    if not isinstance(loaded, dict):
        raise DatasetError(f"{name} holds a {type(loaded).__name__}, expected a dictionary")
    return loaded


def _read_batch(files: CifarFiles, name: str, content: bytes, num_classes: int) -> Split:
    batch = _unpickle(name, content)
    data, labels = batch.get(b"data"), batch.get(files.label_key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        raise DatasetError(
            f"{name} holds no uint8 array of rows of 3072 values under b'data'; "
            "take the official file"
        )
    if (
        not isinstance(labels, list)
        or len(labels) != len(data)
        or not all(isinstance(label, int) and 0 <= label < num_classes for label in labels)
    ):
        raise DatasetError(
            f"{name} holds no list of {len(data)} labels in 0..{num_classes - 1} under "
            f"{files.label_key!r}; take the official file"
        )
    images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (n, height, width, 3)
    return Split(images, np.array(labels, dtype=np.int64), np.arange(len(data)))


def _join(batches: list[Split]) -> Split:
    images: Images = np.concatenate([batch.images for batch in batches])
    labels: Labels = np.concatenate([batch.labels for batch in batches])
    return Split(np.ascontiguousarray(images), labels, np.arange(len(labels), dtype=np.int64))

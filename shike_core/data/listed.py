"""Sources whose images lie in files: published lists, folders of classes, tables.

Nothing here opens an image. Folders can also be URLs that fsspec knows.
"""

import importlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from shike_core.data.split import Labels, Source, Split
from shike_core.errors import DatasetError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may take a file for, whatever its name; others make it start programs."""
# Of the training images of ILSVRC 2012; what networks for photographs are usually given.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PARTS = {"train": "train", "test": "test", "val": "validation", "validation": "validation"}
"""Splits by the names that folders and tables may give them."""
FOLDERS_AT_A_TIME = 16
TEXTS_SHOWN = 20

Paths = npt.NDArray[np.object_]
Texts: TypeAlias = "pd.Series[str]"


@dataclass(frozen=True)
class ImageFiles:
    """Images of a split that stay in files."""

    root: str
    """Folder, or URL that fsspec knows (``s3://bucket/photographs``)."""
    paths: Paths
    """Text relative to root, separated by ``/`` (n,)."""

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, positions: npt.NDArray[np.int64]) -> Self:
        return replace(self, paths=self.paths[positions])

    def read(self, position: int) -> bytes:
        """The content of a file.

        Raises:
            OSError: it is missing or cannot be read.
            DatasetError: what reads such a URL is not installed, or the server has trouble, which
                is no fault of the file.
        """
        try:
            return _read(self.root, self.paths[position])
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            if not is_remote(self.root):
                raise
            url, what = f"{self.root}/{self.paths[position]}", str(error)
            what = what if what.startswith(url) else f"{url} cannot be read ({what})"
            raise DatasetError(
                f"{what}; check the server and your access to it, and do the same again"
            ) from error


@dataclass(frozen=True)
class PublishedLists:
    """Lists of a long-tailed data set, lines of a path and a label, and their published figures."""

    files: Mapping[str, tuple[str, int]]
    """Of each split: the name of its list, and how many images are in it."""
    num_classes: int
    largest: int
    """Training images of the largest class."""
    smallest: int
    """Training images of the smallest class."""
    layout: str
    """What the folder that the paths start from must hold."""
    folder: str
    """Where in `LISTS_URL` the lists are."""


LISTS_URL = "https://github.com/facebookresearch/classifier-balancing/tree/main/data"
LISTS = {
    "imagenet_lt": PublishedLists(  # Liu et al., CVPR 2019
        files={
            "train": ("ImageNet_LT_train.txt", 115_846),
            "validation": ("ImageNet_LT_val.txt", 20_000),
            "test": ("ImageNet_LT_test.txt", 50_000),
        },
        num_classes=1000,
        largest=1280,
        smallest=5,
        layout="train/ and val/ of ILSVRC 2012, both with a folder for each class, as in "
        "val/n01440764/ILSVRC2012_val_00000293.JPEG",
        folder="ImageNet_LT",
    ),
    "places_lt": PublishedLists(  # Liu et al., CVPR 2019
        files={
            "train": ("Places_LT_train.txt", 62_500),
            "validation": ("Places_LT_val.txt", 7_300),
            "test": ("Places_LT_test.txt", 36_500),
        },
        num_classes=365,
        largest=4980,
        smallest=5,
        layout="train/ and val/ of Places365-Standard, both with a folder for each class, as in "
        "val/airfield/Places365_val_00003597.jpg",
        folder="Places_LT",
    ),
    "inaturalist2018": PublishedLists(  # its authors publish no labels of a test part
        files={
            "train": ("iNaturalist18_train.txt", 437_513),
            "test": ("iNaturalist18_val.txt", 24_426),
        },
        num_classes=8142,
        largest=1000,
        smallest=2,
        layout="train_val2018/ of iNaturalist 2018, as in train_val2018/Aves/3178/NAME.jpg",
        folder="iNaturalist18",
    ),
}
DATASETS = (*LISTS, "image_folder", "table")


def load_listed(dataset: str, data_dir: Path | str | None) -> Source:
    """Load a source of images in files.

    Args:
        dataset: one of `DATASETS`. Those of `LISTS` have their published lists beside the images
            or in a folder ``splits``. ``image_folder`` has ``train/CLASS/...`` and ``test/`` (or
            ``val/``; beside ``test/`` that is the validation part), or just ``CLASS/...``. A
            ``table`` has the columns path, label (numbers or names) and perhaps split (train, test
            and val) and class_name, its paths start at its own folder.
        data_dir: the folder of the images, for a table the ``.csv`` or ``.parquet`` file itself;
            or a URL.

    Returns:
        Images in the order of the lists or tables, in folders by name; classes of names are sorted.
        Source indices count lines of a list, images of a part's folder, or rows of the table. The
        test part is empty if there is none.

    Raises:
        DatasetError: lists, folders or tables are missing, damaged, contradict themselves or
            their published figures, or name images that are not there.
    """
    place = _place(dataset, data_dir)
    with _told(place):
        if dataset == "image_folder":  # whose images were just seen
            return _from_folders(place)
        source = _from_table(place) if dataset == "table" else read_lists(dataset, place)
        _refuse_missing(_files(source), dataset)
    return source


def find_listed(dataset: str, data_dir: Path | str | None) -> str:
    """Where `load_listed` will find its images; looked for is only the first of each split.

    Args:
        dataset: as for `load_listed`.
        data_dir: as for `load_listed`.

    Raises:
        DatasetError: there are none, or lists or table cannot be used.
    """
    place = _place(dataset, data_dir)
    with _told(place):
        if dataset == "image_folder":
            folders = sorted(n for n, is_file in _entries(place, "") if n[0] != "." and not is_file)
            if not folders:
                raise DatasetError(f"{place} has no folders; it must hold one for each class")
            return f"{dataset} in {place}: {shown(folders)}"
        source = _from_table(place) if dataset == "table" else read_lists(dataset, place)
        _refuse_missing([files[np.arange(1)] for files in _files(source)], dataset)
    sizes = " + ".join(f"{len(files):,}" for files in _files(source))
    return f"{dataset} in {place}: {sizes} images of {len(source.class_names):,} classes"


def shown(texts: Sequence[str]) -> str:
    """The first of many texts, for a message."""
    more = len(texts) - TEXTS_SHOWN
    return ", ".join(texts[:TEXTS_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def as_rgb(image: Image.Image) -> Image.Image:
    """An image that was opened, decoded and in RGB.

    Raises:
        OSError: it cannot be decoded.
        ValueError: its values are not of 8 bits, and which of them is white is not said. Pillow
            would cut them off at 255.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"values of more than 8 bits (mode {image.mode}); save it with 8 bits a channel"
        )
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _place(dataset: str, data_dir: Path | str | None) -> str:
    if not data_dir:
        what = "the .csv or .parquet file" if dataset == "table" else "the folder of the images"
        raise DatasetError(f"{dataset} is not downloaded; name {what} as data_dir")
    return absolute(str(data_dir))


def _files(source: Source) -> list[ImageFiles]:
    """Those of each split that has any."""
    images = [s.images for s in (source.train, source.validation, source.test) if s]
    return [files for files in images if isinstance(files, ImageFiles) and len(files)]


def read_lists(dataset: str, root: str) -> Source:
    """Read published lists and compare them with their figures; no image is looked for.

    Args:
        dataset: one of `LISTS`.
        root: the folder of the images, or its URL.

    Raises:
        DatasetError: a list is missing, or not the published one.
    """
    published = LISTS[dataset]
    lists = {name: _read_list(root, name, published) for name in published.files}
    paths, labels = pd.concat([p for p, _ in lists.values()]), [k for _, k in lists.values()]
    if (twice := paths[paths.duplicated()]).size:
        raise DatasetError(
            f"the lists in {root} have {twice.size:,} images more than once: "
            f"{shown(twice.to_list())}; take them from {LISTS_URL}/{published.folder}"
        )
    folders = pd.Series([path.partition("/")[2].rpartition("/")[0] for path in paths], dtype=str)
    return Source(
        name=dataset,
        train=_split(root, *lists["train"]),
        test=_split(root, *lists["test"]),
        class_names=_class_names(np.concatenate(labels), folders, f"the lists in {root}"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        validation=_split(root, *lists["validation"]) if "validation" in lists else None,
    )


def _read_list(root: str, split: str, published: PublishedLists) -> tuple[Texts, Labels]:
    """Paths and labels of a list."""
    name = published.files[split][0]
    again = f"take it from {LISTS_URL}/{published.folder}"
    try:
        path, content = _read_first(root, (name, f"splits/{name}"))
        lines = pd.Series(content.decode("utf-8").rstrip().splitlines(), dtype=str)
    except FileNotFoundError as error:
        raise DatasetError(f"{root} has neither {name} nor splits/{name}; {again}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{name} in {root} is no list of paths ({error}); {again}") from error
    where = f"{path} in {root}"
    fields = lines.str.extract(r"^(\S.*?)[ \t]+([0-9]{1,9})$")
    if (bad := fields[0].isna()).any():
        line = int(bad.to_numpy().argmax())
        raise DatasetError(
            f"line {line + 1} of {where} is {lines[line][:200]!r}, expected a path and a label "
            f"({bad.sum():,} such lines); {again}"
        )
    paths, labels = fields[0], fields[1].to_numpy(dtype=np.int64)
    _refuse_bad_paths(paths, "line", where)
    if complaint := _difference(labels, split, published):
        raise DatasetError(f"{where} {complaint}; {again}")
    return paths, labels


def _difference(labels: Labels, split: str, published: PublishedLists) -> str:
    """What the labels of a list and the published figures differ in."""
    size, num_classes = published.files[split][1], published.num_classes
    if len(labels) != size:
        return f"has {len(labels):,} images, the published one {size:,}"
    if (highest := labels.max()) >= num_classes:
        return f"has the label {highest}, the published one has 0..{num_classes - 1}"
    counts = np.bincount(labels, minlength=num_classes)
    if len(empty := np.flatnonzero(counts == 0)):
        return f"has no images of {len(empty):,} classes, such as {empty[0]}"
    largest, smallest = counts.max(), counts.min()
    if split == "train" and (largest, smallest) != (published.largest, published.smallest):
        return (
            f"has classes of {largest:,} to {smallest:,} images, the published one of "
            f"{published.largest:,} to {published.smallest:,}"
        )
    return ""


def _from_folders(root: str) -> Source:
    """Take the images of a folder for each class."""
    found = [path for path in _walk(root) if "/." not in f"/{path}"]
    if strange := [ascii(path) for path in found if not _is_unicode(path)]:
        raise DatasetError(f"{root} has names that are not in UTF-8: {shown(strange)}; rename them")
    images = sorted(path for path in found if path.lower().endswith(IMAGE_SUFFIXES))
    tops = {path.partition("/")[0] for path in found if "/" in path}
    # A class may be called train as well: then its images are right in it, and others beside it.
    in_parts = bool(tops) and (
        tops <= PARTS.keys()
        or ("train" in tops and all(p.count("/") > 1 for p in images if p.startswith("train/")))
    )
    depth = 1 if in_parts else 0
    if outside := [
        path
        for path in images
        if path.count("/") <= depth or (in_parts and path.partition("/")[0] not in PARTS)
    ]:
        expected = "train/CLASS/, test/CLASS/ or val/CLASS/" if in_parts else "CLASS/"
        raise DatasetError(
            f"{len(outside):,} images in {root} are not in a folder {expected}: {shown(outside)}; "
            "move them into one, or away"
        )
    parts: dict[str, list[str]] = {}
    for path in images:
        parts.setdefault(PARTS[path.partition("/")[0]] if in_parts else "train", []).append(path)
    classes = {name: [p.split("/")[depth] for p in paths] for name, paths in parts.items()}
    names = sorted(set(classes.get("train", [])))
    folders = {
        path.split("/")[depth]
        for path in found
        if path.count("/") > depth and (not in_parts or path.partition("/")[0] in PARTS)
    }
    if without := sorted(folders.difference(names)):
        raise DatasetError(
            f"{root} has no images ({' '.join(IMAGE_SUFFIXES)}) to train on of "
            f"{len(without):,} classes: {shown(without)}; add some or remove the folders"
        )
    _refuse_one_class(names, root)
    number = {name: label for label, name in enumerate(names)}
    splits = {
        name: _split(
            root,
            pd.Series(paths, dtype=str),
            np.array([number[c] for c in classes[name]], dtype=np.int64),
        )
        for name, paths in parts.items()
    }
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    return _own_source("image_folder", splits, names)


def _from_table(path: str) -> Source:
    """Take the rows of a CSV or Parquet file."""
    folder, _, name = path.rpartition("/")
    root = folder or "/"
    frame = _read_frame(path, _read(root, name))
    if missing := [column for column in ("path", "label") if column not in frame.columns]:
        raise DatasetError(
            f"{path} has no column {' and no column '.join(missing)}, only "
            f"{', '.join(map(str, frame.columns))}; path and label are needed, split and "
            "class_name can be there"
        )
    columns = [c for c in ("path", "label", "split", "class_name") if c in frame.columns]
    frame = frame[columns].reset_index(drop=True)  # Parquet keeps labels of rows
    for column in frame.columns:
        kind = frame[column].dtype
        if not (pd.api.types.is_integer_dtype(kind) or pd.api.types.is_string_dtype(kind)):
            raise DatasetError(
                f"the column {column} of {path} holds {kind}, expected text or whole numbers"
            )
        empty = frame[column].isna() | (frame[column].astype(str).str.strip() == "")
        if empty.any():
            raise DatasetError(
                f"{path} has no {column} in row {int(empty.to_numpy().argmax()) + 1} "
                f"({empty.sum():,} such rows); fill it in"
            )
    paths = frame["path"].astype(str)
    _refuse_bad_paths(paths, "row", path)
    if (twice := paths[paths.duplicated()]).size:
        raise DatasetError(
            f"{path} has {twice.size:,} images more than once: {shown(twice.to_list())}; "
            "leave one row of each"
        )
    labels, names = _number_labels(frame["label"].astype(str), path)
    if "class_name" in frame.columns:
        names = _class_names(labels, frame["class_name"].astype(str), path)
    _refuse_one_class(names, path)
    parts = _parts(frame, path)
    if len(without := np.setdiff1d(labels, labels[parts == "train"])):
        raise DatasetError(
            f"{path} has no images to train on of {len(without):,} classes: "
            f"{shown([names[label] for label in without])}; add some or leave the rows out"
        )
    everything = Split(
        ImageFiles(root, paths.to_numpy(dtype=object)), labels, np.arange(len(parts))
    )
    splits = {name: everything.take(np.flatnonzero(parts == name)) for name in np.unique(parts)}
    return _own_source("table", splits, names)


def _read_frame(path: str, content: bytes) -> pd.DataFrame:
    try:
        if path.endswith(".parquet"):
            return pd.read_parquet(io.BytesIO(content))
        if path.endswith(".csv"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of rows with more cells than the first
                # Text throughout, so that classes called NA or null keep their names.
                return pd.read_csv(
                    io.BytesIO(content),
                    dtype=str,
                    keep_default_na=False,
                    index_col=False,
                    encoding="utf-8-sig",
                )
    except (ValueError, OSError, pd.errors.ParserWarning) as error:
        raise DatasetError(f"{path} cannot be read as a table ({error}); write it anew") from error
    raise DatasetError(f"a table is a .csv or .parquet file, but data_dir is {path}")


def _number_labels(written: Texts, path: str) -> tuple[Labels, tuple[str, ...]]:
    """Labels as whole numbers, and the names they were written as."""
    if not written.str.fullmatch(r"-?[0-9]{1,18}").all():
        codes, names = pd.factorize(written, sort=True)
        return codes.astype(np.int64), tuple(names)
    labels = written.to_numpy(dtype=np.int64)
    distinct = np.unique(labels)
    if (distinct != np.arange(len(distinct))).any():
        raise DatasetError(
            f"the labels in {path} are {len(distinct):,} numbers from {distinct[0]} to "
            f"{distinct[-1]}, expected 0..{len(distinct) - 1} without gaps; number them so, or "
            "write names, as in class_7"
        )
    return labels, tuple(map(str, distinct))


def _parts(frame: pd.DataFrame, path: str) -> npt.NDArray[np.object_]:
    """The split of each row."""
    if "split" not in frame.columns:
        return np.full(len(frame), "train", dtype=object)
    written = frame["split"].astype(str)
    if (unknown := ~written.isin(list(PARTS))).any():
        row = int(unknown.to_numpy().argmax())
        raise DatasetError(
            f"row {row + 1} of {path} has the split {written[row]!r}, expected one of "
            f"{', '.join(PARTS)} ({unknown.sum():,} such rows)"
        )
    return written.map(PARTS).to_numpy(dtype=object)


def _own_source(name: str, splits: Mapping[str, Split], class_names: Sequence[str]) -> Source:
    """A source of a user's own images, whose means are not known."""
    return Source(
        name=name,
        train=splits["train"],
        test=splits.get("test") or splits["train"].take(np.arange(0)),
        class_names=tuple(class_names),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        validation=splits.get("validation"),
    )


def _split(root: str, paths: Texts, labels: Labels) -> Split:
    return Split(ImageFiles(root, paths.to_numpy(dtype=object)), labels, np.arange(len(labels)))


def _class_names(labels: Labels, names: Texts, where: str) -> tuple[str, ...]:
    """The one name of each label."""
    pairs = pd.DataFrame({"label": labels, "name": names.to_numpy()}).drop_duplicates()
    for one, other in (("label", "name"), ("name", "label")):
        twice = pairs.loc[pairs.duplicated(one), one]
        if len(twice):
            found = pairs.loc[pairs[one] == twice.iloc[0], other].astype(str).to_list()
            raise DatasetError(
                f"{where}: the {one} {twice.iloc[0]} has more than one {other}: {shown(found)} "
                f"({len(twice):,} such cases); a class has one label and one name"
            )
    return tuple(pairs.sort_values("label")["name"].to_list())


def _refuse_one_class(names: Sequence[str], where: str) -> None:
    if len(names) < 2:
        raise DatasetError(
            f"{where} has images of {len(names)} classes to train on, at least 2 are needed"
        )


def _refuse_bad_paths(paths: Texts, unit: str, where: str) -> None:
    """Refuse paths that leave their folder or have more than one spelling."""
    if (bad := paths.str.contains(r"(?:^|/)\.{0,2}(?:/|$)")).any():
        position = int(bad.to_numpy().argmax())
        raise DatasetError(
            f"{unit} {position + 1} of {where} has the path {paths[position]!r} ({bad.sum():,} "
            "such); paths must be relative, without . or .. or empty parts"
        )


def _refuse_missing(images: Sequence[ImageFiles], dataset: str) -> None:
    """Compare paths with what is there, listing each folder once."""
    root = images[0].root
    wanted: dict[str, list[str]] = {}
    for files in images:
        for path in files.paths:
            folder, _, name = path.rpartition("/")
            wanted.setdefault(folder, []).append(name)

    def absent(folder: str) -> list[str]:
        try:
            present = {name for name, is_file in _entries(root, folder) if is_file}
        except (FileNotFoundError, NotADirectoryError):
            present = set()
        prefix = f"{folder}/" if folder else ""
        return [prefix + name for name in wanted[folder] if name not in present]

    with ThreadPoolExecutor(FOLDERS_AT_A_TIME) as pool:
        missing = [path for paths in pool.map(absent, wanted) for path in paths]
    if missing:
        total = sum(map(len, wanted.values()))
        layout = f"hold {LISTS[dataset].layout}" if dataset in LISTS else "be where its paths start"
        raise DatasetError(
            f"{len(missing):,} of {total:,} images are not in {root}: {shown(missing)}; it must "
            f"{layout}"
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a file name that could not be decoded
        return False
    return True


def is_remote(location: str) -> bool:
    """Whether a location is a URL."""
    return "://" in location


def absolute(location: str) -> str:
    """A folder or URL as it can be written down: whole, and without a slash at its end."""
    location = location.removeprefix("file://")
    return location.rstrip("/") if is_remote(location) else str(Path(location).absolute())


@contextmanager
def _told(place: str) -> Iterator[None]:
    """Tell what cannot be read in the user's words."""
    try:
        yield
    except OSError as error:
        raise DatasetError(
            f"{place} cannot be read ({error}); check data_dir and who may read it"
        ) from error


def _read(root: str, path: str) -> bytes:
    if not is_remote(root):
        return Path(root, path).read_bytes()
    system, folder = file_system(root)
    with _as_os_error(f"{root}/{path}"):
        content: bytes = system.cat_file(f"{folder}/{path}")
    return content


def _read_first(root: str, paths: Sequence[str]) -> tuple[str, bytes]:
    """The first of some files that is there, and its content."""
    for path in paths[:-1]:
        try:
            return path, _read(root, path)
        except (FileNotFoundError, NotADirectoryError):
            continue
    return paths[-1], _read(root, paths[-1])


def _entries(root: str, folder: str) -> Iterator[tuple[str, bool]]:
    """Names in a folder, and whether each is a file."""
    if not is_remote(root):
        with os.scandir(Path(root, folder)) as entries:
            yield from ((entry.name, entry.is_file()) for entry in entries)
        return
    system, place = file_system(root)
    with _as_os_error(f"{root}/{folder}"):
        found = system.ls(f"{place}/{folder}".rstrip("/"), detail=True)
    yield from ((e["name"].rstrip("/").rpartition("/")[2], e["type"] == "file") for e in found)


def _walk(root: str) -> Iterator[str]:
    """Paths of all files in a folder and those in it; folders end with a slash."""
    if is_remote(root):
        system, place = file_system(root)
        with _as_os_error(root):
            names = system.find(place)
        yield from (name[len(place) + 1 :] for name in names)
        return

    def refuse(error: OSError) -> None:
        raise error

    for directory, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        here = Path(directory)
        resolved = here.resolve()
        # A link to a folder that it is in would never end.
        folders[:] = [f for f in folders if not resolved.is_relative_to((here / f).resolve())]
        prefix = "" if directory == root else f"{here.relative_to(root).as_posix()}/"
        yield from (f"{prefix}{name}" for name in files)
        yield from (f"{prefix}{name}/" for name in folders)


def file_system(url: str) -> tuple[Any, str]:
    """What reads a URL, and its part that names the place there.

    Raises:
        DatasetError: what reads such a URL is not installed.
    """
    try:
        core = importlib.import_module("fsspec.core")
        # Cached listings of millions of files would take more memory than all the rest.
        system, folder = core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:  # s3, gs and others are packages of their own
        raise DatasetError(
            f"{url} cannot be read ({error}); install the package for such addresses (fsspec, and "
            "s3fs for s3://, gcsfs for gs://), or copy the images to a folder"
        ) from error
    return system, folder.rstrip("/")


@contextmanager
def _as_os_error(url: str) -> Iterator[None]:
    """File systems of URLs have errors of their own, from whatever library speaks to the server."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{url} cannot be read ({type(error).__name__}: {error})") from error

"""The subset on disk: Parquet tables, ``subset.json`` that describes them, and a plot.

A subset directory holds ``train.parquet``, ``test.parquet`` and perhaps ``validation.parquet``,
``subset.json`` and ``class_counts.png``. What the tables are is the ``storage``:

- ``table``: images of one size as PNG, with labels (columns: `SCHEMA`);
- ``packed``: an index (`INDEX_SCHEMA` and `PLACE_SCHEMA` of `shike_core.data.storage`) of images of
  any size in shards, which lie in the folder ``shards`` or where ``subset.json`` says;
- ``referenced``: an index (`INDEX_SCHEMA`) of images in the source's own files.

An index comes with ``unreadable.csv``, the files that were left out. `write_subset` and
`write_subset_of_files` are the only writers, `read_subset` is the one reader.
"""

import hashlib
import importlib.util
import io
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from shike_core.config import SubsetConfig
from shike_core.data.listed import ImageFiles, is_remote
from shike_core.data.long_tail import (
    check_no_empty_class,
    drop_leaked,
    imbalance_measures,
    shot_groups,
)
from shike_core.data.pack import PIECES, SHARDS, StopSignal, pack
from shike_core.data.split import Images, Labels, Source, Split
from shike_core.data.storage import (
    INDEX_SCHEMA,
    PLACE_SCHEMA,
    PLAN_KEY,
    PackedImages,
    ReferencedImages,
    shard_metadata,
)
from shike_core.data.unreadable import UNREADABLE_FILE, Unreadable, write_unreadable
from shike_core.errors import DatasetError
from shike_core.files import atomic_write

FORMAT = 1
"""Of a subset whose storage is a table."""
FILES_FORMAT = 2
"""Of a subset of images in files or shards."""
SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),  # PNG, RGB
        pa.field("label", pa.int64(), nullable=False),
        pa.field("class_name", pa.string(), nullable=False),
        pa.field("source_index", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)
SCHEMAS = {
    "table": SCHEMA,
    "packed": pa.schema([*INDEX_SCHEMA, *PLACE_SCHEMA]),
    "referenced": INDEX_SCHEMA,
}
SUBSET_FILE = "subset.json"
PLOT_FILE = "class_counts.png"
SPLITS = ("train", "test", "validation")

SHARDS_CHECKED_AT_ONCE = 8

_NEEDED = {"table": (), "packed": ("short_side", "shards"), "referenced": ("short_side", "root")}
"""What ``subset.json`` has besides, by storage."""
_GROUP_COLOURS = {"many_shot": "#3b82c4", "medium_shot": "#e69f00", "few_shot": "#d1495b"}


@dataclass(frozen=True)
class Subset:
    """A subset as it was read back."""

    splits: dict[str, Split]
    class_names: tuple[str, ...]
    class_counts: Labels
    """Training images of each class (C,)."""
    digest: str
    """Identity of the content of all splits, whether read or not."""
    test_digest: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    info: dict[str, Any]
    """All of ``subset.json``."""


def write_subset(
    directory: Path,
    splits: Mapping[str, Split],
    source: Source,
    rule: SubsetConfig,
    identical_images: Mapping[str, Any],
    unreadable: Sequence[Unreadable] = (),
) -> dict[str, Any]:
    """Write a subset of images in memory.

    ``subset.json`` comes last, so a directory that has it is complete.

    Args:
        directory: made if it is missing.
        splits: train, test and perhaps validation, with images of one size.
        source: what the subset was cut out of; its mean and std are those of the subset too.
        rule: how it was cut, by `shike_core.data.long_tail.cut`.
        identical_images: as `shike_core.data.long_tail.drop_leaked` counts them.
        unreadable: files that were left out.

    Returns:
        The content of ``subset.json``.

    Raises:
        ArtifactError: a file cannot be written.
    """
    names = _class_names(source, rule)
    info: dict[str, Any] = {"format": FORMAT, "storage": "table"} | _describe(
        {name: split.labels for name, split in splits.items()},
        {name: split_digest(name, split, names) for name, split in splits.items()},
        source,
        rule,
        identical_images,
    )
    info["image_size"] = list(_pixels(splits["train"]).shape[1:3])
    info["unreadable"] = _by_split(unreadable, splits)
    tables = ((name, _to_table(name, splits[name], names)) for name in info["sizes"])
    if unreadable:
        write_unreadable(unreadable, directory)
    _write(directory, tables, info)
    if not unreadable:  # left by an earlier rule, as are the folders
        (directory / UNREADABLE_FILE).unlink(missing_ok=True)
    for folder in (SHARDS, PIECES):
        shutil.rmtree(directory / folder, ignore_errors=True)
    return info


def write_subset_of_files(
    directory: Path,
    splits: Mapping[str, Split],
    source: Source,
    rule: SubsetConfig,
    *,
    shards_dir: str = "",
    workers: int = 0,
    stop_signal: StopSignal = lambda: None,
) -> dict[str, Any]:
    """Pack a subset of images in files, or refer to them, and write it.

    ``subset.json`` comes last, so a directory that has it is complete. What an earlier call has
    finished is taken over, see `shike_core.data.pack.pack`.

    Args:
        directory: made if it is missing.
        splits: train, test and perhaps validation, with images in files.
        source: as for `write_subset`.
        rule: as for `write_subset`.
        shards_dir: folder or URL for the shards; by default they are part of the subset.
        workers: processes that read images; 0 means as many as there are cores and memory for.
        stop_signal: asked again and again whether to stop.

    Returns:
        The content of ``subset.json``.

    Raises:
        DatasetError: more images than the rule allows cannot be read, a class is left without
            training images, or training images are also test images and the rule refuses that.
        ArtifactError: a file cannot be written.
        InterruptedPacking: a signal came; what is done is kept.
    """
    names = _class_names(source, rule)
    with suppress(OSError):  # the subset that was here is not whole from now on
        (directory / SUBSET_FILE).unlink()
    packed = pack(
        splits,
        names,
        rule,
        directory,
        shards_dir=shards_dir,
        workers=workers,
        stop_signal=stop_signal,
    )
    index = packed.index
    check_no_empty_class(
        np.bincount(_numbers(index["train"], "label"), minlength=len(names)),
        names,
        f"what it had cannot be read, see {directory / UNREADABLE_FILE}",
    )
    clean, identical_images = drop_leaked(
        contents={name: table["sha256"].to_pylist() for name, table in index.items()},
        splits={name: _as_split(table, packed.root) for name, table in index.items()},
        leakage=rule.leakage,
        class_names=names,
    )
    index["train"] = index["train"].take(clean)
    info: dict[str, Any] = {"format": FILES_FORMAT, "storage": rule.storage} | _describe(
        {name: _numbers(table, "label") for name, table in index.items()},
        {name: index_digest(name, table, names, rule.short_side) for name, table in index.items()},
        source,
        rule,
        identical_images,
    )
    info |= {
        "image_size": None,
        "short_side": rule.short_side,
        "median_short_side": _median_short_side(index["train"]),
        "unreadable": _by_split(packed.unreadable, index),
    }
    if rule.storage == "packed":
        info["shards"] = {
            "location": packed.location if shards_dir else SHARDS,
            "group_size": packed.group_size,
            "files": {
                name: {
                    "rows": rows,
                    "plan": packed.plans[name],
                    "content": packed.contents[name],
                }
                for name, rows in packed.rows.items()
            },
        }
    else:
        info["root"] = packed.root
    columns = SCHEMAS[rule.storage].names
    _write(directory, ((name, index[name].select(columns)) for name in info["sizes"]), info)
    shutil.rmtree(directory / PIECES, ignore_errors=True)
    return info


def _median_short_side(index: pa.Table) -> float:
    return float(np.median(np.minimum(_numbers(index, "width"), _numbers(index, "height"))))


def _by_split(unreadable: Sequence[Unreadable], splits: Iterable[str]) -> dict[str, int]:
    return {name: sum(image.split == name for image in unreadable) for name in splits}


def read_subset(directory: Path, splits: Iterable[str] = ("train", "test")) -> Subset:
    """Read a subset and check that it is what ``subset.json`` says.

    Args:
        directory: as `write_subset` made it.
        splits: which ones to decode; validation is left out if the subset has none.

    Raises:
        DatasetError: a file is missing or damaged, an image cannot be used, a label is outside
            the range, or tables and ``subset.json`` contradict each other.
    """
    info = read_info(directory)
    wanted = [name for name in splits if name in info["sizes"] or name != "validation"]
    return Subset(
        splits={name: _read_split(directory, name, info) for name in wanted},
        class_names=tuple(info["class_names"]),
        class_counts=np.array(info["class_counts"], dtype=np.int64),
        digest=info["digest"],
        test_digest=info["test_digest"],
        mean=tuple(info["mean"]),
        std=tuple(info["std"]),
        info=info,
    )


def read_info(directory: Path) -> dict[str, Any]:
    """Read ``subset.json`` alone.

    Raises:
        DatasetError: it is missing, damaged, or of another format.
    """
    path = directory / SUBSET_FILE
    try:
        info = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise DatasetError(
            f"there is no {path}; run build_subset first, or check the path"
        ) from error
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read ({error}); run build_subset again") from error
    if not isinstance(info, dict) or info.get("format") not in (FORMAT, FILES_FORMAT):
        raise DatasetError(
            f"{path} is not of format {FORMAT} or {FILES_FORMAT}; run build_subset again"
        )
    storage = info.setdefault("storage", "table")  # there was no other when it had no name
    needed = ["digest", "test_digest", "split_digests", "sizes", "image_size", "class_names"]
    needed += ["class_counts", "mean", "std", *_NEEDED.get(storage, ())]
    missing = [key for key in needed if key not in info]
    if missing:
        raise DatasetError(f"{path} lacks {', '.join(missing)}; run build_subset again")
    if storage not in _NEEDED:
        raise DatasetError(f"{path} has the unknown storage {storage!r}; run build_subset again")
    if _join_digests(info["split_digests"]) != info["digest"]:
        raise DatasetError(f"the digests in {path} contradict each other; run build_subset again")
    return info


def split_digest(name: str, split: Split, class_names: Sequence[str]) -> str:
    """SHA-256 of a split's content, in hexadecimal digits.

    Of pixels, labels, source indices, class names and the split's name, so it depends neither on
    how images and tables are encoded nor on the machine.
    """
    images = _pixels(split)
    head = json.dumps([FORMAT, name, list(class_names), list(images.shape)])
    digest = hashlib.sha256(head.encode("ascii"))
    digest.update(np.ascontiguousarray(images, dtype="u1").data)
    for numbers in (split.labels, split.source_index):
        digest.update(np.ascontiguousarray(numbers, dtype="<i8").data)
    return digest.hexdigest()


def index_digest(name: str, index: pa.Table, class_names: Sequence[str], short_side: int) -> str:
    """SHA-256 of the content of a split of files, in hexadecimal digits.

    Of the files' own SHA-256, labels, source indices, class names, the split's name and
    short_side; so it depends neither on where the images are and how they are packed, nor on what
    wrote a shrunk image, nor on the machine.
    """
    head = json.dumps([FILES_FORMAT, name, list(class_names), short_side])
    digest = hashlib.sha256(head.encode("ascii"))
    for content in index["sha256"].to_pylist():
        digest.update(content)
    for numbers in (_numbers(index, "label"), _numbers(index, "source_index")):
        digest.update(np.ascontiguousarray(numbers, dtype="<i8").data)
    return digest.hexdigest()


def _pixels(split: Split) -> Images:
    """The images of a split that is in memory.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(split.images, np.ndarray):
        raise TypeError(f"these images are not in memory but {type(split.images).__name__}")
    return split.images


def _class_names(source: Source, rule: SubsetConfig) -> tuple[str, ...]:
    return source.class_names[: rule.num_classes or None]


def _numbers(table: pa.Table, name: str) -> Labels:
    numbers: Labels = table[name].to_numpy().astype(np.int64)
    return numbers


def _as_split(index: pa.Table, root: str) -> Split:
    files = ImageFiles(root, index["path"].to_numpy())
    return Split(files, _numbers(index, "label"), _numbers(index, "source_index"))


def _describe(
    labels: Mapping[str, Labels],
    digests: Mapping[str, str],
    source: Source,
    rule: SubsetConfig,
    identical_images: Mapping[str, Any],
) -> dict[str, Any]:
    """What ``subset.json`` says of every subset."""
    names = _class_names(source, rule)
    class_counts = np.bincount(labels["train"], minlength=len(names))
    groups = {group: members.tolist() for group, members in shot_groups(class_counts).items()}
    digests = {name: digests[name] for name in _in_order(digests)}
    return {
        "digest": _join_digests(digests),
        "test_digest": digests["test"],
        "split_digests": digests,
        "rule": asdict(rule),
        "sizes": {name: len(labels[name]) for name in digests},
        "class_names": list(names),
        "class_counts": class_counts.tolist(),
        "shot_groups": groups,
        "imbalance": imbalance_measures(class_counts),
        "identical_images": dict(identical_images),
        "mean": list(source.mean),
        "std": list(source.std),
    }


def _write(
    directory: Path, tables: Iterable[tuple[str, pa.Table]], info: Mapping[str, Any]
) -> None:
    for name, table in tables:
        with atomic_write(directory / f"{name}.parquet") as temporary:
            pq.write_table(table, temporary)
    if "validation" not in info["sizes"]:  # one left by an earlier rule
        (directory / "validation.parquet").unlink(missing_ok=True)
    if importlib.util.find_spec("matplotlib"):  # not on a machine that only trains
        with atomic_write(directory / PLOT_FILE) as temporary:
            temporary.write_bytes(_plot(np.array(info["class_counts"]), info["shot_groups"]))
    with atomic_write(directory / SUBSET_FILE) as temporary:
        temporary.write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _join_digests(digests: Mapping[str, str]) -> str:
    lines = [f"{name} {digests[name]}\n" for name in _in_order(digests)]
    return hashlib.sha256("".join(lines).encode("ascii")).hexdigest()


def _in_order(names: Iterable[str]) -> list[str]:
    return [name for name in SPLITS if name in set(names)]


def _to_table(name: str, split: Split, class_names: Sequence[str]) -> pa.Table:
    columns = [
        [_encode(image) for image in _pixels(split)],
        split.labels,
        [class_names[label] for label in split.labels],
        split.source_index,
        [name] * len(split.labels),
    ]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)],
        schema=SCHEMA,
    )


def _encode(image: Images) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _read_split(directory: Path, name: str, info: Mapping[str, Any]) -> Split:
    path = directory / f"{name}.parquet"
    table = _read_table(path, SCHEMAS[info["storage"]])
    labels, source_index = _numbers(table, "label"), _numbers(table, "source_index")
    num_classes = len(info["class_names"])
    if (bad := np.flatnonzero((labels < 0) | (labels >= num_classes))).size:
        raise DatasetError(
            f"row {bad[0]} of {path} has the label {labels[bad[0]]}, expected 0..{num_classes - 1} "
            f"({bad.size} such rows); run build_subset again"
        )
    if info["storage"] == "table":
        split = Split(_decode(table, path, info), labels, source_index)
        digest = split_digest(name, split, info["class_names"])
    else:
        digest = index_digest(name, table, info["class_names"], info["short_side"])
    _check_agreement(path, name, table, labels, digest, info)
    if info["storage"] == "packed":
        split = Split(_packed(directory, name, table, info), labels, source_index)
    elif info["storage"] == "referenced":
        paths = table["path"].combine_chunks()
        images = ReferencedImages(info["root"], paths, _numbers(table, "bytes"))
        split = Split(images, labels, source_index)
    return split


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        return pq.read_table(path, partitioning=None).select(schema.names).cast(schema)
    except FileNotFoundError as error:
        raise DatasetError(f"there is no {path}; run build_subset again") from error
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DatasetError(
            f"{path} cannot be read as a Parquet table of {', '.join(schema.names)} ({error}); "
            "run build_subset again"
        ) from error


def _decode(table: pa.Table, path: Path, info: Mapping[str, Any]) -> Images:
    images = np.empty((len(table), *info["image_size"], 3), dtype=np.uint8)
    for row, content in enumerate(table["image"].to_pylist()):
        _decode_into(images[row], content, f"row {row} of {path}")
    return images


def _decode_into(target: Images, content: bytes, where: str) -> None:
    height, width = target.shape[:2]
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if (image.mode, image.size) != ("RGB", (width, height)):
                raise DatasetError(
                    f"{where} is an image of mode {image.mode} and {image.width} x {image.height} "
                    f"pixels, expected RGB and {width} x {height}; run build_subset again"
                )
            target[:] = np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(
            f"{where} cannot be read as an image ({error}); run build_subset again"
        ) from error


def _packed(directory: Path, name: str, table: pa.Table, info: Mapping[str, Any]) -> PackedImages:
    """The images of a split in its shards, which are there and are those of the index."""
    location = info["shards"]["location"]
    if not is_remote(location):
        location = str(directory.absolute() / location)
    shards = {
        file: content
        for file, content in sorted(
            info["shards"]["files"].items(), key=lambda item: (len(item[0]), item[0])
        )  # by number, which has five digits or more
        if file.startswith(f"{name}-")
    }
    with ThreadPoolExecutor(SHARDS_CHECKED_AT_ONCE) as pool:  # they may be on a distant server
        list(pool.map(partial(_check_shard, location), shards, shards.values()))
    images = PackedImages(
        location,
        tuple(shards),
        tuple(f"{shard['plan']} {shard.get('content', '')}" for shard in shards.values()),
        info["shards"]["group_size"],
        _numbers(table, "shard").astype(np.int32),
        _numbers(table, "row").astype(np.int32),
    )
    rows = np.array([content["rows"] for content in shards.values()])
    if images.shard.max(initial=0) >= len(rows) or (images.row >= rows[images.shard]).any():
        raise DatasetError(
            f"{directory / name}.parquet names rows that its shards do not have; run build_subset "
            "again"
        )
    return images


def _check_shard(location: str, name: str, expected: Mapping[str, Any]) -> None:
    where = f"{location}/{name}"
    try:
        metadata = shard_metadata(location, name)
    except DatasetError:
        raise
    except Exception as error:  # each kind of server has errors of its own
        raise DatasetError(
            f"{where} is a part of the subset and cannot be read ({error}); make that place "
            "reachable from here, or run build_subset again"
        ) from error
    plan = (metadata.metadata or {}).get(PLAN_KEY, b"").decode()
    if (metadata.num_rows, plan) != (expected["rows"], expected["plan"]):
        raise DatasetError(
            f"{where} has {metadata.num_rows} images of the plan {plan or 'without a name'}, "
            f"expected {expected['rows']} of {expected['plan']}: it belongs to another subset; run "
            "build_subset again"
        )


def _check_agreement(
    path: Path,
    name: str,
    table: pa.Table,
    labels: Labels,
    digest: str,
    info: Mapping[str, Any],
) -> None:
    names = info["class_names"]
    counts = np.bincount(labels, minlength=len(names)).tolist()
    of_labels = pa.array(names, pa.string()).take(pa.array(labels))
    complaint = None
    if len(labels) != info["sizes"].get(name):
        complaint = f"{len(labels)} rows, expected {info['sizes'].get(name)}"
    elif name == "train" and counts != info["class_counts"]:
        complaint = f"other class counts: {counts}, expected {info['class_counts']}"
    elif not table["class_name"].combine_chunks().equals(of_labels):
        complaint = "class names that do not belong to the labels"
    elif set(table["split"].unique().to_pylist()) - {name}:
        complaint = "rows of another split"
    elif digest != info["split_digests"].get(name):
        complaint = "another content: its digest differs"
    if complaint:
        raise DatasetError(
            f"{path} and {SUBSET_FILE} contradict each other, the table has {complaint}; "
            "run build_subset again"
        )


def _plot(class_counts: Labels, groups: Mapping[str, Sequence[int]]) -> bytes:
    """Bars of class sizes, largest first, coloured by shot group, as PNG."""
    from matplotlib.figure import Figure  # reading a subset does without it

    figure = Figure(figsize=(6.4, 3.6), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for group, labels in groups.items():  # largest classes first, and so are the groups
        sizes = np.sort(class_counts[labels])[::-1]
        first = int((class_counts > sizes[0]).sum())
        edges = np.arange(first, first + len(sizes) + 1) - 0.5
        name = f"{group.replace('_', '-')} ({len(sizes)})"
        axes.stairs(sizes, edges, fill=True, color=_GROUP_COLOURS[group], label=name)
    if class_counts.max() >= 10 * class_counts.min():
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="classes, largest first", ylabel="training images")
    axes.set_xlim(-0.5, len(class_counts) - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="classes", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()

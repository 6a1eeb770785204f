"""The subset on disk: Parquet tables, ``subset.json`` that describes them, and a plot.

A subset directory holds ``train.parquet``, ``test.parquet`` and perhaps ``validation.parquet``
(columns: see `SCHEMA`), ``subset.json`` and ``class_counts.png``. `write_subset` is the one
writer, `read_subset` the one reader.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from PIL import Image

from shike_core.config import SubsetConfig
from shike_core.data.long_tail import imbalance_measures, shot_groups
from shike_core.data.sources import Images, Labels, Source, Split
from shike_core.errors import DatasetError
from shike_core.files import atomic_write

FORMAT = 1
SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),  # PNG, RGB
        pa.field("label", pa.int64(), nullable=False),
        pa.field("class_name", pa.string(), nullable=False),
        pa.field("source_index", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)
SUBSET_FILE = "subset.json"
PLOT_FILE = "class_counts.png"
SPLITS = ("train", "test", "validation")

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
) -> dict[str, Any]:
    """Write a subset; ``subset.json`` comes last, so a directory that has it is complete.

    Args:
        directory: made if it is missing.
        splits: train, test and perhaps validation, with images of one size.
        source: what the subset was cut out of; its mean and std are those of the subset too.
        rule: how it was cut, by `shike_core.data.long_tail.cut`.
        identical_images: as `shike_core.data.long_tail.find_identical` counts them.

    Returns:
        The content of ``subset.json``.

    Raises:
        ArtifactError: a file cannot be written.
    """
    class_names = source.class_names[: rule.num_classes or None]
    class_counts = np.bincount(splits["train"].labels, minlength=len(class_names))
    groups = {group: labels.tolist() for group, labels in shot_groups(class_counts).items()}
    digests = {name: split_digest(name, splits[name], class_names) for name in _in_order(splits)}
    info = {
        "format": FORMAT,
        "digest": _join_digests(digests),
        "test_digest": digests["test"],
        "split_digests": digests,
        "rule": asdict(rule),
        "sizes": {name: len(splits[name].labels) for name in digests},
        "image_size": list(splits["train"].images.shape[1:3]),
        "class_names": list(class_names),
        "class_counts": class_counts.tolist(),
        "shot_groups": groups,
        "imbalance": imbalance_measures(class_counts),
        "identical_images": dict(identical_images),
        "mean": list(source.mean),
        "std": list(source.std),
    }
    for name in digests:
        with atomic_write(directory / f"{name}.parquet") as temporary:
            pq.write_table(_to_table(name, splits[name], class_names), temporary)
    if "validation" not in splits:  # one left by an earlier rule
        (directory / "validation.parquet").unlink(missing_ok=True)
    with atomic_write(directory / PLOT_FILE) as temporary:
        temporary.write_bytes(_plot(class_counts, groups))
    with atomic_write(directory / SUBSET_FILE) as temporary:
        temporary.write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return info


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
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise DatasetError(f"{path} is not of format {FORMAT}; run build_subset again")
    needed = ("digest", "test_digest", "split_digests", "sizes", "image_size", "class_names")
    missing = [key for key in (*needed, "class_counts", "mean", "std") if key not in info]
    if missing:
        raise DatasetError(f"{path} lacks {', '.join(missing)}; run build_subset again")
    if _join_digests(info["split_digests"]) != info["digest"]:
        raise DatasetError(f"the digests in {path} contradict each other; run build_subset again")
    return info


def split_digest(name: str, split: Split, class_names: Sequence[str]) -> str:
    """SHA-256 of a split's content, in hexadecimal digits.

    Of pixels, labels, source indices, class names and the split's name, so it depends neither on
    how images and tables are encoded nor on the machine.
    """
    head = json.dumps([FORMAT, name, list(class_names), list(split.images.shape)])
    digest = hashlib.sha256(head.encode("ascii"))
    digest.update(np.ascontiguousarray(split.images, dtype="u1").data)
    for column in (split.labels, split.source_index):
        digest.update(np.ascontiguousarray(column, dtype="<i8").data)
    return digest.hexdigest()


def _join_digests(digests: Mapping[str, str]) -> str:
    lines = [f"{name} {digests[name]}\n" for name in _in_order(digests)]
    return hashlib.sha256("".join(lines).encode("ascii")).hexdigest()


def _in_order(names: Iterable[str]) -> list[str]:
    return [name for name in SPLITS if name in set(names)]


def _to_table(name: str, split: Split, class_names: Sequence[str]) -> pa.Table:
    columns = [
        [_encode(image) for image in split.images],
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
    table = _read_table(path)
    labels, source_index = (
        table[column].to_numpy().astype(np.int64) for column in ("label", "source_index")
    )
    num_classes = len(info["class_names"])
    if (bad := np.flatnonzero((labels < 0) | (labels >= num_classes))).size:
        raise DatasetError(
            f"row {bad[0]} of {path} has the label {labels[bad[0]]}, expected 0..{num_classes - 1} "
            f"({bad.size} such rows); run build_subset again"
        )
    height, width = info["image_size"]
    images = np.empty((len(labels), height, width, 3), dtype=np.uint8)
    for row, content in enumerate(table["image"].to_pylist()):
        _decode_into(images[row], content, f"row {row} of {path}")
    split = Split(images, labels, source_index)
    _check_agreement(path, name, table, split, info)
    return split


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, partitioning=None).select(SCHEMA.names).cast(SCHEMA)
    except FileNotFoundError as error:
        raise DatasetError(f"there is no {path}; run build_subset again") from error
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DatasetError(
            f"{path} cannot be read as a Parquet table of {', '.join(SCHEMA.names)} ({error}); "
            "run build_subset again"
        ) from error


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


def _check_agreement(
    path: Path, name: str, table: pa.Table, split: Split, info: Mapping[str, Any]
) -> None:
    names = info["class_names"]
    counts = np.bincount(split.labels, minlength=len(names)).tolist()
    complaint = None
    if len(split.labels) != info["sizes"].get(name):
        complaint = f"{len(split.labels)} rows, expected {info['sizes'].get(name)}"
    elif name == "train" and counts != info["class_counts"]:
        complaint = f"other class counts: {counts}, expected {info['class_counts']}"
    elif table["class_name"].to_pylist() != [names[label] for label in split.labels]:
        complaint = "class names that do not belong to the labels"
    elif set(table["split"].to_pylist()) - {name}:
        complaint = "rows of another split"
    elif split_digest(name, split, names) != info["split_digests"].get(name):
        complaint = "another content: its digest differs"
    if complaint:
        raise DatasetError(
            f"{path} and {SUBSET_FILE} contradict each other, the table has {complaint}; "
            "run build_subset again"
        )


def _plot(class_counts: Labels, groups: Mapping[str, Sequence[int]]) -> bytes:
    """Bars of class sizes, largest first, coloured by shot group, as PNG."""
    figure = Figure(figsize=(6.4, 3.6), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    rank = np.empty(len(class_counts), dtype=np.int64)
    rank[np.argsort(-class_counts, kind="stable")] = np.arange(len(class_counts))
    for group, labels in groups.items():
        name = f"{group.replace('_', '-')} ({len(labels)})"
        axes.bar(rank[labels], class_counts[labels], 1.0, color=_GROUP_COLOURS[group], label=name)
    if class_counts.max() >= 10 * class_counts.min():
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="classes, largest first", ylabel="training images")
    axes.set_xlim(-0.5, len(rank) - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="classes", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()

import hashlib
import io
import json
import zlib
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shike_core.config import SubsetConfig
from shike_core.data.long_tail import cut
from shike_core.data.manifest import (
    SCHEMA,
    Split,
    read_info,
    read_subset,
    split_digest,
    write_subset,
)
from shike_core.data.sources import Source
from shike_core.errors import ArtifactError, DatasetError

NAMES = ("ant", "bee", "b\N{LATIN SMALL LETTER E WITH GRAVE}te")
RULE = SubsetConfig(dataset="digits", imbalance_factor=20, validation_per_class=2)
DIGITS_DIGEST = "b8a1a469ee067dc0c6b5349c3511e943ef823fdecfddfe14b9e0c6446323c8b6"
FOUR_DIGITS_DIGEST = "77f459422fccad065647e99518871ecf704810657f9b6b1cd97bde4852eec731"
SMALL_DIGITS_DIGEST = "4c585aae176bf218c41854a4f5bf5079bf14d56ae56c98ac7f1a3f1a6633c5e2"


def split_of(labels: list[int], seed: int) -> Split:
    images = np.random.default_rng(seed).integers(256, size=(len(labels), 5, 4, 3), dtype=np.uint8)
    return Split(images, np.array(labels, dtype=np.int64), np.arange(len(labels)) + 100)


TINY = {
    "test": split_of([0, 1, 2], 1),
    "train": split_of([0] * 30 + [1] * 5 + [2], 0),
    "validation": split_of([2, 1, 0], 2),
}


def write(directory, splits=TINY, rule=RULE) -> dict:
    source = Source("tiny", splits["train"], splits["test"], NAMES, (0.5, 0.4, 0.3), (0.2,) * 3)
    return write_subset(directory, splits, source=source, rule=rule, identical_images={"n": 0})


@pytest.fixture
def directory(tmp_path):
    write(tmp_path / "subset")
    return tmp_path / "subset"


def change_table(path, **columns) -> None:
    """Write the table anew with other columns, given as lists."""
    table = pq.read_table(path)
    for name, values in columns.items():
        i = table.schema.get_field_index(name)
        table = table.set_column(i, SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type))
    pq.write_table(table, path)


def column(path, name: str) -> list:
    return pq.read_table(path)[name].to_pylist()


def change_image(path, row: int, content: bytes) -> None:
    images = column(path, "image")
    images[row] = content
    change_table(path, image=images)


def encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "PNG"} | options))
    return buffer.getvalue()


def test_what_is_written_is_read_back(directory):
    subset = read_subset(directory, splits=("train", "test", "validation"))
    for name, split in TINY.items():
        for field in ("images", "labels", "source_index"):
            read, written = getattr(subset.splits[name], field), getattr(split, field)
            assert read.dtype == written.dtype
            assert (read == written).all()
            assert read.flags.writeable  # torch warns of arrays that are not
    assert subset.class_names == NAMES
    assert subset.class_counts.tolist() == [30, 5, 1]
    assert (subset.mean, subset.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


def test_the_directory_and_its_description(directory):
    assert sorted(path.name for path in directory.iterdir()) == [
        "class_counts.png", "subset.json", "test.parquet", "train.parquet", "validation.parquet",
    ]  # fmt: skip
    info = json.loads((directory / "subset.json").read_text("utf-8"))
    assert info == read_info(directory) == read_subset(directory).info
    assert info["rule"]["imbalance_factor"] == 20
    assert info["rule"]["selection"] == "first"
    assert info["sizes"] == {"train": 36, "test": 3, "validation": 3}
    assert info["class_names"] == list(NAMES)
    assert info["class_counts"] == [30, 5, 1]
    assert info["shot_groups"] == {"medium_shot": [0], "few_shot": [1, 2]}
    assert info["imbalance"]["imbalance_factor"] == 30
    assert info["identical_images"] == {"n": 0}
    with Image.open(directory / "class_counts.png") as plot:
        assert plot.width > 600
    assert pq.read_schema(directory / "train.parquet").equals(SCHEMA)
    assert column(directory / "test.parquet", "class_name") == list(NAMES)
    assert column(directory / "test.parquet", "split") == ["test"] * 3


def test_a_subset_of_fewer_classes_and_smaller_images(digits, tmp_path):
    rule = replace(RULE, num_classes=4, image_size=5)
    splits, found = cut(digits, rule)
    info = write_subset(tmp_path, splits, source=digits, rule=rule, identical_images=found)
    assert (info["rule"]["num_classes"], info["rule"]["image_size"]) == (4, 5)
    assert info["image_size"] == [5, 5]
    assert info["class_names"] == ["0", "1", "2", "3"]
    assert info["sizes"]["test"] == 4 * 50
    largest = info["class_counts"][0]
    assert info["class_counts"] == [int(largest * 20 ** (-c / 3)) for c in range(4)]
    subset = read_subset(tmp_path, splits=tuple(splits))
    assert subset.class_names == ("0", "1", "2", "3")
    assert (subset.mean, subset.std) == (digits.mean, digits.std)
    for name, split in splits.items():
        assert (subset.splits[name].images == split.images).all()
        assert (subset.splits[name].labels == split.labels).all()
        assert set(split.labels) == {0, 1, 2, 3}


def test_a_description_older_than_some_fields_of_the_rule(directory):
    path = directory / "subset.json"
    info = json.loads(path.read_text("utf-8"))
    for name in ("num_classes", "image_size"):
        del info["rule"][name]
    path.write_text(json.dumps(info), "utf-8")
    subset = read_subset(directory, splits=("train", "test", "validation"))
    assert subset.info == info
    assert (subset.splits["train"].images == TINY["train"].images).all()


def test_only_the_named_splits_are_read(directory, tmp_path):
    (directory / "train.parquet").unlink()
    assert list(read_subset(directory, splits=("test",)).splits) == ["test"]
    without = {name: split for name, split in TINY.items() if name != "validation"}
    write(tmp_path / "other", without)
    subset = read_subset(tmp_path / "other", splits=("train", "validation"))
    assert list(subset.splits) == ["train"]


def test_a_validation_split_of_an_earlier_rule_does_not_stay(directory):
    write(directory, {name: split for name, split in TINY.items() if name != "validation"})
    assert not (directory / "validation.parquet").exists()


def test_the_digest_by_hand():
    split = TINY["test"]
    text = b'[1, "test", ["ant", "bee", "b\\u00e8te"], [3, 5, 4, 3]]'
    numbers = b"".join(int(n).to_bytes(8, "little") for n in (0, 1, 2, 100, 101, 102))
    expected = hashlib.sha256(text + split.images.tobytes() + numbers).hexdigest()
    assert split_digest("test", split, NAMES) == expected
    big_endian = replace(split, labels=split.labels.astype(">i8"), images=split.images.copy("F"))
    assert split_digest("test", big_endian, NAMES) == expected


def test_the_digest_covers_all_of_the_content(tmp_path):
    def digests(changed_split: str, **changes) -> tuple[str, str]:
        splits = TINY | {changed_split: replace(TINY[changed_split], **changes)}
        info = write(tmp_path, splits)
        return info["digest"], info["test_digest"]

    original = digests("train")
    images = TINY["train"].images.copy()
    images[7, 4, 3, 2] ^= 1
    for changed in (
        digests("train", images=images),
        digests("train", labels=TINY["train"].labels[::-1]),
        digests("train", source_index=TINY["train"].source_index + 1),
        digests("validation", source_index=TINY["validation"].source_index + 1),
    ):
        assert changed[0] != original[0]
        assert changed[1] == original[1]
    changed = digests("test", source_index=TINY["test"].source_index + 1)
    assert changed[0] != original[0]
    assert changed[1] != original[1]


def test_the_digest_does_not_depend_on_how_images_and_tables_are_encoded(directory):
    before = read_subset(directory)
    images = [
        encoded(Image.fromarray(image), compress_level=0) for image in before.splits["train"].images
    ]
    assert images != column(directory / "train.parquet", "image")
    change_table(directory / "train.parquet", image=images)
    frame = pq.read_table(directory / "test.parquet").to_pandas()
    frame.to_parquet(directory / "test.parquet", compression="zstd")
    after = read_subset(directory)
    assert after.digest == before.digest
    assert (after.splits["train"].images == before.splits["train"].images).all()


def test_a_missing_subset(tmp_path):
    with pytest.raises(DatasetError, match=r"there is no .*subset\.json; run build_subset first"):
        read_subset(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", '{"format": 1', "[]", '{"format": 9}', '{"format": 1}'])
def test_a_damaged_description(directory, text):
    (directory / "subset.json").write_text(text)
    with pytest.raises(DatasetError, match=r"subset\.json .*; run build_subset again"):
        read_subset(directory)


def test_a_changed_digest(directory):
    path = directory / "subset.json"
    path.write_text(path.read_text("utf-8").replace(read_info(directory)["digest"], "0" * 64))
    with pytest.raises(DatasetError, match=r"the digests in .* contradict each other"):
        read_subset(directory)


def test_a_missing_table(directory):
    (directory / "test.parquet").unlink()
    with pytest.raises(DatasetError, match=r"there is no .*test\.parquet; run build_subset again"):
        read_subset(directory)


@pytest.mark.parametrize("keep", [0, 3, 500])
def test_a_truncated_table(directory, keep):
    path = directory / "train.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DatasetError, match=r"train\.parquet cannot be read as a Parquet table"):
        read_subset(directory)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"image": [b"x"]}, 'Field "label" does not exist'),
        ({name: [None] for name in SCHEMA.names}, "null values"),
        ({name: ["x"] for name in SCHEMA.names}, "Failed to parse string"),
    ],
)
def test_a_table_with_other_columns(directory, table, message):
    pq.write_table(pa.table(table), directory / "train.parquet")
    with pytest.raises(DatasetError, match=message):
        read_subset(directory)


def huge(png: bytes) -> bytes:
    """The same PNG with a header that claims 100,000 x 100,000 pixels."""
    header = b"IHDR" + 2 * (100_000).to_bytes(4, "big") + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


PIXELS = TINY["train"].images[17]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "row 17 of .*train.parquet cannot be read as an image"),
        (b"", "row 17 of .*train.parquet cannot be read as an image"),
        (encoded(Image.fromarray(PIXELS))[:60], "row 17 of .* cannot be read as an image"),
        (encoded(Image.fromarray(PIXELS), format="BMP"), "row 17 of .* cannot be read as an image"),
        (
            encoded(Image.fromarray(PIXELS[..., 0])),
            r"row 17 of .* mode L .* expected RGB",
        ),
        (huge(encoded(Image.fromarray(PIXELS))), "row 17 of .* cannot be read as an image"),
        (encoded(Image.fromarray(PIXELS).convert("RGBA")), "row 17 of .* of mode RGBA"),
        (encoded(Image.fromarray(PIXELS).convert("P")), "row 17 of .* of mode P"),
        (
            encoded(Image.fromarray(PIXELS[:3])),
            r"row 17 .* 4 x 3 pixels, expected RGB and 4 x 5",
        ),
    ],
)
def test_an_image_that_cannot_be_used(directory, content, message):
    change_image(directory / "train.parquet", 17, content)
    with pytest.raises(DatasetError, match=message):
        read_subset(directory)


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_a_label_outside_the_range(directory, label):
    path = directory / "test.parquet"
    change_table(path, label=[0, label, 2])
    with pytest.raises(DatasetError, match=rf"row 1 .* has the label {label}, expected 0\.\.2 \(1"):
        read_subset(directory)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"label": [0] * 29 + [1] * 6 + [2]},
            r"other class counts: \[29, 6, 1\], expected \[30",
        ),
        ({"class_name": ["ant"] * 36}, "class names that do not belong to the labels"),
        ({"split": ["test"] * 36}, "rows of another split"),
        ({"source_index": [0] * 36}, "another content: its digest differs"),
    ],
)
def test_a_table_that_contradicts_the_description(directory, columns, message):
    change_table(directory / "train.parquet", **columns)
    with pytest.raises(DatasetError, match=f"contradict each other, the table has {message}"):
        read_subset(directory)


def test_a_table_with_too_few_rows(directory):
    path = directory / "train.parquet"
    pq.write_table(pq.read_table(path).slice(0, 35), path)
    with pytest.raises(DatasetError, match="the table has 35 rows, expected 36"):
        read_subset(directory)


def test_a_changed_pixel(directory):
    image = TINY["train"].images[3].copy()
    image[0, 0, 0] ^= 255
    change_image(directory / "train.parquet", 3, encoded(Image.fromarray(image)))
    with pytest.raises(DatasetError, match="another content: its digest differs"):
        read_subset(directory)


def test_writing_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot write .*train\.parquet: a part of the path"):
        write(tmp_path / "file")


def test_writing_to_a_full_disk_leaves_no_half_files(full_disk):
    splits = TINY | {"train": split_of([0, 1, 2] * 400, 0)}
    with pytest.raises(ArtifactError, match=r"cannot write .*train\.parquet: the disk is full"):
        write(full_disk, splits)
    assert list(full_disk.iterdir()) == []


@pytest.mark.parametrize("class_counts", [[5], [0, 0], [0, 1, 2] * 9])
def test_the_plot_copes_with_few_classes_and_equal_ones(tmp_path, class_counts):
    labels = [*class_counts, 0, 1, 2]
    assert write(tmp_path, TINY | {"train": split_of([x % 3 for x in labels], 0)})["digest"]


@pytest.mark.parametrize(
    ("changes", "digest"),
    [
        ({}, DIGITS_DIGEST),
        ({"num_classes": 10, "image_size": 8}, DIGITS_DIGEST),  # all that there is
        ({"num_classes": 4}, FOUR_DIGITS_DIGEST),
        ({"image_size": 5}, SMALL_DIGITS_DIGEST),
    ],
)
def test_the_digest_of_the_digits_is_the_same_everywhere(digits, tmp_path, changes, digest):
    rule = replace(RULE, selection="random", class_order="shuffled", **changes)
    splits, found = cut(digits, rule)
    info = write_subset(tmp_path, splits, source=digits, rule=rule, identical_images=found)
    assert info["digest"] == digest

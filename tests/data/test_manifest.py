import hashlib
import io
import json
import shutil
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shike_core.config import SubsetConfig
from shike_core.data.listed import ImageFiles
from shike_core.data.long_tail import cut
from shike_core.data.manifest import (
    SCHEMA,
    SCHEMAS,
    index_digest,
    read_info,
    read_subset,
    split_digest,
    write_subset,
    write_subset_of_files,
)
from shike_core.data.split import Source, Split
from shike_core.data.storage import PackedImages, ReferencedImages
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
        field = table.schema.field(name)
        table = table.set_column(i, field, pa.array(values, field.type))
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


def test_where_nothing_can_draw_there_is_no_plot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".parquet"}
    assert read_subset(tmp_path).class_counts.tolist() == [30, 5, 1]


def test_a_subset_of_fewer_classes_and_smaller_images(digits, tmp_path):
    rule = replace(RULE, num_classes=4, image_size=5)
    splits, found, _ = cut(digits, rule)
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
    splits, found, _ = cut(digits, rule)
    info = write_subset(tmp_path, splits, source=digits, rule=rule, identical_images=found)
    assert info["digest"] == digest


def test_the_storage_is_named_and_was_a_table_before_it_had_a_name(directory):
    path = directory / "subset.json"
    info = json.loads(path.read_text("utf-8"))
    assert (info["format"], info.pop("storage")) == (1, "table")
    path.write_text(json.dumps(info), "utf-8")
    subset = read_subset(directory)
    assert subset.info["storage"] == "table"
    assert (subset.splits["train"].images == TINY["train"].images).all()


# ---- images in files


@pytest.fixture
def photographed(tmp_path, monkeypatch) -> dict[str, Split]:
    """The tiny splits as files; three training images are also test images."""
    monkeypatch.setattr("shike_core.data.manifest._plot", lambda *counts: b"takes half a second")
    splits = {}
    for name, split in TINY.items():
        paths = np.array([f"{name}/{i}.png" for i in range(len(split.labels))], dtype=object)
        (tmp_path / "images" / name).mkdir(parents=True)
        for path, image in zip(paths, split.images, strict=True):
            (tmp_path / "images" / path).write_bytes(encoded(Image.fromarray(image)))
        splits[name] = replace(split, images=ImageFiles(str(tmp_path / "images"), paths))
    for i in (0, 30, 31):
        shutil.copy(tmp_path / "images" / "test" / "1.png", tmp_path / f"images/train/{i}.png")
    return splits


def write_files(directory, splits, **changes) -> dict:
    source = Source("tiny", splits["train"], splits["test"], NAMES, (0.5, 0.4, 0.3), (0.2,) * 3)
    shards_dir = changes.pop("shards_dir", "")
    rule = SubsetConfig(**{"dataset": "image_folder", "imbalance_factor": 0} | changes)
    return write_subset_of_files(directory, splits, source, rule, shards_dir=shards_dir, workers=1)


def all_images(split: Split) -> list[bytes]:
    return split.images.read(range(len(split.labels)))


@pytest.fixture(params=["packed", "referenced"])
def storage(request) -> str:
    return request.param


def test_images_in_files_are_read_back(photographed, tmp_path, storage):
    info = write_files(tmp_path / "subset", photographed, storage=storage)
    subset = read_subset(tmp_path / "subset", splits=("train", "test", "validation"))
    assert subset.info == info == read_info(tmp_path / "subset")
    assert (info["format"], info["storage"], info["image_size"]) == (2, storage, None)
    assert info["sizes"] == {"train": 36, "test": 3, "validation": 3}
    assert info["unreadable"] == {"train": 0, "test": 0, "validation": 0}
    assert subset.class_counts.tolist() == [30, 5, 1]
    for name, split in photographed.items():
        read = subset.splits[name]
        assert isinstance(read.images, {"packed": PackedImages}.get(storage, ReferencedImages))
        assert (read.labels == split.labels).all()
        assert (read.source_index == split.source_index).all()
        assert all_images(read) == [split.images.read(i) for i in range(len(split.labels))]


def test_the_directory_of_a_subset_of_files(photographed, tmp_path, storage):
    write_files(tmp_path / "subset", photographed, storage=storage)
    present = ["class_counts.png", "subset.json", "test.parquet", "train.parquet"]
    present += ["unreadable.csv", "validation.parquet"] + ["shards"] * (storage == "packed")
    assert sorted(path.name for path in (tmp_path / "subset").iterdir()) == sorted(present)
    table = pq.read_table(tmp_path / "subset" / "train.parquet")
    assert table.schema.equals(SCHEMAS[storage])
    assert table["path"].to_pylist() == photographed["train"].images.paths.tolist()
    assert set(zip(*(table[c].to_pylist() for c in ("width", "height")), strict=True)) == {(4, 5)}


def test_a_packed_subset_can_be_moved_and_needs_the_files_no_more(photographed, tmp_path):
    write_files(tmp_path / "subset", photographed)
    expected = all_images(read_subset(tmp_path / "subset").splits["train"])
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "subset").rename(tmp_path / "moved")
    assert all_images(read_subset(tmp_path / "moved").splits["train"]) == expected


def test_shards_elsewhere(photographed, tmp_path):
    info = write_files(tmp_path / "subset", photographed, shards_dir=str(tmp_path / "place"))
    assert not (tmp_path / "subset" / "shards").exists()
    assert Path(info["shards"]["location"]).parent == tmp_path / "place"
    (tmp_path / "subset").rename(tmp_path / "moved")
    read = read_subset(tmp_path / "moved").splits["test"]
    assert all_images(read) == [photographed["test"].images.read(i) for i in range(3)]


def test_shards_below_a_url_are_read(photographed, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write_files(tmp_path / "subset", photographed, shards_dir="memory://bucket/manifest")
    read = read_subset(tmp_path / "subset").splits["test"]
    assert all_images(read) == [photographed["test"].images.read(i) for i in range(3)]


def test_the_digest_of_an_index_by_hand(photographed, tmp_path):
    info = write_files(tmp_path, photographed)
    text = b'[2, "test", ["ant", "bee", "b\\u00e8te"], 0]'
    files = [photographed["test"].images.read(i) for i in range(3)]
    contents = b"".join(hashlib.sha256(content).digest() for content in files)
    numbers = b"".join(int(n).to_bytes(8, "little") for n in (0, 1, 2, 100, 101, 102))
    assert info["test_digest"] == hashlib.sha256(text + contents + numbers).hexdigest()


def test_the_digest_of_files_is_the_same_wherever_they_are(photographed, tmp_path, monkeypatch):
    first = write_files(tmp_path / "a", photographed, short_side=4)
    (tmp_path / "images").rename(tmp_path / "others")
    moved = {
        name: replace(split, images=ImageFiles(str(tmp_path / "others"), split.images.paths))
        for name, split in photographed.items()
    }
    # As another version of the encoder would do.
    monkeypatch.setattr("shike_core.data.pack.JPEG_OPTIONS", {"quality": 50})
    second = write_files(tmp_path / "b", moved, short_side=4, shard_mib=1)
    assert second["digest"] == first["digest"]
    plain = [write_files(tmp_path / x, moved, storage=x) for x in ("packed", "referenced")]
    assert plain[0]["digest"] == plain[1]["digest"] != first["digest"]


def test_the_digest_of_files_covers_their_content_labels_and_indices(photographed, tmp_path):
    before = write_files(tmp_path / "a", photographed, storage="referenced")
    labels, index = photographed["train"].labels.copy(), photographed["train"].source_index
    labels[7] = 1
    changed = [replace(photographed["train"], labels=labels)]
    changed += [replace(photographed["train"], source_index=index + 1)]
    digests = {before["digest"]}
    for train in changed:
        splits = photographed | {"train": train}
        digests.add(write_files(tmp_path / "a", splits, storage="referenced")["digest"])
    path = tmp_path / "images" / "train" / "5.png"
    path.write_bytes(path.read_bytes() + b"x")
    after = write_files(tmp_path / "a", photographed, storage="referenced")
    assert len(digests | {after["digest"]}) == 4
    assert after["test_digest"] == before["test_digest"]


def test_shrunk_images_are_what_the_index_says(photographed, tmp_path):
    write_files(tmp_path, photographed, short_side=4)
    path = tmp_path / "images" / "train" / "2.png"
    path.write_bytes(encoded(Image.new("RGB", (12, 30))))
    info = write_files(tmp_path / "subset", photographed, short_side=4)
    assert info["short_side"] == 4
    table = pq.read_table(tmp_path / "subset" / "train.parquet")
    assert [table[c][2].as_py() for c in ("width", "height")] == [4, 10]
    (image,) = read_subset(tmp_path / "subset").splits["train"].images.read([2])
    with Image.open(io.BytesIO(image)) as shrunk:
        assert (shrunk.format, shrunk.size) == ("JPEG", (4, 10))


def test_identical_files_are_kept_dropped_or_refused(photographed, tmp_path, storage):
    options = {"storage": storage}
    kept = write_files(tmp_path / "a", photographed, **options)
    assert kept["identical_images"] == {
        "train_in_test": 3,
        "train_test_pairs": [[100, 101], [130, 101], [131, 101]],
        "train_repeats": 2,
        "train_in_validation": 0,
        "validation_in_test": 0,
        "train_dropped": 0,
    }
    dropped = write_files(tmp_path / "b", photographed, leakage="drop", **options)
    assert dropped["class_counts"] == [29, 3, 1]
    assert dropped["identical_images"]["train_dropped"] == 3
    read = read_subset(tmp_path / "b").splits["train"]
    assert len(read.images) == len(read.labels) == 33
    assert not set(read.source_index) & {100, 130, 131}
    assert all_images(read)[-1] == photographed["train"].images.read(35)
    with pytest.raises(DatasetError, match=r"3 training images are identical .*100 = 101"):
        write_files(tmp_path / "c", photographed, leakage="refuse", **options)
    assert not (tmp_path / "c" / "subset.json").exists()


def test_a_class_whose_images_cannot_be_read(photographed, tmp_path, storage):
    (tmp_path / "images" / "train" / "35.png").write_bytes(b"")
    message = r"class 2 \(b.te\) is left without training images .*unreadable\.csv"
    with pytest.raises(DatasetError, match=message):
        write_files(tmp_path / "subset", photographed, storage=storage, max_unreadable=0.1)
    assert not (tmp_path / "subset" / "subset.json").exists()


def test_images_left_out_are_counted(photographed, tmp_path, storage):
    for path in ("train/2.png", "train/3.png", "validation/0.png"):
        (tmp_path / "images" / path).write_bytes(b"")
    info = write_files(tmp_path / "a", photographed, storage=storage, max_unreadable=0.1)
    assert info["unreadable"] == {"train": 2, "test": 0, "validation": 1}
    assert info["sizes"] == {"train": 34, "test": 3, "validation": 2}
    assert info["class_counts"] == [28, 5, 1]
    subset = read_subset(tmp_path / "a", splits=("train", "validation"))
    assert subset.splits["validation"].labels.tolist() == [1, 0]


def test_subsets_of_different_kinds_in_one_directory(photographed, tmp_path, storage):
    subset = tmp_path / "subset"
    write(subset)
    write_files(subset, photographed, storage=storage)
    assert not isinstance(read_subset(subset).splits["train"].images, np.ndarray)
    write(subset)
    assert sorted(path.name for path in subset.iterdir()) == [
        "class_counts.png", "subset.json", "test.parquet", "train.parquet", "validation.parquet",
    ]  # fmt: skip
    assert (read_subset(subset).splits["train"].images == TINY["train"].images).all()


def test_a_subset_that_is_being_rebuilt_is_none(photographed, tmp_path, storage):
    write_files(tmp_path / "subset", photographed, storage=storage)
    (tmp_path / "images" / "train" / "2.png").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"1 of .* cannot be read"):
        write_files(tmp_path / "subset", photographed, storage=storage, subset_seed=1)
    with pytest.raises(DatasetError, match=r"there is no .*subset\.json"):
        read_subset(tmp_path / "subset")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0] * 29 + [1] * 6 + [2]}, r"other class counts: \[29, 6, 1\], expected \[30"),
        ({"class_name": ["ant"] * 36}, "class names that do not belong to the labels"),
        ({"split": ["test"] * 36}, "rows of another split"),
        ({"source_index": [0] * 36}, "another content: its digest differs"),
        ({"sha256": [bytes(32)] * 36}, "another content: its digest differs"),
    ],
)
def test_an_index_that_contradicts_the_description(
    photographed, tmp_path, storage, columns, message
):
    write_files(tmp_path, photographed, storage=storage)
    change_table(tmp_path / "train.parquet", **columns)
    with pytest.raises(DatasetError, match=f"contradict each other, the table has {message}"):
        read_subset(tmp_path)


@pytest.mark.parametrize("rows", [[36] * 36, [0] * 35 + [99]])
def test_an_index_of_rows_that_no_shard_has(photographed, tmp_path, rows):
    write_files(tmp_path, photographed)
    change_table(tmp_path / "train.parquet", row=rows)
    with pytest.raises(DatasetError, match=r"train\.parquet names rows that its shards do not"):
        read_subset(tmp_path)


def test_an_index_without_its_columns(photographed, tmp_path, storage):
    write_files(tmp_path, photographed, storage=storage)
    pq.write_table(
        pq.read_table(tmp_path / "test.parquet").drop(["sha256"]), tmp_path / "test.parquet"
    )
    with pytest.raises(DatasetError, match=r"test\.parquet cannot be read as .*sha256"):
        read_subset(tmp_path)


def test_shards_that_are_missing_damaged_or_of_another_subset(photographed, tmp_path):
    write_files(tmp_path / "a", photographed)
    write_files(tmp_path / "b", photographed, short_side=4)
    shard, other = (tmp_path / x / "shards" / "train-00000.parquet" for x in "ab")
    shutil.copy(other, shard)
    with pytest.raises(DatasetError, match=r"has 36 images of the plan .*: it belongs to another"):
        read_subset(tmp_path / "a")
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"train-00000\.parquet is a part of the subset and"):
        read_subset(tmp_path / "a")
    shard.unlink()
    with pytest.raises(DatasetError, match=r"cannot be read .*make that place reachable from here"):
        read_subset(tmp_path / "a")
    assert list(read_subset(tmp_path / "a", splits=("test",)).splits) == ["test"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": "tape"}, "unknown storage 'tape'"),
        ({"root": None, "storage": "referenced"}, "lacks root"),
        ({"shards": None, "storage": "packed"}, "lacks shards"),
    ],
)
def test_a_description_of_another_storage(photographed, tmp_path, storage, changes, message):
    info = write_files(tmp_path, photographed, storage=storage) | changes
    kept = {key: value for key, value in info.items() if value is not None or key == "image_size"}
    (tmp_path / "subset.json").write_text(json.dumps(kept), "utf-8")
    with pytest.raises(DatasetError, match=message):
        read_info(tmp_path)


def test_the_index_digest_takes_no_other_column(photographed, tmp_path):
    info = write_files(tmp_path, photographed)
    table = pq.read_table(tmp_path / "train.parquet")
    moved = table.set_column(4, "path", pa.array(["elsewhere"] * 36)).drop(["shard", "row"])
    assert index_digest("train", moved, NAMES, 0) == info["split_digests"]["train"]
    assert index_digest("train", moved, NAMES, 8) != info["split_digests"]["train"]


@pytest.mark.parametrize("classes", [8142, 2])
def test_the_plot_copes_with_many_classes(tmp_path, classes):
    labels = np.repeat(np.arange(classes), np.where(np.arange(classes) % 300, 1, 50))
    pixels = np.zeros((len(labels), 1, 1, 3), dtype=np.uint8)
    split = Split(pixels, labels, np.arange(len(labels)))
    names = tuple(map(str, range(classes)))
    source = Source("many", split, split, names, (0.5,) * 3, (0.2,) * 3)
    test = split.take(np.arange(3))
    info = write_subset(tmp_path, {"train": split, "test": test}, source, RULE, {})
    assert len(info["class_counts"]) == classes
    with Image.open(tmp_path / "class_counts.png") as plot:
        assert plot.width > 600

import csv
import errno
import hashlib
import io
import multiprocessing
import os
import signal
import threading
import time
import zlib
from contextlib import suppress
from dataclasses import replace
from multiprocessing import spawn
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shike_core.config import SubsetConfig
from shike_core.data import pack as packing
from shike_core.data.listed import ImageFiles
from shike_core.data.pack import available_workers, pack, prepare
from shike_core.data.split import Split
from shike_core.data.storage import SHARD_SCHEMA, PackedImages
from shike_core.errors import ArtifactError, DatasetError, Interrupted, InterruptedPacking

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "photographs"
NAMES = ("ant", "bee", "cat")


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


@pytest.fixture(scope="session")
def photographs() -> list[bytes]:
    """Real photographs of about 500 x 375 pixels, some of them grey."""
    if not PHOTOGRAPHS.is_dir():
        pytest.skip("the photographs are not in ../shared")
    return [path.read_bytes() for path in sorted(PHOTOGRAPHS.iterdir())[:40]]


# ---- one image


@pytest.mark.parametrize("short_side", [0, 8, 9])
def test_a_file_stays_as_it_is_if_nothing_is_to_be_shrunk(digits, short_side):
    content = encoded(Image.fromarray(digits.train.images[0]).resize((12, 8)), "BMP")
    assert prepare(content, short_side) == (content, 12, 8)


def test_the_shorter_side_gets_the_size_asked_and_the_shape_stays(photographs):
    for content in photographs:
        width, height = decoded(content).size
        image, *shape = prepare(content, 64)
        expected = [64, 64 * height / width] if width < height else [64 * width / height, 64]
        assert shape == [round(x) for x in expected]
        assert decoded(image).size == tuple(shape)
        assert (decoded(image).format, decoded(image).mode) == ("JPEG", "RGB")


def test_a_very_long_image_keeps_a_pixel_of_each_side():
    assert prepare(encoded(Image.new("RGB", (8, 900))), 4)[1:] == (4, 450)


def test_shrinking_averages_over_all_pixels():
    chequered = np.indices((64, 64)).sum(0) % 2 * 255
    image, *_ = prepare(encoded(Image.fromarray(chequered.astype(np.uint8))), 16)
    inner = np.asarray(decoded(image))[2:-2, 2:-2]
    assert np.abs(inner.astype(int) - 127.5).max() < 4


@pytest.mark.parametrize("short_side", [0, 8])
def test_an_image_of_more_than_8_bits_is_refused(short_side):
    content = encoded(Image.fromarray(np.full((20, 20), 3000, dtype=np.uint16)))
    with pytest.raises(ValueError, match=r"more than 8 bits \(mode I;16\); save it with 8 bits"):
        prepare(content, short_side)


def test_a_side_that_decoding_does_not_divide_is_not_stretched():
    # Decoded at a quarter, 401 pixels become 101, of which the last stands for a quarter of one.
    slope = np.linspace(0, 255, 401).astype(np.uint8)
    image = Image.fromarray(np.tile(slope, (401, 1))).convert("RGB")
    small, *shape = prepare(encoded(image, "JPEG", quality=100), 50)
    exact = np.asarray(image.resize(tuple(shape), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(np.asarray(decoded(small)).astype(int) - exact)[:, 2:-2].max() <= 2


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    """In decibels."""
    return 10 * np.log10(255**2 / np.mean((image.astype(float) - other.astype(float)) ** 2))


def test_what_shrinking_and_encoding_photographs_costs(photographs):
    losses = []
    for content in photographs:
        if min(decoded(content).size) > 256:
            image, *shape = prepare(content, 256)
            exact = decoded(content).convert("RGB").resize(tuple(shape), Image.Resampling.LANCZOS)
            losses.append(psnr(np.asarray(decoded(image)), np.asarray(exact)))
    assert len(losses) > 30
    assert np.mean(losses) > 40
    assert min(losses) > 36


def test_decoding_a_large_photograph_at_a_smaller_size_costs_little(photographs):
    for content in photographs[:10]:
        large = decoded(content).convert("RGB").resize((1600, 1200), Image.Resampling.LANCZOS)
        image, *shape = prepare(encoded(large, "JPEG", quality=95), 128)
        assert shape == [171, 128]
        exact = large.resize((171, 128), Image.Resampling.LANCZOS)
        assert psnr(np.asarray(decoded(image)), np.asarray(exact)) > 34


COLOURS = Image.new("RGB", (32, 32), (200, 100, 50))


@pytest.mark.parametrize(
    ("content", "colour"),
    [
        (encoded(COLOURS.convert("L")), (124, 124, 124)),
        (encoded(COLOURS.convert("LA")), (124, 124, 124)),
        (encoded(COLOURS.convert("1")), None),
        (encoded(COLOURS.convert("RGBA")), (200, 100, 50)),
        (encoded(COLOURS.convert("P", palette=Image.Palette.ADAPTIVE)), (200, 100, 50)),
        (
            encoded(COLOURS.convert("P", palette=Image.Palette.ADAPTIVE), transparency=b"\x00\x80"),
            (200, 100, 50),
        ),
        (encoded(COLOURS.convert("CMYK"), "JPEG", quality=100), (200, 100, 50)),
        (encoded(COLOURS.convert("L"), "JPEG", quality=100), (124, 124, 124)),
        (encoded(COLOURS, "WEBP", lossless=True), (200, 100, 50)),
        (encoded(COLOURS, "TIFF"), (200, 100, 50)),
    ],
)
def test_every_kind_of_image_becomes_rgb(content, colour):
    assert prepare(content) == (content, 32, 32)
    image, *shape = prepare(content, 16)
    assert (decoded(image).mode, shape) == ("RGB", [16, 16])
    if colour:
        assert np.abs(np.asarray(decoded(image)).astype(int) - colour).max() <= 3


def bomb() -> bytes:
    """A PNG with a header that claims 100,000 x 100,000 pixels."""
    png = encoded(COLOURS)
    header = b"IHDR" + 2 * (100_000).to_bytes(4, "big") + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def noise(size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(size, size, 3), dtype="u1"))


UNREADABLE = {
    "empty": (b"", "the file is empty"),
    "text": (b"<html>404</html>", "not an image that can be read"),
    "half a JPEG": (encoded(noise(64), "JPEG")[:2000], "truncated"),
    "half a PNG": (encoded(noise(64))[:4000], "truncated"),
    "a bomb": (bomb(), "exceeds limit"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
}


@pytest.mark.parametrize("short_side", [0, 16])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_not_an_image(kind, short_side):
    content, message = UNREADABLE[kind]
    with pytest.raises(ValueError, match=message):
        prepare(content, short_side)


def test_a_warning_of_too_many_pixels_counts(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"\(1024 pixels\) exceeds limit of 1000"):
        prepare(encoded(COLOURS))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_photograph_cut_off_anywhere_is_noticed(photographs, share):
    for content in photographs:
        with pytest.raises(ValueError, match=r"(?i)truncated|not an image"):
            prepare(content[: int(share * len(content))])


# ---- a subset


def rule(**changes) -> SubsetConfig:
    return SubsetConfig(**{"dataset": "image_folder", "shard_mib": 1, "subset_seed": 7} | changes)


@pytest.fixture
def splits(digits, tmp_path) -> dict[str, Split]:
    """Real digits, enlarged, in 90 files to train on and 20 to test on."""
    root, splits, number = tmp_path / "images", {}, 0
    for name, size in (("train", 90), ("test", 20)):
        paths = []
        for i in range(size):
            image = Image.fromarray(digits.train.images[number]).resize((16 + i % 5, 14))
            paths.append(f"{name}/{i % 3}/\N{LATIN SMALL LETTER E WITH ACUTE}{i:03d}.png")
            (root / paths[-1]).parent.mkdir(parents=True, exist_ok=True)
            (root / paths[-1]).write_bytes(encoded(image))
            number += 1
        files = ImageFiles(str(root), np.array(paths, dtype=object))
        splits[name] = Split(files, np.arange(size) % 3, 10 * np.arange(size))
    return splits


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Images of a few hundred bytes would all lie in one piece."""
    monkeypatch.setattr(packing, "PIECE_IMAGES", 32)
    monkeypatch.setattr(packing, "_power_of_two", lambda number: min(32, int(number)))


def packed(splits, directory, workers=1, **changes):
    options = {k: changes.pop(k) for k in ("shards_dir", "stop_signal") if k in changes}
    return pack(splits, NAMES, rule(**changes), directory, workers=workers, **options)


def shards(directory) -> list[Path]:
    return sorted((directory / "shards").iterdir())


def test_shards_can_be_read_by_pandas_and_hold_everything(splits, tmp_path):
    found = packed(splits, tmp_path / "out")
    assert [path.name for path in shards(tmp_path / "out")] == [
        "test-00000.parquet", "train-00000.parquet", "train-00001.parquet", "train-00002.parquet",
    ]  # fmt: skip
    frame = pd.concat(map(pd.read_parquet, shards(tmp_path / "out")), ignore_index=True)
    assert list(frame.columns) == SHARD_SCHEMA.names
    assert sorted(frame["path"]) == sorted(
        [*splits["train"].images.paths, *splits["test"].images.paths]
    )
    for row in frame.itertuples():
        content = (tmp_path / "images" / row.path).read_bytes()
        assert row.image == content
        assert row.sha256 == hashlib.sha256(content).digest()
        assert row.bytes == len(content)
        assert (row.width, row.height) == decoded(content).size
        assert row.split == row.path.split("/")[0]
        assert row.source_index == 10 * int(row.path[-7:-4])
        assert row.class_name == NAMES[row.label] == NAMES[int(row.path.split("/")[1])]
    assert found.rows == {p.name: pq.read_metadata(p).num_rows for p in shards(tmp_path / "out")}
    assert sum(found.rows.values()) == 110


def test_row_groups_are_small_and_images_neither_compressed_nor_without_checksum(splits, tmp_path):
    packed(splits, tmp_path / "out")
    for path in shards(tmp_path / "out"):
        metadata = pq.read_metadata(path)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        assert [g.num_rows for g in groups[:-1]] == [8] * (len(groups) - 1)
        assert {g.column(0).compression for g in groups} == {"UNCOMPRESSED"}
        assert not any(g.column(0).is_stats_set for g in groups)


@pytest.mark.parametrize(
    ("total", "image_bytes", "group", "images"),
    [
        (9000, 2**22, 1, 1),  # at 4 MiB a row group and a shard
        (9000, 2**20, 4, 4),
        (9000, 10_000, 8, 256),  # 419 would fit, but there are at least 32 shards
        (900, 10, 8, 256),  # unless they are as small as this
        (100_000, 1000, 8, 2048),  # 3125 would be a 32nd, 4194 would fit
        (100_000, 10_000, 8, 256),
        (0, 10, 8, 256),
    ],
)
def test_how_many_images_go_into_row_groups_and_shards(
    monkeypatch, total, image_bytes, group, images
):
    monkeypatch.undo()
    monkeypatch.setattr(packing, "_typical_bytes", lambda splits, rule: float(image_bytes))
    files = ImageFiles("/x", np.array(["a"] * total, dtype=object))
    split = Split(files, np.zeros(total, int), np.arange(total))
    first, *others = packing._plan({"train": split}, NAMES, rule(shard_mib=4))
    assert (first.group_size, len(first.files)) == (group, min(images, total))
    assert len(others) == max(1, -(-total // images)) - 1


def test_training_images_are_shuffled_by_the_seed_and_others_stay_in_order(splits, tmp_path):
    def order(directory, name) -> list[int]:
        paths = [path for path in shards(directory) if path.name.startswith(name)]
        return pd.concat(map(pd.read_parquet, paths))["source_index"].tolist()

    packed(splits, tmp_path / "a")
    packed(splits, tmp_path / "b", subset_seed=8)
    everything = splits["train"].source_index.tolist()
    first, second = order(tmp_path / "a", "train"), order(tmp_path / "b", "train")
    assert sorted(first) == sorted(second) == everything
    assert len({tuple(x) for x in (first, second, everything)}) == 3
    assert order(tmp_path / "a", "test") == splits["test"].source_index.tolist()


@pytest.mark.parametrize("storage", ["packed", "referenced"])
def test_the_index_is_in_the_order_of_the_split(splits, tmp_path, storage):
    found = packed(splits, tmp_path / "out", storage=storage)
    for name, split in splits.items():
        table = found.index[name]
        assert table["source_index"].to_pylist() == split.source_index.tolist()
        assert table["label"].to_pylist() == split.labels.tolist()
        assert table["path"].to_pylist() == split.images.paths.tolist()


def test_the_index_finds_every_image_in_its_shard(splits, tmp_path):
    found = packed(splits, tmp_path / "out")
    for name, split in splits.items():
        names = tuple(sorted(n for n in found.rows if n.startswith(name)))
        shard, row = (found.index[name][c].to_numpy() for c in ("shard", "row"))
        images = PackedImages(found.location, names, ("",) * len(names), 8, shard, row)
        expected = [split.images.read(i) for i in range(len(split.labels))]
        assert images.read(range(len(images))) == expected


def test_images_left_where_they_are_are_only_read(splits, tmp_path):
    found = packed(splits, tmp_path / "out", storage="referenced")
    assert not (tmp_path / "out" / "shards").exists()
    sizes = [len(splits["train"].images.read(i)) for i in range(90)]
    assert found.index["train"]["bytes"].to_pylist() == sizes
    assert found.root == str(tmp_path / "images")


def test_several_processes_make_the_same_as_one(splits, tmp_path):
    packed(splits, tmp_path / "a", short_side=8)
    packed(splits, tmp_path / "b", short_side=8, workers=2)
    for one, other in zip(shards(tmp_path / "a"), shards(tmp_path / "b"), strict=True):
        assert one.read_bytes() == other.read_bytes()


# ---- what cannot be read


def spoil(splits, name="train") -> dict[str, str]:
    """Damage some files; what is said of each."""
    files, expected = splits[name].images, {}
    for position, (content, message) in enumerate(UNREADABLE.values()):
        Path(files.root, files.paths[position]).write_bytes(content)
        expected[files.paths[position]] = message
    Path(files.root, files.paths[10]).unlink()
    return expected | {files.paths[10]: "there is no such file"}


def listed(directory) -> list[dict[str, str]]:
    with (directory / "unreadable.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("storage", ["packed", "referenced"])
@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_images_are_left_out_and_listed(splits, tmp_path, storage, workers):
    expected = spoil(splits)
    found = packed(splits, tmp_path / "out", workers, storage=storage, max_unreadable=0.2)
    rows = listed(tmp_path / "out")
    assert {row["path"] for row in rows} == set(expected)
    assert all(row["split"] == "train" and expected[row["path"]] in row["reason"] for row in rows)
    assert len(found.index["train"]) == 90 - 7
    assert not set(found.index["train"]["path"].to_pylist()) & set(expected)
    assert found.index["train"]["source_index"].to_pylist() == sorted(
        set(splits["train"].source_index.tolist()) - {0, 10, 20, 30, 40, 50, 100}
    )
    assert len(found.index["test"]) == 20


def test_nothing_unreadable_is_told_too(splits, tmp_path):
    packed(splits, tmp_path / "out")
    assert listed(tmp_path / "out") == []


def test_too_many_unreadable_images(splits, tmp_path):
    spoil(splits, "test")
    message = (
        r"^7 of 110 images \(6\.36%\) cannot be read, more than max_unreadable=0\.06 of all 110 "
        r"allows \(test/0/.000\.png: the file is empty; .*00[1-5].*; list: .*/unreadable\.csv\); "
        r"check data_dir, repair"
    )
    with pytest.raises(DatasetError, match=message):
        packed(splits, tmp_path / "out", max_unreadable=0.06)
    assert len(listed(tmp_path / "out")) == 7
    packed(splits, tmp_path / "out", max_unreadable=0.064)


def test_a_wrong_folder_is_noticed_after_the_first_piece(splits, tmp_path):
    away = {
        name: Split(ImageFiles("/away", s.images.paths), s.labels, s.source_index)
        for name, s in splits.items()
    }
    with pytest.raises(DatasetError) as error:
        packed(away, tmp_path / "out", shard_mib=4)
    assert "32 of 32 images (100.00%) cannot be read" in str(error.value)
    assert str(error.value).count("there is no such file") == 20
    assert "; ...; list" in str(error.value)


# ---- going on


def stamps(directory) -> dict[str, tuple[int, int]]:
    """Files written anew have other ones."""
    stats = {path.name: path.stat() for path in directory.iterdir()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.mark.parametrize(("storage", "folder"), [("packed", "shards"), ("referenced", "pieces")])
def test_a_second_call_takes_over_what_the_first_has_finished(splits, tmp_path, storage, folder):
    spoil(splits)
    first = packed(splits, tmp_path, storage=storage, max_unreadable=0.2)
    before = stamps(tmp_path / folder)
    (tmp_path / folder / "train-00001.parquet").unlink()
    torn = tmp_path / folder / "train-00002.parquet"
    torn.write_bytes(torn.read_bytes()[:-100])
    second = packed(splits, tmp_path, storage=storage, max_unreadable=0.2)
    after = stamps(tmp_path / folder)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"train-00001.parquet", "train-00002.parquet"}
    assert second.unreadable == first.unreadable
    assert all(second.index[name].equals(first.index[name]) for name in splits)


@pytest.mark.parametrize(
    "changes", [{"short_side": 8}, {"subset_seed": 8}], ids=["short_side", "subset_seed"]
)
def test_pieces_of_another_plan_are_made_anew(splits, tmp_path, changes):
    packed(splits, tmp_path / "out")
    before = stamps(tmp_path / "out" / "shards")
    packed(splits, tmp_path / "out", **changes)
    after = stamps(tmp_path / "out" / "shards")
    again = {name for name in after if after[name] != before[name]}
    assert again >= {f"train-0000{i}.parquet" for i in range(3)}
    packed(
        {"train": splits["train"].take(np.arange(40))} | {"test": splits["test"]}, tmp_path / "out"
    )
    assert [path.name for path in shards(tmp_path / "out")] == [
        "test-00000.parquet", "train-00000.parquet", "train-00001.parquet",
    ]  # fmt: skip


def test_the_plan_of_a_piece_covers_everything_that_decides_its_content(splits, monkeypatch):
    piece = packing._plan(splits, NAMES, rule())[0]
    elsewhere, renamed = piece.files.paths.copy(), dict(piece.columns)
    elsewhere[0] += "x"
    renamed["class_name"] = ["dog", *piece.columns["class_name"][1:]]
    others = [
        replace(piece, **change)
        for change in (
            {"split": "test"}, {"files": replace(piece.files, root="/")}, {"short_side": 8},
            {"files": replace(piece.files, paths=elsewhere)}, {"columns": renamed},
            {"with_images": False}, {"group_size": 4},
        )
    ]  # fmt: skip
    plans = {other.plan for other in [piece, *others]}
    assert len(plans) == 8
    monkeypatch.setattr(packing, "JPEG_OPTIONS", {"quality": 94})
    assert replace(piece).plan not in plans
    monkeypatch.undo()
    monkeypatch.setattr(packing, "PIECE_FORMAT", packing.PIECE_FORMAT + 1)
    assert replace(piece).plan not in plans


def test_images_of_the_same_names_elsewhere_are_not_confused(splits, tmp_path):
    packed(splits, tmp_path / "out")
    (tmp_path / "images").rename(tmp_path / "others")
    elsewhere = {
        name: Split(ImageFiles(str(tmp_path / "others"), s.images.paths), s.labels, s.source_index)
        for name, s in splits.items()
    }
    before = stamps(tmp_path / "out" / "shards")
    packed(elsewhere, tmp_path / "out")
    after = stamps(tmp_path / "out" / "shards")
    assert all(after[name] != before[name] for name in before)


def test_a_piece_whose_unreadable_images_were_repaired_is_made_anew(splits, tmp_path):
    path = tmp_path / "images" / splits["test"].images.paths[3]
    content = path.read_bytes()
    path.write_bytes(b"")
    before = packed(splits, tmp_path / "out", max_unreadable=0.01)
    assert len(before.index["test"]) == 19
    path.write_bytes(content)
    after = packed(splits, tmp_path / "out")
    assert len(after.index["test"]) == 20
    # Copies of the piece elsewhere are told apart, whose plan is the same.
    changed = {name for name in after.contents if after.contents[name] != before.contents[name]}
    assert after.plans == before.plans
    assert {name.partition("-")[0] for name in changed} == {"test"}
    assert packed(splits, tmp_path / "out").contents == after.contents


def test_storages_leave_nothing_of_each_other(splits, tmp_path):
    packed(splits, tmp_path / "out")
    packed(splits, tmp_path / "out", storage="referenced")
    assert not (tmp_path / "out" / "shards").exists()
    packed(splits, tmp_path / "out")
    assert not (tmp_path / "out" / "pieces").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_stops_it_and_the_next_call_goes_on(splits, tmp_path, workers):
    asked = []

    def stop_signal() -> int | None:
        asked.append(time.monotonic())
        return signal.SIGTERM if any((tmp_path / "out" / "shards").glob("train*")) else None

    message = r"stopped by signal 15 after \d+ of 110 images\. Run the same command again"
    with pytest.raises(InterruptedPacking, match=message) as stop:
        packed(splits, tmp_path / "out", workers, stop_signal=stop_signal)
    assert isinstance(stop.value, Interrupted)  # whose exit code the commands know
    assert stop.value.signal_number == 15
    assert len(asked) > 1
    before = stamps(tmp_path / "out" / "shards")
    assert not [name for name in before if name.startswith(".partial")]
    packed(splits, tmp_path / "out")
    after = stamps(tmp_path / "out" / "shards")
    assert len(after) == 4
    assert {name: after[name] for name in before} == before


def test_after_a_kill_the_workers_end_and_the_next_call_goes_on(photographs, tmp_path):
    for i, content in enumerate(photographs * 10):
        (tmp_path / f"{i}.jpg").write_bytes(content)
    paths = np.array([f"{i}.jpg" for i in range(400)], dtype=object)
    files = ImageFiles(str(tmp_path), paths)
    splits = {
        "train": Split(files, np.arange(400) % 3, np.arange(400)),
        "test": Split(files[np.arange(4)], np.arange(4) % 3, np.arange(4)),
    }
    context = multiprocessing.get_context("fork")
    process = context.Process(target=packed, args=(splits, tmp_path / "out", 2))
    process.start()
    folder = tmp_path / "out" / "shards"
    deadline = time.monotonic() + 60
    while len(list(folder.glob("t*.parquet"))) < 3:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    before = {name: i for name, i in stamps(folder).items() if not name.startswith(".")}
    assert 3 <= len(before) < 41
    packed(splits, tmp_path / "out")
    after = stamps(folder)
    assert len(after) == 41  # nothing half-written stays
    assert {name: after[name] for name in before} == before


def started_workers() -> list[psutil.Process]:
    workers = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                workers.append(child)
    return workers


def test_a_worker_that_is_killed_is_told(splits, tmp_path):
    def kill_a_worker() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if len(workers := started_workers()) == 2:
                time.sleep(0.1)  # until the pool has both
                workers[0].kill()
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    with pytest.raises(ArtifactError, match=r"one of 2 processes that read images was killed"):
        packed(splits, tmp_path / "out", workers=2)
    killer.join()


def test_a_worker_that_is_killed_while_another_is_started_is_told(splits, tmp_path, monkeypatch):
    """The pool then closes the pipes which it is about to give to the other."""

    def after_the_others_death(*arguments):
        for worker in started_workers():
            worker.kill()
            time.sleep(1)  # until the pool has seen it
        return get_preparation_data(*arguments)

    get_preparation_data = spawn.get_preparation_data
    monkeypatch.setattr(spawn, "get_preparation_data", after_the_others_death)
    with pytest.raises(ArtifactError, match=r"one of 2 processes that read images was killed"):
        packed(splits, tmp_path / "out", workers=2)


def test_a_worker_that_cannot_be_started_is_told_with_the_reason(splits, tmp_path, monkeypatch):
    def refuse_the_second(*arguments):
        if started_workers():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return get_preparation_data(*arguments)

    get_preparation_data = spawn.get_preparation_data
    monkeypatch.setattr(spawn, "get_preparation_data", refuse_the_second)
    with pytest.raises(ArtifactError, match=r"could not be started \(Too many open files\)"):
        packed(splits, tmp_path / "out", workers=2)
    assert not multiprocessing.active_children()


def has_ended(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def test_a_worker_that_is_killed_while_it_waits_does_not_make_the_others_wait(splits, tmp_path):
    """It holds the lock of the queue from which the others learn that there is no more to do."""
    root, path = splits["train"].images.root, splits["train"].images.paths[0]
    fifo, out = Path(root, path), tmp_path / "out"
    fifo.unlink()
    os.mkfifo(fifo)

    def kill_the_idle_worker() -> None:
        with fifo.open("wb"):  # returns when a worker opens the other end; nothing is written
            workers = started_workers()
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not list(out.rglob("test-*.parquet")):
                time.sleep(0.01)
            time.sleep(1)  # until its result has arrived, and it waits again
            for worker in workers:
                open_files = Path("/proc", str(worker.pid), "fd").iterdir()
                if str(fifo) not in [os.path.realpath(file) for file in open_files]:
                    worker.kill()
            # Not psutil.wait_procs: who reaps a child keeps multiprocessing from ever knowing.
            while time.monotonic() < deadline and not all(map(has_ended, workers)):
                time.sleep(0.01)

    killer = threading.Thread(target=kill_the_idle_worker, daemon=True)
    killer.start()
    with pytest.raises(ArtifactError, match=r"one of 2 processes that read images was killed"):
        packed(splits, out, workers=2)
    killer.join(60)
    assert not killer.is_alive()
    assert not multiprocessing.active_children()


# ---- other places


def test_a_shared_place_keeps_the_shards_of_every_plan(splits, tmp_path):
    place = str(tmp_path / "place")
    first = packed(splits, tmp_path / "a", shards_dir=place)
    second = packed(splits, tmp_path / "b", shards_dir=place, short_side=8)
    assert Path(first.location).parent == Path(second.location).parent == tmp_path / "place"
    assert first.location != second.location
    before = stamps(Path(first.location))
    assert len(before) == 4
    again = packed(splits, tmp_path / "c", shards_dir=f"file://{place}")
    assert again.location == first.location
    assert stamps(Path(first.location)) == before
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["unreadable.csv"]


def test_in_a_shared_place_only_what_was_abandoned_is_removed(splits, tmp_path):
    found = packed(splits, tmp_path / "a", shards_dir=str(tmp_path / "place"))
    old, new = (Path(found.location, f".partial-{n}-train-00000.parquet") for n in (1, 2))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    packed(splits, tmp_path / "a", shards_dir=str(tmp_path / "place"))
    assert not old.exists()
    assert new.exists()


def test_shards_below_a_url(splits, tmp_path):
    import fsspec

    first = packed(splits, tmp_path / "out", shards_dir="memory://bucket/shards/")
    system = fsspec.filesystem("memory")
    names = [path.rpartition("/")[2] for path in system.ls(first.location, detail=False)]
    assert sorted(names) == sorted(first.rows)
    created = {name: system.created(f"{first.location}/{name}") for name in names}
    second = packed(splits, tmp_path / "out", shards_dir="memory://bucket/shards")
    assert {name: system.created(f"{first.location}/{name}") for name in names} == created
    assert all(second.index[name].equals(first.index[name]) for name in splits)


def test_a_url_that_needs_another_package(splits, tmp_path):
    with pytest.raises(DatasetError, match=r"abfs://bucket/.* package"):
        packed(splits, tmp_path / "out", shards_dir="abfs://bucket/shards")


def test_images_below_a_url(splits, tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    system.put(str(tmp_path / "images"), "/photographs", recursive=True)
    there = {
        name: Split(ImageFiles("memory://photographs", s.images.paths), s.labels, s.source_index)
        for name, s in splits.items()
    }
    expected = packed(splits, tmp_path / "here")
    found = packed(there, tmp_path / "there")
    assert all(found.index[name].equals(expected.index[name]) for name in splits)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(splits, full_disk, workers):
    with pytest.raises(ArtifactError, match=r"cannot write .*t.*-0.*parquet: the disk is full"):
        packed(splits, full_disk / "out", workers)
    assert not list(full_disk.glob("*/shards/.partial*"))


def test_a_place_that_is_a_file(splits, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot write .*: a part of the path is a file"):
        packed(splits, tmp_path / "file")


def test_progress_is_a_line_now_and_then(splits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(packing, "SECONDS_BETWEEN_LINES", 0.0)
    packed(splits, tmp_path / "out")
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("32 of 110 images read  left ")
    assert last == "110 of 110 images read  left 0 s"


def test_there_is_at_least_one_worker_and_none_too_many():
    assert 1 <= available_workers() <= (os.cpu_count() or 1)

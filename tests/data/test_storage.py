import multiprocessing
import pickle
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shike_core.config import SubsetConfig
from shike_core.data import pack as packing
from shike_core.data.listed import ImageFiles, absolute, is_remote
from shike_core.data.pack import pack
from shike_core.data.split import Split
from shike_core.data.storage import (
    WINDOW,
    PackedImages,
    ReferencedImages,
)
from shike_core.errors import DatasetError


@pytest.fixture
def contents(digits, tmp_path) -> list[bytes]:
    """A hundred real digits as files of their own."""
    found = []
    for i, image in enumerate(digits.train.images[:100]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        found.append((tmp_path / f"{i}.png").read_bytes())
    assert len(set(found)) > 95
    return found


@pytest.fixture
def packed(contents, tmp_path, monkeypatch) -> PackedImages:
    """These digits in four shards."""
    monkeypatch.setattr(packing, "_power_of_two", lambda number: min(32, int(number)))
    files = ImageFiles(str(tmp_path), np.array([f"{i}.png" for i in range(100)], dtype=object))
    split = Split(files, np.arange(100) % 2, np.arange(100))
    rule = SubsetConfig(dataset="image_folder", shard_mib=1)
    found = pack({"train": split}, ("a", "b"), rule, tmp_path / "subset", workers=1)
    return PackedImages(
        found.location,
        tuple(found.rows),
        tuple(found.plans.values()),
        found.group_size,
        found.index["train"]["shard"].to_numpy(),
        found.index["train"]["row"].to_numpy(),
    )


@pytest.fixture
def referenced(contents, tmp_path) -> ReferencedImages:
    paths = pa.array([f"{i}.png" for i in range(100)])
    return ReferencedImages(str(tmp_path), paths, np.array([len(c) for c in contents]))


@pytest.fixture(params=["packed", "referenced"])
def images(request):
    return request.getfixturevalue(request.param)


def test_images_come_in_the_order_asked_and_as_often(images, contents):
    assert len(images) == 100
    rows = np.random.default_rng(0).integers(100, size=300)
    assert images.read(rows) == [contents[row] for row in rows]
    assert images.read([5]) == [contents[5]]
    assert images.read([]) == []


def test_images_at_some_positions(images, contents):
    some = images[np.array([7, 3, 99])]
    assert len(some) == 3
    assert some.read([2, 0]) == [contents[99], contents[7]]


def test_other_processes_and_threads_read_the_same(images, contents):
    images.read([0])  # opened here already
    rows = list(range(0, 100, 9))
    expected = [[contents[row]] for row in rows]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(images.read, [[row] for row in rows])) == expected
    for method in ("fork", "spawn"):
        with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
            assert list(pool.map(images.read, [[row] for row in rows])) == expected


def test_sending_a_million_images_costs_a_few_bytes_for_each():
    n = 1_000_000
    packed = PackedImages(
        "/x", ("a",), ("b",), 8, np.zeros(n, np.int32), np.arange(n, dtype=np.int32)
    )
    assert len(pickle.dumps(packed)) < 8 * n + 1000
    paths = pa.array(np.char.add("train/", np.arange(n).astype(str)))
    assert len(pickle.dumps(ReferencedImages("/x", paths, np.arange(n)))) < 30 * n


# ---- the order of an epoch


def ten_shards(n: int = 20_000) -> PackedImages:
    """Every second of 4,000 rows in each of ten shards, listed in another order."""
    place = np.random.default_rng(1).permutation(2 * n)[:n].astype(np.int32)
    names = tuple(map(str, range(10)))
    return PackedImages("/x", names, names, 8, place // 4000, place % 4000)


@pytest.mark.parametrize("make", [ten_shards, lambda: ReferencedImages("/x", None, np.arange(99))])
def test_an_order_has_every_row_once_and_the_generator_alone_decides(make):
    images = make()
    orders = [images.order(np.random.default_rng(seed)) for seed in (0, 0, 1)]
    for order in orders:
        assert order.dtype == np.int64
        assert sorted(order) == list(range(len(images)))
    assert (orders[0] == orders[1]).all()
    assert (orders[0] != orders[2]).mean() > 0.9


def test_an_order_of_packed_images_reads_every_row_group_about_once():
    images = ten_shards()
    order = images.order(np.random.default_rng(0))
    shard, group = images.shard[order], images.row[order] // 8
    windows = [slice(i, i + WINDOW) for i in range(0, len(order), WINDOW)]
    reads = sum(len(set(zip(shard[w], group[w], strict=True))) for w in windows)
    assert reads <= 5000 + len(windows)
    assert max(len(set(shard[w])) for w in windows) <= 4  # 2,000 images each


def test_an_order_of_packed_images_mixes_within_a_window():
    images = ten_shards()
    order = images.order(np.random.default_rng(0))
    batches = images.shard[order[:WINDOW]].reshape(-1, 256)
    assert all(len(set(batch)) > 1 for batch in batches)
    group = images.shard[order] * 1000 + images.row[order] // 8
    assert (np.diff(group) == 0).mean() < 0.02


def test_an_order_draws_shards_and_row_groups():
    images = ten_shards()
    first = [images.shard[images.order(np.random.default_rng(seed))[0]] for seed in range(40)]
    assert len(set(first)) > 5


def test_an_order_of_no_images():
    empty = np.zeros(0, np.int32)
    assert (
        len(PackedImages("/x", ("a",), ("",), 8, empty, empty).order(np.random.default_rng(0))) == 0
    )


# ---- what is wrong


def test_a_damaged_shard_is_told_with_its_row_and_the_rest_can_be_read(packed, contents):
    path = Path(packed.location, packed.names[1])
    stored = path.read_bytes()
    victim = int(np.flatnonzero((packed.shard == 1) & (packed.row == 17))[0])
    place = stored.index(contents[victim][20:60])
    path.write_bytes(stored[:place] + b"\x00" * 9 + stored[place + 9 :])
    with pytest.raises(
        DatasetError, match=r"row 17 of .*train-00001\.parquet cannot be .*CRC.*; del"
    ):
        packed.read([victim])
    others = [i for i in range(100) if (packed.shard[i], packed.row[i] // 8) != (1, 17 // 8)]
    assert packed.read(others) == [contents[i] for i in others]


@pytest.mark.parametrize("damage", ["missing", "cut off", "no table", "fewer rows"])
def test_a_shard_that_is_not_what_it_was(packed, damage):
    path = Path(packed.location, packed.names[2])
    if damage == "missing":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "no table":
        path.write_text("x")
    else:
        pq.write_table(pq.read_table(path).slice(0, 3), path)
    row = int(np.flatnonzero((packed.shard == 2) & (packed.row == 3))[0])
    with pytest.raises(DatasetError, match=r"row 3 of .*train-00002\.parquet cannot be read"):
        packed.read([0, row])


def test_a_referenced_file_that_is_gone_or_changed(referenced, tmp_path):
    (tmp_path / "3.png").unlink()
    with pytest.raises(DatasetError, match=r"/3\.png cannot be read \(.*No such file.*put it back"):
        referenced.read([2, 3])
    (tmp_path / "3.png").write_bytes(b"x")
    size = referenced.sizes[3]
    with pytest.raises(DatasetError, match=rf"/3\.png has 1 bytes, but had {size} when"):
        referenced.read([3])


# ---- other places


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the directory by HTTP; gives the address and the list of what was fetched."""
    fetched = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            fetched.append(self.path)
            super().do_GET()

        def log_message(self, *args) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield f"http://127.0.0.1:{served.server_port}", fetched
    served.shutdown()
    served.server_close()
    thread.join()


def read_there(images: PackedImages, directory: Path, rows: list[int]) -> list[bytes]:
    """In another process."""
    tempfile.tempdir = str(directory)
    return images.read(rows)


def test_a_shard_from_a_server_is_fetched_once_for_all_processes(
    packed, contents, server, tmp_path
):
    address, fetched = server
    there = replace(packed, location=f"{address}/subset/shards")
    ask = partial(read_there, there, tmp_path)
    rows = [list(range(i, 100, 4)) for i in range(4)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for asked, found in zip(rows, pool.map(ask, rows), strict=True):
            assert found == [contents[row] for row in asked]
    assert there.read([1, 2]) == contents[1:3]
    assert sorted(fetched) == [f"/subset/shards/{name}" for name in packed.names]


def test_a_shard_that_a_server_does_not_have(packed, server):
    address, _ = server
    there = replace(packed, location=f"{address}/nowhere")
    with pytest.raises(
        DatasetError, match=r"nowhere/train-0000\d\.parquet cannot be fetched to .*; check"
    ):
        there.read([0])


def test_a_rebuilt_shard_is_fetched_again(packed, contents, server):
    address, fetched = server
    there = replace(packed, location=f"{address}/subset/shards")
    assert there.read([0]) == contents[:1]
    rebuilt = replace(there, plans=("other",) * len(there.plans))
    assert rebuilt.read([0]) == contents[:1]
    assert len(fetched) == 2


def test_where_something_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("a/b/") == absolute(f"file://{tmp_path}/a/b") == f"{tmp_path}/a/b"
    assert absolute("s3://bucket/a/") == "s3://bucket/a"
    assert is_remote("s3://bucket")
    assert not is_remote("/a/b")

import hashlib
import io
import pickle
import sys
import tarfile
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from shike_core.config import Dataset
from shike_core.data.sources import (
    CIFAR100_FILES,
    CifarFiles,
    load_source,
    where_images_come_from,
)
from shike_core.errors import DatasetError


def pickled(content: object) -> bytes:
    return pickle.dumps(content, protocol=2)


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def batch(labels: list[int], seed: int) -> dict[bytes, object]:
    data = np.random.default_rng(seed).integers(256, size=(len(labels), 3072), dtype=np.uint8)
    return {b"batch_label": b"a batch", b"labels": labels, b"data": data}


BATCHES = {"data_batch_1": batch([2, 0, 1], 1), "data_batch_2": batch([0, 1], 2)}
TEST_BATCH = batch([1, 2, 0], 3)
CONTENTS = {
    **{name: pickled(content) for name, content in BATCHES.items()},
    "test_batch": pickled(TEST_BATCH),
    "batches.meta": pickled({b"label_names": [b"cat", b"dog", b"\xc3\xa2ne"]}),
}


def cifar_files(contents: dict[str, bytes]) -> CifarFiles:
    return CifarFiles(
        folder="tiny-batches-py",
        url="http://127.0.0.1:9/tiny-python.tar.gz",
        archive_md5="0" * 32,
        train=("data_batch_1", "data_batch_2"),
        test=("test_batch",),
        meta="batches.meta",
        label_key=b"labels",
        names_key=b"label_names",
        md5={name: md5(content) for name, content in contents.items()},
    )


FILES = cifar_files(CONTENTS)


def write_folder(directory: Path, contents: dict[str, bytes] = CONTENTS) -> Path:
    folder = directory / FILES.folder
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(path: Path) -> Path:
    with tarfile.open(path, "w:" + path.suffix.removeprefix(".").replace("tar", "")) as tar:
        for name, content in CONTENTS.items():
            member = tarfile.TarInfo(f"{FILES.folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def assert_is_tiny_cifar(source) -> None:
    assert source.class_names == ("cat", "dog", "âne")
    assert source.train.labels.tolist() == [2, 0, 1, 0, 1]
    assert source.test.labels.tolist() == [1, 2, 0]
    assert source.train.source_index.tolist() == [0, 1, 2, 3, 4]
    assert source.train.images.shape == (5, 32, 32, 3)
    assert source.train.images.dtype == np.uint8
    row = BATCHES["data_batch_2"][b"data"][0]  # the red plane, then green, then blue, row by row
    assert source.train.images[3, 7, 30].tolist() == [row[c * 1024 + 7 * 32 + 30] for c in range(3)]


def test_cifar_from_its_folder_or_the_one_above(tmp_path):
    folder = write_folder(tmp_path)
    for data_dir in (folder, tmp_path):
        assert_is_tiny_cifar(load_source("cifar10", data_dir, files=FILES))


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.xz", "tar"])
def test_cifar_from_its_archive(tmp_path, suffix):
    archive = write_archive(tmp_path / f"tiny-python.{suffix}")
    assert_is_tiny_cifar(load_source("cifar10", tmp_path, files=FILES))
    assert list(tmp_path.iterdir()) == [archive]


def test_pickles_with_the_name_that_numpy_had_before(tmp_path):
    renamed = {
        name: content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
        for name, content in CONTENTS.items()
    }
    write_folder(tmp_path, renamed)
    assert_is_tiny_cifar(load_source("cifar10", tmp_path, files=cifar_files(renamed)))


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Codec:
    def __reduce__(self):
        import codecs

        return codecs.encode, ("text", "rot13")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickled({b"data": Codec(), b"labels": []}), r"the codec 'rot13' is not allowed"),
        (pickled(getattr), r"getattr is not allowed"),
        (pickled(["no", "dictionary"]), "holds a list, expected a dictionary"),
        (b"no pickle at all", "data_batch_1 is refused"),
        (CONTENTS["data_batch_1"][:100], "data_batch_1 is refused"),
        (pickled({b"labels": [0]}), "no uint8 array of rows of 3072 values"),
        (pickled(batch([0], 1) | {b"data": np.zeros((1, 3072))}), "no uint8 array"),
        (pickled(batch([0], 1) | {b"data": np.zeros((1, 10), np.uint8)}), "no uint8 array"),
        (pickled(batch([0, 3], 1)), r"no list of 2 labels in 0\.\.2"),
        (pickled(batch([0, -1], 1)), r"no list of 2 labels in 0\.\.2"),
        (pickled(batch([0], 1) | {b"labels": [0, 1]}), r"no list of 1 labels"),
    ],
)
def test_a_file_of_another_content_is_refused(tmp_path, content, message):
    contents = CONTENTS | {"data_batch_1": content}
    write_folder(tmp_path, contents)
    with pytest.raises(DatasetError, match=message):
        load_source("cifar10", tmp_path, files=cifar_files(contents))


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path):
    content = pickled({b"data": Evil(tmp_path / "executed"), b"labels": []})
    contents = CONTENTS | {"data_batch_1": content}
    write_folder(tmp_path, contents)
    with pytest.raises(DatasetError, match=r"data_batch_1 is refused .*not allowed"):
        load_source("cifar10", tmp_path, files=cifar_files(contents))
    assert not (tmp_path / "executed").exists()
    pickle.loads(content)
    assert (tmp_path / "executed").exists()  # so it was malicious indeed


@pytest.mark.parametrize("meta", [{}, {b"label_names": [1, 2, 3]}, {b"label_names": [b"\xff"]}])
def test_class_names_are_needed(tmp_path, meta):
    contents = CONTENTS | {"batches.meta": pickled(meta)}
    write_folder(tmp_path, contents)
    with pytest.raises(DatasetError, match=r"batches\.meta holds no list of class names"):
        load_source("cifar10", tmp_path, files=cifar_files(contents))


def test_a_missing_file_is_named(tmp_path):
    (write_folder(tmp_path) / "test_batch").unlink()
    with pytest.raises(DatasetError, match=r"has no file test_batch; all of .* are needed"):
        load_source("cifar10", tmp_path, files=FILES)


def test_a_truncated_file_is_told_with_both_checksums_and_its_size(tmp_path):
    path = write_folder(tmp_path) / "data_batch_2"
    path.write_bytes(path.read_bytes()[:1000])
    expected = md5(CONTENTS["data_batch_2"])
    with pytest.raises(DatasetError, match=rf"data_batch_2 .*\(1000 bytes\), expected {expected}"):
        load_source("cifar10", tmp_path, files=FILES)


def test_the_official_checksums_are_compared(tmp_path):
    folder = tmp_path / CIFAR100_FILES.folder
    folder.mkdir()
    for name in CIFAR100_FILES.md5:
        (folder / name).write_bytes(b"x")
    with pytest.raises(DatasetError, match="expected 16019d7e3df5f24257cddd939b257f8d"):
        load_source("cifar100", tmp_path)


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.xz"])
def test_a_truncated_archive(tmp_path, suffix):
    path = write_archive(tmp_path / f"tiny-python.{suffix}")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DatasetError, match=r"cannot read .*; if it is truncated, delete it"):
        load_source("cifar10", tmp_path, files=FILES)


def test_an_archive_without_a_file(tmp_path):
    with tarfile.open(tmp_path / "tiny-python.tar", "w"):
        pass
    with pytest.raises(DatasetError, match="has no file data_batch_1"):
        load_source("cifar10", tmp_path, files=FILES)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def served(tmp_path):
    """The tiny archive on a web server."""
    directory = tmp_path / "served"
    directory.mkdir()
    archive = write_archive(directory / "tiny-python.tar.gz")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(directory)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/tiny-python.tar.gz"
    yield replace(FILES, url=url, archive_md5=md5(archive.read_bytes()))
    server.shutdown()
    thread.join()
    server.server_close()


def test_cifar_is_downloaded_into_data_dir_once(tmp_path, served):
    data_dir = tmp_path / "data"
    assert_is_tiny_cifar(load_source("cifar10", data_dir, files=served))
    assert (data_dir / "tiny-python.tar.gz").is_file()
    assert_is_tiny_cifar(load_source("cifar10", data_dir, files=FILES))  # no server at its address


def test_without_data_dir_cifar_is_downloaded_into_the_users_cache(tmp_path, served, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_is_tiny_cifar(load_source("cifar10", files=served))
    assert len(list(tmp_path.rglob("shike/tiny-python.tar.gz"))) == 1


def test_a_download_with_another_checksum_is_refused(tmp_path, served):
    with pytest.raises(DatasetError, match=r"downloading it failed .*hash.* by hand and"):
        load_source("cifar10", tmp_path, files=replace(served, archive_md5="0" * 32))
    assert not (tmp_path / "tiny-python.tar.gz").exists()


def test_a_download_that_fails(tmp_path):
    with pytest.raises(DatasetError, match=r"has neither tiny-batches-py nor tiny-python\.tar\.gz"):
        load_source("cifar10", tmp_path, files=FILES)


def test_without_pooch_the_message_tells_what_to_download(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(DatasetError, match=r"install pooch, or download http.* by hand"):
        load_source("cifar10", tmp_path, files=FILES)


def test_an_unknown_dataset():
    with pytest.raises(ValueError, match="unknown dataset 'mnist'; choose one of digits, cifar10"):
        load_source("mnist")


@pytest.mark.parametrize("look", [load_source, where_images_come_from])
def test_cifar_is_not_read_from_a_url(look):
    with pytest.raises(
        DatasetError, match=r"cifar10 is read from a folder, but data_dir is s3://b"
    ):
        look("cifar10", "s3://bucket/cifar")


def test_a_folder_may_be_given_as_text(tmp_path):
    write_folder(tmp_path)
    assert_is_tiny_cifar(load_source("cifar10", str(tmp_path), files=FILES))


def test_images_in_files_are_a_source_as_well(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").touch()
    source = load_source("image_folder", tmp_path)
    assert source.train.images.paths.tolist() == ["a/1.jpg", "b/1.jpg"]
    found = where_images_come_from("image_folder", str(tmp_path))
    assert found == f"image_folder in {tmp_path}: a, b"


def test_every_dataset_of_the_configuration_is_a_source():
    for dataset in set(get_args(Dataset)) - {"digits", "cifar10", "cifar100"}:
        with pytest.raises(DatasetError, match=f"{dataset} is not downloaded; name the .* as data"):
            load_source(dataset)


def test_the_last_fifty_digits_of_each_class_are_the_test_set(digits):
    assert digits.train.images.shape == (1297, 8, 8, 3)
    assert np.bincount(digits.test.labels).tolist() == [50] * 10
    everything = np.concatenate([digits.train.source_index, digits.test.source_index])
    assert np.sort(everything).tolist() == list(range(1797))
    for label in range(10):
        last_train = digits.train.source_index[digits.train.labels == label].max()
        assert (digits.test.source_index[digits.test.labels == label] > last_train).all()


def test_digits_are_scaled_to_the_full_range_and_grey(digits):
    from sklearn.datasets import load_digits

    original = load_digits().images[digits.train.source_index]
    grey = digits.train.images[..., 0]
    for value, scaled in ((0, 0), (1, 16), (8, 128), (15, 239), (16, 255)):
        assert np.unique(grey[original == value]).tolist() == [scaled]
    assert (digits.train.images == grey[..., np.newaxis]).all()


def test_the_statistics_of_the_digits_are_those_of_the_training_pool(digits):
    pixels = digits.train.images.astype(np.float64) / 255
    assert digits.mean == pytest.approx(pixels.mean(axis=(0, 1, 2)), abs=5e-5)
    assert digits.std == pytest.approx(pixels.std(axis=(0, 1, 2)), abs=5e-5)


def test_the_real_cifar100(cifar100):
    assert cifar100.train.images.shape == (50000, 32, 32, 3)
    assert np.bincount(cifar100.train.labels).tolist() == [500] * 100
    assert np.bincount(cifar100.test.labels).tolist() == [100] * 100
    assert cifar100.class_names[0] == "apple"
    assert cifar100.class_names[99] == "worm"
    mean = (cifar100.train.images / np.float32(255)).mean(axis=(0, 1, 2), dtype=np.float64)
    assert mean == pytest.approx([0.5071, 0.4865, 0.4409], abs=1e-4)  # as published

import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from shike_core.config import SubsetConfig
from shike_core.data.listed import (
    LISTS,
    ImageFiles,
    PublishedLists,
    find_listed,
    load_listed,
    read_lists,
    shown,
)
from shike_core.data.long_tail import cut
from shike_core.data.sources import Source, Split
from shike_core.errors import DatasetError

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


def touch(root: Path, paths: list[str]) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def files_of(*paths: str, root: str) -> ImageFiles:
    return ImageFiles(root, np.array(paths, dtype=object))


def contents(split: Split) -> list[tuple[str, int]]:
    return list(zip(split.images.paths.tolist(), split.labels.tolist(), strict=True))


@pytest.fixture
def memory(tmp_path) -> Iterator[str]:
    """URL of a folder in memory, which is like one on a server to fsspec."""
    yield "memory://bucket/images"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def upload(root: Path, url: str) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            with fsspec.open(f"{url}/{path.relative_to(root).as_posix()}", "wb") as file:
                file.write(path.read_bytes())


# Images in files


def test_files_are_read_from_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.jpg").write_bytes(b"one")
    (tmp_path / "c.jpg").write_bytes(b"two")
    files = files_of("a/b.jpg", "c.jpg", "d.jpg", root=str(tmp_path))
    assert len(files) == 3
    assert [files.read(0), files.read(1)] == [b"one", b"two"]
    with pytest.raises(FileNotFoundError, match=r"d\.jpg"):
        files.read(2)
    with pytest.raises(IsADirectoryError):
        files_of("a", root=str(tmp_path)).read(0)


def test_files_are_read_from_a_url(memory, tmp_path):
    touch(tmp_path, ["a/b.jpg"])
    (tmp_path / "a/b.jpg").write_bytes(b"one")
    upload(tmp_path, memory)
    files = files_of("a/b.jpg", "d.jpg", root=memory)
    assert files.read(0) == b"one"
    with pytest.raises(FileNotFoundError):
        files.read(1)


def test_some_of_the_files_in_another_order_and_elsewhere():
    files = files_of("a.jpg", "b.jpg", "c.jpg", root="/images")
    some = pickle.loads(pickle.dumps(files[np.array([2, 0])]))
    assert some.root == "/images"
    assert some.paths.tolist() == ["c.jpg", "a.jpg"]


class FailingFileSystem(MemoryFileSystem):
    protocol = "failing"

    def cat_file(self, *args: object, **options: object) -> bytes:
        raise RuntimeError("no credentials")


def test_errors_of_a_server_are_told_as_such():
    fsspec.register_implementation("failing", FailingFileSystem, clobber=True)
    message = r"^failing://x/a\.jpg cannot be read \(RuntimeError: no credentials\); check the ser"
    with pytest.raises(DatasetError, match=message):
        files_of("a.jpg", root="failing://x").read(0)


def test_the_package_for_a_url_is_named(monkeypatch):
    # Nothing here installs what reads this one.
    with pytest.raises(DatasetError, match=r"abfs://x cannot be read .*install the package"):
        files_of("a.jpg", root="abfs://x").read(0)
    with pytest.raises(DatasetError, match=r"sea://x cannot be read .*known: sea"):
        files_of("a.jpg", root="sea://x").read(0)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(DatasetError, match=r"install the package .*fsspec"):
        files_of("a.jpg", root="memory://x").read(0)


# Published lists

TINY = PublishedLists(
    files={"train": ("tiny_train.txt", 6), "validation": ("tiny_val.txt", 3), "test": ("t.txt", 3)},
    num_classes=3,
    largest=3,
    smallest=1,
    layout="train/ and val/",
    folder="Tiny",
)
TINY_LISTS = {
    "tiny_train.txt": "train/n1/a.jpg 0\ntrain/n1/b.jpg 0\ntrain/n3/c.jpg 2\n"
    "train/n1/d.jpg 0\ntrain/n2/e.jpg 1\ntrain/n3/f.jpg 2\n",
    "tiny_val.txt": "train/n2/v.jpg 1\ntrain/n1/v.jpg 0\ntrain/n3/v.jpg 2\n",
    "t.txt": "val/n1/t.jpg 0\nval/n2/t.jpg 1\nval/n3/t.jpg 2\n",
}


@pytest.fixture
def tiny(monkeypatch, tmp_path) -> Path:
    """Lists of twelve images in a folder that has them, in place of those of ImageNet-LT."""
    monkeypatch.setitem(LISTS, "imagenet_lt", TINY)
    for name, text in TINY_LISTS.items():
        (tmp_path / name).write_text(text)
        touch(tmp_path, [line.split()[0] for line in text.splitlines()])
    return tmp_path


def assert_is_tiny(source: Source, root: str) -> None:
    assert source.class_names == ("n1", "n2", "n3")
    assert contents(source.train) == [
        ("train/n1/a.jpg", 0),
        ("train/n1/b.jpg", 0),
        ("train/n3/c.jpg", 2),
        ("train/n1/d.jpg", 0),
        ("train/n2/e.jpg", 1),
        ("train/n3/f.jpg", 2),
    ]
    assert source.validation.labels.tolist() == [1, 0, 2]
    assert contents(source.test)[1] == ("val/n2/t.jpg", 1)
    for split in (source.train, source.validation, source.test):
        assert split.source_index.tolist() == list(range(len(split.labels)))
        assert split.images.root == root
    assert source.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("folder", [".", "splits"])
def test_lists_beside_the_images_or_in_a_folder_of_their_own(tiny, folder):
    (tiny / folder).mkdir(exist_ok=True)
    for name in TINY_LISTS:
        (tiny / name).rename(tiny / folder / name)
    assert_is_tiny(load_listed("imagenet_lt", tiny), str(tiny))
    for data_dir in (f"{tiny}/", f"file://{tiny}"):
        assert_is_tiny(load_listed("imagenet_lt", data_dir), str(tiny))


def test_a_folder_is_known_from_everywhere(tiny, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    assert_is_tiny(load_listed("imagenet_lt", tiny.name), str(tiny))


def test_lists_and_images_behind_a_url(tiny, memory):
    upload(tiny, memory)
    assert_is_tiny(load_listed("imagenet_lt", f"{memory}/"), memory)
    assert "6 + 3 + 3 images of 3 classes" in find_listed("imagenet_lt", memory)
    fsspec.filesystem("memory").rm("/bucket/images/train/n3/c.jpg")
    with pytest.raises(DatasetError, match=r"1 of 12 images .* memory://.*: train/n3/c\.jpg;"):
        load_listed("imagenet_lt", memory)


def test_lists_written_by_other_systems(tiny):
    text = TINY_LISTS["tiny_train.txt"]
    for written in (text.replace("\n", "\r\n"), text.replace(" ", "\t"), text.strip(), text + "\n"):
        (tiny / "tiny_train.txt").write_bytes(written.encode())
        assert_is_tiny(load_listed("imagenet_lt", tiny), str(tiny))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("train/n3/c.jpg 2", "train/n3/c.jpg", r"line 3 of tiny_train\.txt in .* is 'train/n3/c"),
        ("train/n3/c.jpg 2", "train/n3/c.jpg two", r"'train/n3/c\.jpg two', expected a path and a"),
        ("train/n3/c.jpg 2", "train/n3/c.jpg -2", r"'train/n3/c\.jpg -2', expected .*\(1 such"),
        ("train/n3/c.jpg 2", "", r"line 3 of tiny_train\.txt in .* is ''"),
        ("train/n3/c.jpg 2\n", "", r"tiny_train\.txt in .* has 5 images, the published one 6; tak"),
        ("train/n3/c.jpg 2", "train/n3/c.jpg 3", r"has the label 3, the published one has 0\.\.2"),
        ("train/n3/c.jpg 2", "train/n3/c.jpg 999999999", r"has the label 999999999"),
        ("train/n2/e.jpg 1", "train/n1/e.jpg 0", r"no images of 1 classes, such as 1"),
        ("train/n1/b.jpg 0", "train/n2/b.jpg 1", r"classes of 2 to 2 images, the .* of 3 to 1"),
        ("train/n3/c.jpg 2", "/train/n3/c.jpg 2", r"line 3 of .*the path '/train/n3/c\.jpg'"),
        ("train/n3/c.jpg 2", "train/../n3/c.jpg 2", r"path 'train/\.\./n3/c\.jpg' \(1 such\)"),
        ("train/n3/c.jpg 2", "../c.jpg 2", r"paths must be relative"),
        ("train/n3/c.jpg 2", "train/n3//c.jpg 2", r"paths must be relative"),
        ("train/n3/c.jpg 2", "train/n3/f.jpg 2", r"1 images more than once: train/n3/f\.jpg"),
        ("train/n3/c.jpg 2", "train/n3/v.jpg 2", r"1 images more than once: train/n3/v\.jpg"),
        ("train/n3/c.jpg 2", "train/n4/c.jpg 2", r"label 2 has more than one name: n4, n3 \(1"),
        ("train/n2/e.jpg 1", "train/n1/e.jpg 1", r"label 1 has more than one name: n1, n2"),
    ],
)
def test_a_list_that_is_not_the_published_one(tiny, before, after, message):
    changed = TINY_LISTS["tiny_train.txt"].replace(before, after, 1)
    (tiny / "tiny_train.txt").write_text(changed)
    with pytest.raises(DatasetError, match=message):
        load_listed("imagenet_lt", tiny)


def test_two_labels_of_one_folder(tiny):
    for name, text in TINY_LISTS.items():
        (tiny / name).write_text(text.replace("/n3/", "/n2/more_"))
    with pytest.raises(DatasetError, match=r"name n2 has more than one label: (1, 2|2, 1)"):
        load_listed("imagenet_lt", tiny)


def test_lists_that_are_no_lists_or_not_there(tiny):
    (tiny / "tiny_val.txt").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(DatasetError, match=r"tiny_val\.txt in .* is no list of paths .*codec"):
        load_listed("imagenet_lt", tiny)
    (tiny / "tiny_val.txt").unlink()
    with pytest.raises(DatasetError, match=r"neither tiny_val\.txt nor splits/tiny_val\.txt; take"):
        load_listed("imagenet_lt", tiny)
    (tiny / "t.txt").write_text("")
    shutil.copy(tiny / "tiny_train.txt", tiny / "tiny_val.txt")
    with pytest.raises(
        DatasetError, match=r"tiny_val\.txt in .* has 6 images, the published one 3"
    ):
        load_listed("imagenet_lt", tiny)
    with pytest.raises(DatasetError, match=r"has neither tiny_train\.txt nor"):
        load_listed("imagenet_lt", tiny / "elsewhere")
    with pytest.raises(DatasetError, match=r"t\.txt cannot be read .*check data_dir"):
        load_listed("imagenet_lt", tiny / "t.txt")
    with pytest.raises(DatasetError, match=r"imagenet_lt is not downloaded; name the folder of"):
        load_listed("imagenet_lt", None)


def test_images_that_are_not_there_are_told_together(tiny):
    shutil.rmtree(tiny / "val" / "n2")
    (tiny / "train/n1/b.jpg").unlink()
    (tiny / "train/n1/b.jpg").mkdir()
    (tiny / "train/n3/c.jpg").unlink()
    (tiny / "train/n3/c.jpg").symlink_to(tiny / "nowhere")
    message = (
        r"3 of 12 images are not in .*: train/n1/b\.jpg, train/n3/c\.jpg, val/n2/t\.jpg; "
        r"it must hold train/ and val/"
    )
    with pytest.raises(DatasetError, match=message):
        load_listed("imagenet_lt", tiny)
    (tiny / "train/n3/c.jpg").unlink()
    (tiny / "train/n3/c.jpg").symlink_to(tiny / "train/n3/f.jpg")
    with pytest.raises(DatasetError, match="2 of 12 images"):
        load_listed("imagenet_lt", tiny)


def test_of_many_texts_the_first_are_shown():
    assert shown([str(i) for i in range(3)]) == "0, 1, 2"
    assert shown([str(i) for i in range(20)]).endswith(", 18, 19")
    assert shown([str(i) for i in range(2000)]).endswith(", 18, 19 and 1,980 more")


def test_where_lists_find_their_images(tiny):
    found = find_listed("imagenet_lt", tiny)
    assert found == f"imagenet_lt in {tiny}: 6 + 3 + 3 images of 3 classes"
    (tiny / "train/n1/b.jpg").unlink()
    assert find_listed("imagenet_lt", tiny) == found  # it looks for the first of each split only
    (tiny / "val/n1/t.jpg").unlink()
    with pytest.raises(DatasetError, match=r"1 of 3 images are not in .*: val/n1/t\.jpg"):
        find_listed("imagenet_lt", tiny)


@pytest.fixture
def published(tmp_path) -> Path:
    """The published lists, as far as they are here."""
    if not (lists := SHARED_DATA / "splits").is_dir():
        pytest.skip("the published lists are not in ../shared")
    (tmp_path / "splits").symlink_to(lists)
    return tmp_path


def test_the_published_lists_of_places(published):
    source = read_lists("places_lt", str(published))
    counts = np.bincount(source.train.labels)
    assert [len(s.labels) for s in (source.train, source.validation, source.test)] == [
        62_500,
        7_300,
        36_500,
    ]
    assert (len(counts), counts.max(), counts.min()) == (365, 4980, 5)
    assert np.bincount(source.validation.labels).tolist() == [20] * 365
    assert np.bincount(source.test.labels).tolist() == [100] * 365
    assert (source.class_names[0], source.class_names[364]) == ("airfield", "zen_garden")
    lines = (published / "splits" / "Places_LT_train.txt").read_text().splitlines()
    assert [f"{path} {label}" for path, label in contents(source.train)] == lines


def test_a_subset_of_places_has_the_published_classes(published):
    source = read_lists("places_lt", str(published))
    splits, found, _ = cut(source, SubsetConfig(dataset="places_lt", imbalance_factor=0))
    assert found is None
    assert {name: len(split.labels) for name, split in splits.items()} == {
        "train": 62_500,
        "test": 36_500,
        "validation": 7_300,
    }
    with pytest.raises(DatasetError, match=r"have 5 to 4980 images already: imbalance_factor=0"):
        cut(source, SubsetConfig(dataset="places_lt"))


def test_places_are_looked_for(published):
    with pytest.raises(DatasetError, match=r"3 of 3 images .*: train/airfield/.*of Places365"):
        find_listed("places_lt", published)
    touch(published, ["train/airfield/00004851.jpg", "train/airfield/00002049.jpg"])
    touch(published, ["val/airfield/Places365_val_00003597.jpg"])
    assert "62,500 + 7,300 + 36,500 images of 365 classes" in find_listed("places_lt", published)
    with pytest.raises(DatasetError, match=r"106,297 of 106,300 images .* and 106,277 more; it mu"):
        load_listed("places_lt", published)


@pytest.mark.parametrize("dataset", ["imagenet_lt", "inaturalist2018"])
def test_published_lists_with_a_made_up_train_list_of_the_published_figures(published, dataset):
    """Of these the train lists are not here: folders are taken from the test list."""
    figures = LISTS[dataset]
    lines = (published / "splits" / figures.files["test"][0]).read_text().splitlines()
    folder = {int(line.split()[1]): line.split("/", 1)[1].rpartition("/")[0] for line in lines}
    name, size = figures.files["train"]
    counts = np.full(figures.num_classes, figures.smallest)
    room = figures.largest - figures.smallest
    full, rest = divmod(size - counts.sum(), room)
    counts[:full] += room
    counts[full] += rest
    labels = np.repeat(np.arange(figures.num_classes), counts)
    text = "".join(f"made_up/{folder[k]}/{i}.jpg {k}\n" for i, k in enumerate(labels.tolist()))
    (published / name).write_text(text)
    source = read_lists(dataset, str(published))
    assert len(source.train.labels) == size
    assert len(source.test.labels) == {"imagenet_lt": 50_000, "inaturalist2018": 24_426}[dataset]
    if dataset == "imagenet_lt":
        assert len(source.validation.labels) == 20_000
        assert source.class_names[0] == "n01440764"
    else:
        assert source.validation is None
        assert source.class_names[7291] == "Plantae/7291"


# A folder for each class


def test_folders_of_train_val_and_test(tmp_path):
    touch(tmp_path, ["train/cat/2.jpg", "train/cat/1.PNG", "train/ant/deep/er/3.tiff"])
    touch(tmp_path, ["val/cat/4.webp", "test/ant/5.ppm", "test/cat/6.JPEG"])
    touch(tmp_path, ["train/cat/notes.txt", "train/.hidden/7.jpg", "test/ant/._5.jpg", "readme.md"])
    source = load_listed("image_folder", tmp_path)
    assert source.class_names == ("ant", "cat")
    assert contents(source.train) == [
        ("train/ant/deep/er/3.tiff", 0),
        ("train/cat/1.PNG", 1),
        ("train/cat/2.jpg", 1),
    ]
    assert contents(source.validation) == [("val/cat/4.webp", 1)]
    assert contents(source.test) == [("test/ant/5.ppm", 0), ("test/cat/6.JPEG", 1)]
    assert source.test.source_index.tolist() == [0, 1]
    assert source.train.images.root == str(tmp_path)


def test_without_a_folder_test_the_folder_val_is_the_test_part(tmp_path):
    touch(tmp_path, ["train/a/1.jpg", "train/b/2.jpg", "val/b/3.jpg"])
    source = load_listed("image_folder", tmp_path)
    assert contents(source.test) == [("val/b/3.jpg", 1)]
    assert source.validation is None


def test_folders_of_classes_alone_have_no_test_part(tmp_path):
    touch(tmp_path, [f"{name}/{i}.jpg" for name in ("b", "a") for i in range(5)])
    source = load_listed("image_folder", tmp_path)
    assert source.class_names == ("a", "b")
    assert len(source.train.labels) == 10
    assert len(source.test.labels) == 0
    with pytest.raises(DatasetError, match=r"image_folder has no test images; set test_per_class"):
        cut(source, SubsetConfig(dataset="image_folder", imbalance_factor=0))
    config = SubsetConfig(dataset="image_folder", imbalance_factor=0, test_per_class=2)
    splits, _, _ = cut(source, config)
    assert np.bincount(splits["train"].labels).tolist() == [3, 3]
    taken = set(splits["train"].images.paths) | set(splits["test"].images.paths)
    assert taken == set(source.train.images.paths)


def test_a_class_may_be_called_train(tmp_path):
    touch(tmp_path, ["train/1.jpg", "plane/2.jpg"])
    assert load_listed("image_folder", tmp_path).class_names == ("plane", "train")


def test_folders_behind_a_url(tmp_path, memory):
    touch(tmp_path, ["train/a/1.jpg", "train/b/c/2.jpg", "test/b/3.jpg", "train/a/notes.txt"])
    upload(tmp_path, memory)
    here, there = load_listed("image_folder", tmp_path), load_listed("image_folder", memory)
    assert there.class_names == here.class_names == ("a", "b")
    assert contents(there.train) == contents(here.train)
    assert contents(there.test) == contents(here.test)
    assert find_listed("image_folder", memory) == f"image_folder in {memory}: test, train"


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["a/1.jpg", "b/2.gif"], r"no images \(\.jpg .*\) to train on of 1 classes: b; add"),
        (["a/1.jpg", "b/2.jpg", "c/"], r"to train on of 1 classes: c; add some or remove"),
        (["train/a/1.jpg", "test/a/2.jpg", "test/b/3.jpg"], r"to train on of 1 classes: b"),
        (["test/a/2.jpg", "val/b/3.jpg"], r"to train on of 2 classes: a, b"),
        (["train/a/1.jpg", "test/a/2.jpg"], r"images of 1 classes to train on, at least 2"),
        (["1.txt"], r"images of 0 classes to train on, at least 2"),
        (["a/1.jpg", "b/2.jpg", "3.jpg"], r"1 images in .* not in a folder CLASS/: 3\.jpg; move"),
        (["train/1.jpg", "test/2.jpg"], r"2 images .* train/CLASS/, .*: test/2\.jpg, train/1\.jpg"),
        (["train/a/1.jpg", "train/b/2.jpg", "more/a/3.jpg"], r"1 images .*: more/a/3\.jpg; move"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, paths, message):
    for path in paths:
        (tmp_path / path).mkdir(parents=True) if path[-1] == "/" else touch(tmp_path, [path])
    with pytest.raises(DatasetError, match=message):
        load_listed("image_folder", tmp_path)


def test_a_folder_that_is_none(tmp_path):
    for data_dir in (tmp_path / "nowhere", tmp_path / "a.jpg"):
        touch(tmp_path, ["a.jpg"])
        for look in (load_listed, find_listed):
            with pytest.raises(DatasetError, match=r"cannot be read .*; check data_dir"):
                look("image_folder", data_dir)
    with pytest.raises(DatasetError, match=r"has no folders; it must hold one for each class"):
        find_listed("image_folder", tmp_path)


def test_links_are_followed_but_not_for_ever(tmp_path):
    touch(tmp_path, ["data/a/1.jpg", "elsewhere/2.jpg"])
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/b/up").symlink_to(tmp_path / "elsewhere")
    source = load_listed("image_folder", tmp_path / "data")
    assert contents(source.train) == [("a/1.jpg", 0), ("b/2.jpg", 1)]


def test_a_name_that_is_no_text(tmp_path):
    touch(tmp_path, ["a/1.jpg", "b/2.jpg"])
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/\xff.jpg")).touch()
    with pytest.raises(DatasetError, match=r"not in UTF-8: 'a/.udcff\.jpg'; rename"):
        load_listed("image_folder", tmp_path)


# Tables


def write_table(root: Path, text: str, *, suffix: str = "csv") -> Path:
    """Lines of cells as a table, with its images."""
    header, *rows = [line.split(",") for line in text.split()]
    frame = pd.DataFrame(rows, columns=header)
    if "path" in header:
        touch(root, [path for path in frame["path"] if path and path[0] not in "/."])
    table = root / f"table.{suffix}"
    if suffix == "csv":
        table.write_text("\n".join(text.split()))
    else:
        numbers = {c: frame[c].astype(int) for c in header if frame[c].str.isdigit().all()}
        frame.assign(**numbers).to_parquet(table)
    return table


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_of_names(tmp_path, suffix):
    table = write_table(
        tmp_path,
        """label,path,split,width
        dog,x/1.jpg,train,9
        NA,2.jpg,train,9
        dog,3.jpg,test,9
        NA,4.jpg,val,9
        cat,5.jpg,train,9
        NA,6.jpg,validation,9""",
        suffix=suffix,
    )
    source = load_listed("table", table)
    assert source.class_names == ("NA", "cat", "dog")
    assert contents(source.train) == [("x/1.jpg", 2), ("2.jpg", 0), ("5.jpg", 1)]
    assert source.train.source_index.tolist() == [0, 1, 4]
    assert contents(source.validation) == [("4.jpg", 0), ("6.jpg", 0)]
    assert contents(source.test) == [("3.jpg", 2)]
    assert source.test.source_index.tolist() == [2]
    assert source.train.images.root == str(tmp_path)
    assert find_listed("table", table) == f"table in {table}: 3 + 2 + 1 images of 3 classes"


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_of_numbers_with_names_beside_them(tmp_path, suffix):
    text = "path,label,class_name 1.jpg,1,ant 2.jpg,0,bee 3.jpg,1,ant".replace(" ", "\n")
    source = load_listed("table", write_table(tmp_path, text, suffix=suffix))
    assert source.class_names == ("bee", "ant")
    assert source.train.labels.tolist() == [1, 0, 1]
    assert len(source.test.labels) == 0
    text = text.replace(",class_name", "").replace(",ant", "").replace(",bee", "")
    assert load_listed("table", write_table(tmp_path, text)).class_names == ("0", "1")


def test_a_table_written_by_a_spreadsheet(tmp_path):
    touch(tmp_path, ["ä.jpg", "b, c.jpg"])
    text = '\ufeffpath,label\r\nä.jpg,x\r\n"b, c.jpg",y\r\n'
    (tmp_path / "t.csv").write_bytes(text.encode("utf-8"))
    source = load_listed("table", tmp_path / "t.csv")
    assert contents(source.train) == [("ä.jpg", 0), ("b, c.jpg", 1)]
    (tmp_path / "t.csv").write_bytes(text.encode("utf-16"))
    with pytest.raises(DatasetError, match=r"t\.csv cannot be read as a table .*codec"):
        load_listed("table", tmp_path / "t.csv")


def test_a_table_behind_a_url(tmp_path, memory):
    upload(
        write_table(tmp_path, "path,label a/1.jpg,x b/2.jpg,y".replace(" ", "\n")).parent, memory
    )
    source = load_listed("table", f"{memory}/table.csv")
    assert source.train.images.root == memory
    assert contents(source.train) == [("a/1.jpg", 0), ("b/2.jpg", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label 1.jpg,x", r"has no column path, only file, label; path and label are needed"),
        ("a;b 1.jpg;x", r"has no column path and no column label, only a;b"),
        ("path,label 1.jpg,x 2.jpg,", r"has no label in row 2 \(1 such rows\); fill it in"),
        ("path,label ,x ,y", r"has no path in row 1 \(2 such rows\)"),
        ("path,label 1.jpg,x 2.jpg", r"has no label in row 2"),
        ("path,label 1.jpg,x,y 2.jpg,z,y", r"cannot be read as a table"),
        ("path,label 1.jpg,x 2.jpg,y,z", r"cannot be read as a table .*line 3"),
        ("path,label,split 1.jpg,x,train 2.jpg,y,dev", r"row 2 .* split 'dev', expected one of tr"),
        ("path,label,split 1.jpg,x, 2.jpg,y,test", r"has no split in row 1"),
        ("path,label 1.jpg,1 2.jpg,2", r"2 numbers from 1 to 2, expected 0\.\.1 without gaps; num"),
        ("path,label 1.jpg,0 2.jpg,2", r"2 numbers from 0 to 2, expected 0\.\.1"),
        ("path,label 1.jpg,-1 2.jpg,0", r"2 numbers from -1 to 0"),
        ("path,label,split 1.jpg,x,train 2.jpg,y,test 3.jpg,z,train", r"train on of 1 classes: y;"),
        ("path,label 1.jpg,x 2.jpg,x", r"images of 1 classes to train on, at least 2"),
        ("path,label", r"images of 0 classes to train on, at least 2"),
        ("path,label 1.jpg,x 1.jpg,y", r"has 1 images more than once: 1\.jpg; leave one row"),
        ("path,label 1.jpg,x /2.jpg,y", r"row 2 of .* has the path '/2\.jpg' \(1 such\)"),
        ("path,label 1.jpg,x ../2.jpg,y", r"paths must be relative"),
        ("path,label 1.jpg,x s3://b/2.jpg,y", r"paths must be relative"),
        ("path,label,class_name 1.jpg,0,x 2.jpg,1,x", r"name x has more than one label: 0, 1"),
        ("path,label,class_name 1.jpg,0,x 2.jpg,0,y", r"label 0 has more than one name: x, y"),
    ],
)
def test_a_table_that_cannot_be_used(tmp_path, text, message):
    touch(tmp_path, ["1.jpg", "2.jpg", "3.jpg"])
    (tmp_path / "table.csv").write_text(text.replace(" ", "\n"))
    with pytest.raises(DatasetError, match=message):
        load_listed("table", tmp_path / "table.csv")


def test_other_files_than_tables(tmp_path):
    touch(tmp_path, ["1.jpg", "2.jpg", "images.xlsx", "empty.csv", "no.parquet"])
    for name, message in {
        "images.xlsx": r"a table is a \.csv or \.parquet file, but data_dir is .*images\.xlsx",
        "empty.csv": r"empty\.csv cannot be read as a table",
        "no.parquet": r"no\.parquet cannot be read as a table",
        "nowhere.csv": r"nowhere\.csv cannot be read .*; check data_dir",
        "": r"cannot be read .*directory.*; check data_dir",
    }.items():
        with pytest.raises(DatasetError, match=message):
            load_listed("table", tmp_path / name)
    with pytest.raises(DatasetError, match=r"table is not downloaded; name the \.csv or \.parquet"):
        load_listed("table", None)
    frame = pd.DataFrame({"path": ["1.jpg", "2.jpg"], "label": [0.0, 1.0]})
    frame.to_parquet(tmp_path / "no.parquet")
    with pytest.raises(DatasetError, match=r"column label of .* holds float64, expected text or"):
        load_listed("table", tmp_path / "no.parquet")
    frame.assign(label=pd.array([0, None], dtype="Int64")).to_parquet(tmp_path / "no.parquet")
    with pytest.raises(DatasetError, match=r"has no label in row 2"):
        load_listed("table", tmp_path / "no.parquet")


def test_a_parquet_table_may_have_kept_labels_of_its_rows(tmp_path):
    touch(tmp_path, ["1.jpg", "2.jpg", "3.jpg"])
    frame = pd.DataFrame({"path": ["1.jpg", "2.jpg", "3.jpg"], "label": [0, 1, 1]})
    frame[frame.path != "1.jpg"].to_parquet(tmp_path / "t.parquet")
    frame.assign(path=["1.jpg", "2.jpg", "/3.jpg"])[1:][::-1].to_parquet(tmp_path / "wrong.parquet")
    with pytest.raises(DatasetError, match=r"/3\.jpg"):
        load_listed("table", tmp_path / "wrong.parquet")
    frame[1:].assign(label=["x", "y"], split=["train", "dev"])[::-1].to_parquet(
        tmp_path / "dev.parquet"
    )
    with pytest.raises(DatasetError, match="dev"):
        load_listed("table", tmp_path / "dev.parquet")


@pytest.mark.parametrize("error", [TimeoutError("no answer"), PermissionError("no right")])
def test_trouble_of_a_server_is_no_fault_of_the_file(error, monkeypatch):
    def refuse(root: str, path: str) -> bytes:
        raise error

    monkeypatch.setattr("shike_core.data.listed._read", refuse)
    paths = np.array(["a.jpg"], dtype=object)
    with pytest.raises(
        DatasetError, match=r"s3://b/a\.jpg cannot be read \(no .*; check the server"
    ):
        ImageFiles("s3://b", paths).read(0)
    with pytest.raises(type(error)):
        ImageFiles("/b", paths).read(0)


def test_images_of_a_table_that_are_not_there(tmp_path):
    table = write_table(tmp_path, "path,label 1.jpg,x a/2.jpg,y".replace(" ", "\n"))
    (tmp_path / "a/2.jpg").unlink()
    message = r"1 of 2 images are not in .*: a/2\.jpg; it must be where its paths start"
    with pytest.raises(DatasetError, match=message):
        load_listed("table", table)


@pytest.fixture
def photographs() -> list[Path]:
    if not (folder := SHARED_DATA / "photographs").is_dir():
        pytest.skip("the photographs are not in ../shared")
    return sorted(folder.iterdir())


def test_real_photographs_as_folders_and_as_a_table(photographs, tmp_path):
    rows = []
    for i, photograph in enumerate(photographs[:40]):
        kind = "bird" if i % 4 else "fish"
        path = tmp_path / kind / photograph.name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(photograph)
        rows.append((f"{kind}/{photograph.name}", kind))
    table = tmp_path / "photographs.csv"
    pd.DataFrame(sorted(rows), columns=["path", "label"]).to_csv(table, index=False)
    config = SubsetConfig(
        dataset="image_folder", imbalance_factor=2, test_per_class=3, image_size=24
    )
    of_folders, found, unreadable = cut(load_listed("image_folder", tmp_path), config)
    of_table, _, _ = cut(load_listed("table", table), replace(config, dataset="table"))
    assert not unreadable
    assert found["train_in_test"] == 0
    assert np.bincount(of_folders["train"].labels).tolist() == [7, 3]
    for name, split in of_folders.items():
        assert split.images.shape == (len(split.labels), 24, 24, 3)
        assert (split.images == of_table[name].images).all()
        assert (split.labels == of_table[name].labels).all()

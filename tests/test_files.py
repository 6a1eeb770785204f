import os
from pathlib import Path

import pytest

from shike_core.errors import ArtifactError
from shike_core.files import atomic_write


def test_the_file_appears_whole_under_its_own_name(tmp_path):
    path = tmp_path / "new" / "folder" / "report.json"
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent
        assert temporary.suffix == ".json"
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """As in two containers with the same process number; the one that ends last is read."""
    path = tmp_path / "shard"
    with atomic_write(path) as slow:
        slow.write_text("slow")
        with atomic_write(path) as fast:
            fast.write_text("fast")
        assert path.read_text() == "fast"
    assert path.read_text() == "slow"
    assert list(tmp_path.iterdir()) == [path]


def test_an_older_file_is_replaced(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_a_failure_in_between_keeps_the_older_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise KeyError("in between")

    with pytest.raises(KeyError, match="in between"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_a_full_disk_is_told_as_such(tmp_path):
    with (
        pytest.raises(ArtifactError, match=r"cannot write .*x: the disk is full: free some space"),
        atomic_write(tmp_path / "x"),
    ):
        Path("/dev/full").write_text("too much")
    assert list(tmp_path.iterdir()) == []


def test_on_a_disk_that_is_full_nothing_is_left(full_disk):
    with (
        pytest.raises(ArtifactError, match="the disk is full"),
        atomic_write(full_disk / "x") as temporary,
    ):
        temporary.write_bytes(bytes(10**6))
    assert list(full_disk.iterdir()) == []


def write_nothing(path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("")


@pytest.mark.parametrize("below", ["x", "folder/x"])
def test_a_file_in_place_of_the_directory(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file, not a directory: choose another"):
        write_nothing(tmp_path / "file" / below)


def test_a_directory_in_place_of_the_file(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(ArtifactError, match="it is a directory: choose the path of a file"):
        write_nothing(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ArtifactError, match="permission denied: choose a place"):
        write_nothing(tmp_path / "x")


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(ArtifactError, match="the name is too long: choose a shorter"):
        write_nothing(tmp_path / ("x" * 300))


def test_a_failure_without_advice_of_its_own_is_still_told(tmp_path):
    with (
        pytest.raises(ArtifactError, match="Too many open files: choose another place"),
        atomic_write(tmp_path / "x"),
    ):
        raise OSError(24, "Too many open files")

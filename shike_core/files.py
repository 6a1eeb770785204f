"""Writing files so that a reader never meets half of one."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shike_core.errors import ArtifactError

_WHAT_TO_DO = {
    errno.ENOSPC: "the disk is full: free some space or write to another place",
    errno.EDQUOT: "your disk quota is used up: free some space or write to another place",
    errno.EACCES: "permission denied: choose a place that you may write to",
    errno.EPERM: "permission denied: choose a place that you may write to",
    errno.EROFS: "the file system is read-only: choose a place that you may write to",
    errno.ENOTDIR: "a part of the path is a file, not a directory: choose another path",
    errno.EEXIST: "a part of the path is a file, not a directory: choose another path",
    errno.EISDIR: "it is a directory: choose the path of a file",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter path",
}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Let the caller write a file under a temporary name, then move it to its own at once.

    An older file of that name stays as it was until then, whatever happens. Missing parent
    directories are made.

    Args:
        path: the file wanted.

    Yields:
        A path in the same directory and with the same suffix, to write to.

    Raises:
        ArtifactError: the operating system refuses (no space, no permission, not a directory).
    """
    # Containers that share a folder have the same process numbers.
    temporary = path.with_name(f".partial-{secrets.token_hex(4)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name on an empty file
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {_explain(error)}") from error
    finally:
        _remove_quietly(temporary)


def _explain(error: OSError) -> str:
    fallback = f"{error.strerror or error}: choose another place"
    return _WHAT_TO_DO.get(error.errno or 0, fallback)


def _remove_quietly(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # the directory itself is not there: nothing was written
        return

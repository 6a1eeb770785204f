"""Files of a source that are no images, and the list of them that comes with a subset."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shike_core.files import atomic_write

UNREADABLE_FILE = "unreadable.csv"


@dataclass(frozen=True)
class Unreadable:
    """A file that is no image."""

    split: str
    path: str
    """Below the root of the images."""
    reason: str


def write_unreadable(wrong: Sequence[Unreadable], directory: Path) -> None:
    """Write `UNREADABLE_FILE`, a table with the columns split, path and reason."""
    with (
        atomic_write(directory / UNREADABLE_FILE) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["split", "path", "reason"])
        writer.writerows([image.split, image.path, image.reason] for image in wrong)

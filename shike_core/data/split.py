"""Images with their labels, wherever the images lie."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from shike_core.data.listed import ImageFiles
    from shike_core.data.storage import StoredImages

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Images with their labels."""

    images: "Images | ImageFiles | StoredImages"
    """Pixels (n, height, width, 3), files of a source, or encoded images of a subset on disk."""
    labels: Labels
    """Classes (n,)."""
    source_index: Labels
    """Positions in the source's files (n,), counted apart for its training and test files."""

    def take(self, positions: Labels) -> Self:
        """The images at some positions, in that order; not of a subset on disk."""
        images = cast("Images | ImageFiles", self.images)
        return type(self)(images[positions], self.labels[positions], self.source_index[positions])


@dataclass(frozen=True)
class Source:
    """Images with their labels, split into a pool to train on and a balanced test set."""

    name: str
    train: Split
    test: Split
    """Without images if the source has no test part: `shike_core.data.long_tail.cut` draws it."""
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    """Of each channel, in fractions of full brightness."""
    std: tuple[float, float, float]
    validation: Split | None = None
    """A part that the source itself holds out for validation."""

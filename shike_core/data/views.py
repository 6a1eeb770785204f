"""What a network is shown of an encoded image, in training and in evaluation.

As torchvision's transforms do it, with its distributions, but a large JPEG is decoded at half, a
quarter or an eighth of its size where that still has the pixels wanted. As in torchvision's loader,
an orientation noted in the file is ignored and transparency dropped. All happens on a CPU, one
image at a time; normalisation is left to the device.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

from shike_core.config import TrainConfig
from shike_core.data.listed import IMAGE_FORMATS, as_rgb
from shike_core.data.loader import seed_of

AREA = (0.08, 1.0)
"""Smallest and largest share of an image that a random crop shows."""
ASPECT = (3 / 4, 4 / 3)
"""Smallest and largest width over height of a random crop, before it is resized."""
RESIZE = 256 / 224
"""Shorter side of an image over the side of its centre crop, for evaluation."""
SMALLEST_SCALE = 8
"""A JPEG can be decoded at 1/2, 1/4 and 1/8 of its size."""


class View(Protocol):
    """What becomes of an encoded image."""

    @property
    def size(self) -> int:
        """Pixels a side."""

    def __call__(self, content: bytes, row: int) -> Image.Image:
        """An RGB image of that size, of the image in a row."""


@dataclass(frozen=True)
class TrainingView:
    """A random crop, resized, mirrored and recoloured; it moves torch's global generator."""

    config: TrainConfig
    epoch: int

    @property
    def size(self) -> int:
        """See `View`."""
        return self.config.crop_size

    def __call__(self, content: bytes, row: int) -> Image.Image:
        """See `View`."""
        torch.default_generator.manual_seed(seed_of(self.config.seed, self.epoch, row))
        image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
        top, left, height, width = RandomResizedCrop.get_params(image, AREA, ASPECT)
        scale = shrink_to(image, min(height, width) / self.size)
        box = (left * scale, top * scale, (left + width) * scale, (top + height) * scale)
        augmented: Image.Image = augmentation(self.config)(cropped(image, box, self.size))
        return augmented


@dataclass(frozen=True)
class EvaluationView:
    """The centre of an image whose shorter side is `RESIZE` times as long as the crop's."""

    size: int

    def __call__(self, content: bytes, row: int) -> Image.Image:
        """See `View`."""
        image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
        short = round(RESIZE * self.size)
        resized = [short * length // min(image.size) for length in image.size]
        lengths = image.size
        scale = shrink_to(image, min(lengths) / short)
        box: list[float] = []
        for whole, length in zip(resized, lengths, strict=True):
            first = round((whole - self.size) / 2)
            box += [first * scale * length / whole, (first + self.size) * scale * length / whole]
        left, right, upper, lower = box
        shape = (self.size, self.size)
        return as_rgb(image).resize(shape, Image.Resampling.BILINEAR, (left, upper, right, lower))


def shrink_to(image: Image.Image, ratio: float) -> float:
    """Have a JPEG that is not yet decoded made smaller by decoding; others stay as they are.

    Args:
        image: just opened.
        ratio: by how much, at most; a power of two is taken.

    Returns:
        What lengths in it are now over what they were. A last pixel may stand for a part of one.
    """
    width, height = image.size
    scale = 1
    while 2 * scale <= min(ratio, SMALLEST_SCALE):
        scale *= 2
    if scale == 1 or image.draft(None, (width // scale, height // scale)) is None:
        return 1.0
    return 1 / scale


def cropped(image: Image.Image, box: tuple[float, float, float, float], size: int) -> Image.Image:
    """A part of an image, resized as an image of its own: nothing around it shows at its border.

    Args:
        image: of any mode.
        box: left, upper, right, lower, in pixels.
        size: pixels a side of the result, RGB.
    """
    # Rounded, because a box that ends with the image must not end behind it by an error of 1e-13.
    left, upper, right, lower = (round(edge, 6) for edge in box)
    x, y = int(left), int(upper)
    part = as_rgb(image).crop((x, y, math.ceil(right), math.ceil(lower)))
    inner = (left - x, upper - y, right - x, lower - y)
    return part.resize((size, size), Image.Resampling.BILINEAR, inner)


def decoded(content: bytes) -> Image.Image:
    """A whole encoded image in RGB.

    Raises:
        OSError: it cannot be read.
        ValueError: as `shike_core.data.listed.as_rgb`.
    """
    return as_rgb(Image.open(io.BytesIO(content), formats=IMAGE_FORMATS))


@cache
def augmentation(config: TrainConfig) -> Callable[[Image.Image], Any]:
    """What follows the crop."""
    steps: list[Any] = [v2.Identity()]
    if config.flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.rand_augment:
        steps.append(v2.RandAugment(config.rand_augment, config.rand_augment_magnitude))
    if change := config.color_jitter:
        steps.append(v2.ColorJitter(brightness=change, contrast=change, saturation=change))
    whole: Callable[[Image.Image], Any] = v2.Compose(steps)
    return whole

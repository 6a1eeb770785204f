"""Augmentation of whole batches of uint8 images on any device.

What happens to each image is drawn on the CPU, for a whole epoch at once, and applied later to as
many images together as one likes. So the images that a seed gives depend neither on the device
nor on how they are grouped, and the device never has to be waited for. The operations have the
distribution of torchvision's per-image transforms.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tvf
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from shike_core.config import TrainConfig
from shike_core.device import upload

FILL = 128.0
"""What AutoAugment's geometric operations show outside the image (the authors' value)."""
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
SIGNED = (*GEOMETRIC, "Brightness", "Color", "Contrast", "Sharpness")
"""Operations whose magnitude is negative half of the time."""
OPERATIONS = (
    *SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert",
)  # fmt: skip
"""torchvision's names of AutoAugment's operations."""
CACHED_NUMBERS = 200_000
"""Numbers in float32 that a core's cache holds."""
LEVELS = 10
"""Magnitudes of AutoAugment are given in ten levels, 0 to 9."""


def normalise(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Turn pixels into the network's input, in channels-last memory on a CPU.

    Args:
        images: ``(batch, 3, h, w)``, values 0 to 255 of any type.
        mean: of each channel, for values 0 to 1.
        std: of each channel, for values 0 to 1.
        dtype: of the result; computed in float32.
    """
    constants = torch.tensor([mean, std], dtype=torch.float32)
    if images.device.type != "cpu":
        offset, scale = upload(constants, images.device).view(2, 1, -1, 1, 1).unbind()
        return ((images.to(torch.float32) / 255 - offset) / scale).to(dtype)
    # A few images at a time, which stay in the cache, and rows of pixels as one long dimension.
    batch, channels, height, width = images.shape
    offset, scale = constants.repeat(1, width)
    pixels = images.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
    result = torch.empty(pixels.shape, dtype=dtype)
    together = max(1, min(batch, CACHED_NUMBERS // pixels[:1].numel())) if batch else 1
    numbers = torch.empty(together, *pixels.shape[1:])
    for target, part in zip(result.split(together), pixels.split(together), strict=True):
        made = numbers[: len(part)].copy_(part).div_(255).sub_(offset).div_(scale)
        target.copy_(made)
    return result.view(batch, height, width, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Draws:
    """What happens to each of n images; tensors on the CPU."""

    offset: Tensor
    """Upper left corner of the crop in the padded image, y and x, int64 ``(n, 2)``."""
    mirrored: Tensor
    """Bool ``(n,)``."""
    operation: Tensor
    """AutoAugment's two operations as indices of `OPERATIONS`, -1 for none, ``(n, 2)``."""
    magnitude: Tensor
    """Their magnitudes in torchvision's units, with sign, ``(n, 2)``."""
    hole: Tensor
    """Centre of Cutout's square, y and x, int64 ``(n, 2)``."""

    @classmethod
    def of(
        cls, config: TrainConfig, size: tuple[int, int, int], generator: torch.Generator
    ) -> "Draws":
        """Draw for ``(n, height, width)`` images.

        Args:
            config: which of the operations.
            size: images, and pixels of each.
            generator: of the CPU; decides everything.
        """
        count, height, width = size
        offset = torch.randint(2 * config.crop_padding + 1, (count, 2), generator=generator)
        mirrored = torch.rand(count, generator=generator) < (0.5 if config.flip else 0.0)
        operation, magnitude = torch.full((count, 2), -1), torch.zeros(count, 2)
        if config.auto_augment:
            operation, magnitude = _draw_policy(count, height, width, generator)
        hole = torch.rand(count, 2, generator=generator) * torch.tensor([height, width])
        return cls(offset, mirrored, operation, magnitude, hole.long())

    def __getitem__(self, rows: slice | Tensor) -> "Draws":
        return Draws(*(value[rows] for value in vars(self).values()))


def _draw_policy(
    count: int, height: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One of the 25 sub-policies found on CIFAR-10 for each image (Cubuk et al. 2019)."""
    operation, probability, level = _policy_table()
    chosen = torch.randint(len(operation), (count,), generator=generator)
    applied = torch.rand(count, 2, generator=generator) <= probability[chosen]
    negative = torch.rand(count, 2, generator=generator) < 0.5
    which = operation[chosen]  # (count, 2)
    magnitude = _magnitudes(OPERATIONS, height, width)[which, level[chosen]]
    signed = torch.tensor([name in SIGNED for name in OPERATIONS])
    magnitude = torch.where(negative & signed[which], -magnitude, magnitude)
    return torch.where(applied, which, -1), magnitude


def augment(images: Tensor, draws: Draws, config: TrainConfig) -> Tensor:
    """Random crop, flip, AutoAugment and Cutout, in the authors' order.

    Args:
        images: uint8 ``(n, 3, h, w)``.
        draws: for these images.
        config: which of the operations, and their sizes.

    Returns:
        uint8, the same shape.
    """
    if config.crop_padding or config.flip:
        images = crop_and_flip(images, config.crop_padding, draws.offset, draws.mirrored)
    if config.auto_augment:
        images = auto_augment(images, draws.operation, draws.magnitude)
    if config.cutout_size:
        images = cutout(images, config.cutout_size, draws.hole)
    return images


def crop_and_flip(images: Tensor, padding: int, offset: Tensor, mirrored: Tensor) -> Tensor:
    """Crop after zero padding, and mirror: one gather.

    Args:
        images: uint8 ``(n, 3, h, w)``.
        padding: pixels on each side.
        offset: upper left corner of the crop in the padded image, y and x, ``(n, 2)``.
        mirrored: which images, ``(n,)``.
    """
    count, _, height, width = images.shape
    device = images.device
    offset, mirrored = upload(offset, device), upload(mirrored, device)
    rows = offset[:, :1] + torch.arange(height, device=device)  # (n, height)
    columns = offset[:, 1:] + torch.arange(width, device=device)  # (n, width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, (padding, padding, padding, padding)).permute(0, 2, 3, 1)
    cropped = padded[
        torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]
    ]  # (n, height, width, 3)
    return cropped.permute(0, 3, 1, 2)


def cutout(images: Tensor, size: int, hole: Tensor) -> Tensor:
    """Black out a square around a pixel, cut off at the border (DeVries & Taylor 2017).

    Args:
        images: uint8 ``(n, 3, h, w)``.
        size: side of the square in pixels.
        hole: its centre, y and x, ``(n, 2)``.
    """
    start = upload(hole - size // 2, images.device)
    inside = []
    for axis, length in enumerate(images.shape[-2:]):
        position = torch.arange(length, device=images.device)
        first = start[:, axis, None]
        inside.append((position >= first) & (position < first + size))  # (n, length)
    rows, columns = inside
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)


def auto_augment(images: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """Apply two operations to each image, one after the other.

    Args:
        images: uint8 ``(n, 3, h, w)``.
        operation: indices of `OPERATIONS` or -1, ``(n, 2)`` on the CPU.
        magnitude: in torchvision's units, with sign, ``(n, 2)`` on the CPU.
    """
    images = images.clone()
    for slot in (0, 1):
        which, values = operation[:, slot], magnitude[:, slot]
        groups = torch.where(which >= 0, _groups()[which], -1)
        # Sorted by group and uploaded together: each upload costs a GPU's host more than the work.
        order = groups.argsort(stable=True)
        which, values = which[order], values[order]
        ends = torch.bincount(groups + 1, minlength=len(OPERATIONS) + 2).cumsum(0).tolist()
        rows, numbers = upload(order, images.device), upload(values, images.device)
        for group, (start, end) in enumerate(pairwise(ends)):
            if start == end:
                continue
            picked, some = rows[start:end], slice(start, end)
            if group == 0:
                theta = _affine(which[some], values[some], *images.shape[-2:])
                images[picked] = affine_nearest(images[picked], theta)
            else:
                images[picked] = _COLOUR[OPERATIONS[group - 1]](
                    images[picked], numbers[some].view(-1, 1, 1, 1)
                )
    return images


@cache
def _groups() -> Tensor:
    """For each operation what is applied together: all geometric ones, which are one affine map."""
    return torch.tensor([0 if name in GEOMETRIC else i for i, name in enumerate(OPERATIONS, 1)])


def apply_operation(images: Tensor, name: str, magnitude: Tensor) -> Tensor:
    """One operation of AutoAugment on a batch, with a magnitude for each image.

    Args:
        images: uint8 ``(n, 3, h, w)``.
        name: torchvision's name of the operation.
        magnitude: ``(n,)`` on the CPU, in torchvision's units, with sign.
    """
    if name in GEOMETRIC:
        which = torch.full((len(images),), OPERATIONS.index(name))
        return affine_nearest(images, _affine(which, magnitude, *images.shape[-2:]))
    return _COLOUR[name](images, upload(magnitude, images.device).view(-1, 1, 1, 1))


def affine_nearest(images: Tensor, theta: Tensor) -> Tensor:
    """Sample the nearest pixel at affinely mapped places; `FILL` outside.

    Args:
        images: uint8 ``(n, 3, h, w)``.
        theta: ``(n, 2, 3)``, from output to input places in pixels around the centre.
    """
    _, channels, height, width = images.shape
    theta = upload(theta, images.device)[..., None, None]
    x = torch.arange(width, device=images.device) + 0.5 - width / 2
    y = (torch.arange(height, device=images.device) + 0.5 - height / 2)[:, None]
    # One rounding after the other, so that every device hits the same pixels.
    place = theta[:, :, 0] * x + theta[:, :, 1] * y + theta[:, :, 2]  # (n, 2, h, w)
    column = (place[:, 0] + width / 2).floor().long()  # the pixel whose area is hit
    row = (place[:, 1] + height / 2).floor().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    source = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    source = source.flatten(1)[:, None].expand(-1, channels, -1)
    taken = images.flatten(2).gather(2, source).view_as(images)
    return taken.masked_fill(~inside[:, None], int(FILL))


def _affine(which: Tensor, magnitude: Tensor, height: int, width: int) -> Tensor:
    """The maps ``(n, 2, 3)`` from output to input places, in pixels around the centre."""
    m = magnitude.double()
    is_ = {name: (which == OPERATIONS.index(name)).double() for name in GEOMETRIC}
    angle = torch.deg2rad(m) * is_["Rotate"]
    x_of_y, y_of_x = m * is_["ShearX"], m * is_["ShearY"]
    theta = torch.stack(
        [
            angle.cos(),
            x_of_y - angle.sin(),
            x_of_y * height / 2 - m.trunc() * is_["TranslateX"],  # shears leave the edge in place
            y_of_x + angle.sin(),
            angle.cos(),
            y_of_x * width / 2 - m.trunc() * is_["TranslateY"],
        ],
        dim=-1,
    )
    return theta.to(torch.float32).view(-1, 2, 3)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    mixed = factor * images + (1 - factor) * other
    return mixed.clamp(0, 255).to(torch.uint8)


def _brightness(images: Tensor, magnitude: Tensor) -> Tensor:
    return _blend(images, torch.zeros((), device=images.device), 1 + magnitude)


def _grey(images: Tensor) -> Tensor:
    grey: Tensor = tvf.rgb_to_grayscale(images, num_output_channels=1)
    return grey


def _color(images: Tensor, magnitude: Tensor) -> Tensor:
    return _blend(images, _grey(images).to(torch.float32), 1 + magnitude)


def _contrast(images: Tensor, magnitude: Tensor) -> Tensor:
    mean = _grey(images).to(torch.float32).mean(dim=(1, 2, 3), keepdim=True)
    return _blend(images, mean, 1 + magnitude)


def _sharpness(images: Tensor, magnitude: Tensor) -> Tensor:
    smooth = images.clone()
    if min(images.shape[-2:]) > 2:
        # Not as a convolution: cuDNN prepares each new number of images for a sixth of a second.
        pixels = images.to(torch.float32)
        rows = pixels[..., :-2, :] + pixels[..., 1:-1, :] + pixels[..., 2:, :]
        around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
        inner = (around + 4 * pixels[..., 1:-1, 1:-1]) / 13
        smooth[..., 1:-1, 1:-1] = inner.round().to(torch.uint8)
    return _blend(images, smooth, 1 + magnitude)


def _posterize(images: Tensor, magnitude: Tensor) -> Tensor:
    dropped = 8 - magnitude.to(torch.uint8)
    return images >> dropped << dropped


def _solarize(images: Tensor, magnitude: Tensor) -> Tensor:
    return torch.where(images >= magnitude, 255 - images, images)


_COLOUR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": lambda images, _: tvf.autocontrast(images),
    "Equalize": lambda images, _: tvf.equalize(images),
    "Invert": lambda images, _: 255 - images,
}


@cache
def _policy_table() -> tuple[Tensor, Tensor, Tensor]:
    """Operation, probability and level of AutoAugment's sub-policies, each ``(25, 2)``."""
    policies = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    operation = torch.tensor([[OPERATIONS.index(name) for name, _, _ in p] for p in policies])
    probability = torch.tensor([[p for _, p, _ in policy] for policy in policies])
    level = torch.tensor([[level or 0 for _, _, level in policy] for policy in policies])
    return operation, probability, level


@cache
def _magnitudes(names: tuple[str, ...], height: int, width: int) -> Tensor:
    """The value of each level of each operation, ``(operations, levels)``."""
    steps = torch.arange(LEVELS) / (LEVELS - 1)
    largest = {
        "ShearX": 0.3,
        "ShearY": 0.3,
        "TranslateX": 150 / 331 * width,
        "TranslateY": 150 / 331 * height,
        "Rotate": 30.0,
        "Brightness": 0.9,
        "Color": 0.9,
        "Contrast": 0.9,
        "Sharpness": 0.9,
    }
    special = {"Posterize": 8 - (4 * steps).round(), "Solarize": 255 * (1 - steps)}
    return torch.stack([special.get(name, largest.get(name, 0.0) * steps) for name in names])

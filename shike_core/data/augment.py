"""Augmentation of whole batches of uint8 images on any device.

Every choice is drawn on the CPU from a `torch.Generator`, as one small tensor for the batch, and
applied to all images at once; so the images a seed gives do not depend on the device. The
operations have the distribution of torchvision's per-image transforms.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tvf
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from shike_core.config import TrainConfig

FILL = 128.0
"""What AutoAugment's geometric operations show outside the image (the authors' value)."""
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
SIGNED = (*GEOMETRIC, "Brightness", "Color", "Contrast", "Sharpness")
"""Operations whose magnitude is negative half of the time."""
LEVELS = 10
"""Magnitudes of AutoAugment are given in ten levels, 0 to 9."""


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn pixels into the network's input, in float32.

    Args:
        images: ``(batch, 3, h, w)``, values 0 to 255 of any type.
        mean: of each channel, for values 0 to 1.
        std: of each channel, for values 0 to 1.
    """
    shape = (1, -1, 1, 1)
    offset = images.new_tensor(mean, dtype=torch.float32).view(shape)
    scale = images.new_tensor(std, dtype=torch.float32).view(shape)
    return (images.to(torch.float32) / 255 - offset) / scale


def augment(images: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """Random crop, flip, AutoAugment and Cutout, in the authors' order.

    Args:
        images: uint8 ``(batch, 3, h, w)``.
        config: which of the operations, and their sizes.
        generator: of the CPU; decides everything.

    Returns:
        uint8, the same shape.
    """
    if config.crop_padding or config.flip:
        images = crop_and_flip(images, config.crop_padding, config.flip, generator)
    if config.auto_augment:
        images = auto_augment(images, generator)
    if config.cutout_size:
        images = cutout(images, config.cutout_size, generator)
    return images


def crop_and_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Crop at a random place after zero padding, and mirror half of the images: one gather.

    Args:
        images: uint8 ``(batch, 3, h, w)``.
        padding: pixels on each side.
        flip: whether to mirror.
        generator: of the CPU.
    """
    batch, _, height, width = images.shape
    offsets = torch.randint(2 * padding + 1, (2, batch, 1), generator=generator)
    rows = offsets[0] + torch.arange(height)  # (batch, height)
    columns = offsets[1] + torch.arange(width)  # (batch, width)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (padding, padding, padding, padding)).permute(0, 2, 3, 1)
    device = images.device
    cropped = padded[
        torch.arange(batch, device=device)[:, None, None],
        rows.to(device)[:, :, None],
        columns.to(device)[:, None, :],
    ]  # (batch, height, width, 3)
    return cropped.permute(0, 3, 1, 2)


def cutout(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Black out a square around a random pixel, cut off at the border (DeVries & Taylor 2017).

    Args:
        images: uint8 ``(batch, 3, h, w)``.
        size: side of the square in pixels.
        generator: of the CPU.
    """
    batch, _, height, width = images.shape
    centre_y = torch.randint(height, (batch, 1), generator=generator)
    centre_x = torch.randint(width, (batch, 1), generator=generator)
    rows = _inside(torch.arange(height), centre_y, size).to(images.device)  # (batch, height)
    columns = _inside(torch.arange(width), centre_x, size).to(images.device)  # (batch, width)
    hole = rows[:, None, :, None] & columns[:, None, None, :]
    return images.masked_fill(hole, 0)


def _inside(position: Tensor, centre: Tensor, size: int) -> Tensor:
    start = centre - size // 2
    return (position >= start) & (position < start + size)


def auto_augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """One of the 25 sub-policies found on CIFAR-10 for each image (Cubuk et al. 2019).

    Args:
        images: uint8 ``(batch, 3, h, w)``.
        generator: of the CPU.
    """
    batch, _, height, width = images.shape
    names, operation, probability, level = _policy_table()
    chosen = torch.randint(len(operation), (batch,), generator=generator)
    chance = torch.rand(batch, 2, generator=generator)
    negative = torch.rand(batch, 2, generator=generator) < 0.5
    magnitudes = _magnitudes(names, height, width)  # (operations, levels)
    images = images.clone()
    for slot in (0, 1):
        applied = chance[:, slot] <= probability[chosen, slot]
        which = torch.where(applied, operation[chosen, slot], -1)  # (batch,)
        magnitude = magnitudes[which, level[chosen, slot]]
        magnitude = torch.where(negative[:, slot] & _signed(names)[which], -magnitude, magnitude)
        for index, name in enumerate(names):
            picked = (which == index).nonzero().squeeze(1)
            if name in GEOMETRIC or not len(picked):
                continue
            on_device = picked.to(images.device)
            images[on_device] = apply_operation(images[on_device], name, magnitude[picked])
        geometric = torch.tensor([name in GEOMETRIC for name in names])
        picked = (geometric[which] & applied).nonzero().squeeze(1)
        if len(picked):
            operations = [names[i] for i in which[picked].tolist()]
            theta = torch.stack(
                [
                    _affine(name, value, height, width)
                    for name, value in zip(operations, magnitude[picked].tolist(), strict=True)
                ]
            )
            on_device = picked.to(images.device)
            images[on_device] = affine_nearest(images[on_device], theta)
    return images


def apply_operation(images: Tensor, name: str, magnitude: Tensor) -> Tensor:
    """One operation of AutoAugment on a batch, with a magnitude for each image.

    Args:
        images: uint8 ``(batch, 3, h, w)``.
        name: torchvision's name of the operation.
        magnitude: ``(batch,)`` on the CPU, in torchvision's units, with sign.
    """
    if name in GEOMETRIC:
        height, width = images.shape[-2:]
        theta = torch.stack([_affine(name, m, height, width) for m in magnitude.tolist()])
        return affine_nearest(images, theta)
    return _COLOUR[name](images, magnitude.to(images.device).view(-1, 1, 1, 1))


def affine_nearest(images: Tensor, theta: Tensor) -> Tensor:
    """Sample the nearest pixel at affinely mapped places; `FILL` outside.

    Args:
        images: uint8 ``(batch, 3, h, w)``.
        theta: ``(batch, 2, 3)``, from output to input places in pixels around the centre.
    """
    _, channels, height, width = images.shape
    x = torch.arange(width) + 0.5 - width / 2
    y = torch.arange(height) + 0.5 - height / 2
    places = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
    places = torch.cat([places, torch.ones(height, width, 1)], dim=-1).view(-1, 3)
    mapped = places @ theta.transpose(1, 2)  # (batch, h * w, 2)
    column = (mapped[..., 0] + width / 2).floor().long()  # the pixel whose area is hit
    row = (mapped[..., 1] + height / 2).floor().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    source = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    source, inside = source.to(images.device), inside.to(images.device)
    taken = images.flatten(2).gather(2, source[:, None].expand(-1, channels, -1))
    return taken.masked_fill(~inside[:, None], int(FILL)).view_as(images)


def _affine(name: str, m: float, height: int, width: int) -> Tensor:
    """The 2 x 3 matrix from output to input places, in pixels around the centre."""
    match name:
        case "ShearX":  # about the upper edge, as torchvision's centre (0, 0) says
            rows = [[1.0, m, m * height / 2], [0.0, 1.0, 0.0]]
        case "ShearY":
            rows = [[1.0, 0.0, 0.0], [m, 1.0, m * width / 2]]
        case "TranslateX":
            rows = [[1.0, 0.0, -int(m)], [0.0, 1.0, 0.0]]
        case "TranslateY":
            rows = [[1.0, 0.0, 0.0], [0.0, 1.0, -int(m)]]
        case _:
            cosine, sine = math.cos(math.radians(m)), math.sin(math.radians(m))
            rows = [[cosine, -sine, 0.0], [sine, cosine, 0.0]]
    return torch.tensor(rows)


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
        kernel = torch.ones(3, 1, 3, 3, device=images.device) / 13
        kernel[:, :, 1, 1] = 5 / 13
        inner = F.conv2d(images.to(torch.float32), kernel, groups=3)
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
def _policy_table() -> tuple[tuple[str, ...], Tensor, Tensor, Tensor]:
    """Names of the operations; operation, probability and level, each ``(25, 2)``."""
    policies = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    names = tuple(sorted({name for policy in policies for name, _, _ in policy}))
    operation = torch.tensor([[names.index(name) for name, _, _ in policy] for policy in policies])
    probability = torch.tensor([[p for _, p, _ in policy] for policy in policies])
    level = torch.tensor([[level or 0 for _, _, level in policy] for policy in policies])
    return names, operation, probability, level


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


@cache
def _signed(names: tuple[str, ...]) -> Tensor:
    return torch.tensor([name in SIGNED for name in names])

"""Augmentation against torchvision's per-image transforms on real images, and by hand."""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from shike_core.config import TrainConfig
from shike_core.data import augment as module
from shike_core.data.augment import (
    GEOMETRIC,
    SIGNED,
    Draws,
    _magnitudes,
    apply_operation,
    normalise,
)

NOTHING = TrainConfig(crop_padding=0, flip=False, auto_augment=False, cutout_size=0)

POLICY = AutoAugment(AutoAugmentPolicy.CIFAR10)
SPACE = POLICY._augmentation_space(10, (32, 32))
TIED_SHEARS = SPACE["ShearX"][0][[2, 6]].tolist()
"""A fifteenth and a fifth: some pixels fall exactly between two, and rounding decides. The policy
has neither."""


def settings_of(name: str) -> list[float]:
    """Every magnitude that torchvision has for an operation, with both signs."""
    levels, signed = SPACE[name]
    magnitudes = levels.reshape(-1).tolist()
    return magnitudes + [-m for m in magnitudes if m] * signed


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augment(images: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """Draw, then apply."""
    draws = Draws.of(config, (len(images), *images.shape[-2:]), generator)
    return module.augment(images, draws, config)


def crop_and_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    return augment(images, replace(NOTHING, crop_padding=padding, flip=flip), generator)


def auto_augment(images: Tensor, generator: torch.Generator) -> Tensor:
    return augment(images, replace(NOTHING, auto_augment=True), generator)


def cutout(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return augment(images, replace(NOTHING, cutout_size=size), generator)


def numbered(batch: int, height: int, width: int) -> Tensor:
    """Images whose pixels are all different and none of them 0."""
    pixels = torch.arange(1, height * width + 1, dtype=torch.uint8).view(1, 1, height, width)
    return pixels.repeat(batch, 3, 1, 1)


@pytest.fixture(scope="module")
def patches() -> Tensor:
    """Real images, then plain ones and noise: uint8 (n, 3, 32, 32)."""
    real = [
        torch.tensor(photograph).unfold(0, 32, 107).unfold(1, 32, 107).reshape(-1, 3, 32, 32)
        for photograph in load_sample_images().images
    ]
    plain = [torch.full((1, 3, 32, 32), value, dtype=torch.uint8) for value in (0, 77, 255)]
    noise = torch.randint(256, (3, 3, 32, 32), generator=seeded(), dtype=torch.uint8)
    return torch.cat([*real, *plain, noise])


def differences(ours: Tensor, theirs: list[Tensor]) -> Tensor:
    return (ours.int() - torch.stack(theirs).int()).abs()


@pytest.mark.parametrize("size", [(32, 32), (20, 32)])
@pytest.mark.parametrize("name", SPACE)
def test_operations_are_those_of_torchvision_on_tensors(patches, name, size) -> None:
    images = patches[:, :, : size[0], : size[1]].contiguous()
    for magnitude in settings_of(name):
        ours = apply_operation(images, name, torch.full((len(images),), magnitude))
        theirs = [
            _apply_op(image, name, magnitude, InterpolationMode.NEAREST, [128.0] * 3)
            for image in images
        ]
        off = differences(ours, theirs)
        if name not in GEOMETRIC:  # the same up to rounding
            assert off.max() <= 1
            assert (off > 0).float().mean() < 0.2
        elif name.startswith("Shear") and abs(magnitude) in TIED_SHEARS:
            assert (off > 0).float().mean() < 0.12
        else:
            assert off.max() == 0


@pytest.mark.parametrize("name", SPACE)
def test_operations_are_close_to_those_of_torchvision_on_pil_images(patches, name) -> None:
    for magnitude in settings_of(name):
        ours = apply_operation(patches, name, torch.full((len(patches),), magnitude))
        theirs = [
            pil_to_tensor(
                _apply_op(
                    to_pil_image(image), name, magnitude, InterpolationMode.NEAREST, [128] * 3
                )
            )
            for image in patches
        ]
        off = differences(ours, theirs).float()
        if name.startswith("Shear") and abs(magnitude) in TIED_SHEARS:
            assert (off > 0).float().mean() < 0.12
        elif name == "Rotate":  # PIL computes places with a few digits
            assert (off > 0).float().mean() < 0.01
        elif name in GEOMETRIC:
            assert off.max() == 0
        else:
            assert off.max() <= 2
            assert off.mean() < 0.6


@pytest.mark.parametrize("name", SPACE)
def test_each_image_of_a_batch_has_its_own_magnitude(patches, name) -> None:
    magnitudes = torch.tensor(settings_of(name))
    images = patches[7:8].expand(len(magnitudes), -1, -1, -1).contiguous()
    together = apply_operation(images, name, magnitudes)
    for image, magnitude in zip(together, magnitudes, strict=True):
        assert torch.equal(apply_operation(images[:1], name, magnitude[None])[0], image)


@pytest.mark.parametrize("size", [(32, 32), (20, 48), (8, 8)])
def test_magnitudes_are_those_of_torchvision(size) -> None:
    space = POLICY._augmentation_space(10, size)
    for ours, (theirs, _) in zip(_magnitudes(tuple(space), *size), space.values(), strict=True):
        torch.testing.assert_close(ours, theirs.float().expand_as(ours), rtol=1e-6, atol=1e-7)
    solarize = list(space).index("Solarize")  # an integer pixel is compared with it
    ours, theirs = _magnitudes(tuple(space), *size)[solarize], space["Solarize"][0]
    assert torch.equal(ours.ceil(), theirs.ceil())


def outcomes(image: Tensor) -> dict[bytes, float]:
    """Every image the policy can make of one, with its probability."""
    magnitudes = dict(zip(SPACE, _magnitudes(tuple(SPACE), 32, 32), strict=True))
    found: Counter[bytes] = Counter()
    for policy in POLICY.policies:
        for (first, second), signs in product(
            product((0, 1), repeat=2), product((1, -1), repeat=2)
        ):
            result, probability = image[None], 1 / 25 / 4
            for (name, chance, level), applied, sign in zip(
                policy, (first, second), signs, strict=True
            ):
                probability *= chance if applied else 1 - chance
                if applied:
                    sign = sign if SPACE[name][1] else 1
                    result = apply_operation(result, name, sign * magnitudes[name][[level or 0]])
            found[result.numpy().tobytes()] += probability
    return found


def test_the_policy_makes_every_image_as_often_as_its_table_says(patches) -> None:
    expected = outcomes(patches[7])
    assert sum(expected.values()) == pytest.approx(1)
    assert len(expected) > 100
    draws, generator, seen = 20_000, seeded(), Counter()
    batch = patches[7].expand(1000, -1, -1, -1)
    for _ in range(draws // len(batch)):
        seen.update(image.tobytes() for image in auto_augment(batch, generator).numpy())
    assert seen.keys() <= {key for key, p in expected.items() if p > 0}
    for key, p in expected.items():
        deviation = (draws * p * (1 - p)) ** 0.5
        assert abs(seen[key] - draws * p) <= 5 * deviation + 1


def test_operations_with_a_sign_are_those_of_torchvision() -> None:
    assert {name for name, (_, signed) in SPACE.items() if signed} == set(SIGNED)


def test_auto_augment_leaves_its_input_alone(patches) -> None:
    before = patches.clone()
    result = auto_augment(patches, seeded())
    assert torch.equal(patches, before)
    assert (result.dtype, result.shape) == (torch.uint8, patches.shape)


def test_shear_translate_and_rotate_by_hand() -> None:
    image = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.uint8).expand(1, 3, 3, 3)
    expected = {
        ("TranslateX", 1.9): [[128, 1, 2], [128, 4, 5], [128, 7, 8]],
        ("TranslateY", -1.0): [[4, 5, 6], [7, 8, 9], [128, 128, 128]],
        ("Rotate", 90.0): [[3, 6, 9], [2, 5, 8], [1, 4, 7]],  # against the clock
        ("ShearX", 0.5): [[1, 2, 3], [5, 6, 128], [8, 9, 128]],
    }
    for (name, magnitude), pixels in expected.items():
        result = apply_operation(image, name, torch.tensor([magnitude]))
        assert result[0, 0].tolist() == pixels, name


def test_crop_by_hand_is_one_of_the_windows_of_the_padded_image() -> None:
    images = numbered(4000, 3, 2)
    padded = np.pad(images[0].numpy(), ((0, 0), (1, 1), (1, 1)))
    windows = [padded[:, y : y + 3, x : x + 2] for y in range(3) for x in range(3)]
    cropped = crop_and_flip(images, 1, False, seeded()).numpy()
    counts = [int((cropped == window).all(axis=(1, 2, 3)).sum()) for window in windows]
    assert sum(counts) == 4000
    deviation = (4000 * 1 / 9 * 8 / 9) ** 0.5
    assert all(abs(count - 4000 / 9) < 5 * deviation for count in counts)


def test_half_of_the_images_are_mirrored() -> None:
    images = numbered(4000, 3, 4)
    flipped = crop_and_flip(images, 0, True, seeded())
    mirrored = (flipped == images.flip(3)).all(dim=(1, 2, 3))
    kept = (flipped == images).all(dim=(1, 2, 3))
    assert (mirrored ^ kept).all()
    assert abs(mirrored.sum().item() - 2000) < 5 * (4000 / 4) ** 0.5


def test_crop_and_flip_are_independent() -> None:
    images = numbered(8000, 2, 2)
    result = crop_and_flip(images, 1, True, seeded())
    outcomes = Counter(image.tobytes() for image in result.numpy())
    # 9 windows and 2 directions; of a window with one pixel left, the mirror image differs
    assert len(outcomes) == 18
    assert all(abs(n - 8000 / 18) < 5 * (8000 / 18) ** 0.5 for n in outcomes.values())


def test_a_padding_of_nothing_without_mirroring_changes_nothing(patches) -> None:
    assert torch.equal(crop_and_flip(patches, 0, False, seeded()), patches)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 16])
def test_cutout_is_one_square_cut_off_at_the_borders(size) -> None:
    height, width = 5, 7
    result = cutout(numbered(6000, height, width), size, seeded())
    holes = result[:, 0] == 0
    assert torch.equal(result == 0, holes[:, None].expand_as(result))  # in all channels alike
    expected = Counter()
    for y, x in product(range(height), range(width)):
        hole = np.zeros((height, width), dtype=bool)
        for row, column in product(range(height), range(width)):
            hole[row, column] = (
                y - size // 2 <= row < y - size // 2 + size
                and x - size // 2 <= column < x - size // 2 + size
            )
        expected[hole.tobytes()] += 1 / (height * width)
    seen = Counter(hole.tobytes() for hole in holes.numpy())
    assert seen.keys() == expected.keys()
    for key, p in expected.items():
        assert abs(seen[key] - 6000 * p) <= 5 * (6000 * abs(p * (1 - p))) ** 0.5 + 1e-6


def test_cutout_keeps_the_other_pixels(patches) -> None:
    result = cutout(patches, 16, seeded())
    assert torch.equal(torch.where(result == 0, patches, result), patches)
    assert not torch.equal(result, patches)


def test_augment_does_what_the_configuration_says(patches) -> None:
    assert torch.equal(augment(patches, NOTHING, seeded()), patches)
    draws = Draws.of(TrainConfig(), (len(patches), 32, 32), seeded(3))
    steps = module.crop_and_flip(patches, 4, draws.offset, draws.mirrored)
    steps = module.auto_augment(steps, draws.operation, draws.magnitude)
    steps = module.cutout(steps, 16, draws.hole)
    everything = module.augment(patches, draws, TrainConfig())
    assert torch.equal(everything, steps)
    assert (everything.dtype, everything.shape) == (torch.uint8, patches.shape)


@pytest.mark.parametrize("group", [1, 7, 100])
def test_how_images_are_grouped_does_not_change_them(patches, group) -> None:
    draws = Draws.of(TrainConfig(), (len(patches), 32, 32), seeded())
    together = module.augment(patches, draws, TrainConfig())
    apart = [
        module.augment(patches[i : i + group], draws[i : i + group], TrainConfig())
        for i in range(0, len(patches), group)
    ]
    assert torch.equal(torch.cat(apart), together)


def test_the_seed_decides_the_images(patches) -> None:
    first, again, other = (augment(patches, TrainConfig(), seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_memory_layout_does_not_matter(patches) -> None:
    last = patches.contiguous(memory_format=torch.channels_last)
    one, other = (augment(images, TrainConfig(), seeded()) for images in (patches, last))
    assert torch.equal(one, other)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 8), (15, 33)])
def test_images_of_any_size(size) -> None:
    images = torch.randint(256, (64, 3, *size), generator=seeded(), dtype=torch.uint8)
    assert augment(images, TrainConfig(), seeded()).shape == images.shape


def test_normalise_by_hand() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    result = normalise(images, (0.5, 0.4, 0.1), (0.5, 0.1, 0.3))
    assert result.dtype == torch.float32
    assert result.flatten().tolist() == pytest.approx([-1.0, -2.0, 3.0])
    assert torch.equal(normalise(images.double(), (0.5, 0.4, 0.1), (0.5, 0.1, 0.3)), result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3, 7, 9), (3, 3, 300, 250), (0, 3, 4, 4)])
def test_normalise_is_torchvisions_formula_to_the_last_bit(shape, dtype) -> None:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = torch.randint(256, shape, generator=seeded(), dtype=torch.uint8)
    expected = (pixels.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for images in (pixels, pixels.contiguous(memory_format=torch.channels_last), pixels.float()):
        before = images.clone()
        result = normalise(images, mean.tolist(), std.tolist(), dtype)
        assert result.dtype == dtype
        assert torch.equal(result, expected.to(dtype))
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, before)

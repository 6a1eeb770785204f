"""Views of photographs against torchvision's transforms; modes and sizes of images by hand."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

from shike_core.config import TrainConfig
from shike_core.data.loader import seed_of
from shike_core.data.views import (
    AREA,
    ASPECT,
    EvaluationView,
    TrainingView,
    augmentation,
    cropped,
    shrink_to,
)

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "photographs"
PLAIN = TrainConfig(crop="resized", crop_size=224, auto_augment=False, cutout_size=0, flip=False)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.int64)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def photographs() -> list[bytes]:
    """Every fourth of 200, in colour and grey, of 68 to 1632 pixels a side."""
    if not PHOTOGRAPHS.is_dir():
        pytest.skip("the photographs are not in ../shared")
    return [path.read_bytes() for path in sorted(PHOTOGRAPHS.iterdir())[::4]]


# ---- against torchvision


@pytest.mark.parametrize("size", [224, 64])
def test_training_crops_are_torchvisions(photographs: list[bytes], size: int) -> None:
    config = replace(PLAIN, crop_size=size)
    reference = RandomResizedCrop(size)
    assert (reference.scale, reference.ratio) == (AREA, ASPECT)
    exact, differences = 0, []
    for row, content in enumerate(photographs):
        ours = TrainingView(config, epoch=3)(content, row)
        torch.manual_seed(seed_of(config.seed, 3, row))  # the same draws, of its get_params
        whole = opened(content).convert("RGB")
        box = RandomResizedCrop.get_params(whole, list(AREA), list(ASPECT))
        theirs = v2.functional.resized_crop(whole, *box, [size, size], antialias=True)
        difference = np.abs(pixels(ours) - pixels(theirs))
        if min(box[2:]) < 2 * size:  # decoded at its own size
            assert not difference.any()
            exact += 1
        else:
            differences.append(difference.mean())
    assert exact >= 3
    if size == 64:  # in levels of 255: one and a half percent at the very worst
        assert len(differences) > 20
        assert np.mean(differences) < 2
        assert max(differences) < 6


@pytest.mark.parametrize("size", [224, 64])
def test_evaluation_is_torchvisions_resize_and_centre_crop(photographs, size: int) -> None:
    short = round(size * 256 / 224)
    reference = v2.Compose([v2.Resize(short, antialias=True), v2.CenterCrop(size)])
    differences = []
    for content in photographs:
        whole = opened(content).convert("RGB")
        difference = np.abs(pixels(EvaluationView(size)(content, row=0)) - pixels(reference(whole)))
        if min(whole.size) < 2 * short:
            assert difference.max() <= 1  # of rounding
        else:
            differences.append(difference.mean())
    if size == 64:
        assert len(differences) > 20
        assert np.mean(differences) < 2
        assert max(differences) < 4


@pytest.mark.parametrize("width", [1200, 1201, 1203, 1207])
def test_a_side_that_decoding_does_not_divide_is_not_stretched(width: int) -> None:
    slope = np.linspace(0, 255, width).astype(np.uint8)
    image = Image.fromarray(np.tile(slope, (width, 1))).convert("RGB")
    seen = pixels(EvaluationView(64)(encoded(image, "JPEG", quality=100), 0))
    short = round(64 * 256 / 224)
    reference = v2.Compose([v2.Resize(short, antialias=True), v2.CenterCrop(64)])
    assert np.abs(seen - pixels(reference(image))).max() <= 1


def test_flip_jitter_and_random_augment_are_torchvisions() -> None:
    config = replace(PLAIN, crop_size=48, flip=True, rand_augment=2, color_jitter=0.4)
    reference = v2.Compose(
        [
            v2.RandomResizedCrop(48, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(2, 9),
            v2.ColorJitter(0.4, 0.4, 0.4),
        ]
    )
    image = noise(90, 70)
    for row in range(20):
        ours = TrainingView(config, epoch=0)(encoded(image), row)
        torch.manual_seed(seed_of(config.seed, 0, row))
        assert (pixels(ours) == pixels(reference(image))).all()


# ---- draws


def test_a_view_follows_from_seed_epoch_and_row() -> None:
    content, config = encoded(noise(60, 50)), replace(PLAIN, crop_size=16)

    def seen(seed: int, epoch: int, row: int) -> bytes:
        torch.rand(3)  # what was drawn before has no part in it
        return TrainingView(replace(config, seed=seed), epoch)(content, row).tobytes()

    cases = [(seed, epoch, row) for seed in (0, 1) for epoch in (0, 1) for row in (0, 1)]
    first = [seen(*case) for case in cases]
    assert [seen(*case) for case in cases] == first
    assert len(set(first)) == len(cases)


def test_half_of_the_images_are_mirrored_unless_flip_is_off() -> None:
    image = Image.fromarray(np.arange(100, dtype=np.uint8).reshape(1, 100).repeat(3, axis=0))
    content = encoded(image.convert("RGB").resize((100, 100)))

    def mirrored(config: TrainConfig) -> int:
        views = [TrainingView(config, 0)(content, row) for row in range(200)]
        return sum(int(pixels(view)[0, 0, 0] > pixels(view)[0, -1, 0]) for view in views)

    config = replace(PLAIN, crop_size=8)
    assert mirrored(config) == 0
    assert 70 < mirrored(replace(config, flip=True)) < 130


def test_only_what_is_asked_for_is_done_after_the_crop() -> None:
    def names(config: TrainConfig) -> list[str]:
        return [type(step).__name__ for step in augmentation(config).transforms][1:]

    assert names(PLAIN) == []
    assert names(replace(PLAIN, flip=True, color_jitter=0.4)) == [
        "RandomHorizontalFlip", "ColorJitter",
    ]  # fmt: skip
    changed = replace(PLAIN, rand_augment=3, rand_augment_magnitude=5)
    assert names(changed) == ["RandAugment"]
    assert augmentation(changed).transforms[1].num_ops == 3
    assert augmentation(changed).transforms[1].magnitude == 5


# ---- decoding


@pytest.mark.parametrize(
    ("ratio", "size"),
    [
        (0.5, (1001, 807)),
        (1.99, (1001, 807)),
        (2.0, (501, 404)),
        (3.99, (501, 404)),
        (4.0, (251, 202)),
        (9.0, (126, 101)),
        (100.0, (126, 101)),
    ],
)
def test_a_jpeg_is_decoded_smaller_but_not_too_small(ratio, size) -> None:
    image = opened(encoded(noise(1001, 807), "JPEG"))
    scale = shrink_to(image, ratio)
    assert image.size == size
    assert 1 / scale == round(1001 / size[0])  # a last pixel may stand for a part of one
    image.load()
    assert image.size == size


def test_other_formats_are_decoded_as_they_are() -> None:
    image = opened(encoded(noise(1001, 807)))
    assert shrink_to(image, 8.0) == 1.0
    assert image.size == (1001, 807)


def test_nothing_from_outside_a_crop_shows_in_it() -> None:
    # A white square in black, enlarged and reduced: all of it stays white.
    values = np.zeros((40, 50, 3), dtype=np.uint8)
    values[10:30, 20:40] = 255
    image = Image.fromarray(values)
    for size in (4, 20, 77):
        assert (pixels(cropped(image, (20, 10, 40, 30), size)) == 255).all()


@pytest.mark.parametrize("width", range(640, 700, 7))
def test_a_crop_that_ends_with_a_shrunk_image_has_no_black_border(width) -> None:
    # Such as 661 pixels, half of which are 331: 661 * (331 / 661) is not quite 331.
    content = encoded(Image.new("RGB", (width, width), (200, 200, 200)), "JPEG")
    image = opened(content)
    end = width * shrink_to(image, 2)
    made = pixels(cropped(image, (0.0, 0.0, end, end), 64))
    assert made.min() > 195


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (30, 20), 100), "PNG", (100, 100, 100)),
        (Image.new("L", (30, 20), 100), "JPEG", (100, 100, 100)),
        (Image.new("RGBA", (30, 20), (10, 20, 30, 40)), "PNG", (10, 20, 30)),
        (Image.new("LA", (30, 20), (70, 5)), "PNG", (70, 70, 70)),
        (Image.new("1", (30, 20), 1), "PNG", (255, 255, 255)),
        (Image.new("RGB", (30, 20), (8, 16, 24)).quantize(4), "PNG", (8, 16, 24)),
        (Image.new("CMYK", (30, 20), (255, 0, 0, 0)), "JPEG", (0, 255, 255)),
        (Image.new("RGB", (3, 2), (8, 16, 24)), "PNG", (8, 16, 24)),  # enlarged
        (Image.new("RGB", (300, 1), (8, 16, 24)), "BMP", (8, 16, 24)),
    ],
)
def test_images_of_all_modes_and_sizes_become_squares_in_rgb(image, kind, expected) -> None:
    content = encoded(image, kind)
    for view in (EvaluationView(16), TrainingView(replace(PLAIN, crop_size=16), 0)):
        made = view(content, 0)
        assert (made.mode, made.size, view.size) == ("RGB", (16, 16), 16)
        assert np.abs(pixels(made) - expected).max() <= 2  # a JPEG loses a little


def test_formats_that_make_pillow_start_programs_are_not_opened(tmp_path: Path) -> None:
    content = encoded(noise(20, 20), "EPS")
    with pytest.raises(OSError, match="cannot identify"):
        EvaluationView(16)(content, 0)

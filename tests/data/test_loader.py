"""Batches: every image once, an order of its own for each epoch, resumable anywhere."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from shike_core.config import TrainConfig
from shike_core.data import loader
from shike_core.data.loader import (
    ImageTable,
    seeded_generator,
    shares,
    steps_per_epoch,
    warn_of_streaming,
)

PLAIN = TrainConfig(batch_size=8, crop_padding=0, flip=False, auto_augment=False, cutout_size=0)
AUGMENTED = TrainConfig(batch_size=8)
MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def a_table(images: int = 29) -> ImageTable:
    """Image i has only the value i, and the label 2 i."""
    pixels = np.arange(images, dtype=np.uint8)[:, None, None, None]
    pixels = np.broadcast_to(pixels, (images, 8, 6, 3)).copy()
    return ImageTable.from_arrays(pixels, 2 * np.arange(images))


def an_epoch(config: TrainConfig, epoch: int = 0, first_step: int = 0, part=(0, 1)):
    return list(
        a_table().training_batches(config, MEAN, STD, epoch=epoch, first_step=first_step, part=part)
    )


def labels_of(batches) -> list[int]:
    return torch.cat([labels for _, labels in batches]).tolist()


def test_from_arrays_puts_channels_before_pixels() -> None:
    images = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    table = ImageTable.from_arrays(images, np.array([1, 0]))
    assert len(table) == 2
    assert table.images.shape == (2, 3, 3, 4)
    assert (table.images.permute(0, 2, 3, 1).numpy() == images).all()
    assert table.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("images", "steps"), [(1, 1), (7, 1), (8, 1), (9, 2), (10_847, 1356)])
def test_steps_per_epoch(images, steps) -> None:
    assert steps_per_epoch(images, 8) == steps
    assert steps_per_epoch(10_847, 128) == 85  # the paper's


@pytest.mark.parametrize("config", [PLAIN, AUGMENTED], ids=["plain", "augmented"])
def test_every_image_comes_once_an_epoch_and_the_last_batch_is_smaller(config) -> None:
    batches = an_epoch(config)
    assert [len(labels) for _, labels in batches] == [8, 8, 8, 5]
    assert sorted(labels_of(batches)) == list(range(0, 58, 2))


def test_images_keep_their_labels_and_are_normalised() -> None:
    for images, labels in an_epoch(PLAIN):
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        expected = (labels / 2 / 255)[:, None, None, None].expand_as(images)
        torch.testing.assert_close(images, expected)


def test_the_batches_of_a_seed_stay_what_they_are() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(20, 16, 12, 3), dtype=np.uint8)
    table = ImageTable.from_arrays(pixels, np.arange(20))
    digest = hashlib.sha256()
    config = TrainConfig(batch_size=8, seed=3, auto_augment=False, consistency_weight=1.0)
    for images, labels in table.training_batches(config, MEAN, STD, epoch=5):
        digest.update(images.contiguous().numpy().tobytes() + labels.numpy().tobytes())
    assert digest.hexdigest()[:16] == "a1e3782abd782124"


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_the_shares_of_several_processes_together_are_the_batch(processes) -> None:
    whole = an_epoch(AUGMENTED, epoch=1, first_step=1)
    parts = [
        an_epoch(AUGMENTED, epoch=1, first_step=1, part=(rank, processes))
        for rank in range(processes)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    for (images, labels), *of_each in zip(whole, *parts, strict=True):
        if len(labels) < processes:  # the last five images for eight processes
            of_each = [every for every in of_each if torch.equal(every[1], labels)]
            assert len(of_each) == processes
            of_each = of_each[:1]
        assert torch.equal(torch.cat([x for x, _ in of_each]), images)
        assert torch.equal(torch.cat([y for _, y in of_each]), labels)


def test_shares_by_hand() -> None:
    # Batches of 8, 8 and 3 images for three processes: 3 + 3 + 2, and one each.
    assert shares(19, 8, (0, 3)) == [slice(0, 3), slice(8, 11), slice(16, 17)]
    assert shares(19, 8, (1, 3)) == [slice(3, 6), slice(11, 14), slice(17, 18)]
    assert shares(19, 8, (2, 3)) == [slice(6, 8), slice(14, 16), slice(18, 19)]
    assert shares(9, 8, (0, 2)) == [slice(0, 4), slice(8, 9)]  # one is left, for both
    assert shares(9, 8, (1, 2)) == [slice(4, 8), slice(8, 9)]
    assert shares(0, 8) == []


def test_images_for_evaluation_come_in_their_order_as_they_are() -> None:
    table = a_table()
    batches = list(table.batches(12))
    assert [len(images) for images in batches] == [12, 12, 5]
    assert torch.equal(torch.cat(batches), table.images)
    assert next(table.batches(4))[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    for rank in (0, 1, 2, 3):  # the fourth of four processes has none
        mine = list(table.batches(12, part=(rank, 4)))
        assert [b.tolist() for b in mine] == [b.tolist() for b in batches[rank : rank + 1]]


def test_nobody_waits_for_images_in_memory() -> None:
    table = a_table()
    assert table.seconds_waited() is None
    table.close()
    assert len(list(table.batches(29))) == 1


def test_order_differs_by_epoch_and_by_seed_and_not_by_run() -> None:
    first = labels_of(an_epoch(PLAIN, epoch=3))
    assert labels_of(an_epoch(PLAIN, epoch=3)) == first
    assert labels_of(an_epoch(PLAIN, epoch=4)) != first
    assert labels_of(an_epoch(TrainConfig(batch_size=8, seed=1), epoch=3)) != first
    assert labels_of(an_epoch(AUGMENTED, epoch=3)) == first


@pytest.mark.parametrize("first_step", [0, 1, 3, 4])
def test_an_epoch_resumes_at_any_step_with_the_same_images(first_step) -> None:
    torch.rand(5)  # the global generator has no part in it
    whole, rest = an_epoch(AUGMENTED, 2), an_epoch(AUGMENTED, 2, first_step)
    assert len(rest) == len(whole) - first_step
    for (images, labels), (again, labels_again) in zip(whole[first_step:], rest, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, labels_again)


def test_augmentation_differs_by_epoch_and_by_seed() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(1, 32, 32, 3), dtype=np.uint8)
    table = ImageTable.from_arrays(pixels, np.array([0]))
    seen = {
        next(table.training_batches(config, MEAN, STD, epoch=epoch))[0].numpy().tobytes()
        for config in (TrainConfig(seed=0), TrainConfig(seed=1))
        for epoch in range(5)
    }
    assert len(seen) == 10


def test_seeded_generator_is_the_same_on_every_machine() -> None:
    draws = torch.randint(10**9, (3,), generator=seeded_generator(0, 1, 2))
    assert draws.tolist() == [231316947, 829961345, 55773968]
    states = {seeded_generator(*key).initial_seed() for key in [(0,), (1,), (0, 0), (0, 1), (1, 0)]}
    assert len(states) == 5
    assert min(states) >= 0


@pytest.mark.parametrize("chunk_bytes", [1, 2**13, 2**30])
def test_the_number_of_batches_augmented_together_does_not_change_them(
    chunk_bytes, monkeypatch
) -> None:
    expected = an_epoch(AUGMENTED, 1)
    monkeypatch.setitem(loader.CHUNK_BYTES, "cpu", chunk_bytes)
    for (images, labels), (again, labels_again) in zip(
        expected, an_epoch(AUGMENTED, 1), strict=True
    ):
        assert torch.equal(images, again)
        assert torch.equal(labels, labels_again)


def test_for_consistency_the_same_images_follow_only_cropped_and_mirrored() -> None:
    both = replace(AUGMENTED, consistency_weight=1.0)
    weak = replace(AUGMENTED, auto_augment=False, cutout_size=0)
    seen = an_epoch(weak)
    batches = an_epoch(both)
    assert [len(images) for images, _ in batches] == [16, 16, 16, 10]
    for (images, labels), (alone, labels_alone), (_, of_weak) in zip(
        batches, an_epoch(AUGMENTED), seen, strict=True
    ):
        assert torch.equal(labels, labels_alone)
        assert torch.equal(labels, of_weak)
        assert torch.equal(images[: len(labels)], alone)
        # Image i has only the value i, or 0 where padding was cropped in.
        values = images[len(labels) :].flatten(1)
        expected = (labels / 2 / 255)[:, None]
        assert ((values - expected).abs().lt(1e-6) | (values == 0)).all()
        assert images[len(labels) :].is_contiguous(memory_format=torch.channels_last)


def test_images_in_half_precision_are_the_rounded_ones() -> None:
    halves = a_table().training_batches(AUGMENTED, MEAN, STD, epoch=0, dtype=torch.bfloat16)
    for (images, _), (half, _) in zip(an_epoch(AUGMENTED), halves, strict=True):
        assert torch.equal(images.bfloat16(), half)


def test_images_without_room_on_the_device_are_announced() -> None:
    with pytest.warns(UserWarning, match=r"take 3\.0 GiB and the device has 4\.5 GiB free, .*50%"):
        warn_of_streaming(3 * 2**30, 9 * 2**29)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_makes_the_same_batches_whether_it_holds_the_images_or_not(monkeypatch) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(50, 32, 32, 3), dtype=np.uint8)
    labels, config = np.arange(50), TrainConfig(batch_size=16)
    tables = [ImageTable.from_arrays(pixels, labels, device) for device in ("cpu", "cuda")]
    monkeypatch.setattr(loader, "SHARE_OF_MEMORY", 0.0)
    with pytest.warns(UserWarning, match="streamed"):
        tables.append(ImageTable.from_arrays(pixels, labels, "cuda"))
    assert [table.images.device.type for table in tables] == ["cpu", "cuda", "cpu"]
    epochs = [list(t.training_batches(config, MEAN, STD, epoch=0)) for t in tables]
    for (images, targets), *others in zip(*epochs, strict=True):
        for other_images, other_targets in others:
            assert other_images.device.type == "cuda"
            torch.testing.assert_close(images, other_images.cpu(), rtol=0, atol=1.01 / 255)
            # A GPU divides differently in the last bit; whole grey levels must be rare.
            assert ((images - other_images.cpu()).abs() > 1e-5).float().mean() < 0.01
            assert torch.equal(targets, other_targets.cpu())

"""The plain form does what the engine does: transforms, first steps, whole curves."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.plain import Cutout, make_loader, make_transform, train_plain
from shike_core import stages
from shike_core.config import SubsetConfig, TrainConfig
from shike_core.data.augment import crop_and_flip, cutout, normalise
from shike_core.data.long_tail import cut
from shike_core.data.manifest import Subset, read_subset, write_subset
from shike_core.data.sources import Source

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.3, 0.25)
AS_THEY_ARE = {"crop_padding": 0, "flip": False, "auto_augment": False, "cutout_size": 0}
ONE_BATCH = TrainConfig(
    **AS_THEY_ARE,
    num_experts=2,
    width=4,
    batch_size=1000,
    stage1_epochs=3,
    stage1_warmup_start=0.0002,
    stage1_learning_rate=0.0003,
    stage2_epochs=2,
    warmup_epochs=1,
    precision="float32",
    device="cpu",
)
"""An epoch is one step on all images, so that their order does not matter."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def written(directory: Path, source: Source, rule: SubsetConfig) -> Subset:
    splits, identical, _ = cut(source, rule)
    write_subset(directory, splits, source, rule, identical)
    return read_subset(directory, splits=("train", "test"))


def outcomes(transform, image: np.ndarray, draws: int) -> set[bytes]:
    """Whatever a random transform makes of an image, as float32 pixels 0 to 255."""
    pixels = Image.fromarray(image)
    return {transform(pixels).mul(255).round().numpy().tobytes() for _ in range(draws)}


def numbered(side: int) -> np.ndarray:
    """An image whose pixels are all different and none of them 0."""
    return np.arange(1, 3 * side**2 + 1, dtype=np.uint8).reshape(side, side, 3)


def unit(config: TrainConfig, side: int):
    return make_transform(config, (side, side), (0.0,) * 3, (1.0,) * 3)


def test_without_augmentation_images_are_those_of_the_engine() -> None:
    image = np.random.default_rng(0).integers(256, size=(8, 6, 3), dtype=np.uint8)
    ours = normalise(torch.from_numpy(image).permute(2, 0, 1)[None], MEAN, STD)[0]
    plain = make_transform(replace(ONE_BATCH), (8, 6), MEAN, STD)(Image.fromarray(image))
    torch.testing.assert_close(plain, ours)


def test_crops_and_mirror_images_are_those_of_the_engine() -> None:
    torch.manual_seed(0)
    image = numbered(2)
    config = replace(ONE_BATCH, crop_padding=1, flip=True)
    places = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(2))
    batch = torch.from_numpy(image).permute(2, 0, 1).expand(len(places), -1, -1, -1)
    ours = crop_and_flip(batch, 1, places[:, :2], places[:, 2].bool())
    assert outcomes(unit(config, 2), image, 400) == {
        x.float().contiguous().numpy().tobytes() for x in ours
    }


@pytest.mark.parametrize("size", [2, 3])
def test_holes_are_those_of_the_engine(size) -> None:
    torch.manual_seed(0)
    image = numbered(4)
    centres = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    batch = torch.from_numpy(image).permute(2, 0, 1).expand(len(centres), -1, -1, -1)
    ours = {x.float().contiguous().numpy().tobytes() for x in cutout(batch, size, centres)}
    assert outcomes(unit(replace(ONE_BATCH, cutout_size=size), 4), image, 400) == ours


def test_a_hole_has_the_size_asked_for() -> None:
    torch.manual_seed(0)
    sizes = {int((Cutout(16)(torch.ones(3, 32, 32)) == 0).sum()) // 3 for _ in range(50)}
    assert max(sizes) == 16 * 16
    assert min(sizes) >= 8 * 8


def test_the_loader_gives_every_image_once(digits, tmp_path) -> None:
    subset = written(tmp_path, digits, SubsetConfig(dataset="digits", imbalance_factor=20))
    batches = list(make_loader(replace(ONE_BATCH, batch_size=100), subset, workers=0))
    assert {len(targets) for _, targets in batches[:-1]} == {100}
    labels = torch.cat([targets for _, targets in batches])
    assert labels.bincount().tolist() == subset.class_counts.tolist()


def test_the_same_images_in_one_batch_give_the_engines_curve(digits, tmp_path) -> None:
    subset = written(tmp_path / "s", digits, SubsetConfig(dataset="digits", imbalance_factor=40))
    engine, plain = [], []
    stages.train(
        ONE_BATCH, tmp_path / "s", tmp_path / "out", lambda m, _: engine.append(m["train/loss"])
    )
    model = train_plain(ONE_BATCH, subset, lambda m, _: plain.append(m["train/loss"]))
    assert plain[0] == pytest.approx(engine[0], rel=1e-5)
    # Sums in another order round differently, and a few units near 0 fall to the other side.
    assert plain == pytest.approx(engine, rel=0.01)
    assert plain[2] < 0.9 * plain[0]
    assert plain[4] < 0.9 * plain[3]
    assert model.stage2_heads[0].weight.grad is not None


def test_without_stage_2_the_heads_of_stage_1_are_deployed(digits, tmp_path) -> None:
    subset = written(tmp_path, digits, SubsetConfig(dataset="digits", imbalance_factor=40))
    config = replace(ONE_BATCH, stage1_epochs=1, stage2_epochs=0)
    model = train_plain(config, subset, lambda metrics, step: None)
    assert torch.equal(model.stage1_heads[1].weight, model.stage2_heads[1].weight)


@pytest.mark.parametrize(
    "extension",
    [
        {"averaging_epochs": 2.0},
        {"stage1_objective": "balanced_softmax"},
        {"stage2_label_smoothing": 0.1},
        {"stage2_logit_adjustment": 1.25},
        {"stage2_batch_norm": "eval"},
        {"consistency_weight": 1.0},
        {"mixup_alpha": 0.2},
    ],
)
def test_an_option_that_it_does_not_have_is_refused(extension) -> None:
    with pytest.raises(ValueError, match=next(iter(extension))):
        train_plain(replace(ONE_BATCH, **extension), None, lambda metrics, step: None)


@pytest.mark.slow
def test_whole_curves_agree_with_all_augmentation(cifar100, tmp_path) -> None:
    rule = SubsetConfig(dataset="cifar100", imbalance_factor=50, num_classes=10)
    subset = written(tmp_path / "subset", cifar100, rule)
    config = TrainConfig(
        width=4,
        scale=8,  # at 30 so short a training depends on chance
        num_experts=2,
        batch_size=64,
        stage1_epochs=5,
        stage1_warmup_start=0.02,
        stage1_learning_rate=0.05,
        stage2_epochs=2,
        stage2_warmup_start=0.02,
        stage2_learning_rate=0.05,
        warmup_epochs=1,
        device="cpu",
    )
    engine, plain = np.zeros((2, config.epochs)), np.zeros((2, config.epochs))
    for seed in range(2):
        mine = replace(config, seed=seed)
        log = partial(note, engine[seed])
        stages.train(mine, tmp_path / "subset", tmp_path / str(seed), log)
        train_plain(mine, subset, partial(note, plain[seed]))
    assert engine.mean(axis=0) == pytest.approx(plain.mean(axis=0), rel=0.08)
    for losses in (engine, plain):
        assert losses[:, 4].mean() < 0.75 * losses[:, 0].mean()
        assert losses[:, 6].mean() < losses[:, 5].mean()


def note(losses: np.ndarray, metrics: Mapping[str, float], epoch: int) -> None:
    losses[epoch] = metrics["train/loss"]

"""Recipes: complete, named, and true to the paper where they say so."""

import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from shike_core.config import Recipe, SubsetConfig, TrainConfig
from shike_core.losses import stage1_loss
from shike_core.recipes import (
    ABLATIONS,
    BASELINES,
    PER_IMAGE,
    QUIRKS,
    RECIPES,
    VARIANTS,
    cifar10_lt,
    cifar100_lt,
    digits_lt,
    distillation_weights,
    recipe_named,
    variant,
    variant_of,
)

LARGER = ("imagenet-lt", "imagenet-lt-resnext50", "inaturalist2018", "places-lt")


def variants_for(base: str) -> list[str]:
    """Those that a recipe has: a consistent training needs crops of the image's own size."""
    return [name for name in VARIANTS if name != "consistent" or base not in LARGER]


@pytest.mark.parametrize("base", RECIPES)
def test_a_variant_is_recognised_by_its_training(base) -> None:
    assert variant_of(RECIPES[base]().train) is None
    for name in variants_for(base):
        assert variant_of(recipe_named(f"{base}/{name}").train) == name
    seeded = replace(recipe_named(f"{base}/no-dkt").train, seed=3, stage1_epochs=7)
    assert variant_of(seeded) == "no-dkt"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_goes_by_its_own_name(name) -> None:
    recipe = recipe_named(name)
    assert isinstance(recipe, Recipe)
    assert recipe.name == name
    assert recipe.register.model_name == f"shike-{name}"


def test_an_unknown_recipe_lists_the_known() -> None:
    choices = f"choose one of {', '.join(RECIPES)}, alone or followed by /VARIANT"
    for name in ("imagenet", "imagenet/no-dkt"):
        with pytest.raises(ValueError, match=f"unknown recipe 'imagenet'; {choices}"):
            recipe_named(name)
    with pytest.raises(ValueError, match=f"unknown recipe ''; {choices}"):
        recipe_named("/no-dkt")


@pytest.mark.parametrize("name", ["no-dk", "", "no-dkt/no-mutual"])
def test_an_unknown_variant_lists_the_known(name) -> None:
    choices = ", ".join(VARIANTS)
    with pytest.raises(ValueError, match=f"unknown variant '{name}' of digits-lt; .* {choices}"):
        recipe_named(f"digits-lt/{name}")


def test_cifar100_lt_is_the_authors_recipe() -> None:
    recipe = cifar100_lt()
    subset, train = recipe.subset, recipe.train
    assert (subset.dataset, subset.imbalance_factor, subset.profile) == ("cifar100", 100, "exp")
    assert (subset.selection, subset.class_order) == ("first", "label")
    assert (train.num_experts, train.width, train.scale) == (3, 16, 30)
    assert (train.stage1_epochs, train.stage2_epochs, train.batch_size) == (180, 20, 128)
    assert (train.momentum, train.weight_decay) == (0.9, 5e-4)
    assert (train.crop_padding, train.cutout_size) == (4, 16)
    assert train.flip
    assert train.auto_augment
    assert cifar10_lt().train == replace(train, dkt_weight=1.0, mutual_weight=0.1)


def test_distillation_is_as_strong_for_each_image_whatever_the_number_of_classes() -> None:
    assert distillation_weights(100) == {"dkt_weight": 10, "mutual_weight": 1}
    logits = 3 * torch.randn(6, 3, 100, generator=torch.Generator().manual_seed(0))
    # Classes that no expert thinks possible change nothing but the number of classes.
    more = torch.cat([logits, torch.full((6, 3, 300), -1e3)], dim=-1)
    ours, theirs = (
        stage1_loss(
            values, torch.arange(6), teacher_target="masked", **distillation_weights(num_classes)
        )
        for values, num_classes in ((more, 400), (logits, 100))
    )
    torch.testing.assert_close(ours.mutual_distillation, theirs.mutual_distillation)
    torch.testing.assert_close(
        ours.dynamic_knowledge_transfer, theirs.dynamic_knowledge_transfer, rtol=1e-4, atol=0
    )


CLASSES = {
    "digits-lt": 10, "cifar10-lt": 10, "cifar100-lt": 100, "imagenet-lt": 1000,
    "imagenet-lt-resnext50": 1000, "inaturalist2018": 8142, "places-lt": 365,
}  # fmt: skip


@pytest.mark.parametrize("base", RECIPES)
def test_every_recipe_distils_as_strongly_for_each_image(base) -> None:
    train, classes = RECIPES[base]().train, CLASSES[base]
    divisor = classes if train.kl_reduction == "mean" else 1
    assert train.dkt_weight / divisor == pytest.approx(0.1)
    assert train.mutual_weight / divisor == pytest.approx(0.01)


@pytest.mark.parametrize("num_classes", [10, 365, 8142])
def test_both_ways_to_write_the_weights_of_distillation_are_one(num_classes) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(6, 3, num_classes, generator=generator, dtype=torch.float64)
    targets = torch.arange(6)
    ours = stage1_loss(logits, targets, **PER_IMAGE)
    theirs = stage1_loss(logits, targets, **distillation_weights(num_classes))
    assert ours.dynamic_knowledge_transfer > 0
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("recipe", [cifar100_lt, cifar10_lt, digits_lt])
def test_the_imbalance_factor_can_be_given(recipe) -> None:
    assert recipe(imbalance_factor=10).subset.imbalance_factor == 10
    with pytest.raises(ValueError, match="probably meant as 100"):
        recipe(imbalance_factor=0.01)


@pytest.mark.parametrize("base", LARGER)
def test_the_larger_recipes_take_all_of_a_long_tailed_source(base) -> None:
    recipe = RECIPES[base]()
    subset, train = recipe.subset, recipe.train
    assert (subset.imbalance_factor, subset.short_side, subset.image_size) == (0, 256, 0)
    assert (train.crop, train.crop_size, train.flip) == ("resized", 224, True)
    assert (train.num_experts, train.width, train.momentum) == (3, 64, 0.9)
    assert train.auto_augment is False
    assert train.cutout_size == 0
    # The warm-up rises as that of CIFAR100-LT does: a sixth of the peak more in each epoch.
    assert train.stage1_warmup_start == pytest.approx(train.stage1_learning_rate / 6)
    assert train.stage2_warmup_start == pytest.approx(train.stage2_learning_rate * 3 / 8)


@pytest.mark.parametrize(
    ("base", "dataset", "network", "sizes", "rates"),
    [  # epochs of both stages and batch; peak rates and weight decay
        ("imagenet-lt", "imagenet_lt", "resnet50", (180, 20, 256), (0.1, 0.1, 5e-4)),
        ("imagenet-lt-resnext50", "imagenet_lt", "resnext50_32x4d", (180, 20, 256),
         (0.1, 0.1, 5e-4)),
        ("inaturalist2018", "inaturalist2018", "resnet50", (100, 30, 512), (0.2, 0.2, 2e-4)),
        ("places-lt", "places_lt", "resnet152", (30, 10, 128), (0.01, 0.05, 4e-4)),
    ],
)  # fmt: skip
def test_values_from_published_trainings(base, dataset, network, sizes, rates) -> None:
    recipe = RECIPES[base]()
    train = recipe.train
    assert (recipe.subset.dataset, train.network) == (dataset, network)
    assert (train.stage1_epochs, train.stage2_epochs, train.batch_size) == sizes
    assert (train.stage1_learning_rate, train.stage2_learning_rate, train.weight_decay) == rates
    if base == "places-lt":
        assert train.pretrained
        assert (train.trunk_learning_rate, train.schedule, train.warmup_epochs) == (0.1, "step", 0)
        assert train.rand_augment == 0
    else:
        assert not train.pretrained
        assert (train.trunk_learning_rate, train.schedule, train.warmup_epochs) == (1, "cosine", 5)
        assert (train.rand_augment, train.rand_augment_magnitude) == (2, 10)


def test_digits_are_never_turned_into_other_signs() -> None:
    train = digits_lt().train
    assert not train.flip
    assert not train.auto_augment


# Variants.

PLAIN = {"num_experts": 1, "fusion": False, "dkt_weight": 0, "mutual_weight": 0}
EXPECTED = {
    "cross-entropy": PLAIN | {"classifier": "linear", "stage1_epochs": 200, "stage2_epochs": 0},
    "balanced-softmax": PLAIN
    | {
        "classifier": "linear",
        "stage1_epochs": 200,
        "stage2_epochs": 0,
        "stage1_objective": "balanced_softmax",
    },
    "crt": PLAIN,
    "no-fusion": {"fusion": False},
    "no-dkt": {"dkt_weight": 0},
    "no-mutual": {"mutual_weight": 0},
    "experts-1": {"num_experts": 1},
    "experts-2": {"num_experts": 2},
    "experts-4": {"num_experts": 4},
    "experts-5": {"num_experts": 5},
    "detached-teachers": {"detach_teachers": True},
    "masked-target": {"teacher_target": "masked"},
    "batch-mean": {"kl_reduction": "batchmean"},
    "relu-all": {"alignment_relu": "all"},
    "relu-none": {"alignment_relu": "none"},
    "frozen-batch-norm": {"stage2_batch_norm": "eval"},
}
"""What a variant of CIFAR100-LT trains differently; everything else is as in the paper's recipe."""


@pytest.mark.parametrize("name", EXPECTED)
def test_a_variant_changes_this_and_nothing_else(name) -> None:
    base, changed = cifar100_lt(), recipe_named(f"cifar100-lt/{name}")
    before, after = asdict(base.train), asdict(changed.train)
    differences = {field: after[field] for field in after if after[field] != before[field]}
    assert differences == EXPECTED[name]
    assert changed.subset == base.subset
    assert changed.evaluate == base.evaluate
    assert changed.train.epochs == base.train.epochs == 200


def test_the_groups_of_variants() -> None:
    assert set(EXPECTED) <= set(VARIANTS)
    groups = [set(group) for group in (BASELINES, ABLATIONS, QUIRKS)]
    assert len(set.union(*groups)) == sum(map(len, groups))
    of_training = {field.name for field in fields(TrainConfig)}
    assert all(changes.keys() <= of_training for changes in VARIANTS.values())


@pytest.mark.parametrize(
    ("base", "name"), [(base, name) for base in RECIPES for name in variants_for(base)]
)
def test_a_variant_of_any_recipe_has_a_model_of_its_own(base, name) -> None:
    recipe = recipe_named(f"{base}/{name}")
    assert recipe.name == f"{base}/{name}"
    assert recipe.register.model_name == f"shike-{base}-{name}"
    assert re.fullmatch("[a-z0-9-]+", name)
    assert recipe.train != recipe_named(base).train


@pytest.mark.parametrize("base", LARGER)
def test_a_variant_that_contradicts_its_recipe(base) -> None:
    message = f"{base} has no variant 'consistent': consistency_weight is for crop=padded"
    with pytest.raises(ValueError, match=message):
        recipe_named(f"{base}/consistent")


def test_the_baselines_of_a_larger_recipe_are_its_own_network_plain() -> None:
    train = recipe_named("places-lt/cross-entropy").train
    assert (train.network, train.pretrained, train.num_experts) == ("resnet152", True, 1)
    assert (train.stage1_epochs, train.stage2_epochs) == (40, 0)
    usual = recipe_named("inaturalist2018/batch-mean").train
    assert (usual.dkt_weight, usual.mutual_weight) == (10, 1)  # 0.1 and 0.01 in the recipe


def test_a_variant_of_a_smaller_problem() -> None:
    whole = cifar100_lt()
    small = replace(
        whole,
        subset=replace(whole.subset, num_classes=20, image_size=16),
        train=replace(whole.train, stage1_epochs=27, stage2_epochs=3, width=8),
        register=replace(whole.register, model_name="small"),
    )
    plain = variant(small, "cross-entropy")
    assert plain.subset == SubsetConfig(
        dataset="cifar100", imbalance_factor=100, num_classes=20, image_size=16
    )
    assert (plain.train.width, plain.train.stage1_epochs, plain.train.stage2_epochs) == (8, 30, 0)
    assert plain.register.model_name == "small-cross-entropy"
    assert variant(cifar100_lt(imbalance_factor=50), "crt").subset.imbalance_factor == 50


def test_every_variant_is_explained() -> None:
    text = (Path(__file__).parents[1] / "docs" / "method.md").read_text()
    explained = re.findall(r"^\| `([a-z0-9-]+)` \|", text, flags=re.MULTILINE)
    assert sorted(explained) == sorted(VARIANTS)

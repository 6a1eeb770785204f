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


@pytest.mark.parametrize("base", RECIPES)
def test_a_variant_is_recognised_by_its_training(base) -> None:
    assert variant_of(RECIPES[base]().train) is None
    for name in VARIANTS:
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
    choices = "choose one of digits-lt, cifar10-lt, cifar100-lt, alone or followed by /VARIANT"
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


@pytest.mark.parametrize("recipe", [cifar100_lt, cifar10_lt, digits_lt])
def test_the_imbalance_factor_can_be_given(recipe) -> None:
    assert recipe(imbalance_factor=10).subset.imbalance_factor == 10
    with pytest.raises(ValueError, match="probably meant as 100"):
        recipe(imbalance_factor=0.01)


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


@pytest.mark.parametrize("base", RECIPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_any_recipe_has_a_model_of_its_own(base, name) -> None:
    recipe = recipe_named(f"{base}/{name}")
    assert recipe.name == f"{base}/{name}"
    assert recipe.register.model_name == f"shike-{base}-{name}"
    assert re.fullmatch("[a-z0-9-]+", name)
    assert recipe.train != recipe_named(base).train


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

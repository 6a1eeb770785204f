"""Recipes: complete, named, and true to the paper where they say so."""

import pytest

from shike_core.config import Recipe
from shike_core.recipes import RECIPES, cifar10_lt, cifar100_lt, digits_lt, recipe_named


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_goes_by_its_own_name(name) -> None:
    recipe = recipe_named(name)
    assert isinstance(recipe, Recipe)
    assert recipe.name == name
    assert recipe.register.model_name == f"shike-{name}"


def test_an_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(
        ValueError, match="unknown recipe 'imagenet'; choose one of digits-lt, cifar10-lt, cifar100"
    ):
        recipe_named("imagenet")


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
    assert cifar10_lt().train == train


@pytest.mark.parametrize("recipe", [cifar100_lt, cifar10_lt, digits_lt])
def test_the_imbalance_factor_can_be_given(recipe) -> None:
    assert recipe(imbalance_factor=10).subset.imbalance_factor == 10
    with pytest.raises(ValueError, match="probably meant as 100"):
        recipe(imbalance_factor=0.01)


def test_digits_are_never_turned_into_other_signs() -> None:
    train = digits_lt().train
    assert not train.flip
    assert not train.auto_augment

"""Full configurations as functions, named after the data set they are for."""

from collections.abc import Callable

from shike_core.config import Recipe, RegisterConfig, SubsetConfig, TrainConfig


def cifar100_lt(imbalance_factor: float = 100.0) -> Recipe:
    """The authors' recipe for CIFAR100-LT with ResNet-32: 180 + 20 epochs, batch 128."""
    return Recipe(
        name="cifar100-lt",
        subset=SubsetConfig(dataset="cifar100", imbalance_factor=imbalance_factor),
        train=TrainConfig(),
        register=RegisterConfig(model_name="shike-cifar100-lt"),
    )


def cifar10_lt(imbalance_factor: float = 100.0) -> Recipe:
    """CIFAR10-LT, trained as CIFAR100-LT."""
    return Recipe(
        name="cifar10-lt",
        subset=SubsetConfig(dataset="cifar10", imbalance_factor=imbalance_factor),
        train=TrainConfig(),
        register=RegisterConfig(model_name="shike-cifar10-lt"),
    )


def digits_lt(imbalance_factor: float = 20.0) -> Recipe:
    """Handwritten digits of 8 x 8 pixels: minutes on a CPU, the pipeline's default.

    A mirrored or inverted digit is another sign, so only a small random crop augments them.
    Batch and learning rate were chosen on a validation part: at the rates for CIFAR the 400
    images do not settle within these epochs. In bfloat16 some seeds do not either, see
    docs/results.md.
    """
    return Recipe(
        name="digits-lt",
        subset=SubsetConfig(dataset="digits", imbalance_factor=imbalance_factor),
        train=TrainConfig(
            batch_size=32,
            stage1_epochs=60,
            stage1_learning_rate=0.05,
            stage1_warmup_start=0.01,
            stage2_epochs=10,
            stage2_learning_rate=0.05,
            stage2_warmup_start=0.02,
            crop_padding=1,
            flip=False,
            auto_augment=False,
            cutout_size=0,
            precision="float32",
        ),
        register=RegisterConfig(model_name="shike-digits-lt"),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits-lt": digits_lt,
    "cifar10-lt": cifar10_lt,
    "cifar100-lt": cifar100_lt,
}
"""Recipes by the name a user types."""


def recipe_named(name: str) -> Recipe:
    """Look a recipe up.

    Raises:
        ValueError: there is no recipe of that name.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()

"""Full configurations as functions, named after the data set they are for, and their variants."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from shike_core.config import Recipe, RegisterConfig, SubsetConfig, TrainConfig

Changes = dict[str, Any]
"""Values for fields of `TrainConfig`."""


def distillation_weights(num_classes: int) -> Changes:
    """The authors' weights of both distillation terms, for another number of classes.

    Their KL terms are means over batch and classes, so the weights 10 and 1 that suit 100 classes
    are ten times as strong for 10. These are as strong for each image: docs/results.md has what
    that is worth.

    Args:
        num_classes: of the data set.
    """
    return {"dkt_weight": 10.0 * num_classes / 100, "mutual_weight": num_classes / 100}


def cifar100_lt(imbalance_factor: float = 100.0) -> Recipe:
    """The authors' recipe for CIFAR100-LT with ResNet-32: 180 + 20 epochs, batch 128."""
    return Recipe(
        name="cifar100-lt",
        subset=SubsetConfig(dataset="cifar100", imbalance_factor=imbalance_factor),
        train=TrainConfig(),
        register=RegisterConfig(model_name="shike-cifar100-lt"),
    )


def cifar10_lt(imbalance_factor: float = 100.0) -> Recipe:
    """CIFAR10-LT, trained as CIFAR100-LT, with distillation as strong as there."""
    return Recipe(
        name="cifar10-lt",
        subset=SubsetConfig(dataset="cifar10", imbalance_factor=imbalance_factor),
        train=TrainConfig(**distillation_weights(10)),
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
            **distillation_weights(10),
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


_ONE_PLAIN_EXPERT: Changes = {
    "num_experts": 1, "fusion": False, "dkt_weight": 0.0, "mutual_weight": 0.0,
}  # fmt: skip
BASELINES: dict[str, Changes] = {
    "cross-entropy": _ONE_PLAIN_EXPERT | {"classifier": "linear", "stage2_epochs": 0},
    "balanced-softmax": _ONE_PLAIN_EXPERT
    | {"classifier": "linear", "stage2_epochs": 0, "stage1_objective": "balanced_softmax"},
    "crt": _ONE_PLAIN_EXPERT,
}
"""What the method is compared with: the same ResNet, data and epochs with one plain expert."""
ABLATIONS: dict[str, Changes] = {
    "no-fusion": {"fusion": False},
    "no-dkt": {"dkt_weight": 0.0},
    "no-mutual": {"mutual_weight": 0.0},
    **{f"experts-{count}": {"num_experts": count} for count in (1, 2, 4, 5)},
}
"""The method without one of its parts, as in the paper, and with other numbers of experts."""
QUIRKS: dict[str, Changes] = {
    "detached-teachers": {"detach_teachers": True},
    "masked-target": {"teacher_target": "masked"},
    "batch-mean": {"kl_reduction": "batchmean"},  # with the weights 10 and 1 all the same
    "relu-all": {"alignment_relu": "all"},
    "relu-none": {"alignment_relu": "none"},
    "frozen-batch-norm": {"stage2_batch_norm": "eval"},
}
"""The method with one thing done as one would write it from the paper, not as the authors did."""
BEYOND: dict[str, Changes] = {
    "averaged": {"averaging_epochs": 5.0},
    "smoothed": {"stage2_label_smoothing": 0.1},
    "consistent": {"consistency_weight": 1.0},
    "balanced-stage1": {"stage1_objective": "balanced_softmax"},
}
"""The method with one thing more; what each of them is worth has not been measured yet."""
TRIALS: dict[str, Changes] = {
    "smoke": {"stage1_epochs": 1, "stage2_epochs": 1, "warmup_epochs": 1, "checkpoint_every": 1},
}
"""Two epochs, to try a machine or a cluster in minutes; accuracies mean nothing."""
VARIANTS: dict[str, Changes] = BASELINES | ABLATIONS | QUIRKS | BEYOND | TRIALS
"""Changes of any recipe's training by the name a user types after a slash; see docs/method.md."""


def variant(base: Recipe, name: str) -> Recipe:
    """A recipe with one thing changed, under a name and a registered model of its own.

    The number of epochs stays: what stage 2 gives up goes to stage 1, unless the changes say both.

    Args:
        base: any recipe that is not itself a variant.
        name: a key of `VARIANTS`.

    Raises:
        ValueError: there is no variant of that name.
    """
    if name not in VARIANTS:
        raise ValueError(
            f"unknown variant {name!r} of {base.name}; choose one of {', '.join(VARIANTS)}"
        )
    changes = VARIANTS[name]
    stage1_epochs = base.train.epochs - changes.get("stage2_epochs", base.train.stage2_epochs)
    return replace(
        base,
        name=f"{base.name}/{name}",
        train=replace(base.train, **{"stage1_epochs": stage1_epochs} | changes),
        register=replace(base.register, model_name=f"{base.register.model_name}-{name}"),
    )


def variant_of(config: TrainConfig) -> str | None:
    """The variant whose changes a training has, the one with the most if there are several."""
    having = [
        name
        for name, changes in VARIANTS.items()
        if all(getattr(config, field) == value for field, value in changes.items())
    ]
    return max(having, key=lambda name: len(VARIANTS[name]), default=None)


def recipe_named(name: str) -> Recipe:
    """Look up ``BASE``, as in ``cifar100-lt``, or ``BASE/VARIANT``, as in ``cifar100-lt/no-dkt``.

    Raises:
        ValueError: there is no recipe or no variant of that name.
    """
    base, slash, change = name.partition("/")
    if base not in RECIPES:
        raise ValueError(
            f"unknown recipe {base!r}; choose one of {', '.join(RECIPES)}, alone or followed by "
            "/VARIANT"
        )
    return variant(RECIPES[base](), change) if slash else RECIPES[base]()

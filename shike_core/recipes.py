"""Full configurations as functions, named after the data set they are for, and their variants."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from shike_core.config import (
    Dataset,
    EvaluateConfig,
    Recipe,
    RegisterConfig,
    SubsetConfig,
    TrainConfig,
)

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


PER_IMAGE: Changes = {"kl_reduction": "batchmean", "dkt_weight": 0.1, "mutual_weight": 0.01}
"""The authors' weights of both distillation terms as they are for each image, whatever the number
of classes: as `distillation_weights`, written so that it need not be known."""
PHOTOGRAPHS: Changes = {
    "width": 64,  # as published
    "crop": "resized",
    "crop_size": 224,
    "auto_augment": False,
    "cutout_size": 0,
    "color_jitter": 0.4,
    "checkpoint_every": 5,  # an epoch takes minutes to an hour
}
"""What trainings on the larger data sets have in common; crops and colours of Cui et al. 2021."""
OF_PHOTOGRAPHS = EvaluateConfig(eval_batch_size=128)
"""Larger batches would only take more memory."""
RAND_AUGMENT: Changes = {"rand_augment": 2, "rand_augment_magnitude": 10}
"""Cui et al. 2021 (PaCo), for ImageNet-LT and iNaturalist 2018."""


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
        subset=SubsetConfig(
            dataset="digits", imbalance_factor=imbalance_factor, validation_per_class=10
        ),
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


def imagenet_lt() -> Recipe:
    """ResNet-50 on ImageNet-LT, 180 + 20 epochs, batch 256; not measured by us.

    The authors' code does not train on this data set. From the published trainings of others: in
    stage 1 epochs, cosine, weight decay, and the peak rate for this batch are those of Zhang et al.
    2022 (SADE); RandAugment is that of Cui et al. 2021 (PaCo); stage 2's peak is the 0.2 for
    batches of 512 of Kang et al. 2020. From CIFAR100-LT: stage 2's epochs, warm-up, scale and, for
    each image, the weights of distillation.
    """
    return Recipe(
        name="imagenet-lt",
        subset=_as_published("imagenet_lt"),
        train=TrainConfig(
            **PER_IMAGE | PHOTOGRAPHS | RAND_AUGMENT | _peaks(stage1=0.1, stage2=0.1),
            network="resnet50",
            batch_size=256,
            weight_decay=5e-4,
        ),
        evaluate=OF_PHOTOGRAPHS,
        register=RegisterConfig(model_name="shike-imagenet-lt"),
    )


def imagenet_lt_resnext50() -> Recipe:
    """ResNeXt-50 (32x4d) on ImageNet-LT, otherwise the same; results are published for either."""
    base = imagenet_lt()
    return replace(
        base,
        name="imagenet-lt-resnext50",
        train=replace(base.train, network="resnext50_32x4d"),
        register=replace(base.register, model_name="shike-imagenet-lt-resnext50"),
    )


def inaturalist2018() -> Recipe:
    """ResNet-50 on iNaturalist 2018, 100 + 30 epochs, batch 512; not measured by us.

    The authors' code does not train on this data set. From the published trainings of others: in
    stage 1 epochs, batch, peak rate and weight decay are those of Zhang et al. 2022 (SADE);
    RandAugment is that of Cui et al. 2021 (PaCo); epochs, batch and peak rate of stage 2 are those
    of Kang et al. 2020; scale 32 is usual for cosine heads on this data set. From CIFAR100-LT:
    warm-up, cosine and, for each image, the weights of distillation.
    """
    return Recipe(
        name="inaturalist2018",
        subset=_as_published("inaturalist2018"),
        train=TrainConfig(
            **PER_IMAGE | PHOTOGRAPHS | RAND_AUGMENT | _peaks(stage1=0.2, stage2=0.2),
            network="resnet50",
            scale=32.0,
            batch_size=512,
            stage1_epochs=100,
            stage2_epochs=30,
            weight_decay=2e-4,
        ),
        evaluate=OF_PHOTOGRAPHS,
        register=RegisterConfig(model_name="shike-inaturalist2018"),
    )


def places_lt() -> Recipe:
    """ResNet-152 on Places-LT from ImageNet weights, 30 + 10 epochs; not measured by us.

    The authors' code does not train on this data set. From the published trainings of others: in
    stage 1 epochs, batch, both rates, the steps at 10 and 20, no warm-up, and weight decay are
    those of Zhang et al. 2022 (SADE); stage 2 has the epochs of Kang et al. 2020, and its peak is
    their 0.1 for batches of 256. From CIFAR100-LT: scale and, for each image, the weights of
    distillation.
    """
    return Recipe(
        name="places-lt",
        subset=_as_published("places_lt"),
        train=TrainConfig(
            **PER_IMAGE | PHOTOGRAPHS | _peaks(stage1=0.01, stage2=0.05),
            network="resnet152",
            pretrained=True,
            batch_size=128,
            stage1_epochs=30,
            stage2_epochs=10,
            warmup_epochs=0,
            schedule="step",
            trunk_learning_rate=0.1,
            weight_decay=4e-4,
        ),
        evaluate=OF_PHOTOGRAPHS,
        register=RegisterConfig(model_name="shike-places-lt"),
    )


def _as_published(dataset: Dataset) -> SubsetConfig:
    """All of a data set that has a long tail of its own; images no larger than crops need."""
    return SubsetConfig(dataset=dataset, imbalance_factor=0.0, short_side=256)


def _peaks(stage1: float, stage2: float) -> Changes:
    """Peak learning rates, and warm-ups from the same fractions of them as for CIFAR100-LT."""
    authors = TrainConfig()
    return {
        "stage1_learning_rate": stage1,
        "stage1_warmup_start": stage1 * authors.stage1_warmup_start / authors.stage1_learning_rate,
        "stage2_learning_rate": stage2,
        "stage2_warmup_start": stage2 * authors.stage2_warmup_start / authors.stage2_learning_rate,
    }


RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits-lt": digits_lt,
    "cifar10-lt": cifar10_lt,
    "cifar100-lt": cifar100_lt,
    "imagenet-lt": imagenet_lt,
    "imagenet-lt-resnext50": imagenet_lt_resnext50,
    "inaturalist2018": inaturalist2018,
    "places-lt": places_lt,
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
    "batch-mean": {"kl_reduction": "batchmean", "dkt_weight": 10.0, "mutual_weight": 1.0},
    "relu-all": {"alignment_relu": "all"},
    "relu-none": {"alignment_relu": "none"},
    "frozen-batch-norm": {"stage2_batch_norm": "eval"},
}
"""The method with one thing done as one would write it from the paper, not as the authors did."""
BEYOND: dict[str, Changes] = {
    "averaged": {"averaging_epochs": 5.0},
    "smoothed": {"stage2_label_smoothing": 0.1},
    "logit-adjusted": {"stage2_logit_adjustment": 1.25},
    "rescaled": {"stage2_scale": 22.0},
    "consistent": {"consistency_weight": 1.0},
    "mixed": {"mixup_alpha": 0.2},
    "gated-mutual": PER_IMAGE
    | {"mutual_weight": 0.5, "mutual_teachers": "correct", "detach_teachers": True},
    "balanced-stage1": {"stage1_objective": "balanced_softmax"},
}
"""The method with one thing more; docs/results.md has what some of them are worth."""
PLUS: dict[str, Changes] = {
    "shike-plus": {"stage2_scale": 22.0, "stage2_logit_adjustment": 1.1},
}
"""The method with what has been worth something after full trainings; see docs/results.md."""
TRIALS: dict[str, Changes] = {
    "smoke": {"stage1_epochs": 1, "stage2_epochs": 1, "warmup_epochs": 1, "checkpoint_every": 1},
}
"""Two epochs, to try a machine or a cluster in minutes; accuracies mean nothing."""
VARIANTS: dict[str, Changes] = BASELINES | ABLATIONS | QUIRKS | BEYOND | PLUS | TRIALS
"""Changes of any recipe's training by the name a user types after a slash; see docs/method.md."""


def variant(base: Recipe, name: str) -> Recipe:
    """A recipe with one thing changed, under a name and a registered model of its own.

    The number of epochs stays: what stage 2 gives up goes to stage 1, unless the changes say both.

    Args:
        base: any recipe that is not itself a variant.
        name: a key of `VARIANTS`.

    Raises:
        ValueError: there is no variant of that name, or its change does not go with the recipe.
    """
    if name not in VARIANTS:
        raise ValueError(
            f"unknown variant {name!r} of {base.name}; choose one of {', '.join(VARIANTS)}"
        )
    changes = VARIANTS[name]
    stage1_epochs = base.train.epochs - changes.get("stage2_epochs", base.train.stage2_epochs)
    try:
        train = replace(base.train, **{"stage1_epochs": stage1_epochs} | changes)
    except ValueError as error:
        raise ValueError(f"{base.name} has no variant {name!r}: {error}") from error
    return replace(
        base,
        name=f"{base.name}/{name}",
        train=train,
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

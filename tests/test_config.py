"""Configurations refuse what cannot work, and explain themselves."""

from dataclasses import FrozenInstanceError, asdict, fields, replace
from functools import partial

import pytest

from pipelines.parameters import field_docs
from shike_core.config import (
    EvaluateConfig,
    RegisterConfig,
    SubsetConfig,
    TrainConfig,
    config_digest,
)

INF, NAN = float("inf"), float("nan")
GOOD = {
    SubsetConfig: partial(SubsetConfig, dataset="digits"),
    TrainConfig: TrainConfig,
    EvaluateConfig: EvaluateConfig,
    RegisterConfig: partial(RegisterConfig, model_name="a model"),
}
BAD = {
    SubsetConfig: {
        "dataset": ["mnist", ""],
        "imbalance_factor": [0.01, -1, 0.999, INF, NAN],
        "profile": ["linear"],
        "selection": ["last"],
        "class_order": ["random"],
        "subset_seed": [-1, 2**32],
        "validation_per_class": [-1],
        "leakage": ["ignore", "Keep"],
        "num_classes": [-1, 1],
        "image_size": [-1, 3],
        "test_per_class": [-1],
        "short_side": [-1, 3],
        "storage": ["copied"],
        "shard_mib": [0],
        "max_unreadable": [-0.1, 1, NAN],
    },
    TrainConfig: {
        "network": ["resnet18", "ResNet50"],
        "num_experts": [0, -1],
        "width": [0],
        "scale": [0, -1, INF, NAN],
        "alignment_relu": ["last"],
        "classifier": ["cosinus"],
        "batch_size": [0],
        "stage1_epochs": [0],
        "stage1_learning_rate": [0, -0.1, INF, NAN],
        "stage1_warmup_start": [0, NAN],
        "stage2_epochs": [-1],
        "stage2_learning_rate": [0, INF],
        "stage2_warmup_start": [-1],
        "warmup_epochs": [-1],
        "schedule": ["linear"],
        "trunk_learning_rate": [-0.1, INF, NAN],
        "momentum": [-0.1, 1, NAN],
        "weight_decay": [-1e-4, INF, NAN],
        "stage1_objective": ["focal"],
        "stage2_label_smoothing": [-0.1, 1, NAN],
        "stage2_logit_adjustment": [-0.1, INF, NAN],
        "stage2_scale": [-1, INF, NAN],
        "averaging_epochs": [-0.1, INF, NAN],
        "consistency_weight": [-0.1, INF, NAN],
        "mixup_alpha": [-0.1, INF, NAN],
        "dkt_weight": [-1, NAN],
        "mutual_weight": [-1, INF],
        "temperature": [0, -1, NAN],
        "kl_reduction": ["sum"],
        "teacher_target": ["one"],
        "mutual_teachers": ["none"],
        "stage2_batch_norm": ["frozen"],
        "crop": ["random"],
        "crop_size": [0],
        "crop_padding": [-1],
        "cutout_size": [-1],
        "rand_augment": [-1],
        "rand_augment_magnitude": [-1, 31],
        "color_jitter": [-0.1, NAN],
        "micro_batch_size": [-1],
        "batch_norm": ["global"],
        "processes": [-1],
        "workers": [-1],
        "seed": [-1, 2**32],
        "precision": ["float8"],
        "device": ["tpu", "cuda:7"],
        "acceleration": ["fast"],
        "checkpoint_every": [0],
    },
    EvaluateConfig: {
        "eval_batch_size": [0],
        "calibration_bins": [0],
        "device": ["gpu"],
        "workers": [-1],
    },
    RegisterConfig: {
        "model_name": ["", "  ", "a/b", "a:1", "anna's"],
        "max_accuracy_drop": [-0.1, NAN],
        "max_few_shot_drop": [-0.1],
        "max_medium_shot_drop": [-0.1],
        "max_many_shot_drop": [-0.1],
        "metric": ["few_shot"],
        "min_accuracy": [-0.1, 56.3, NAN],
        "min_few_shot_accuracy": [-0.1, 1.1],
    },
}


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (config, name, value)
        for config, names in BAD.items()
        for name, values in names.items()
        for value in values
    ],
)
def test_a_bad_value_is_named_with_what_was_got(config, name, value) -> None:
    good = GOOD[config]()
    with pytest.raises(ValueError, match=name) as caught:
        replace(good, **{name: value})
    if str(value).strip():
        assert str(value) in str(caught.value)


def test_no_field_but_a_switch_goes_unchecked() -> None:
    for config, names in BAD.items():
        switches = {field.name for field in fields(config) if field.type is bool}
        assert {field.name for field in fields(config)} - switches == names.keys()


@pytest.mark.parametrize(("value", "hint"), [(0.01, "100"), (0.05, "20"), (0.5, "2")])
def test_an_imbalance_factor_the_wrong_way_round_gets_a_hint(value, hint) -> None:
    with pytest.raises(ValueError, match=f"{value} is probably meant as {hint}$"):
        SubsetConfig(dataset="cifar100", imbalance_factor=value)


def test_an_unknown_choice_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown dataset 'mnist'; .* digits, cifar10, cifar100"):
        SubsetConfig(dataset="mnist")


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (SubsetConfig, {"imbalance_factor": 1, "subset_seed": 2**32 - 1}),
        (SubsetConfig, {"imbalance_factor": 0, "max_unreadable": 0, "shard_mib": 1}),
        (TrainConfig, {"num_experts": 1, "stage1_epochs": 1, "stage2_epochs": 1, "momentum": 0}),
        (TrainConfig, {"crop_padding": 0, "cutout_size": 0, "warmup_epochs": 0, "dkt_weight": 0}),
        (RegisterConfig, {"max_accuracy_drop": 0.0, "max_few_shot_drop": 1.0, "min_accuracy": 1}),
    ],
)
def test_values_at_the_border_are_good(config, values) -> None:
    assert asdict(replace(GOOD[config](), **values)).items() >= values.items()


PHOTOGRAPHS = {"crop": "resized", "auto_augment": False, "cutout_size": 0}


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (SubsetConfig, {"image_size": 32, "short_side": 32}, "give one of them"),
        (SubsetConfig, {"short_side": 32}, "short_side is for images in files, and those of digi"),
        (SubsetConfig, {"storage": "referenced"}, "with dataset=digits they are held in memory"),
        (
            SubsetConfig,
            {"dataset": "table", "storage": "referenced", "image_size": 32},
            "with image_size they are held in memory; choose storage=packed",
        ),
        (
            SubsetConfig,
            {"dataset": "table", "storage": "referenced", "short_side": 256},
            "leaves images as they are, but short_side is 256",
        ),
        (TrainConfig, {"pretrained": True}, "no pretrained weights for resnet32"),
        (TrainConfig, {"network": "resnet50"}, "width=16 is that of resnet32"),
        (
            TrainConfig,
            {"network": "resnet50", "width": 32, "pretrained": True},
            "pretrained weights are for width=64, got 32",
        ),
        (TrainConfig, {"network": "resnext50_32x4d", "width": 24}, "a multiple of 16"),
        (TrainConfig, {"trunk_learning_rate": 0}, "set pretrained=True"),
        (
            TrainConfig,
            {"crop": "resized"},
            "auto_augment and cutout_size cannot be had with crop=resized; choose crop=padded",
        ),
        (
            TrainConfig,
            {"micro_batch_size": 129},
            "micro_batch_size=129 is more than batch_size=128",
        ),
        (TrainConfig, {"processes": 129}, "processes=129 is more than batch_size=128"),
        (TrainConfig, {"rand_augment": 2}, "rand_augment cannot be had with crop=padded"),
        (TrainConfig, {"color_jitter": 0.4}, "color_jitter cannot be had with crop=padded"),
        (
            TrainConfig,
            {"stage2_epochs": 0, "stage2_logit_adjustment": 1.25},
            "stage2_epochs=0 leaves it out; set it to 1, or stage2_epochs to more",
        ),
        (
            TrainConfig,
            {"stage2_epochs": 0, "stage2_batch_norm": "eval"},
            "stage2_batch_norm=eval is for classifier retraining",
        ),
        (
            TrainConfig,
            {"stage2_epochs": 0, "stage2_scale": 20.0},
            "stage2_scale=20.0 is for classifier retraining.*set it to 0, or stage2_epochs",
        ),
        (
            TrainConfig,
            {"classifier": "linear", "stage2_scale": 20.0},
            "stage2_scale=20.0 is for cosine heads.*set it to 0, or classifier to cosine",
        ),
        (
            TrainConfig,
            PHOTOGRAPHS | {"consistency_weight": 1.0},
            "consistency_weight is for crop=padded",
        ),
        (
            TrainConfig,
            {"mutual_weight": 0.0, "mutual_teachers": "correct"},
            "mutual_teachers=correct is for mutual distillation.*or mutual_weight to more",
        ),
        (
            TrainConfig,
            {"consistency_weight": 1.0, "mixup_alpha": 0.2},
            "consistency_weight=1.0 compares views of one image, and mixup_alpha=0.2 mixes two",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(config, values, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GOOD[config](), **values)


@pytest.mark.parametrize("config", GOOD)
def test_every_field_has_a_docstring_under_it(config) -> None:
    docs = field_docs(config)
    assert docs.keys() == {field.name for field in fields(config)}
    assert all(doc.endswith(".") for doc in docs.values())


@pytest.mark.parametrize("config", GOOD)
def test_configurations_are_frozen(config) -> None:
    good = GOOD[config]()
    with pytest.raises(FrozenInstanceError):
        setattr(good, fields(good)[0].name, None)


def test_epochs_are_those_of_both_stages() -> None:
    assert TrainConfig(stage1_epochs=7, stage2_epochs=2).epochs == 9


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1.0),
        ({"stage2_logit_adjustment": 1.1}, 1.1),
        ({"stage2_epochs": 0}, 0.0),
        ({"stage2_epochs": 0, "stage1_objective": "balanced_softmax"}, 1.0),
    ],
    ids=str,
)
def test_the_logit_adjustment_is_that_of_the_heads_that_are_deployed(changes, expected) -> None:
    assert replace(TrainConfig(), **changes).logit_adjustment == expected


@pytest.mark.parametrize(
    ("whole", "fraction"),
    [
        (TrainConfig(averaging_epochs=5), {"averaging_epochs": 5.0}),
        (SubsetConfig(dataset="digits", imbalance_factor=20), {"imbalance_factor": 20.0}),
        (RegisterConfig(model_name="m", max_few_shot_drop=1), {"max_few_shot_drop": 1.0}),
    ],
)
def test_a_whole_number_is_the_same_configuration_as_its_fraction(whole, fraction) -> None:
    assert config_digest(whole) == config_digest(replace(whole, **fraction))
    assert type(whole.__dict__[next(iter(fraction))]) is float


def test_config_digest_tells_any_difference() -> None:
    configs = [
        TrainConfig(),
        TrainConfig(seed=1),
        TrainConfig(weight_decay=5.0000001e-4),
        TrainConfig(flip=False),
        EvaluateConfig(),
    ]
    digests = [config_digest(config) for config in configs]
    digests += [config_digest(TrainConfig(), "subset"), config_digest(TrainConfig(), "sub", "set")]
    assert len(set(digests)) == len(digests)
    assert config_digest(TrainConfig(), "subset") == digests[5]
    assert {len(digest) for digest in digests} == {16}

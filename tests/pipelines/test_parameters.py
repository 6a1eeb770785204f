from dataclasses import fields, replace

import pytest

from pipelines.parameters import EXTRA, STEPS, arguments, choices, describe, field_docs
from shike_core.config import (
    EvaluateConfig,
    Recipe,
    RegisterConfig,
    SubsetConfig,
    TrainConfig,
)
from shike_core.recipes import digits_lt


@pytest.mark.parametrize("config", STEPS.values())
def test_every_field_of_a_configuration_has_a_docstring(config):
    docs = field_docs(config)
    assert list(docs) == [field.name for field in fields(config)]
    assert all(text.endswith(".") and "\n" not in text for text in docs.values())


def test_describe_quotes_the_docstring_in_one_line():
    assert describe("step2_batch_size") == "Images per step, of all processes together."
    assert "(transfers between numbers of classes: divide" in describe("step2_kl_reduction")


@pytest.mark.parametrize("name", EXTRA)
def test_parameters_without_a_field_are_described_and_free(name):
    assert describe(name) == EXTRA[name]
    assert choices(name) == ()


def test_an_unknown_parameter_has_no_description():
    with pytest.raises(KeyError, match="learning_rat"):
        describe("step2_learning_rat")


def test_choices_are_those_of_the_type():
    assert choices("step1_profile") == ("exp", "step")
    assert choices("step3_device") == ("auto", "cpu", "cuda")
    assert choices("step2_flip") == ()
    assert choices("step2_num_experts") == ()


def test_arguments_hold_every_value_of_the_recipe():
    recipe = Recipe(
        name="other",
        subset=SubsetConfig(dataset="cifar10", selection="random", subset_seed=7),
        train=replace(digits_lt().train, seed=8),
        evaluate=EvaluateConfig(device="cpu"),
        register=RegisterConfig(model_name="other", max_few_shot_drop=0.25),
    )
    values = arguments(recipe, data_dir="/data", checkpoint_dir="/kept", stage1_from="a@champion")
    assert values["step1_dataset"] == "cifar10"
    assert values["step1_subset_seed"] == 7
    assert values["step2_seed"] == 8
    assert values["step3_device"] == "cpu"
    assert values["step4_max_few_shot_drop"] == 0.25
    assert values["step1_data_dir"] == "/data"
    assert values["step2_checkpoint_dir"] == "/kept"
    assert values["step2_stage1_from"] == "a@champion"
    assert values["step2_num_nodes"] == 1
    configs = (SubsetConfig, TrainConfig, EvaluateConfig, RegisterConfig)
    assert len(values) == sum(len(fields(config)) for config in configs) + 5


def test_whole_numbers_for_fractions_are_written_as_fractions():
    recipe = replace(digits_lt(), subset=SubsetConfig(dataset="digits", imbalance_factor=20))
    value = arguments(recipe)["step1_imbalance_factor"]
    assert (value, type(value)) == (20, float)

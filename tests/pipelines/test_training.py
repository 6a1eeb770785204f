from dataclasses import fields
from typing import get_type_hints

import pytest

from shike_core.config import EvaluateConfig, RegisterConfig, SubsetConfig, TrainConfig
from shike_core.recipes import recipe_named

CONFIGS = {
    "step1": SubsetConfig,
    "step2": TrainConfig,
    "step3": EvaluateConfig,
    "step4": RegisterConfig,
}
WITHOUT_FIELD = {"step1_data_dir": "", "step2_checkpoint_dir": ""}
KFP_TYPES = {
    bool: "BOOLEAN",
    int: "NUMBER_INTEGER",
    float: "NUMBER_DOUBLE",
    str: "STRING",
}


@pytest.fixture(scope="session")
def parameters(specification) -> dict:
    return specification["root"]["inputDefinitions"]["parameters"]


@pytest.fixture(scope="session")
def tasks(specification) -> dict:
    return specification["root"]["dag"]["tasks"]


def test_defaults_are_the_values_of_the_recipe(parameters, recipe_name):
    recipe = recipe_named(recipe_name)
    parts = (recipe.subset, recipe.train, recipe.evaluate, recipe.register)
    expected = WITHOUT_FIELD | {
        f"step{number}_{field.name}": getattr(part, field.name)
        for number, part in enumerate(parts, start=1)
        for field in fields(part)
    }
    assert {name: spec["defaultValue"] for name, spec in parameters.items()} == expected


def test_types_are_those_of_the_fields(parameters):
    for name, parameter in parameters.items():
        step, _, field = name.partition("_")
        of_field = get_type_hints(CONFIGS[step]).get(field, str)
        assert parameter["parameterType"] == KFP_TYPES.get(of_field, "STRING"), name


def test_each_step_takes_only_its_own_parameters_under_their_own_names(tasks):
    steps = {"build-subset": 1, "train": 2, "evaluate": 3, "compare-with-champion": 4}
    for task, number in steps.items():
        given = tasks[task]["inputs"]["parameters"]
        quoted = {
            name: source["componentInputParameter"]
            for name, source in given.items()
            if "componentInputParameter" in source
        }
        assert quoted == {name: f"step{number}_{name}" for name in quoted}
        fields_of_step = {field.name for field in fields(CONFIGS[f"step{number}"])}
        assert fields_of_step <= set(quoted), f"{task} is not given a field"


def test_every_parameter_is_used(parameters, tasks):
    used = {
        source.get("componentInputParameter")
        for task in tasks.values()
        for source in task["inputs"]["parameters"].values()
    }
    assert used - {None} == set(parameters)


def test_the_steps_depend_on_each_other(tasks):
    depends_on = {name: set(task.get("dependentTasks", [])) for name, task in tasks.items()}
    assert depends_on == {
        "build-subset": set(),
        "train": {"build-subset"},
        "evaluate": {"build-subset", "train"},
        "compare-with-champion": {"train", "evaluate"},
        "condition-branches-1": {"train", "evaluate", "compare-with-champion"},
    }


def test_artifacts_go_from_step_to_step(tasks):
    def sources(task: str) -> dict[str, tuple[str, str]]:
        return {
            name: (output["producerTask"], output["outputArtifactKey"])
            for name, source in tasks[task]["inputs"]["artifacts"].items()
            for output in [source["taskOutputArtifact"]]
        }

    assert sources("train") == {"subset": ("build-subset", "subset")}
    assert sources("evaluate") == {
        "subset": ("build-subset", "subset"),
        "checkpoint": ("train", "checkpoint"),
    }
    assert sources("compare-with-champion") == {"evaluation": ("evaluate", "evaluation")}


def test_one_of_two_branches_registers(specification):
    components = specification["components"]
    branches = components["comp-condition-branches-1"]["dag"]["tasks"]
    registered = {}
    for branch in branches.values():
        inner = components[branch["componentRef"]["name"]]["dag"]["tasks"]
        (task,) = inner.values()
        alias = task["inputs"]["parameters"]["alias"]["runtimeValue"]["constant"]
        registered[alias] = branch["triggerPolicy"]["condition"], task
    gate = "inputs.parameter_values['pipelinechannel--compare-with-champion-Output'] == 'champion'"
    assert registered["champion"][0] == gate
    assert registered["challenger"][0] == f"!({gate})"
    for alias, (_, task) in registered.items():
        assert task["taskInfo"]["name"] == f"register {alias}"
        assert not task["cachingOptions"].get("enableCache", False)


def test_the_gate_is_never_served_from_the_cache(tasks):
    assert not tasks["compare-with-champion"]["cachingOptions"].get("enableCache", False)
    assert tasks["build-subset"]["cachingOptions"]["enableCache"]

from dataclasses import fields
from typing import get_origin, get_type_hints

import pytest

from pipelines.cluster import PARAMETERS, Cluster
from pipelines.compile import on_device
from shike_core.config import EvaluateConfig, RegisterConfig, SubsetConfig, TrainConfig
from shike_core.recipes import recipe_named

CONFIGS = {
    "step1": SubsetConfig,
    "step2": TrainConfig,
    "step3": EvaluateConfig,
    "step4": RegisterConfig,
}
WITHOUT_FIELD = {
    "step1_data_dir": "", "step1_shards_dir": "", "step2_checkpoint_dir": "",
    "step2_stage1_from": "",
    "step2_num_nodes": 1, "step2_nodes": {},
}  # fmt: skip
KFP_TYPES = {
    bool: "BOOLEAN",
    int: "NUMBER_INTEGER",
    float: "NUMBER_DOUBLE",
    str: "STRING",
    dict: "STRUCT",
    list: "LIST",
}


@pytest.fixture(scope="session")
def parameters(specification) -> dict:
    return specification["root"]["inputDefinitions"]["parameters"]


@pytest.fixture(scope="session")
def tasks(specification) -> dict:
    """The steps, which all stand under the exit handler."""
    steps = specification["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    for task in steps.values():
        for source in task["inputs"].get("parameters", {}).values():
            if name := source.get("componentInputParameter"):
                source["componentInputParameter"] = name.removeprefix("pipelinechannel--")
    return steps


def test_defaults_are_the_values_of_the_recipe(parameters, recipe_name):
    recipe = on_device(recipe_named(recipe_name), "cuda")
    parts = (recipe.subset, recipe.train, recipe.evaluate, recipe.register)
    expected = WITHOUT_FIELD | {
        f"step{number}_{field.name}": getattr(part, field.name)
        for number, part in enumerate(parts, start=1)
        for field in fields(part)
    }
    given = {name: spec["defaultValue"] for name, spec in parameters.items()}
    of_cluster = {name: given.pop(f"cluster_{name}") for name in PARAMETERS}
    assert given == expected
    assert of_cluster == {name: getattr(Cluster(), name) for name in PARAMETERS}


def test_types_are_those_of_the_fields(parameters):
    kinds = {name: get_type_hints(Cluster)[name] for name in PARAMETERS}
    for name, parameter in parameters.items():
        step, _, field = name.partition("_")
        if step == "cluster":
            assert parameter["parameterType"] == KFP_TYPES[get_origin(kinds[field]) or kinds[field]]
            continue
        of_field = get_type_hints(CONFIGS[step]).get(field, type(WITHOUT_FIELD.get(name, "")))
        assert parameter["parameterType"] == KFP_TYPES.get(of_field, "STRING"), name


def test_each_step_takes_only_its_own_parameters_under_their_own_names(tasks):
    steps = {"build-subset": 1, "train": 2, "evaluate": 3, "compare-with-champion": 4}
    for task, number in steps.items():
        given = tasks[task]["inputs"]["parameters"]
        quoted = {
            name: source["componentInputParameter"]
            for name, source in given.items()
            if "componentInputParameter" in source and not name.startswith("pipelinechannel--")
        }
        if task == "evaluate":  # discards what the training kept
            assert quoted.pop("checkpoint_dir") == "step2_checkpoint_dir"
        assert quoted == {name: f"step{number}_{name}" for name in quoted}
        fields_of_step = {field.name for field in fields(CONFIGS[f"step{number}"])}
        assert fields_of_step <= set(quoted), f"{task} is not given a field"


def test_every_parameter_is_used(parameters, tasks, compiled, recipe_name):
    text = compiled[recipe_name].read_text()
    used = {
        source.get("componentInputParameter")
        for task in tasks.values()
        for source in task["inputs"]["parameters"].values()
    }
    of_cluster = {
        name
        for name in parameters
        if f"pipelinechannel--{name}']" in text or f"Parameter: pipelinechannel--{name}\n" in text
    }
    assert (used - {None}) | of_cluster == set(parameters)


def test_the_steps_depend_on_each_other(tasks):
    depends_on = {name: set(task.get("dependentTasks", [])) for name, task in tasks.items()}
    assert depends_on == {
        "preflight": set(),
        "build-subset": {"preflight"},
        "train": {"build-subset"},
        "evaluate": {"build-subset", "train"},
        "compare-with-champion": {"evaluate"},
        "condition-branches-2": {"evaluate", "compare-with-champion"},
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
    branches = components["comp-condition-branches-2"]["dag"]["tasks"]
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


def test_only_steps_without_side_effects_are_served_from_the_cache(tasks):
    cached = {
        name for name, task in tasks.items() if task.get("cachingOptions", {}).get("enableCache")
    }
    assert cached == {"build-subset", "train"}


def test_the_last_step_runs_whatever_happened(specification):
    closing = specification["root"]["dag"]["tasks"]["close-runs"]
    assert closing["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert closing["inputs"]["parameters"]["status"]["taskFinalStatus"]["producerTask"] == (
        "exit-handler-1"
    )
    assert not closing["cachingOptions"].get("enableCache", False)

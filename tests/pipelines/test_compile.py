import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from kfp import components

from pipelines import compile as compiling
from shike_core.config import EvaluateConfig, RegisterConfig, SubsetConfig, TrainConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tagged(tmp_path_factory) -> str:
    """What the command line writes for a registry and a tag."""
    path = tmp_path_factory.mktemp("tagged") / "new" / "pipeline.yaml"
    command = [sys.executable, "-m", "pipelines.compile", "--output", str(path)]
    command += ["--registry", "registry.example/group/", "--tag", "0123abc"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    return path.read_text()


def test_every_image_has_the_given_registry_and_tag(tagged):
    executors = next(yaml.safe_load_all(tagged))["deploymentSpec"]["executors"]
    used = {name: executor["container"]["image"] for name, executor in executors.items()}
    start = "registry.example/group/shike-python-"
    assert used == {
        "exec-build-subset": f"{start}data:0123abc",
        "exec-train": f"{start}train:0123abc",
        "exec-evaluate": f"{start}evaluate:0123abc",
        "exec-compare-with-champion": f"{start}register:0123abc",
        "exec-register-model": f"{start}register:0123abc",
        "exec-register-model-2": f"{start}register:0123abc",
    }


def test_no_step_installs_anything_when_it_starts(tagged):
    for executor in next(yaml.safe_load_all(tagged))["deploymentSpec"]["executors"].values():
        words = " ".join(executor["container"]["command"])
        assert "kfp.dsl.executor_main" in words
        assert not re.search(r"pip3? |--trusted-host|venv", words)


@pytest.mark.parametrize("tag", [*compiling.MUTABLE_TAGS, ""])
def test_a_tag_that_may_move_is_refused(tag, tmp_path, monkeypatch):
    path = tmp_path / "pipeline.yaml"
    monkeypatch.setattr(sys, "argv", ["compile", "--output", str(path), "--tag", tag])
    with pytest.raises(SystemExit, match=f"image tag '{tag}' .*stale results; give --tag"):
        compiling.main()
    assert not path.exists()


def test_the_default_tag_is_the_commit():
    head = (ROOT / ".git").exists() and compiling.git_commit()
    assert head == "" or re.fullmatch("[0-9a-f]{12,}", head)


def test_compiled_file_loads_again(compiled, recipe_name):
    loaded = components.load_component_from_file(str(compiled[recipe_name]))
    assert loaded.name == f"shike-{recipe_name}"
    assert loaded.component_spec.inputs["step2_num_experts"].default == 3


def test_compiled_file_is_far_from_the_limits_of_the_platform(compiled, recipe_name):
    assert compiled[recipe_name].stat().st_size < 200_000


def test_every_parameter_has_a_description(specification):
    parameters = specification["root"]["inputDefinitions"]["parameters"]
    assert all(len(p["description"]) >= 15 for p in parameters.values())
    assert parameters["step1_imbalance_factor"]["description"].endswith("100 means 100:1.")


def test_fields_with_few_values_become_menus(specification):
    parameters = specification["root"]["inputDefinitions"]["parameters"]
    menus = {
        f"step{number}_{name}": list(get_args(kind))
        for number, config in enumerate(
            (SubsetConfig, TrainConfig, EvaluateConfig, RegisterConfig), start=1
        )
        for name, kind in get_type_hints(config).items()
        if get_origin(kind) is Literal
    }
    written = {name: p["literals"] for name, p in parameters.items() if "literals" in p}
    assert written == menus
    assert len(menus) == 12
    for name, values in written.items():
        assert parameters[name]["defaultValue"] in values


def test_sorted_parameters_stand_step_by_step(specification):
    names = sorted(specification["root"]["inputDefinitions"]["parameters"])
    assert all(re.fullmatch(r"step[1-4]_[a-z0-9_]+", name) for name in names)
    assert [name[:5] for name in (names[0], names[-1])] == ["step1", "step4"]

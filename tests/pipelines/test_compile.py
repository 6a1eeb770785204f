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
from shike_core.recipes import recipe_named

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
        "exec-preflight": f"{start}data:0123abc",
        "exec-close-runs": f"{start}data:0123abc",
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


@pytest.mark.parametrize("tag", compiling.MUTABLE_TAGS)
def test_a_tag_that_may_move_is_refused(tag, tmp_path, monkeypatch):
    path = tmp_path / "pipeline.yaml"
    monkeypatch.setattr(sys, "argv", ["compile", "--output", str(path), "--tag", tag])
    with pytest.raises(SystemExit, match=f"image tag '{tag}' .*stale results; give --tag"):
        compiling.main()
    assert not path.exists()


def test_the_name_of_a_pipeline_is_one_the_platform_takes(specification, recipe_name):
    name = specification["pipelineInfo"]["name"]
    assert re.fullmatch("[a-z0-9][a-z0-9-]{0,127}", name)
    assert name == f"shike-{recipe_name.replace('/', '-')}"


def test_make_compiles_a_variant_into_one_file():
    command = ["make", "--dry-run", "pipeline-compile", "DATASET=cifar100-lt/no-dkt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[words.index("--recipe") + 1] == "cifar100-lt/no-dkt"
    assert words[words.index("--output") + 1] == "build/cifar100-lt-no-dkt.yaml"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("places", "unknown recipe 'places'; choose one of digits-lt"),
        ("digits-lt/dkt", "unknown variant 'dkt' of digits-lt; choose one of cross-entropy"),
    ],
)
def test_an_unknown_recipe_is_refused(recipe, message, tmp_path, monkeypatch):
    path = tmp_path / "pipeline.yaml"
    arguments = ["compile", "--output", str(path), "--tag", "0123abc", "--recipe", recipe]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=f"error: {message}"):
        compiling.main()
    assert not path.exists()


def test_a_file_that_cannot_be_written_is_told_in_a_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "pipeline.yaml"
    monkeypatch.setattr(sys, "argv", ["compile", "--output", str(path), "--tag", "0123abc"])
    with pytest.raises(SystemExit, match=r"^error: .*pipeline\.yaml"):
        compiling.main()


def test_the_default_tag_is_the_commit():
    head = (ROOT / ".git").exists() and compiling.git_commit()
    assert head == "" or re.fullmatch("[0-9a-f]{12,}", head)


def test_compiled_file_loads_again(compiled, recipe_name):
    loaded = components.load_component_from_file(str(compiled[recipe_name]))
    assert loaded.name == f"shike-{recipe_name.replace('/', '-')}"
    experts = recipe_named(recipe_name).train.num_experts
    assert loaded.component_spec.inputs["step2_num_experts"].default == experts


def test_compiled_file_is_far_from_the_limits_of_the_platform(compiled, recipe_name):
    assert compiled[recipe_name].stat().st_size < 200_000


def test_every_parameter_has_a_description(specification):
    parameters = specification["root"]["inputDefinitions"]["parameters"]
    assert all(len(p["description"]) >= 15 for p in parameters.values())
    assert "100 means 100:1" in parameters["step1_imbalance_factor"]["description"]


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
    assert len(menus) == 22
    for name, values in written.items():
        assert parameters[name]["defaultValue"] in values


def test_sorted_parameters_stand_step_by_step(specification):
    names = sorted(specification["root"]["inputDefinitions"]["parameters"])
    assert all(re.fullmatch(r"(cluster|step[1-4])_[a-z0-9_]+", name) for name in names)
    assert [name.partition("_")[0] for name in (names[0], names[-1])] == ["cluster", "step4"]

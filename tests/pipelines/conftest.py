"""Compiled pipelines, shared by the tests that look into them."""

from pathlib import Path

import pytest
import yaml

from pipelines.compile import compile_pipeline
from shike_core.recipes import RECIPES, recipe_named

NAMES = (*RECIPES, "cifar100-lt/cross-entropy")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> dict[str, Path]:
    """The YAML file of every recipe and of a variant."""
    directory = tmp_path_factory.mktemp("compiled")
    files = {name: directory / f"{name}.yaml" for name in NAMES}
    for name, path in files.items():
        compile_pipeline(recipe_named(name), path)
    return files


@pytest.fixture(scope="session", params=NAMES)
def recipe_name(request) -> str:
    """Each recipe in turn, and a variant."""
    return request.param


@pytest.fixture(scope="session")
def specification(compiled, recipe_name) -> dict:
    """The compiled pipeline of a recipe."""
    return next(yaml.safe_load_all(compiled[recipe_name].read_text()))

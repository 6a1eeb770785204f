"""What the pipeline's parameters mean, read off the configuration they quote."""

import ast
import inspect
from dataclasses import fields
from functools import cache
from typing import Any, get_args

from pipelines.cluster import Cluster
from shike_core.config import (
    EvaluateConfig,
    Recipe,
    RegisterConfig,
    SubsetConfig,
    TrainConfig,
)
from shike_core.recipes import RECIPES

STEPS: dict[str, Any] = {
    "step1": SubsetConfig,
    "step2": TrainConfig,
    "step3": EvaluateConfig,
    "step4": RegisterConfig,
}
EXTRA = {
    "step1_data_dir": "Folder with the source's files, for a table the file itself, or a URL; "
    "empty means downloading CIFAR.",
    "step1_shards_dir": "Folder or URL that keeps the shards of a packed subset; empty means "
    "inside the subset.",
    "step2_checkpoint_dir": "Folder that outlives the step, where a stopped training goes on from; "
    "empty means none.",
    "step2_stage1_from": "MLflow run, or registered model as in NAME@champion, with the same "
    "settings but for those of stage 2, whose stage 1 is taken; empty trains both stages.",
    "step2_num_nodes": "Machines that train together, as one TrainJob; 1 trains in the pod of the "
    "step.",
    "step2_nodes": "What each of several machines asks for, as compiled; see Nodes in "
    "components/train_job.py.",
    "sweep_seeds": "Seeds of the trainings of each recipe, as a JSON list.",
    "sweep_imbalance_factors": "Ratios of the largest class to the smallest, as a JSON list; the "
    "recipe is chosen at the first.",
    "sweep_validation_per_class": "Training images per class held out to choose the recipe by; 0 "
    "chooses and registers nothing.",
}
"""Parameters that are not part of a configuration."""

RECIPE_HELP = f"{', '.join(RECIPES)}; or a variant of one, as in cifar100-lt/no-dkt"


@cache
def field_docs(config: Any) -> dict[str, str]:
    """The docstring under each field of a configuration."""
    body = ast.parse(inspect.getsource(config)).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(doc.value.value).replace("\n", " ")
        for field, doc in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
        and isinstance(doc.value.value, str)
    }


def describe(name: str) -> str:
    """The description of a pipeline parameter."""
    step, _, field = name.partition("_")
    if step == "cluster":
        return field_docs(Cluster)[field]
    return EXTRA.get(name) or field_docs(STEPS[step])[field]


def choices(name: str) -> tuple[Any, ...]:
    """The few values that a parameter may have; empty if it is not of that kind."""
    step, _, field = name.partition("_")
    if step not in STEPS:
        return ()
    types: dict[str, Any] = {f.name: f.type for f in fields(STEPS[step])}
    return get_args(types.get(field))


def arguments(
    recipe: Recipe, data_dir: str = "", checkpoint_dir: str = "", stage1_from: str = ""
) -> dict[str, Any]:
    """The pipeline's arguments for a full configuration."""
    parts: dict[str, Any] = dict(
        zip(STEPS, (recipe.subset, recipe.train, recipe.evaluate, recipe.register), strict=True)
    )
    values = {
        # KFP takes no 0 for 0.0.
        f"{step}_{field.name}": float(value) if field.type is float else value
        for step, part in parts.items()
        for field in fields(part)
        for value in (getattr(part, field.name),)
    }
    one_node: dict[str, Any] = {"step2_num_nodes": 1, "step2_nodes": {}}
    others = {
        "step1_data_dir": data_dir,
        "step2_checkpoint_dir": checkpoint_dir,
        "step2_stage1_from": stage1_from,
    }
    return values | one_node | others

"""Compile the pipeline to the YAML that is uploaded in the KFP UI."""

import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from kfp import compiler

from pipelines.cluster import Cluster
from pipelines.parameters import choices, describe
from shike_core.config import Device, Recipe
from shike_core.errors import ShikeError
from shike_core.files import atomic_write
from shike_core.recipes import recipe_named

MUTABLE_TAGS = ("latest", "local", "main", "master", "dev")


def compile_pipeline(
    recipe: Recipe, output: Path, cluster: Cluster | None = None, code: str = ""
) -> None:
    """Write the intermediate representation, with descriptions and drop-down choices.

    Args:
        recipe: its values become the parameters' defaults; where it leaves the device open, a
            cluster's GPU is demanded.
        output: path of the YAML file.
        cluster: what the steps ask of Kubernetes; None takes the defaults.
        code: commit that the images have to hold; empty means any.
    """
    from pipelines.training import training_pipeline  # after the images' tag is known

    place = cluster or Cluster()
    pipeline = training_pipeline(on_device(recipe, place.device), place, code)
    write_package(pipeline, output)


def on_device(recipe: Recipe, device: Device) -> Recipe:
    """The recipe with the device where it says auto: a step must not do without its GPU unseen."""
    return replace(
        recipe,
        train=replace(recipe.train, device=_decided(recipe.train.device, device)),
        evaluate=replace(recipe.evaluate, device=_decided(recipe.evaluate.device, device)),
    )


def _decided(asked: Device, device: Device) -> Device:
    return device if asked == "auto" else asked


def write_package(pipeline: Any, output: Path) -> None:
    """Compile a pipeline and add what the SDK leaves out."""
    with atomic_write(output) as temporary:
        compiler.Compiler().compile(pipeline, str(temporary))
        specification, *platform = yaml.safe_load_all(temporary.read_text())
        _complete(specification["root"]["inputDefinitions"]["parameters"])
        temporary.write_text(yaml.safe_dump_all([specification, *platform], sort_keys=False))


def _complete(parameters: dict[str, dict[str, Any]]) -> None:
    for name, parameter in parameters.items():
        parameter["description"] = describe(name)
        if literals := choices(name):
            # The SDK cannot compile typing.Literal; backend and UI read the field all the same.
            parameter["literals"] = list(literals)


def name_images(registry: str, tag: str) -> str:
    """Set registry and tag of the images; to be called before a pipeline is imported.

    Args:
        registry: HOST/PROJECT, or empty.
        tag: an empty one means the git commit.

    Returns:
        The tag.

    Raises:
        ValueError: the tag may move.
    """
    tag = tag or git_commit()
    if not tag or tag in MUTABLE_TAGS:
        raise ValueError(
            f"the image tag {tag!r} may come to mean other code later, and KFP's cache "
            "would serve stale results; give --tag, best a git commit"
        )
    os.environ["SHIKE_TAG"], os.environ["SHIKE_REGISTRY"] = tag, registry
    return tag


def git_commit() -> str:
    """The commit of the checkout, or an empty string outside of one."""
    found = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip()


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is compiled, and for which cluster."""

    output: Path
    """YAML file to write."""
    recipe: str = "digits-lt"
    """Name of the recipe; a variant follows after a slash."""
    registry: str = ""
    """Where the images are, HOST/PROJECT."""
    tag: str = ""
    """Tag of the images; empty means the git commit."""
    cluster: Annotated[Cluster, tyro.conf.OmitArgPrefixes] = field(default_factory=Cluster)
    """What the steps ask of Kubernetes."""


def main() -> None:
    """Command line of ``python -m pipelines.compile``."""
    options = tyro.cli(Options, prog="make pipeline-compile ARGS=", description=__doc__)
    try:
        recipe = recipe_named(options.recipe)
        tag = name_images(options.registry, options.tag)
        compile_pipeline(recipe, options.output, options.cluster, git_commit())
    except (ShikeError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {options.output} (images tagged {tag})")


if __name__ == "__main__":
    main()

"""Compile the pipeline to the YAML that is uploaded in the KFP UI."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler

from pipelines.parameters import RECIPE_HELP, choices, describe
from shike_core.config import Recipe
from shike_core.files import atomic_write
from shike_core.recipes import recipe_named

MUTABLE_TAGS = ("latest", "local", "main", "master", "dev")


def compile_pipeline(recipe: Recipe, output: Path) -> None:
    """Write the intermediate representation, with descriptions and drop-down choices.

    Args:
        recipe: its values become the parameters' defaults.
        output: path of the YAML file.
    """
    from pipelines.training import training_pipeline  # after the images' tag is known

    with atomic_write(output) as temporary:
        compiler.Compiler().compile(training_pipeline(recipe), str(temporary))
        specification, *platform = yaml.safe_load_all(temporary.read_text())
        _complete(specification["root"]["inputDefinitions"]["parameters"])
        temporary.write_text(yaml.safe_dump_all([specification, *platform], sort_keys=False))


def _complete(parameters: dict[str, dict[str, Any]]) -> None:
    for name, parameter in parameters.items():
        parameter["description"] = describe(name)
        if literals := choices(name):
            # The SDK cannot compile typing.Literal; backend and UI read the field all the same.
            parameter["literals"] = list(literals)


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


def main() -> None:
    """Command line of ``python -m pipelines.compile``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="digits-lt", help=RECIPE_HELP)
    parser.add_argument("--output", type=Path, required=True, help="YAML file to write")
    parser.add_argument("--registry", default="", help="where the images are, host/project")
    parser.add_argument("--tag", default=git_commit(), help="tag of the images: the git commit")
    options = parser.parse_args()
    try:
        recipe = recipe_named(options.recipe)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not options.tag or options.tag in MUTABLE_TAGS:
        sys.exit(
            f"error: the image tag {options.tag!r} may come to mean other code later, and KFP's "
            "cache would serve stale results; give --tag, best a git commit"
        )
    os.environ["SHIKE_TAG"], os.environ["SHIKE_REGISTRY"] = options.tag, options.registry
    compile_pipeline(recipe, options.output)
    print(f"wrote {options.output} (images tagged {options.tag})")


if __name__ == "__main__":
    main()

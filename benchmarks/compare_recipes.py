"""Compare a recipe with its variants, seed by seed on the same images, and write one table.

    python -m benchmarks.compare_recipes SUBSET --base cifar100-lt \
        --variants cross-entropy crt no-fusion no-dkt no-mutual \
        --work build/ablation --out benchmarks/results/ablation.json

A variant is a name of docs/method.md, or several things at once, as in
``averaged+mutual_weight=2``. On a GPU the trainings of several recipes run side by side.

A difference to the base is a mean over seeds of paired differences: both have the same initial
random numbers, order of images and augmentation. Its interval covers 95 % if the seeds' differences
are normally distributed (Student's t). Seeds are few, so read the intervals before the means.

Variants of stage 2 alone go on from the base's stage 1, if that was trained before them and not
beside them (``--side-by-side 1`` on a GPU); the result is the same.

The file is written after every recipe (on a GPU after those that were side by side), and recipes in
it are not trained again: ``machine`` as in `gpu_headline`, and under ``recipes``, by name, the same
as there; a file of another subset, split, configuration or other seeds is refused. A recipe whose
training fails is left out, and the exit code is 2.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.runs import (
    Job,
    common_arguments,
    configured,
    exit_code,
    machine,
    train_jobs,
    with_changes,
)
from shike_core.config import Recipe
from shike_core.data.manifest import read_info
from shike_core.device import resolve_device
from shike_core.errors import ShikeError
from shike_core.recipes import recipe_named, variant
from shike_core.stages import write_json

STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Two-sided 95 % by degrees of freedom, from 1; with more, the last is a little too wide."""
GROUPS = ("many_shot", "medium_shot", "few_shot")


class FailedTrainings(ShikeError):
    """Some recipes could not be trained; the others are in the file."""


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None]:
    """Mean of the paired differences, and half of its 95 % interval; None for one pair.

    Args:
        ours: one value for each seed.
        theirs: for the same seeds.
    """
    pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(pairs) < 2:
        return pairs[0], None
    spread = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return statistics.mean(pairs), STUDENT_T[min(len(pairs) - 1, len(STUDENT_T)) - 1] * spread


def table(results: dict[str, Any], base: str) -> str:
    """A Markdown table of finished recipes, in percent and points."""
    lines = [
        "| recipe | accuracy | - base (95 %) | many | medium | few | ECE | flip |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reference = [_accuracy(run) for run in results[base]["seeds"]]
    for name, result in results.items():
        runs = result["seeds"]
        accuracies = [_accuracy(run) for run in runs]
        mean, half = difference(accuracies, reference)
        against = f"{100 * mean:+.1f}" + (f" ± {100 * half:.1f}" if half is not None else "")
        spread = f" ± {100 * result['accuracy_std']:.1f}" if result["accuracy_std"] else ""
        cells = [
            name,
            f"{100 * result['accuracy_mean']:.1f}{spread}",
            "" if name == base else against,
            *(_mean(runs, "shot_groups", group) for group in GROUPS),
            _mean(runs, "expected_calibration_error"),
            _mean(runs, "flip_accuracy"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _accuracy(run: dict[str, Any]) -> float:
    value: float = run["test_accuracy"] if "test_accuracy" in run else run["accuracy"]
    return value


def _mean(runs: list[dict[str, Any]], *keys: str) -> str:
    values = []
    for run in runs:
        value: Any = run
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            return ""
        values.append(value)
    return f"{100 * statistics.mean(values):.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; the exit code is that of `exit_code`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    common_arguments(parser)
    parser.add_argument("--base", default="cifar100-lt", help="the recipe to compare with")
    parser.add_argument("--variants", nargs="+", default=[], help="see docs/method.md")
    parser.add_argument("--split", choices=["test", "validation"], default="test",
                        help="validation for choosing among recipes")  # fmt: skip
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Train what is missing, write as soon as there is something, print the table.

    Raises:
        FailedTrainings: of some recipes.
        InterruptedTraining: time was up, or somebody asked to stop; the same call goes on.
        ShikeError: the subset or the device cannot be used, or the file cannot be written.
        ValueError: there is no such recipe or value, the subset has no images of the split, or
            the file holds something else.
    """
    deadline = time.monotonic() + 60 * options.minutes
    recipes = [candidate(options.base, name) for name in dict.fromkeys(("", *options.variants))]
    info = read_info(options.subset)
    if options.split not in info["sizes"]:
        raise ValueError(
            f"{options.subset} holds no {options.split} images; build it with "
            "--validation-per-class, or leave --split out"
        )
    digest = info["digest"]
    results = earlier(options.out)
    jobs = [
        Job(
            name=recipe.name,
            config=configured(recipe.train, options),
            seeds=options.seeds,
            subset=options.subset,
            work=options.work,
            split=options.split,
            print_every=options.print_every,
        )
        for recipe in recipes
    ]
    for name, found in results.items():
        job = next((job for job in jobs if job.name == name), jobs[0])
        _refuse_another(found, name, job, digest, options.out)
    missing = [job for job in jobs if job.name not in results]
    on_gpu = resolve_device(options.device).type == "cuda"
    at_once = max(1, options.side_by_side // len(options.seeds)) if on_gpu else 1
    failures = []
    for first in range(0, len(missing), at_once):
        some = missing[first : first + at_once]
        for job, found in zip(
            some,
            train_jobs(some, max(0.0, deadline - time.monotonic()), options.side_by_side),
            strict=True,
        ):
            if isinstance(found, ShikeError):
                failures.append(f"{job.name}: {found}")
            else:
                results[job.name] = found
        write_json({"machine": machine(options.device), "recipes": results}, options.out)
    if jobs[0].name in results:
        print(table(results, jobs[0].name))
    if failures:
        raise FailedTrainings("; ".join(failures))


def candidate(base: str, change: str) -> Recipe:
    """A recipe, or that recipe with changes.

    Args:
        base: name of the recipe.
        change: none, a variant, or variants and ``FIELD=VALUE`` joined by ``+``.

    Raises:
        ValueError: there is no such recipe, variant, field or value.
    """
    recipe = recipe_named(base)
    for part in change.split("+") if change else []:
        if "=" in part:
            recipe = replace(recipe, train=with_changes(recipe.train, [part]))
        else:
            recipe = variant(recipe, part)
    return replace(recipe, name=f"{base}/{change}") if change else recipe


def _refuse_another(found: dict[str, Any], name: str, job: Job, digest: str, path: Path) -> None:
    """Refuse what cannot stand in one table with a job, or is another of the same name."""
    seeds = [seed["seed"] for seed in found["seeds"]]
    wanted = (digest, job.split, list(job.seeds))
    same = job.name != name or found["config"] == asdict(job.config) | {"seed": None}
    if (found["subset_digest"], found["split"], seeds) != wanted or not same:
        raise ValueError(
            f"{path} holds {name} of another subset, split or configuration, or other seeds; "
            "give another file"
        )


def earlier(path: Path) -> dict[str, Any]:
    """The recipes in a file written before, if there is one.

    Raises:
        ValueError: it is not a file of this script.
    """
    if not path.exists():
        return {}
    try:
        recipes: dict[str, Any] = json.loads(path.read_text())["recipes"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a file of this script ({error}); give another one"
        ) from error
    return recipes


if __name__ == "__main__":
    sys.exit(main())

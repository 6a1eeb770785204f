"""Every table about a recipe by one command: its seeds, other subsets, baselines, ablations.

    python -m benchmarks.reproduce build/reproduce --base cifar100-lt --data-dir FILES

The experiments are made in the order of `EXPERIMENTS`, each as `compare_recipes` makes it, from
which the tables and files are. In the folder given lie, for each subset that they need, one folder
with the ``subset`` (built if it is not there) and the checkpoints (``work``), so that a recipe is
trained once for all experiments on the same images; and ``results``, with a JSON file for each
experiment in a folder for each base. A call that runs out of time stops with checkpoints and exit
code 75, and the same command goes on from them. A training that fails costs only its own recipe;
the exit code is then 2.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import compare_recipes
from benchmarks.runs import Split, configured, exit_code, training_arguments
from shike_core import stages
from shike_core.config import SubsetConfig
from shike_core.data.manifest import read_info
from shike_core.recipes import ABLATIONS, BASELINES, BEYOND, PLUS, QUIRKS, recipe_named


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Recipes against each other on one subset."""

    about: str
    """Printed above the table."""
    variants: Sequence[str] = ()
    """Compared with the base, as `compare_recipes` takes them."""
    subset: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the rule of the recipe's subset."""
    split: Split = "test"
    times: int = 1
    """As many epochs as the recipe has, or as are asked for."""


EXPERIMENTS: dict[str, Experiment] = {
    "headline": Experiment(about="the recipe"),
    "random": Experiment(about="a random draw of images", subset={"selection": "random"}),
    "precision": Experiment(
        about="number formats",
        # By itself a training in float16 is not recorded, and takes ten times as long.
        variants=("precision=float16+acceleration=cuda-graph", "precision=float32"),
    ),
    "parts": Experiment(about="baselines, ablations", variants=(*BASELINES, *ABLATIONS)),
    "quirks": Experiment(about="what the authors' code does its own way", variants=(*QUIRKS,)),
    "beyond": Experiment(
        about="additions, on images held out of training",
        variants=(*BEYOND,),
        subset={"validation_per_class": 50},
        split="validation",
    ),
    "plus": Experiment(about="the additions that were worth it", variants=(*PLUS,)),
    "imbalance-50": Experiment(about="imbalance factor 50", subset={"imbalance_factor": 50.0}),
    "imbalance-10": Experiment(about="imbalance factor 10", subset={"imbalance_factor": 10.0}),
    "plus-long": Experiment(about="the same in twice the epochs", variants=(*PLUS,), times=2),
}
"""In the order in which they are made."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; the exit code is that of `exit_code`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="receives subsets, checkpoints and results")
    parser.add_argument("--base", default="cifar100-lt", help="the recipe")
    parser.add_argument("--data-dir", help="folder with the source's files, or its URL")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=[*EXPERIMENTS],
                        metavar="NAME", help=", ".join(EXPERIMENTS))  # fmt: skip
    training_arguments(parser)
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Build the subsets of the experiments that are asked for, then make these.

    Raises:
        FailedTrainings: of some recipes; the others were made.
        InterruptedTraining: time was up, or somebody asked to stop; the same call goes on.
        ShikeError: as `compare_recipes.run`, or a subset cannot be built; nothing goes on.
        ValueError: likewise.
    """
    # Wrong for one experiment, wrong for all.
    epochs = configured(recipe_named(options.base).train, options).epochs
    deadline = time.monotonic() + 60 * options.minutes
    chosen = {name: EXPERIMENTS[name] for name in options.only}
    places = {
        name: with_subset(options.folder, experiment, options.base, options.data_dir)
        for name, experiment in chosen.items()
    }
    failures = []
    for name, experiment in chosen.items():
        print(f"\n== {name}: {experiment.about}", flush=True)
        values = {
            "subset": places[name] / "subset",
            "work": places[name] / ("work" if experiment.times == 1 else name),
            "epochs": experiment.times * epochs if experiment.times > 1 else options.epochs,
            "out": options.folder / "results" / options.base.replace("/", "-") / f"{name}.json",
            "variants": experiment.variants,
            "split": experiment.split,
            "minutes": (deadline - time.monotonic()) / 60,
        }
        try:
            compare_recipes.run(argparse.Namespace(**vars(options) | values))
        except compare_recipes.FailedTrainings as error:
            failures.append(f"{name}: {error}")
    if failures:
        raise compare_recipes.FailedTrainings("; ".join(failures))


def with_subset(folder: Path, experiment: Experiment, base: str, data_dir: str | None) -> Path:
    """The folder of an experiment's subset and trainings; the subset is built if need be.

    Raises:
        DatasetError: the source's files cannot be used.
        ValueError: another subset lies there, or the recipe has no such subset.
    """
    rule = replace(recipe_named(base).subset, **experiment.subset)
    changes = [f"{key}-{value:g}" if isinstance(value, float) else f"{key}-{value}"
               for key, value in experiment.subset.items()]  # fmt: skip
    place = folder / "-".join([base.replace("/", "-"), *changes])
    subset = place / "subset"
    if (subset / "subset.json").exists():
        _refuse_another(rule, subset)
    else:
        stages.build_subset(rule, data_dir, subset, lambda metrics, step: None)
    return place


def _refuse_another(rule: SubsetConfig, path: Path) -> None:
    found = read_info(path)["rule"]
    different = [key for key, value in asdict(rule).items() if found.get(key) != value]
    if different:
        raise ValueError(
            f"{path} holds a subset of another rule ({', '.join(different)}); give another folder"
        )


if __name__ == "__main__":
    sys.exit(main())

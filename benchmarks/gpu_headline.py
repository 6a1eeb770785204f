"""Train a recipe with several seeds, side by side on one GPU, and write what they reach.

    python -m benchmarks.gpu_headline SUBSET --recipe cifar100-lt --seeds 0 1 2 \
        --work build/headline --out benchmarks/results/headline.json

Needs torch, torchvision, numpy, pandas, pyarrow and Pillow, no git and nothing else; SUBSET is the
directory that ``python -m shike_core build-subset`` writes. The accuracy is that of the last
epoch's weights; nothing is chosen by looking at the test images. A call that runs out of time stops
with checkpoints and exit code 75, and the same command goes on from them.

The file written holds:

- ``device``, ``versions``, ``commit``, ``recipe``, ``config``, ``subset_digest``;
- ``seconds_per_run``: time of training both stages, data included, each epoch's divided by the
  number of trainings that it was made beside; mean over the seeds; ``side_by_side``: the largest
  such number; ``compile_seconds``: time of compiling and recording, not in it, of all seeds and
  calls, but for a call that stopped in its first epoch. A stage 1 that another recipe with the same
  one has left in the work folder is not made again, and counts with what it took there;
- ``peak_memory_bytes``: the most in all calls, of the GPU's tensors (all trainings side by side),
  or on a CPU of the process;
- ``accuracy_mean`` and ``accuracy_std`` over the seeds;
- ``seeds``: for each the ``seed``, ``test_accuracy`` (a fraction, like all accuracies),
  ``shot_groups``, ``experts``, ``expected_calibration_error``, ``flip_accuracy`` (mean over each
  image and its mirror image), ``seconds`` of each part, ``precision``, ``acceleration`` and the
  ``curve`` by every tenth epoch.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.runs import Job, common_arguments, configured, exit_code, machine, train_seeds
from shike_core.recipes import recipe_named
from shike_core.stages import write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; the exit code is that of `exit_code`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    common_arguments(parser)
    parser.add_argument("--recipe", default="cifar100-lt", help="or RECIPE/VARIANT")
    parser.add_argument("--curve", action="store_true",
                        help="measure the test images with every checkpoint too")  # fmt: skip
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Train, measure, write, print a line for each seed."""
    recipe = recipe_named(options.recipe)
    job = Job(
        name=recipe.name,
        config=configured(recipe.train, options),
        seeds=options.seeds,
        subset=options.subset,
        work=options.work,
        watch="test" if options.curve else "validation",
        print_every=options.print_every,
    )
    result = train_seeds(job, 60 * options.minutes, options.side_by_side)
    write_json(machine(options.device) | result, options.out)
    for seed in result["seeds"]:
        groups = "  ".join(f"{name} {100 * x:.2f}" for name, x in seed["shot_groups"].items())
        print(
            f"seed {seed['seed']}: {100 * seed['test_accuracy']:.2f} %  {groups}  "
            f"ECE {100 * seed['expected_calibration_error']:.2f} %"
        )
    spread = f" +- {100 * result['accuracy_std']:.2f}" if len(job.seeds) > 1 else ""
    print(
        f"{recipe.name}: {100 * result['accuracy_mean']:.2f}{spread} % in "
        f"{result['seconds_per_run']:.1f} s a run (compiling {result['compile_seconds']:.1f} s); "
        f"wrote {options.out}"
    )


if __name__ == "__main__":
    sys.exit(main())

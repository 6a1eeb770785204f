"""The sweep: seeds x imbalance factors x recipes, one training each; the best is registered.

``python -m pipelines.sweep`` compiles it for a cluster, or with ``--run`` runs it on this machine.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from pipelines.cluster import Cluster, Placement
from pipelines.compile import git_commit, name_images, on_device, write_package
from shike_core.config import Recipe, TrainConfig
from shike_core.data.listed import absolute
from shike_core.errors import ShikeError
from shike_core.recipes import recipe_named, variant

VALIDATION_PER_CLASS = 10
"""Images per class that a sweep holds out where the recipe holds out none."""


def sweep_pipeline(
    base: Recipe,
    variants: Sequence[Recipe] = (),
    cluster: Cluster | None = None,
    code: str = "",
    seeds: Sequence[int] = (0, 1, 2),
    imbalance_factors: Sequence[float] = (),
    parallelism: int = 1,
) -> BaseComponent:
    """A pipeline that trains a recipe and variants of it with several seeds and imbalances.

    Seeds, imbalance factors, validation part, folders and the gate are its parameters, the
    recipes' other values are fixed. The trainings are children of one MLflow run. The recipe with
    the highest mean validation accuracy at the first imbalance factor is chosen.

    Args:
        base: its subset, its evaluation and the name of its registered model hold for all.
        variants: recipes that differ from it in training only.
        cluster: what the steps ask of Kubernetes; None for a run on this machine.
        code: commit that the images have to hold; empty means any.
        seeds: default of the parameter.
        imbalance_factors: default of the parameter; empty means the base's own.
        parallelism: trainings at the same time.

    Raises:
        ValueError: the recipes do not make a sweep, or there is nothing to sweep over.
    """
    from components.build_subset import build_subset
    from components.evaluate import evaluate
    from components.register_best import register_best
    from components.summarise_sweep import summarise_sweep
    from components.train import train
    from pipelines.steps import closing_step, preflight_step

    recipes = [base, *variants]
    differences = differing_values(recipes)
    _check(recipes, differences, seeds, imbalance_factors, parallelism)
    subset_config, register_config = base.subset, base.register
    place = cluster or Cluster()
    default_seeds = list(seeds)
    default_factors = [float(x) for x in imbalance_factors or [subset_config.imbalance_factor]]
    held_out = subset_config.validation_per_class or VALIDATION_PER_CLASS
    subset_values = _without(
        asdict(subset_config), "imbalance_factor", "validation_per_class", "dataset"
    )

    @dsl.pipeline(
        name=f"shike-sweep-{base.name.replace('/', '-')}",
        description="Long-tailed classification by SHIKE: seeds x imbalance factors x "
        f"{', '.join(differences)}.",
        pipeline_config=place.config(),
    )
    def sweep(
        cluster_gpu_type: str = place.gpu_type,
        cluster_gpu_count: int = place.gpu_count,
        cluster_cpu: str = place.cpu,
        cluster_memory: str = place.memory,
        cluster_node_selector: dict = place.node_selector,  # type: ignore[type-arg]
        cluster_tolerations: list = place.tolerations,  # type: ignore[type-arg]
        cluster_mlflow_secret: str = place.mlflow_secret,
        step1_data_dir: str = place.data_dir,
        step1_shards_dir: str = place.shards_dir(subset_config),
        step2_checkpoint_dir: str = place.checkpoint_dir,
        step4_model_name: str = register_config.model_name,
        step4_metric: str = register_config.metric,
        step4_max_accuracy_drop: float = register_config.max_accuracy_drop,
        step4_max_few_shot_drop: float = register_config.max_few_shot_drop,
        step4_max_medium_shot_drop: float = register_config.max_medium_shot_drop,
        step4_max_many_shot_drop: float = register_config.max_many_shot_drop,
        step4_min_accuracy: float = register_config.min_accuracy,
        step4_min_few_shot_accuracy: float = register_config.min_few_shot_accuracy,
        sweep_seeds: list = default_seeds,  # type: ignore[type-arg]
        sweep_imbalance_factors: list = default_factors,  # type: ignore[type-arg]
        sweep_validation_per_class: int = held_out,
    ) -> None:
        on = Placement(
            cluster,
            {
                "gpu_type": cluster_gpu_type,
                "gpu_count": cluster_gpu_count,
                "cpu": cluster_cpu,
                "memory": cluster_memory,
                "node_selector": cluster_node_selector,
                "tolerations": cluster_tolerations,
                "mlflow_secret": cluster_mlflow_secret,
            },
        )

        of_gate = {
            "model_name": step4_model_name,
            "metric": step4_metric,
            "max_accuracy_drop": step4_max_accuracy_drop,
            "max_few_shot_drop": step4_max_few_shot_drop,
            "max_medium_shot_drop": step4_max_medium_shot_drop,
            "max_many_shot_drop": step4_max_many_shot_drop,
            "min_accuracy": step4_min_accuracy,
            "min_few_shot_accuracy": step4_min_few_shot_accuracy,
        }

        with dsl.ExitHandler(closing_step(on), name="sweep"):
            # 0. Find out in seconds what would stop the sweep later; open its MLflow run.
            checked = preflight_step(
                on,
                dataset=subset_config.dataset,
                data_dir=step1_data_dir,
                checkpoint_dir=step2_checkpoint_dir,
                device=base.train.device,
                code=code,
                kind="sweep",
                evaluate=asdict(base.evaluate),
                register=of_gate,
            )

            # One imbalance after the other, so that no more trainings run at the same time than
            # the inner loop allows.
            with dsl.ParallelFor(
                sweep_imbalance_factors, parallelism=1, name="imbalance factors"
            ) as factor:
                # 1. Build the long-tailed subset.
                subset = build_subset(
                    dataset=subset_config.dataset,
                    data_dir=step1_data_dir,
                    shards_dir=step1_shards_dir,
                    imbalance_factor=factor,
                    validation_per_class=sweep_validation_per_class,
                    **subset_values,
                ).set_display_name("build subset")
                subset.after(checked)
                on.all_images(subset, subset_config)
                on.with_data(subset)
                on.with_checkpoints(subset)

                with dsl.ParallelFor(sweep_seeds, parallelism=parallelism, name="seeds") as seed:
                    evaluation = None
                    for recipe in recipes:
                        # 2. Train both stages.
                        training = train(
                            subset=subset.outputs["subset"],
                            seed=seed,
                            checkpoint_dir=step2_checkpoint_dir,
                            stage1_from="",
                            num_nodes=1,
                            nodes={},
                            **_without(asdict(recipe.train), "seed"),
                        ).set_display_name(f"train {recipe.name}")
                        if evaluation is not None:
                            training.after(evaluation)
                        on.heavy(training, minutes=60 * place.train_timeout_hours)
                        on.with_data(training)
                        on.with_checkpoints(training)

                        # 3. Measure on the balanced test set, and export.
                        evaluation = evaluate(
                            subset=subset.outputs["subset"],
                            checkpoint=training.outputs["checkpoint"],
                            checkpoint_dir=on.discarded(step2_checkpoint_dir),
                            **asdict(base.evaluate),
                        ).set_display_name(f"evaluate {recipe.name}")
                        evaluation.set_caching_options(False)  # it logs into this sweep
                        on.heavy(evaluation, minutes=60)
                        on.with_data(evaluation)
                        on.with_checkpoints(evaluation)

            # 4. Means and spreads, and the choice; it waits for the last recipe of each loop,
            # which waited for the others.
            assert evaluation is not None
            summary = summarise_sweep(
                evaluated=dsl.Collected(evaluation.outputs["run_id"]),
                dataset=subset_config.dataset,
                # A list, because a mapping loses its order on the way.
                recipes=[{"name": key, "values": values} for key, values in differences.items()],
                imbalance_factors=sweep_imbalance_factors,
                seeds=sweep_seeds,
            ).set_display_name("summarise sweep")
            summary.set_caching_options(False)  # it reads what was logged
            on.light(summary)

            # 5. Compare with the champion, and register under the alias that results. Where
            # nothing was chosen the step only ends the sweep, so there is no branch.
            registering = register_best(
                sweep_id=summary.outputs["sweep_id"],
                chosen=summary.outputs["chosen"],
                **of_gate,
            ).set_display_name("register best")
            registering.set_caching_options(False)
            on.light(registering)

    return sweep


def differing_values(recipes: Sequence[Recipe]) -> dict[str, dict[str, Any]]:
    """Each recipe's values for the training fields, seed apart, in which they are not all alike."""
    names = [
        field.name
        for field in fields(TrainConfig)
        if field.name != "seed"
        and any(
            getattr(recipe.train, field.name) != getattr(recipes[0].train, field.name)
            for recipe in recipes
        )
    ]
    return {
        recipe.name: {name: getattr(recipe.train, name) for name in names} for recipe in recipes
    }


def _check(
    recipes: Sequence[Recipe],
    differences: dict[str, dict[str, Any]],
    seeds: Sequence[int],
    factors: Sequence[float],
    parallelism: int,
) -> None:
    base = recipes[0]
    for recipe in recipes:
        for part in ("subset", "evaluate"):
            if getattr(recipe, part) != getattr(base, part):
                raise ValueError(
                    f"the recipes of a sweep differ in training only, but {recipe.name} has "
                    f"another {part} than {base.name}; give variants of one recipe"
                )
        if recipe.train.device != base.train.device:
            raise ValueError(
                f"{recipe.name} asks for device {recipe.train.device}, {base.name} for "
                f"{base.train.device}; give all the same"
            )
    names = [recipe.name for recipe in recipes]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"{name} is given twice; name each recipe once")
        for other in names[:i]:
            if differences[name] == differences[other]:
                raise ValueError(f"{name} and {other} are the same training; leave one out")
    for what, values in (("seeds", seeds), ("imbalance factors", factors)):
        if len(set(values)) != len(values):
            raise ValueError(f"{what} are given twice: {', '.join(f'{x:g}' for x in values)}")
    if not seeds:
        raise ValueError("a sweep needs at least one seed, got none")
    for seed in seeds:
        replace(base.train, seed=seed)  # the configuration checks its values
    for factor in factors:
        replace(base.subset, imbalance_factor=factor)
    if parallelism < 1:
        raise ValueError(f"parallelism must be at least 1, got {parallelism}")


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


# --- the command line ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is swept over, and where."""

    base: str = "digits-lt"
    """Name of the recipe."""
    variants: tuple[str, ...] = ("no-dkt", "crt")
    """Variants of the recipe to compare it with."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings."""
    imbalance_factors: tuple[float, ...] = ()
    """Imbalance factors of the subsets, the one to choose at first; none means the recipe's."""
    parallelism: int = 1
    """Trainings at the same time, on a cluster."""

    run: bool = False
    """Run it on this machine instead of compiling it."""
    home: Path = Path(".shike")
    """Where runs on this machine are kept."""
    data_dir: str = ""
    """Folder with the source's files, or its URL, for a run on this machine."""

    output: Path | None = None
    """YAML file to write."""
    registry: str = ""
    """Where the images are, HOST/PROJECT."""
    tag: str = ""
    """Tag of the images; empty means the git commit."""
    cluster: Annotated[Cluster, tyro.conf.OmitArgPrefixes] = field(default_factory=Cluster)
    """What the steps ask of Kubernetes."""


def recipes_of(options: Options) -> tuple[Recipe, list[Recipe]]:
    """The base recipe and its variants.

    Raises:
        ValueError: there is none of that name.
    """
    base = recipe_named(options.base)
    return base, [variant(base, name) for name in options.variants]


def compile_sweep(options: Options, output: Path) -> str:
    """Write the pipeline for a cluster; returns the images' tag.

    Raises:
        ValueError: an option does not hold.
    """
    base, variants = recipes_of(options)
    place = options.cluster
    if place.num_nodes > 1:
        raise ValueError(
            f"a sweep trains each recipe on one machine, got num_nodes={place.num_nodes}; leave "
            "--num-nodes out, or compile the training pipeline"
        )
    tag = name_images(options.registry, options.tag)
    pipeline = sweep_pipeline(
        on_device(base, place.device),
        [on_device(recipe, place.device) for recipe in variants],
        place,
        git_commit(),
        options.seeds,
        options.imbalance_factors,
        options.parallelism,
    )
    write_package(pipeline, output)
    return tag


def run_sweep(options: Options) -> str:
    """Run it on this machine, one training after the other; returns the sweep's MLflow run.

    Raises:
        ValueError: an option does not hold.
        RuntimeError: a step failed; its message stands above.
    """
    from pipelines.run_local import run

    base, variants = recipes_of(options)
    pipeline = sweep_pipeline(
        base, variants, seeds=options.seeds, imbalance_factors=options.imbalance_factors
    )
    values = {
        "step1_data_dir": absolute(options.data_dir) if options.data_dir else "",
        "step2_checkpoint_dir": str(options.home.resolve() / "checkpoints"),
    }
    return run(pipeline, values, options.home, kind="sweep")


def main() -> None:
    """Command line of ``python -m pipelines.sweep``."""
    options = tyro.cli(Options, prog="python -m pipelines.sweep", description=__doc__)
    if options.run == (options.output is not None):
        sys.exit("error: give either --run, or --output FILE for the YAML of a cluster")
    if options.output is not None:
        try:
            tag = compile_sweep(options, options.output)
        except (ShikeError, ValueError) as error:
            sys.exit(f"error: {error}")
        print(f"wrote {options.output} (images tagged {tag})")
        return
    from components import tracking
    from pipelines.run_local import exit_on_error

    with exit_on_error("sweep"):
        print(tracking.sweep_summary(run_sweep(options), options.home))


if __name__ == "__main__":
    main()

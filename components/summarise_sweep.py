"""Sweep, after all trainings: their means, the best recipe, and a page about them."""

from typing import NamedTuple

from kfp import dsl

from components import images


@dsl.component(base_image=images.REGISTER, install_kfp_package=False)
def summarise_sweep(
    evaluated: list,  # type: ignore[type-arg]
    dataset: str,
    recipes: list,  # type: ignore[type-arg]
    imbalance_factors: list,  # type: ignore[type-arg]
    seeds: list,  # type: ignore[type-arg]
    page: dsl.Output[dsl.HTML],
) -> NamedTuple("Summarised", [("sweep_id", str), ("chosen", str)]):  # type: ignore[valid-type]
    """Compare the recipes; returns the sweep's MLflow run and the run chosen.

    It finds the trainings in MLflow; that they are there follows from `evaluated`.
    """
    import shutil
    import tempfile
    from pathlib import Path

    from components import boundary, tracking
    from shike_core import sweep

    with boundary.readable_errors(), tempfile.TemporaryDirectory() as directory:
        run = tracking.open_run(f"{dataset}-lt", "sweep")
        report = sweep.summarise(recipes, imbalance_factors, seeds, tracking.trainings())
        sweep.write_summary(report, Path(directory))
        tracking.log_sweep(run, report, Path(directory))
        shutil.copyfile(Path(directory) / "sweep.html", page.path)
        boundary.print_lines([sweep.as_text(report)])
    return run.run_id, report["choice"]["run_id"]

"""Compare evaluated runs of a tracking server: which is better, where, and how sure that is."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import tyro

from components import tracking
from pipelines.run_local import HOME, exit_on_error, local_or_named_server
from shike_core import stages
from shike_core.compare import as_text


def compare(
    runs: Sequence[str], home: Path, out: Path | None = None, across_test_sets: bool = False
) -> str:
    """Compare runs and write the pages.

    Args:
        runs: ids or names of runs, or registered models as ``NAME@ALIAS`` or ``NAME/VERSION``; the
            first is what the others are compared with. None at all takes the two that ended last.
        home: of local runs; its database is used if MLFLOW_TRACKING_URI is not set.
        out: directory to write; by default a new one below `home`.
        across_test_sets: also if they were measured on different images.

    Returns:
        What a terminal shows.

    Raises:
        TrackingError: no runs were made here, or a run, or a file of its evaluation, is not there.
        ComparisonError: the runs cannot be compared.
        ArtifactError: a result cannot be written.
    """
    home = home.resolve()
    client = local_or_named_server(home)
    found = [tracking.find_run(client, run) for run in runs] or tracking.latest_runs(client, 2)
    tracked = [
        tracking.TrackedRun(run.info.run_id, run.info.experiment_id, client) for run in found
    ]
    names = [str(run.info.run_name) for run in found]
    names = [
        name if names.count(name) == 1 else f"{name} ({run.run_id[:6]})"
        for name, run in zip(names, tracked, strict=True)
    ]
    out = out or home / "compare" / time.strftime("%Y%m%d-%H%M%S")
    with tempfile.TemporaryDirectory() as directory:
        report = stages.compare(
            [tracking.fetch_answers(run, Path(directory) / run.run_id) for run in tracked],
            out,
            names,
            [tracking.page(run.experiment_id, run.run_id) for run in tracked],
            across_test_sets,
        )
    where = [
        f"{name}: {tracking.where_to_look(run)}" for name, run in zip(names, tracked, strict=True)
    ]
    return "\n".join([as_text(report), *where, f"page: {out / 'compare.html'}"])


def main(
    runs: tyro.conf.Positional[tuple[str, ...]] = (),
    home: Path = HOME,
    out: Path | None = None,
    across_test_sets: bool = False,
) -> None:
    """Compare evaluated runs: which is better, where, and how sure that is.

    Args:
        runs: ids or names of MLflow runs, or registered models as NAME@champion or NAME/VERSION;
            the first is what the others are compared with. None takes the two that ended last.
        home: where local runs are kept.
        out: directory to write.
        across_test_sets: also if they were measured on different images; then nothing is tested.
    """
    with exit_on_error("comparison"):
        print(compare(runs, home, out, across_test_sets))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m pipelines.compare")

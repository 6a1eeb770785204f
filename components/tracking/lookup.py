"""Runs by what a person calls them, and the small files of their evaluations."""

import re
import tempfile
from pathlib import Path

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from components.tracking.connection import (
    TrackingError,
    all_experiments,
    reason,
    time_for_files,
    without_password,
)
from components.tracking.runs import TrackedRun
from shike_core import stages
from shike_core.config import TrainConfig
from shike_core.errors import CheckpointError

EVALUATED = "tags.weights_digest != '' and tags.kind = 'run' and attributes.status = 'FINISHED'"
SHOWN = 5


def find_run(client: mlflow.MlflowClient, wanted: str) -> Run:
    """A run by its id, its name, or the registered model that came out of it.

    Args:
        client: of the server.
        wanted: an id, a run's name, ``NAME@ALIAS``, ``NAME/VERSION``, or either after
            ``models:/``.

    Raises:
        TrackingError: there is none, or there are several.
    """
    server = without_password(mlflow.get_tracking_uri())
    address = re.fullmatch(r"(?:models:/)?([^/@:]+)(?:@([\w.-]+)|/(\d+))", wanted)
    if address:
        return _run_behind(client, *address.groups())
    if re.fullmatch(r"[0-9a-f]{32}", wanted):
        try:
            return client.get_run(wanted)
        except MlflowException as error:
            raise TrackingError(
                f"there is no MLflow run {wanted} on {server} ({reason(error)}); give the id or "
                "the name of a run of this server"
            ) from error
    quote = '"' if "'" in wanted else "'"
    condition = f"attributes.run_name = {quote}{wanted}{quote}" if quote not in wanted else ""
    found = [
        run
        for run in client.search_runs(all_experiments(client), condition)
        if run.info.run_name == wanted
    ]
    if not found:
        raise TrackingError(
            f"no MLflow run on {server} is called {wanted!r}; give a run's id or name, or a "
            "registered model as NAME@champion or NAME/VERSION"
        )
    if len(found) > 1:
        ids = ", ".join(run.info.run_id for run in found[:SHOWN])
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise TrackingError(
            f"{len(found)} MLflow runs are called {wanted!r}; give the id of one: {ids}{more}"
        )
    return found[0]


def latest_runs(client: mlflow.MlflowClient, number: int) -> list[Run]:
    """The runs that were evaluated and ended last, the older one first.

    Raises:
        TrackingError: there are not so many.
    """
    found = client.search_runs(
        all_experiments(client), EVALUATED, order_by=["end_time DESC"], max_results=number
    )
    if len(found) < number:
        raise TrackingError(
            f"{without_password(mlflow.get_tracking_uri())} has {len(found)} finished run"
            f"{'' if len(found) == 1 else 's'} with an evaluation, and {number} are needed; make "
            "some with make run, or name the server with MLFLOW_TRACKING_URI"
        )
    return list(reversed(found))


def fetch_answers(run: TrackedRun, into: Path) -> Path:
    """Fetch the report and the predictions of a run; the directory they lie in.

    Raises:
        TrackingError: the run has none, or they were deleted.
    """
    into.mkdir(parents=True, exist_ok=True)
    for name in ("report.json", "predictions.parquet"):
        try:
            with time_for_files():
                fetched = run.client.download_artifacts(run.run_id, f"evaluation/{name}", str(into))
        except Exception as error:  # each store raises its own
            raise TrackingError(
                f"run {run.run_id} has no evaluation/{name} ({reason(error)}): it was not "
                "evaluated, or its artifacts were deleted; evaluate it again, or leave it out"
            ) from error
    return Path(fetched).parent


def fetch_checkpoint(client: mlflow.MlflowClient, run: Run, into: Path) -> Path:
    """Fetch the trained weights of a run; the file.

    Raises:
        TrackingError: the run has none, or they were deleted.
    """
    run_id = run.info.run_id
    try:
        with time_for_files():
            fetched = client.download_artifacts(run_id, "train/checkpoint.pt", str(into))
    except Exception as error:  # each store raises its own
        raise TrackingError(
            f"run {run_id} has no train/checkpoint.pt ({reason(error)}): it was not trained "
            "to its end, or its artifacts were deleted; name another model or run"
        ) from error
    return Path(fetched)


def take_stage1(
    run: TrackedRun,
    wanted: str,
    config: TrainConfig,
    subset: Path,
    out: Path,
    checkpoint_dir: Path | None,
) -> None:
    """Have a training take stage 1 of another run, and note in its own run whose that is.

    Args:
        run: of the training.
        wanted: the other run, as `find_run` takes it; empty means that nothing is taken.
        config: as for `shike_core.stages.take_stage1`, like the others.
        subset: as there.
        out: as there.
        checkpoint_dir: as there.

    Raises:
        TrackingError: there is no such run, there are several, or it has no checkpoint.
        ShikeError: as `shike_core.stages.take_stage1`.
        ValueError: likewise.
    """
    if not wanted:
        return
    other = find_run(run.client, wanted)
    with tempfile.TemporaryDirectory() as directory:
        trained = fetch_checkpoint(run.client, other, Path(directory))
        try:
            taken = stages.take_stage1(trained, config, subset, out, checkpoint_dir)
        except (CheckpointError, ValueError) as error:
            named = str(error).replace(str(trained), f"run {other.info.run_id}")
            raise type(error)(named) from error
    if taken:
        run.tag(stage1_run=other.info.run_id)


def _run_behind(
    client: mlflow.MlflowClient, name: str, alias: str | None, version: str | None
) -> Run:
    shown = f"{name}@{alias}" if alias else f"{name}/{version}"
    try:
        found = (
            client.get_model_version_by_alias(name, alias)
            if alias
            else client.get_model_version(name, str(version))
        )
        return client.get_run(str(found.run_id))
    except MlflowException as error:
        raise TrackingError(
            f"{without_password(mlflow.get_tracking_uri())} has no model {shown}, or its run is "
            f"gone ({reason(error)}); the page Models shows what there is"
        ) from error

"""The run of a training: found or created, tagged, and what a step leaves in it."""

import getpass
import json
import os
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from components.tracking.connection import (
    TrackingError,
    all_experiments,
    connect,
    page,
    patience_s,
    patient,
    permission_to_write,
    reason,
    runs_page,
    time_for_files,
    without_password,
)
from shike_core.config import EvaluateConfig, TrainConfig
from shike_core.data.manifest import read_info
from shike_core.gate import shot_groups_digest
from shike_core.recipes import variant_of
from shike_core.stages import training_digest

VIEW_KEY = "shike"
"""Of the view that `all_runs` leads to."""
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"
VIEW: dict[str, Any] = {
    "searchFilter": "",
    "orderByKey": "attributes.start_time",
    "orderByAsc": False,
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "datasetsFilter": [],
    "modelVersionFilter": "All Runs",
    "selectedColumns": [
        "metrics.`test/accuracy`",
        "metrics.`test/many_shot/accuracy`",
        "metrics.`test/medium_shot/accuracy`",
        "metrics.`test/few_shot/accuracy`",
        "metrics.`test/expected_calibration_error`",
        "metrics.`validation/accuracy`",
        "tags.`recipe`",
        "tags.`imbalance_factor`",
        "tags.`seed`",
        "tags.`decision`",
    ],
}
"""What MLflow's list of runs shows by that link, in the form in which it keeps shared views."""
KFP_RUN_ID = "SHIKE_KFP_RUN_ID"
"""Environment variable with the id of the KFP run, the same in all its steps."""
KFP_UI = "SHIKE_KFP_UI"
"""Environment variable with the address of the KFP pages, to link to; may be missing."""
GIT_COMMIT = "SHIKE_GIT_COMMIT"
"""Environment variable with the commit that the running code was built from."""
STOPPED = "SHIKE_STOPPED"
"""Environment variable that is set when a person stops a run on this machine: KFP's local runner
knows nothing but that a step failed."""
HANDED_ON = "run.json"
"""File beside a training's results that names the MLflow run they are logged in."""
OPEN = ("RUNNING", "SCHEDULED")
"""States of a run that has not ended."""
MODEL_URI = "model_uri"
"""Tag of the model that an evaluation exported, set after it was compared with the checkpoint."""
MAX_BATCH = 500
"""Metrics in one request."""


@dataclass(frozen=True)
class TrackedRun:
    """An open MLflow run and a client to write to it."""

    run_id: str
    experiment_id: str
    client: mlflow.MlflowClient = field(repr=False)

    @patient
    def tag(self, **tags: object) -> None:
        """Set tags; one with an empty value is left out."""
        entities = [RunTag(key, str(value)) for key, value in tags.items() if value != ""]
        self.client.log_batch(self.run_id, tags=entities)

    @patient
    def log_params(self, prefix: str, values: object) -> None:
        """Log the fields of a configuration as ``prefix.field``."""
        params = [Param(f"{prefix}.{key}", str(value)) for key, value in _fields(values).items()]
        self.client.log_batch(self.run_id, params=params)

    def log_metrics(self, metrics: Iterable[Metric]) -> None:
        """Log metrics of any number."""
        rest = list(metrics)
        while rest:
            patient(self.client.log_batch)(self.run_id, metrics=rest[:MAX_BATCH])
            del rest[:MAX_BATCH]

    def log_directory(self, directory: Path, artifact_path: str, *patterns: str) -> None:
        """Store the files of a directory that match, under a folder of the run's artifacts."""
        for pattern in patterns:
            for path in sorted(directory.glob(pattern)):
                folder = artifact_path
                if path.parent != directory:
                    folder = f"{artifact_path}/{path.parent.relative_to(directory)}"
                with time_for_files():
                    patient(self.client.log_artifact)(self.run_id, str(path), folder)

    def store_text(self, text: str, path: str) -> None:
        """Store a text among the run's artifacts.

        Raises:
            TrackingError: the artifact store does not take it.
        """
        try:
            self.client.log_text(self.run_id, text, path)
        except Exception as error:  # each store raises its own
            raise TrackingError(
                f"the run can be written, but its artifact store does not take files "
                f"({reason(error)}); check the server's artifact store and this user's rights"
            ) from error

    def log_subset(self, subset: Path) -> None:
        """Store the rule, the class counts and both data sets with their digests."""
        info = read_info(subset)
        self.log_params("subset", info["rule"])
        inputs = []
        for split, digest in (("train", info["digest"]), ("test", info["test_digest"])):
            columns = ["label", "class_name", "source_index"]
            path = subset / f"{split}.parquet"
            with warnings.catch_warnings():  # integers cannot be missing, and labels never are
                warnings.filterwarnings("ignore", message=".*integer column.*")
                warnings.filterwarnings("ignore", message=".*interpreted in multiple ways.*")
                dataset = from_pandas(
                    pd.read_parquet(path, columns=columns),
                    source=str(path),
                    targets="label",
                    name=f"{info['rule']['dataset']}-lt-{split}",
                    digest=digest[:36],
                )._to_mlflow_entity()
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", split)]))
        patient(self.client.log_inputs)(self.run_id, inputs)
        self.log_directory(subset, "subset", "subset.json", "*.png", "*.csv")
        rule = info["rule"]
        self.tag(
            dataset=f"{rule['dataset']}-lt",
            imbalance_factor=rule["imbalance_factor"],
            selection=rule["selection"],
            subset_digest=info["digest"],
            test_digest=info["test_digest"],
        )

    def of_sweep(self) -> bool:
        """Whether this is the run of one training of a sweep."""
        parent = self.client.get_run(self.run_id).data.tags.get("mlflow.parentRunId", "")
        return bool(parent) and self.client.get_run(parent).data.tags.get("kind") == "sweep"

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run with a status."""
        patient(self.client.set_terminated)(self.run_id, status)


def open_run(experiment: str, kind: str = "run") -> TrackedRun:
    """The run of this pipeline run, created if there is none yet.

    Precedence: ``MLFLOW_RUN_ID`` (set by a KFP backend that tracks runs itself), a run tagged with
    this KFP run's id, a new run.

    Args:
        experiment: name of the experiment that a new run belongs to.
        kind: ``run`` for one training, ``sweep`` for the parent of several.

    Raises:
        TrackingError: no server is named, it does not answer, or it has no such run.
    """
    client = connect()
    if given := os.environ.get("MLFLOW_RUN_ID", ""):
        return _attach(client, given)
    kfp_run = os.environ.get(KFP_RUN_ID, "")
    if found := runs_of(client, kfp_run, kind):
        return TrackedRun(found[0].info.run_id, found[0].info.experiment_id, client)
    with permission_to_write(experiment):
        return _create(client, _experiment(client, experiment), kind)


def attach(run_id: str) -> TrackedRun:
    """The run that an earlier step handed on.

    Raises:
        TrackingError: the server does not answer in time, or it has no such run.
    """
    return _attach(connect(patience_s()), run_id)


def open_training(subset: Path, config: TrainConfig) -> TrackedRun:
    """Open the run of a training and write down what will be trained on what.

    Precedence: ``MLFLOW_RUN_ID``, then of this KFP run's runs the one of this very training (the
    step was retried), one that no training has taken yet, a new child of the sweep, a new run.

    Raises:
        TrackingError: no server is named, or it does not answer; nothing was trained.
    """
    client = connect()
    info = read_info(subset)
    digest = training_digest(config, info["digest"])
    if given := os.environ.get("MLFLOW_RUN_ID", ""):
        run = _attach(client, given)
    else:
        run = _run_for_training(client, f"{info['rule']['dataset']}-lt", digest)
    name, variant = _names(info["rule"], config)
    client.update_run(run.run_id, status="RUNNING", name=name)  # a retried step found it FAILED
    run.tag(
        kind="run",
        kfp_run_id=os.environ.get(KFP_RUN_ID, ""),
        training_digest=digest,
        seed=config.seed,
        variant=variant or "shike",
        recipe=f"{info['rule']['dataset']}-lt{f'/{variant}' if variant else ''}",
    )
    run.log_params("train", config)
    run.log_subset(subset)
    return run


def hand_on(run: TrackedRun, out: Path) -> None:
    """Leave beside a step's results in which run they are logged."""
    here = {"run_id": run.run_id, "kfp_run_id": os.environ.get(KFP_RUN_ID, "")}
    (out / HANDED_ON).write_text(json.dumps(here))


def open_evaluation(subset: Path, checkpoint: Path) -> TrackedRun:
    """The run in which a checkpoint's training is logged, in this pipeline run.

    If the training was served from KFP's cache, its configuration, metrics and files are logged
    once more, in the run of this pipeline run.

    Args:
        subset: directory of the subset.
        checkpoint: directory that a training step left.

    Raises:
        TrackingError: the server does not answer, it has no such run, or the directory does not
            come from a training step.
    """
    try:
        handed = json.loads((checkpoint / HANDED_ON).read_text())
        report = json.loads((checkpoint / "train.json").read_text())
        history = json.loads((checkpoint / "history.json").read_text())
    except (OSError, ValueError) as error:
        raise TrackingError(
            f"{checkpoint} is not what the train step leaves ({error}); give its output"
        ) from error
    if handed["kfp_run_id"] == os.environ.get(KFP_RUN_ID, ""):
        return attach(handed["run_id"])
    run = open_training(subset, TrainConfig(**report["config"]))
    now, known = int(time.time() * 1000), last_step(run)
    run.log_metrics(
        Metric(key, float(value), now, int(epoch["epoch"]))
        for epoch in history
        if int(epoch["epoch"]) > known
        for key, value in epoch.items()
    )
    log_training(run, report, checkpoint)
    run.tag(cached_training=handed["run_id"])
    return run


def close_runs(state: str) -> list[str]:
    """Close what a pipeline run left open when it ended; the last step closes what succeeded.

    A run that is still open failed, even if the platform says SUCCEEDED: its last step never ran.

    Args:
        state: how KFP says the pipeline run ended.

    Returns:
        A line for each run closed.
    """
    client = connect(patience_s())
    stopped = state.startswith("CANCEL") or STOPPED in os.environ
    status = "KILLED" if stopped else "FAILED"
    left = [
        run.info.run_id
        for run in runs_of(client, os.environ.get(KFP_RUN_ID, ""))
        if run.info.status in OPEN or (status == "KILLED" and run.info.status == "FAILED")
    ]
    for run_id in left:
        client.set_terminated(run_id, status)
    return [f"closed run {run_id} as {status}" for run_id in left]


def runs_of(client: mlflow.MlflowClient, kfp_run: str, kind: str = "") -> list[Run]:
    """The MLflow runs that belong to a KFP run, the oldest first.

    Args:
        client: of the server.
        kfp_run: its id; an empty one has none.
        kind: ``run`` or ``sweep``; empty takes all.
    """
    if not kfp_run:
        return []
    condition = f"tags.kfp_run_id = '{kfp_run}'" + (f" and tags.kind = '{kind}'" if kind else "")
    return list(client.search_runs(all_experiments(client), condition, order_by=["start_time ASC"]))


def _run_for_training(client: mlflow.MlflowClient, experiment: str, digest: str) -> TrackedRun:
    mine = runs_of(client, os.environ.get(KFP_RUN_ID, ""))
    runs = [run for run in mine if run.data.tags["kind"] == "run"]
    own = [run for run in runs if run.data.tags.get("training_digest") == digest]
    free = [run for run in runs if "training_digest" not in run.data.tags]
    if found := own or free:
        return TrackedRun(found[0].info.run_id, found[0].info.experiment_id, client)
    sweeps = [run for run in mine if run.data.tags["kind"] == "sweep"]
    # With its digest from the first moment: to a training that begins beside it, it is not free.
    if not sweeps:
        return _create(client, _experiment(client, experiment), "run", training_digest=digest)
    parent = sweeps[0].info
    return _create(
        client, parent.experiment_id, "run", parent=parent.run_id, training_digest=digest
    )


def _create(
    client: mlflow.MlflowClient,
    experiment_id: str,
    kind: str,
    *,
    parent: str = "",
    training_digest: str = "",
) -> TrackedRun:
    kfp_run = os.environ.get(KFP_RUN_ID, "")
    tags = {
        "kind": kind,
        "kfp_run_id": kfp_run,
        "mlflow.parentRunId": parent,
        "training_digest": training_digest,
        "mlflow.source.git.commit": os.environ.get(GIT_COMMIT, ""),
        "mlflow.source.name": "shike",
        "mlflow.user": user(),
        "mlflow.note.content": _note(kfp_run),
    }
    tags = {key: value for key, value in tags.items() if value}
    run = client.create_run(experiment_id, tags=tags, run_name=f"{kind} that begins")
    return TrackedRun(run.info.run_id, experiment_id, client)


def _names(rule: Mapping[str, Any], config: TrainConfig) -> tuple[str, str | None]:
    """What a run is called, and its variant."""
    name = (
        f"IF{rule['imbalance_factor']:g} {rule['selection']} {config.num_experts}e "
        f"{config.epochs}ep seed{config.seed}"
    )
    if rule.get("num_classes"):
        name = f"{rule['num_classes']} classes {name}"
    if rule.get("image_size"):
        name = f"{rule['image_size']}px {name}"
    variant = variant_of(config)
    return (f"{variant} {name}" if variant else name), variant


def log_training(run: TrackedRun, report: Mapping[str, Any], out: Path) -> None:
    """Store what a finished training left: weights, history, figures about it."""
    run.tag(
        device=report["device"],
        precision=report["precision"],
        parameters_deployed=report["parameters_deployed"],
    )
    run.log_directory(out, "train", "checkpoint.pt", "*.json", "*.jsonl")


def log_evaluation(
    run: TrackedRun, config: EvaluateConfig, report: Mapping[str, Any], out: Path, model_uri: str
) -> None:
    """Store report, plots and predictions, and what identifies the model."""
    run.log_params("evaluate", config)
    run.tag(
        **{"weights_digest": report["export"]["weights_digest"], MODEL_URI: model_uri},
        shot_groups=shot_groups_digest(report["per_class"]),
    )
    run.log_directory(out, "evaluation", "*.json", "*.html", "*.parquet", "plots/*.png")
    if run.of_sweep():
        run.finish()  # no other step writes to it


def _attach(client: mlflow.MlflowClient, run_id: str) -> TrackedRun:
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise TrackingError(
            f"there is no MLflow run {run_id} on {without_password(mlflow.get_tracking_uri())} "
            f"({reason(error)}); give the id of a run of this server, or none"
        ) from error
    return TrackedRun(run_id, run.info.experiment_id, client)


def user() -> str:
    """Who runs this, or empty."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an arbitrary uid in a container has no name
        return ""


def _note(kfp_run: str) -> str:
    pages = os.environ.get(KFP_UI, "").rstrip("/")
    if not kfp_run:
        return "Not part of a KFP run."
    return (
        f"KFP run [{kfp_run}]({pages}/#/runs/details/{kfp_run})"
        if pages
        else f"KFP run `{kfp_run}`"
    )


def _experiment(client: mlflow.MlflowClient, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is not None and experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {name} was deleted; bring it back: mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}, or delete it for good with mlflow gc"
        )
    if experiment is not None:
        return str(experiment.experiment_id)
    try:
        location = _artifact_location(name)
        return str(client.create_experiment(name, location, tags={VIEW_TAG: json.dumps(VIEW)}))
    except MlflowException:  # another run created it in between
        created = client.get_experiment_by_name(name)
        if created is None:
            raise
        return str(created.experiment_id)


def _artifact_location(name: str) -> str | None:
    """Beside a database file; a server decides for itself."""
    uri = mlflow.get_tracking_uri()
    if not uri.startswith("sqlite:///"):
        return None
    return str(Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts" / name)


def fetch_evaluation(run: TrackedRun, into: Path) -> Path:
    """Fetch a report that `log_evaluation` stored; the directory it lies in.

    Raises:
        TrackingError: no evaluation was logged in this run.
    """
    try:
        return Path(
            run.client.download_artifacts(run.run_id, "evaluation/report.json", str(into))
        ).parent
    except Exception as error:  # each store raises its own
        raise TrackingError(
            f"run {run.run_id} has no report of an evaluation ({reason(error)}); evaluate first"
        ) from error


def last_step(run: TrackedRun) -> int:
    """The last epoch that was logged; -1 if none was."""
    history = run.client.get_metric_history(run.run_id, "train/loss")
    return max((metric.step for metric in history), default=-1)


def where_to_look(run: TrackedRun) -> str:
    """The address of a run's page, or how to open the pages."""
    return page(run.experiment_id, run.run_id) or (
        f"run {run.run_id}; open the pages with: make mlflow-ui "
        f"STORE={without_password(mlflow.get_tracking_uri())}"
    )


def all_runs(run: TrackedRun) -> str:
    """Where all runs of its experiment stand side by side."""
    uri = mlflow.get_tracking_uri()
    server = without_password(uri).rstrip("/") if uri.startswith("http") else "there"
    return f"{server}/{runs_page(run.experiment_id, VIEW_KEY)}"


def _fields(values: object) -> dict[str, Any]:
    return dict(values) if isinstance(values, Mapping) else asdict(values)  # type: ignore[call-overload]

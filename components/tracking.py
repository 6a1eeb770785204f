"""MLflow: the only module that imports it.

One canonical MLflow run belongs to a pipeline run, or to each training of a sweep. A step finds it
by the id that an earlier step handed on, then by ``MLFLOW_RUN_ID``, then by the KFP run's id, and
creates it last of all. A training that KFP served from its cache hands on the run of an older
pipeline run; then what was logged there is logged once more in a run of this one.
"""

import getpass
import json
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# One call may wait 10 s and is tried twice; waiting longer is this module's own decision.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

import mlflow
import pandas as pd
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

from shike_core.config import EvaluateConfig, RegisterConfig, TrainConfig
from shike_core.data.manifest import read_info
from shike_core.errors import ShikeError
from shike_core.gate import Decision
from shike_core.recipes import variant_of
from shike_core.stages import training_digest
from shike_core.sweep import as_text, means

KFP_RUN_ID = "SHIKE_KFP_RUN_ID"
"""Environment variable with the id of the KFP run, the same in all its steps."""
KFP_UI = "SHIKE_KFP_UI"
"""Environment variable with the address of the KFP pages, to link to; may be missing."""
GIT_COMMIT = "SHIKE_GIT_COMMIT"
"""Environment variable with the commit that the running code was built from."""
PATIENCE = "SHIKE_TRACKING_PATIENCE_S"
"""Environment variable: seconds a step waits at its end for a server that went away."""
DEFAULT_PATIENCE_S = 600.0
HANDED_ON = "run.json"
"""File beside a training's results that names the MLflow run they are logged in."""
SYSTEM_METRICS_EVERY_S = 5.0
OPEN = ("RUNNING", "SCHEDULED")
"""States of a run that has not ended."""
MAX_BATCH = 500
"""Metrics in one request."""

Log = Callable[[Mapping[str, float], int], None]


class TrackingError(ShikeError):
    """The tracking server is not configured, not reachable, or lost what it had."""


# --- the run ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrackedRun:
    """An open MLflow run and a client to write to it."""

    run_id: str
    experiment_id: str
    client: mlflow.MlflowClient = field(repr=False)

    def tag(self, **tags: object) -> None:
        """Set tags; one with an empty value is left out."""
        entities = [RunTag(key, str(value)) for key, value in tags.items() if value != ""]
        self.client.log_batch(self.run_id, tags=entities)

    def log_params(self, prefix: str, values: object) -> None:
        """Log the fields of a configuration as ``prefix.field``."""
        params = [Param(f"{prefix}.{key}", str(value)) for key, value in _fields(values).items()]
        self.client.log_batch(self.run_id, params=params)

    def log_metrics(self, metrics: Iterable[Metric]) -> None:
        """Log metrics of any number."""
        rest = list(metrics)
        while rest:
            self.client.log_batch(self.run_id, metrics=rest[:MAX_BATCH])
            del rest[:MAX_BATCH]

    def log_directory(self, directory: Path, artifact_path: str, *patterns: str) -> None:
        """Store the files of a directory that match, under a folder of the run's artifacts."""
        for pattern in patterns:
            for path in sorted(directory.glob(pattern)):
                folder = artifact_path
                if path.parent != directory:
                    folder = f"{artifact_path}/{path.parent.relative_to(directory)}"
                self.client.log_artifact(self.run_id, str(path), folder)

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
                f"({_reason(error)}); check the server's artifact store and this user's rights"
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
        self.client.log_inputs(self.run_id, inputs)
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
        self.client.set_terminated(self.run_id, status)


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
    with _permission_to_write(experiment):
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
    now, known = int(time.time() * 1000), _last_step(run)
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
    status = "KILLED" if state.startswith("CANCEL") else "FAILED"
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
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    condition = f"tags.kfp_run_id = '{kfp_run}'" + (f" and tags.kind = '{kind}'" if kind else "")
    return list(client.search_runs(experiments, condition, order_by=["start_time ASC"]))


def _run_for_training(client: mlflow.MlflowClient, experiment: str, digest: str) -> TrackedRun:
    mine = runs_of(client, os.environ.get(KFP_RUN_ID, ""))
    runs = [run for run in mine if run.data.tags["kind"] == "run"]
    own = [run for run in runs if run.data.tags.get("training_digest") == digest]
    free = [run for run in runs if "training_digest" not in run.data.tags]
    if found := own or free:
        return TrackedRun(found[0].info.run_id, found[0].info.experiment_id, client)
    sweeps = [run for run in mine if run.data.tags["kind"] == "sweep"]
    if not sweeps:
        return _create(client, _experiment(client, experiment), "run")
    return _create(client, sweeps[0].info.experiment_id, "run", sweeps[0].info.run_id)


def _create(
    client: mlflow.MlflowClient, experiment_id: str, kind: str, parent: str = ""
) -> TrackedRun:
    kfp_run = os.environ.get(KFP_RUN_ID, "")
    tags = {
        "kind": kind,
        "kfp_run_id": kfp_run,
        "mlflow.parentRunId": parent,
        "mlflow.source.git.commit": os.environ.get(GIT_COMMIT, ""),
        "mlflow.source.name": "shike",
        "mlflow.user": _user(),
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
    run: TrackedRun, config: EvaluateConfig, report: Mapping[str, Any], out: Path
) -> None:
    """Store report, plots and predictions, and what identifies the model."""
    run.log_params("evaluate", config)
    run.tag(
        weights_digest=report["export"]["weights_digest"],
    )
    run.log_directory(out, "evaluation", "*.json", "*.html", "*.parquet", "plots/*.png")
    if run.of_sweep():
        run.finish()  # no other step writes to it


def connect(patience_s: float = 0.0) -> mlflow.MlflowClient:
    """A client whose server answers.

    Args:
        patience_s: how long to wait for a server that is away; 0 asks once.

    Raises:
        TrackingError: MLFLOW_TRACKING_URI is not set, or the server does not answer.
    """
    uri = _tracking_uri()
    if not uri:
        raise TrackingError(
            "MLFLOW_TRACKING_URI is not set, so every metric would be lost with this container; "
            "set it to the address of the MLflow server (or to sqlite:////path/mlflow.db)"
        )
    mlflow.set_tracking_uri(uri)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            client = mlflow.MlflowClient(uri)
            client.search_experiments(max_results=1)
            return client
        except Exception as error:  # a database, an HTTP client: each store raises its own
            if getattr(error, "error_code", "") == "UNAUTHENTICATED":
                raise TrackingError(
                    f"the MLflow tracking server {uri} does not know this user or password; set "
                    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to those it knows"
                ) from error
            if time.monotonic() >= deadline:
                raise TrackingError(
                    f"the MLflow tracking server {_without_password(uri)} does not answer "
                    f"({_reason(error)}); check MLFLOW_TRACKING_URI, that the server runs, and "
                    "that this machine may reach it"
                ) from error
            time.sleep(2.0)


def _tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, after user and password in it went where no message shows them."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    address = _without_password(uri)
    if uri.startswith("http") and address != uri:
        user, _, password = uri.partition("://")[2].rpartition("@")[0].partition(":")
        os.environ["MLFLOW_TRACKING_URI"] = address
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(user)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(password)
        return address
    return uri


@contextmanager
def _permission_to_write(experiment: str) -> Iterator[None]:
    """Say in words that the server's rules for this user are in the way."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != "PERMISSION_DENIED":
            raise
        user = os.environ.get("MLFLOW_TRACKING_USERNAME", "without a name")
        raise TrackingError(
            f"user {user} may not write to the experiment {experiment} on "
            f"{_without_password(mlflow.get_tracking_uri())}; have its owner or the server's "
            "admin grant EDIT, or be another user"
        ) from error


def _attach(client: mlflow.MlflowClient, run_id: str) -> TrackedRun:
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise TrackingError(
            f"there is no MLflow run {run_id} on {_without_password(mlflow.get_tracking_uri())} "
            f"({_reason(error)}); give the id of a run of this server, or none"
        ) from error
    return TrackedRun(run_id, run.info.experiment_id, client)


def _user() -> str:
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
    if experiment is not None:
        return str(experiment.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location=_artifact_location(name)))
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
            f"run {run.run_id} has no report of an evaluation ({_reason(error)}); evaluate first"
        ) from error


def model_of(run: TrackedRun) -> str:
    """The address of the model that an evaluation exported last.

    Raises:
        TrackingError: there is none.
    """
    outputs = run.client.get_run(run.run_id).outputs
    models = [model.model_id for model in outputs.model_outputs] if outputs else []
    if not models:
        raise TrackingError(f"run {run.run_id} has no model; evaluate first")
    return f"models:/{models[-1]}"


# --- metrics while training ------------------------------------------------------------------


class LiveLog:
    """Sends metrics from a thread; what a server that is away cannot take is kept and sent later.

    Training never waits for it. Every metric is on disk as well, in ``metrics.jsonl``.
    """

    def __init__(self, run: TrackedRun, console: Log, spool: Path) -> None:
        self._run, self._console, self._spool = run, console, spool
        self._pending: list[Metric] = []
        self._lock = threading.Lock()
        self._sending = threading.Lock()  # two senders would drop a batch that neither sent
        self._closing = threading.Event()
        self._last_error = ""
        self._already = _last_step(run)
        self._system = _SystemMetrics()
        self._thread = threading.Thread(target=self._work, daemon=True)
        spool.parent.mkdir(parents=True, exist_ok=True)
        spool.write_text("")
        self._thread.start()

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        """Show and keep the metrics of one epoch; return at once."""
        self._console(metrics, step)
        if step <= self._already:  # a resumed run repeats the epochs that it had logged
            return
        with self._spool.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._add(metrics, step)

    def close(self, patience_s: float) -> None:
        """Send what is left.

        Args:
            patience_s: how long to wait for a server that is away.

        Raises:
            TrackingError: the server did not return; the metrics are on disk.
        """
        self._closing.set()
        self._thread.join(timeout=60.0)
        deadline = time.monotonic() + patience_s
        while not self._send():
            if time.monotonic() >= deadline:
                raise TrackingError(
                    f"the tracking server went away during the step and did not return within "
                    f"{patience_s:g} s ({self._last_error}); {len(self._pending)} values were not "
                    f"sent. They are in {self._spool}, and all results are on disk: run the same "
                    "command again when the server is back, nothing is computed twice"
                )
            time.sleep(min(2.0, max(0.1, deadline - time.monotonic())))

    def _add(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        with self._lock:
            self._pending += [Metric(k, float(v), now, step) for k, v in metrics.items()]

    def _work(self) -> None:
        while not self._closing.wait(1.0):
            sampled = self._system.sample()
            if sampled is not None:
                self._add(*sampled)
            self._send()
        self._system.collect()  # a training of less than a second has no sample yet
        self._add(*self._system.rest())

    def _send(self) -> bool:
        with self._sending:
            return self._send_batches()

    def _send_batches(self) -> bool:
        while self._pending:
            with self._lock:
                batch = self._pending[:MAX_BATCH]
            try:
                self._run.client.log_batch(self._run.run_id, metrics=batch)
            except Exception as error:  # whatever it is, training goes on
                if not self._last_error:
                    print(
                        f"warning: the tracking server does not take metrics ({_reason(error)}); "
                        "they are kept and sent when it returns",
                        file=sys.stderr,
                        flush=True,
                    )
                self._last_error = _reason(error)
                return False
            self._last_error = ""
            with self._lock:
                del self._pending[: len(batch)]
        return True


class _SystemMetrics:
    """Processor, memory, disk, network and GPU, averaged over some seconds."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        try:
            from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

            self._monitors.append(GPUMonitor())
        except (ImportError, RuntimeError):
            pass  # no NVIDIA library, no GPU metrics
        self._step = 0
        self._due = time.monotonic() + SYSTEM_METRICS_EVERY_S

    def sample(self) -> tuple[dict[str, float], int] | None:
        """Take one sample; the averages and their step when they are due."""
        self.collect()
        if time.monotonic() < self._due:
            return None
        self._due += SYSTEM_METRICS_EVERY_S
        return self.rest()

    def collect(self) -> None:
        """Take one sample."""
        for monitor in self._monitors:
            monitor.collect_metrics()

    def rest(self) -> tuple[dict[str, float], int]:
        """Averages of the samples since the last call, and their step."""
        averages: dict[str, float] = {}
        for monitor in self._monitors:
            averages |= {f"system/{k}": v for k, v in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        self._step += 1
        return averages, self._step - 1


@contextmanager
def live_log(run: TrackedRun, console: Log, out: Path) -> Iterator[LiveLog]:
    """A `LiveLog` that has sent everything when the block ends without an error."""
    log = LiveLog(run, console, out / "metrics.jsonl")
    try:
        yield log
    except BaseException:
        log._closing.set()  # the step's own error counts; give the metrics one more chance
        log._thread.join(timeout=15.0)
        log._send()
        raise
    log.close(patience_s())


def patience_s() -> float:
    """Seconds to wait at the end of a step for a server that went away."""
    return float(os.environ.get(PATIENCE, DEFAULT_PATIENCE_S))


def _last_step(run: TrackedRun) -> int:
    history = run.client.get_metric_history(run.run_id, "train/loss")
    return max((metric.step for metric in history), default=-1)


# --- the model -------------------------------------------------------------------------------


@dataclass
class ModelExporter:
    """Stores a model with MLflow as a ``pt2`` program, and gives back what was stored."""

    run: TrackedRun
    model_uri: str = ""

    def __call__(self, model: Any, example: Any, out: Path) -> Callable[[Any], Any]:
        """Export and log a module; return the program as loaded from the server.

        Args:
            model: module, uint8 images ``(batch, 3, h, w)`` to probabilities.
            example: uint8 images, more than one, so that the batch is dynamic.
            out: not used; the server stores the program.
        """
        import mlflow.pytorch
        import torch

        images = example.numpy()
        probabilities = model(example).detach().numpy()
        signature = ModelSignature(
            Schema([TensorSpec(images.dtype, (-1, *images.shape[1:]))]),
            Schema([TensorSpec(probabilities.dtype, (-1, probabilities.shape[1]))]),
        )
        mlflow.set_experiment(experiment_id=self.run.experiment_id)
        # It misses pip in environments made without it, and only names it without a version.
        logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)
        info = Model.log(
            None,
            mlflow.pytorch,
            run_id=self.run.run_id,
            name="model",
            step=_last_step(self.run) + 1,  # or MLflow ties the metrics of epoch 0 to the model
            pytorch_model=model,
            signature=signature,
            input_example=images,
            serialization_format="pt2",
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", "numpy"],
        )
        self.model_uri = f"models:/{info.model_id}"
        program: Callable[[Any], Any] = mlflow.pytorch.load_model(self.model_uri)
        return program

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log final metrics, tied to the model and the test set."""
        model_id = self.model_uri.rpartition("/")[2]
        inputs = self.run.client.get_run(self.run.run_id).inputs
        assert inputs is not None  # the train step logged them
        test = [
            entry.dataset
            for entry in inputs.dataset_inputs
            if any(tag.value == "test" for tag in entry.tags)
        ]
        now = int(time.time() * 1000)
        entities = [
            Metric(
                key,
                value,
                now,
                step,
                model_id=model_id,
                dataset_name=test[0].name if test else None,
                dataset_digest=test[0].digest if test else None,
                run_id=self.run.run_id,
            )
            for key, value in metrics.items()
        ]
        self.run.client.log_batch(self.run.run_id, metrics=entities)


# --- a sweep ---------------------------------------------------------------------------------


def trainings() -> list[dict[str, Any]]:
    """What the server knows of every training of this pipeline run, the oldest first.

    Raises:
        TrackingError: the server does not answer in time.
    """
    client = connect(patience_s())
    return [
        {
            "run_id": run.info.run_id,
            "page": _page(run.info.experiment_id, run.info.run_id),
            "status": run.info.status,
            "params": run.data.params,
            "metrics": run.data.metrics,
        }
        for run in runs_of(client, os.environ.get(KFP_RUN_ID, ""), "run")
    ]


def log_sweep(run: TrackedRun, report: Mapping[str, Any], out: Path) -> None:
    """Store what was asked for, the means, and the files that tell of them.

    Args:
        run: of the sweep.
        report: made by `shike_core.sweep.summarise`.
        out: directory with what `shike_core.sweep.write_summary` wrote.
    """
    recipes, seeds, factors = (report[key] for key in ("recipes", "seeds", "imbalance_factors"))
    shown = " ".join(f"IF{factor:g}" for factor in factors)
    name = f"sweep {shown} {len(recipes)} recipes {len(seeds)} seeds"
    run.client.update_run(run.run_id, name=name)
    run.log_params("sweep", {"recipes": ", ".join(recipes), "seeds": seeds, "factors": factors})
    now = int(time.time() * 1000)
    run.log_metrics(Metric(key, value, now, 0) for key, value in means(report).items())
    run.log_directory(out, "sweep", "*")
    run.tag(chosen_recipe=report["choice"]["recipe"], chosen_run=report["choice"]["run_id"])


def sweep_summary(run_id: str, home: Path) -> str:
    """What came out of a sweep: means, the registered model, where to look.

    Args:
        run_id: of the sweep's finished run.
        home: directory of local runs, which receives the page.
    """
    run = attach(run_id)
    tags = run.client.get_run(run_id).data.tags
    folder = home / "runs" / tags["kfp_run_id"]
    files = Path(run.client.download_artifacts(run_id, "sweep", str(folder)))
    lines = [as_text(json.loads((files / "sweep.json").read_text())), ""]
    if "registered_model" in tags:
        name, version = tags["registered_model"], tags["registered_version"]
        lines.append(f"model     {name} version {version}, alias {tags['decision']}")
    lines += [f"page      {files / 'sweep.html'}", f"MLflow    {_where_to_look(run)}"]
    return "\n".join(lines)


# --- the registry ----------------------------------------------------------------------------


VERSION_TAGS = (
    "dataset",
    "imbalance_factor",
    "subset_digest",
    "test_digest",
    "training_digest",
    "weights_digest",
    "kfp_run_id",
    "mlflow.source.git.commit",
)
"""Tags that a registered version takes over from its run."""


MAX_TAG = 5000
"""Characters that every store takes in a version's tag."""


def champion_of(client: mlflow.MlflowClient, model_name: str) -> dict[str, Any] | None:
    """What the registry says of the present champion, or None if there is none.

    Raises:
        TrackingError: the server does not answer, which says nothing of a champion.
    """
    try:
        # A server with users calls what is not there forbidden; a search tells the two apart.
        if not client.search_registered_models(f"name = '{model_name}'"):
            return None
        version = client.get_model_version_by_alias(model_name, "champion")
    except MlflowException as error:
        # No such model and no such alias, in MLflow's words.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise TrackingError(
            f"the registry does not tell the champion of {model_name} ({_reason(error)}); nothing "
            "was registered: run the step again when the server is back"
        ) from error
    return {
        "version": str(version.version),
        "test_digest": version.tags.get("test_digest", ""),
        "weights_digest": version.tags.get("weights_digest", ""),
        "metrics": json.loads(version.tags.get("metrics", "{}")),
    }


def store_decision(run: TrackedRun, config: RegisterConfig, decision: Decision) -> None:
    """Write down who may become champion and why: a JSON artifact and a tag."""
    # Parameters cannot change, but a model may be judged again, by hand or under another name.
    if "register.model_name" not in run.client.get_run(run.run_id).data.params:
        run.log_params("register", config)
    written = asdict(decision) | {"rule": asdict(config)}
    run.client.log_dict(run.run_id, written, "register/decision.json")
    run.tag(decision=decision.alias)


def load_decision(run: TrackedRun) -> dict[str, Any]:
    """The decision that `store_decision` wrote down."""
    text = mlflow.artifacts.load_text(f"runs:/{run.run_id}/register/decision.json")
    decision: dict[str, Any] = json.loads(text)
    return decision


def register(run: TrackedRun, model_uri: str, config: RegisterConfig, alias: str) -> str:
    """Register a model once and move an alias to it.

    Args:
        run: the run that made the model.
        model_uri: ``models:/m-...`` as stored by `ModelExporter`.
        config: the registered model's name.
        alias: ``champion`` or ``challenger``.

    Returns:
        The version's number; the one already there if these weights were registered before.
    """
    data = run.client.get_run(run.run_id).data
    weights = data.tags["weights_digest"]
    found = _versions_with(run.client, config.model_name, weights)
    if found:
        version = min(found, key=int)
    else:
        tags: dict[str, Any] = {key: data.tags[key] for key in VERSION_TAGS if key in data.tags}
        tags["metrics"] = json.dumps({k: data.metrics[k] for k in _test_keys(data.metrics)})
        tags["configuration"] = json.dumps(
            {key: value for key, value in data.params.items() if key.startswith("train.")}
        )[:MAX_TAG]
        version = str(mlflow.register_model(model_uri, config.model_name, tags=tags).version)
    run.client.set_registered_model_alias(config.model_name, alias, version)
    run.client.set_model_version_tag(config.model_name, version, "decision", alias)
    reasons = "\n".join(f"- {reason}" for reason in load_decision(run)["reasons"])
    run.client.update_model_version(config.model_name, version, f"{alias} because:\n\n{reasons}")
    run.tag(registered_model=config.model_name, registered_version=version)
    return version


def _versions_with(client: mlflow.MlflowClient, name: str, weights: str) -> list[str]:
    versions = client.search_model_versions(f"name = '{name}'")
    return [str(v.version) for v in versions if v.tags.get("weights_digest") == weights]


def _test_keys(metrics: Mapping[str, float]) -> list[str]:
    return sorted(key for key in metrics if key.startswith("test/") and "expert_" not in key)


# --- for people -----------------------------------------------------------------------------


def summary(run_id: str, home: Path) -> str:
    """What came out of a run: accuracies, the registered model, where to look.

    Args:
        run_id: of a finished run.
        home: directory of local runs, where the HTML report lies.
    """
    run = attach(run_id)
    data = run.client.get_run(run_id).data
    groups = ["", "many_shot/", "medium_shot/", "few_shot/"]
    titles = ["overall", "many", "medium", "few"]
    shown = [
        (group, title)
        for group, title in zip(groups, titles, strict=True)
        if f"test/{group}accuracy" in data.metrics
    ]
    experts = int(data.params["train.num_experts"])
    rows = [("ensemble", "test/")] + [(f"expert {i}", f"test/expert_{i}/") for i in range(experts)]
    lines = ["", f"{'accuracy, %':<14}" + "".join(f"{title:>9}" for _, title in shown)]
    for name, prefix in rows:
        cells = [100 * data.metrics[f"{prefix}{group}accuracy"] for group, _ in shown]
        lines.append(f"{name:<14}" + "".join(f"{cell:>9.1f}" for cell in cells))
    name, version = data.tags["registered_model"], data.tags["registered_version"]
    decision = load_decision(run)
    reports = sorted((home / "runs" / data.tags["kfp_run_id"]).glob("**/report.html"))
    lines += [
        "",
        f"model     {name} version {version}, alias {decision['alias']}",
        *(f"          {reason}" for reason in decision["reasons"]),
        *(f"report    {path}" for path in reports[:1]),
        f"MLflow    {_where_to_look(run)}",
    ]
    return "\n".join(lines)


def _where_to_look(run: TrackedRun) -> str:
    return _page(run.experiment_id, run.run_id) or (
        f"run {run.run_id}; open the pages with: make mlflow-ui STORE={mlflow.get_tracking_uri()}"
    )


def _page(experiment_id: str, run_id: str) -> str:
    """The address of a run's page; empty if the store has no pages."""
    uri = mlflow.get_tracking_uri()
    if not uri.startswith("http"):
        return ""
    pages = _without_password(uri).rstrip("/")
    # Without the type of workflow the pages open in their view for language models.
    place = f"experiments/{experiment_id}/runs/{run_id}"
    return f"{pages}/?workflowType=machine_learning#/{place}"


# --- small things ----------------------------------------------------------------------------


def _fields(values: object) -> dict[str, Any]:
    return dict(values) if isinstance(values, Mapping) else asdict(values)  # type: ignore[call-overload]


def _reason(error: BaseException) -> str:
    root = error
    while (inner := root.__cause__ or root.__context__) is not None:
        root = inner
    lines = str(root).splitlines()
    shown = re.sub(r"//[^/\s]*@", "//", lines[0])[:200] if lines else ""  # no password in a URI
    return shown or type(root).__name__


def _without_password(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"

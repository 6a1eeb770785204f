"""MLflow: the only module that imports it.

One canonical MLflow run belongs to a pipeline run. The steps hand its id on; a step that has none
finds it by ``MLFLOW_RUN_ID``, then by the KFP run's id, and creates it last of all.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# One call may wait 10 s and is tried twice; waiting longer is this module's own decision.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

import mlflow
import mlflow.pytorch
import pandas as pd
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

from shike_core.config import EvaluateConfig, RegisterConfig, TrainConfig
from shike_core.data.manifest import read_info
from shike_core.errors import ShikeError
from shike_core.gate import Decision
from shike_core.recipes import variant_of

KFP_RUN_ID = "SHIKE_KFP_RUN_ID"
"""Environment variable with the id of the KFP run, the same in all its steps."""
KFP_UI = "SHIKE_KFP_UI"
"""Environment variable with the address of the KFP pages, to link to; may be missing."""
GIT_COMMIT = "SHIKE_GIT_COMMIT"
"""Environment variable with the commit that the running code was built from."""
PATIENCE = "SHIKE_TRACKING_PATIENCE_S"
"""Environment variable: seconds a step waits at its end for a server that went away."""
DEFAULT_PATIENCE_S = 600.0
SYSTEM_METRICS_EVERY_S = 5.0

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
        """Set tags."""
        entities = [RunTag(key, str(value)) for key, value in tags.items()]
        self.client.log_batch(self.run_id, tags=entities)

    def log_params(self, prefix: str, values: object) -> None:
        """Log the fields of a configuration as ``prefix.field``."""
        params = [Param(f"{prefix}.{key}", str(value)) for key, value in _fields(values).items()]
        self.client.log_batch(self.run_id, params=params)

    def log_directory(self, directory: Path, artifact_path: str, *patterns: str) -> None:
        """Store the files of a directory that match, under a folder of the run's artifacts."""
        for pattern in patterns:
            for path in sorted(directory.glob(pattern)):
                folder = artifact_path
                if path.parent != directory:
                    folder = f"{artifact_path}/{path.parent.relative_to(directory)}"
                self.client.log_artifact(self.run_id, str(path), folder)

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
        self.log_directory(subset, "subset", "subset.json", "*.png")
        rule = info["rule"]
        self.tag(
            dataset=f"{rule['dataset']}-lt",
            imbalance_factor=rule["imbalance_factor"],
            selection=rule["selection"],
            subset_digest=info["digest"],
            test_digest=info["test_digest"],
        )

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run with a status."""
        self.client.set_terminated(self.run_id, status)


def open_run(subset: Path, name: str = "", run_id: str = "") -> TrackedRun:
    """The canonical run of this pipeline run, created if there is none yet.

    Precedence: the id given, ``MLFLOW_RUN_ID`` (set by a KFP backend that tracks runs itself),
    a run tagged with this KFP run's id, a new run in the experiment named after the data set.

    Args:
        subset: directory of the subset; names the experiment.
        name: of a new run; says what differs from others.
        run_id: handed on by an earlier step, or empty.

    Raises:
        TrackingError: no server is named, it does not answer, or it has no such run.
    """
    client = connect(patience_s() if run_id else 0.0)
    known = run_id or os.environ.get("MLFLOW_RUN_ID", "")
    kfp_run = os.environ.get(KFP_RUN_ID, "")
    if known:
        return _attach(client, known)
    found = find_run(client, kfp_run) if kfp_run else None
    if found:
        return _attach(client, found)
    info = read_info(subset)
    experiment_id = _experiment(client, f"{info['rule']['dataset']}-lt")
    tags = {
        "kind": "run",
        "kfp_run_id": kfp_run,
        "mlflow.source.git.commit": os.environ.get(GIT_COMMIT, ""),
        "mlflow.source.name": "shike",
        "mlflow.user": _user(),
        "mlflow.note.content": _note(kfp_run),
    }
    tags = {key: value for key, value in tags.items() if value}
    run = client.create_run(experiment_id, tags=tags, run_name=name)
    return TrackedRun(run.info.run_id, experiment_id, client)


def attach(run_id: str) -> TrackedRun:
    """The run that an earlier step handed on.

    Raises:
        TrackingError: the server does not answer in time, or it has no such run.
    """
    return _attach(connect(patience_s()), run_id)


def open_training(subset: Path, config: TrainConfig) -> TrackedRun:
    """Open the canonical run and write down what will be trained on what.

    Raises:
        TrackingError: no server is named, or it does not answer; nothing was trained.
    """
    rule = read_info(subset)["rule"]
    name = (
        f"IF{rule['imbalance_factor']:g} {rule['selection']} {config.num_experts}e "
        f"{config.epochs}ep seed{config.seed}"
    )
    if rule.get("num_classes"):
        name = f"{rule['num_classes']} classes {name}"
    if rule.get("image_size"):
        name = f"{rule['image_size']}px {name}"
    variant = variant_of(config)
    run = open_run(subset, f"{variant} {name}" if variant else name)
    run.client.update_run(run.run_id, status="RUNNING")  # a retried step found it FAILED
    run.log_params("train", config)
    run.log_subset(subset)
    run.tag(seed=config.seed, variant=variant or "shike")
    return run


def log_training(run: TrackedRun, report: Mapping[str, Any], out: Path) -> None:
    """Store what a finished training left: weights, history, figures about it."""
    run.tag(
        training_digest=report["training_digest"],
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


def connect(patience_s: float = 0.0) -> mlflow.MlflowClient:
    """A client whose server answers.

    Args:
        patience_s: how long to wait for a server that is away; 0 asks once.

    Raises:
        TrackingError: MLFLOW_TRACKING_URI is not set, or the server does not answer.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
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
            if time.monotonic() >= deadline:
                raise TrackingError(
                    f"the MLflow tracking server {_without_password(uri)} does not answer "
                    f"({_reason(error)}); check MLFLOW_TRACKING_URI, that the server runs, and "
                    "that this machine may reach it"
                ) from error
            time.sleep(2.0)


def find_run(client: mlflow.MlflowClient, kfp_run: str) -> str | None:
    """The id of the MLflow run that belongs to a KFP run, or None."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(
        experiments, f"tags.kfp_run_id = '{kfp_run}'", max_results=1, order_by=["start_time ASC"]
    )
    return found[0].info.run_id if found else None


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
                batch = self._pending[:500]
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
    run.log_params("register", config)
    run.client.log_dict(run.run_id, asdict(decision), "register/decision.json")
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
    uri = mlflow.get_tracking_uri()
    if uri.startswith("http"):
        pages = _without_password(uri).rstrip("/")
        # Without the type of workflow the pages open in their view for language models.
        place = f"experiments/{run.experiment_id}/runs/{run.run_id}"
        return f"{pages}/?workflowType=machine_learning#/{place}"
    return f"run {run.run_id}; open the pages with: make mlflow-ui STORE={uri}"


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

"""A training on several nodes, as a TrainJob that another engine runs: the only import of kubeflow.

The step does not train then. It shares a folder with the nodes, the one that keeps the training's
checkpoint, and each side leaves there what the other needs:

    subset/, training.json                      what to train, from the step
    metrics.jsonl, errors/RANK.json             what happens, from the nodes
    checkpoint.pt, history.json, train.json     what came out, from the first of them
    stop                                        the signal that the step was asked to stop by

The engine is Kubeflow Trainer 2 on a cluster, or its SDK on this machine, in containers or in a
process.
"""

import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args

from components import boundary
from shike_core import stages
from shike_core.config import TrainConfig
from shike_core.data.manifest import read_info
from shike_core.environment import CPU_SETTINGS
from shike_core.errors import ArtifactError, Interrupted, PeerError, ShikeError
from shike_core.files import atomic_write

Backend = Literal["kubernetes", "container", "process"]
ENDED = ("Complete", "Failed")
"""States of a job that will not change any more."""
LONGEST_S = 10**8
"""The step's own time limit ends it long before."""
STOP_S = 20
"""How long nodes may take to write a checkpoint; Kubernetes gives the step's pod 30 s to end."""
DELETION_S = 120.0
CLUSTER_AWAY_RETRIES = 8
"""Of a call that the cluster did not answer, within 90 s; the SDK gives up after 120."""
HANDED_DOWN = ("AWS_", "OMP_", *CPU_SETTINGS)
"""Beginnings of the environment variables that a container gets from this process."""
TORCHRUN_REPORTS = ("E0", "E1")
"""How a line begins in which torchrun tells of a process that failed: E and the month."""
SHOWN_LINES = 5
"""Of a log, in a message."""


class TrainJobError(ShikeError):
    """A training on several nodes could not begin, or ended without its results."""


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """What each node of a training asks for; a pipeline hands it on as JSON."""

    backend: Backend = "kubernetes"
    """The engine: Kubeflow Trainer on the step's cluster, or the SDK on this machine. Only the
    first one knows more of what follows than the image."""
    image: str = ""
    """Image of the train step."""
    runtime: str = "torch-distributed"
    """Training runtime of the cluster that starts torchrun on each node."""
    gpu_type: str = "nvidia.com/gpu"
    """Resource name of the GPUs."""
    gpu_count: int = 0
    """GPUs of a node, each of which gets a process."""
    cpu: str = ""
    """Processors of a node."""
    memory: str = ""
    """Memory of a node, shared memory included."""
    shared_memory: str = "2Gi"
    """Of /dev/shm on a node."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes to run on."""
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    """Taints that are tolerated."""
    claims: dict[str, str] = field(default_factory=dict)
    """Volume claims by the path they are mounted at, the same as in the step."""
    image_pull_secrets: list[str] = field(default_factory=list)
    """Secrets to pull the image with."""

    def __post_init__(self) -> None:
        if self.backend not in (known := get_args(Backend)):
            raise ValueError(
                f"the backend of nodes must be one of {', '.join(known)}, got {self.backend!r}"
            )


def train(
    config: TrainConfig,
    subset: Path,
    out: Path,
    log: stages.Log,
    checkpoint_dir: Path | None,
    num_nodes: int,
    nodes: Mapping[str, Any],
) -> stages.Report:
    """Train in this process, or on several nodes; see `shike_core.stages.train`.

    Args:
        config: as there, like the next four.
        subset: is copied for several nodes.
        out: receives the same files.
        log: called here, whoever trains.
        checkpoint_dir: has to be a folder that several nodes share with this step.
        num_nodes: 1 trains here.
        nodes: fields of `Nodes`; only several nodes need them.

    Raises:
        TrainJobError: as `train_on_nodes`.
        ValueError: there are less than one node, `nodes` has other fields, or there is one node
            where this process is not meant to train.
    """
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be at least 1, got {num_nodes}")
    if num_nodes == 1 and nodes:
        raise ValueError(
            "num_nodes=1 would train in this pod, which only waits for nodes and has no GPU; give "
            "more nodes, or compile the pipeline with --num-nodes 1"
        )
    if num_nodes == 1:
        return stages.train(config, subset, out, log, checkpoint_dir)
    try:
        asked = Nodes(**nodes)
    except TypeError as error:
        raise ValueError(
            f"nodes must have the fields {', '.join(Nodes.__dataclass_fields__)}, got {dict(nodes)}"
        ) from error
    return train_on_nodes(config, subset, out, log, checkpoint_dir, num_nodes, asked)


def train_on_nodes(
    config: TrainConfig,
    subset: Path,
    out: Path,
    log: stages.Log,
    checkpoint_dir: Path | None,
    num_nodes: int,
    nodes: Nodes,
) -> stages.Report:
    """Submit a TrainJob and follow it to its end.

    The job's name is that of the training. A step that is tried again goes on following a job that
    still runs, and replaces one that failed.

    Args:
        config: see `train`, like the next five.
        subset: see `train`.
        out: see `train`.
        log: see `train`.
        checkpoint_dir: see `train`.
        num_nodes: see `train`.
        nodes: what each of them asks for.

    Raises:
        TrainJobError: a node failed, the job is gone, or the engine does not take it.
        Interrupted: a signal asked to stop; the nodes were told to write a checkpoint and to end.
        ArtifactError: the shared folder or `out` cannot be written.
    """
    if checkpoint_dir is None:
        raise TrainJobError(
            "several nodes need a folder that they share with this step, and checkpoint_dir is "
            "empty; compile the pipeline with --checkpoint-pvc, a claim that is ReadWriteMany"
        )
    digest = stages.training_digest(config, read_info(subset)["digest"])
    name, out = f"shike-{digest[:16]}", out.absolute()  # a process changes the directory
    shared = Shared((checkpoint_dir / digest).absolute())
    with stages.stop_signals() as stop_signal, _sdk_errors(nodes):
        engine = _engine(nodes, shared.folder)
        follow = _Follower(engine, shared, log)
        if not shared.complete:
            _see_through(follow, name, num_nodes, config, subset, stop_signal)
        engine.delete(name)
    history = json.loads(shared.history.read_text())
    follow.log_new((metrics, int(metrics["epoch"])) for metrics in history)
    for path in (shared.checkpoint, shared.history, shared.report):
        with atomic_write(out / path.name) as temporary:
            shutil.copyfile(path, temporary)
    shutil.rmtree(shared.subset, ignore_errors=True)
    report: stages.Report = json.loads(shared.report.read_text())
    return report


def _see_through(
    follow: "_Follower",
    name: str,
    num_nodes: int,
    config: TrainConfig,
    subset: Path,
    stop_signal: Callable[[], int | None],
) -> None:
    """Have results in the shared folder, whatever was there before."""
    engine, shared = follow.engine, follow.shared
    job = engine.find(name)
    if job is not None and (
        job.status in ENDED or job.num_nodes != num_nodes or not shared.offers(config)
    ):
        engine.delete(name)
        job = None
    if job is None:
        shared.offer(config, subset)
        engine.submit(name, num_nodes)
    print(f"{'following' if job else 'submitted'} TrainJob {name}, {num_nodes} nodes", flush=True)

    def look(job: Any) -> None:
        follow(job)
        if (number := stop_signal()) is not None:
            raise Interrupted(number, shared.kept)

    try:
        job = engine.wait(name, LONGEST_S, look)
    except Interrupted as stop:
        shared.stop.write_text(str(stop.signal_number))
        with suppress(TimeoutError):
            engine.wait(name, STOP_S, follow)
        engine.delete(name)
        raise Interrupted(stop.signal_number, shared.kept) from None
    if shared.complete:
        return
    if job is None:
        raise TrainJobError(
            f"TrainJob {name} was deleted while it trained, and not by this step; run the same "
            "command again to go on from the last checkpoint"
        )
    if job.status == "Complete":
        raise TrainJobError(
            f"TrainJob {name} is complete, but its results are not in {shared.folder}; the claim "
            "mounted there has to be the same in the step and on the nodes, and ReadWriteMany"
        )
    message = shared.error() or _last_lines(engine, name, job)
    engine.delete(name)
    raise TrainJobError(f"training on {num_nodes} nodes failed: {message}")


def _last_lines(engine: "Engine", name: str, job: Any) -> str:
    """What is known of nodes that ended without a message."""
    failed = [step.name for step in job.steps if step.status == "Failed"]
    lines = []
    for node in failed:
        printed = [line for line in engine.log_of(name, node) if line.strip()]
        own = _until(printed, TORCHRUN_REPORTS) or printed[:1]
        lines += [f"{node}: {line}" for line in own[-SHOWN_LINES:]]
    return (
        f"{', '.join(failed) or 'a node'} ended without a message, killed for lack of memory or "
        "pre-empted; run the same command again to go on from the last checkpoint"
        + "".join(f"\n  {line}" for line in lines)
    )


class _Follower:
    """Shows what a job does: its states, what the first node prints, each epoch's metrics once."""

    def __init__(self, engine: "Engine", shared: "Shared", log: stages.Log) -> None:
        self.engine, self.shared, self._log = engine, shared, log
        self._states, self._lines = "", 0
        self._epochs: set[int] = set()

    def __call__(self, job: Any) -> None:
        """Look once."""
        states = ", ".join(f"{step.name} {step.status}" for step in job.steps)
        if states != self._states:
            print(f"nodes: {states}", flush=True)
            self._states = states
        # Where it fails, its message comes in another way.
        lines = _until(self.engine.log_of(job.name, "node-0"), (*TORCHRUN_REPORTS, "Traceback"))
        for line in lines[self._lines :]:
            print(f"node-0: {line}", flush=True)
        self._lines = max(self._lines, len(lines))
        self.log_new(self.shared.metrics())

    def log_new(self, told: Iterable[tuple[Mapping[str, float], int]]) -> None:
        """Log the epochs that are new; nodes that were started again repeat theirs."""
        for metrics, step in told:
            if step not in self._epochs:
                self._epochs.add(step)
                self._log(metrics, step)


def _until(lines: list[str], beginnings: tuple[str, ...]) -> list[str]:
    return list(takewhile(lambda line: not line.startswith(beginnings), lines))


# ---- what both sides share


@dataclass(frozen=True)
class Shared:
    """The folder that the step and the nodes share, seen from one of them."""

    folder: Path

    @property
    def subset(self) -> Path:
        """A copy of the subset."""
        return self.folder / "subset"

    @property
    def stop(self) -> Path:
        """The number of the signal that the nodes should act as if they had got."""
        return self.folder / "stop"

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint; where a training in one process keeps it, too."""
        return self.folder / stages.CHECKPOINT

    @property
    def history(self) -> Path:
        """As `shike_core.stages.train` writes it, like the next one."""
        return self.folder / "history.json"

    @property
    def report(self) -> Path:
        """Is written last."""
        return self.folder / "train.json"

    @property
    def complete(self) -> bool:
        """Whether the training is done."""
        return self.report.exists()

    @property
    def kept(self) -> str:
        """What there is to go on from."""
        if self.checkpoint.exists():
            return f"with the last checkpoint of its nodes in {self.checkpoint}"
        return "before its nodes wrote a checkpoint"

    @property
    def _config(self) -> Path:
        return self.folder / "training.json"

    @property
    def _metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def _errors(self) -> Path:
        return self.folder / "errors"

    def offer(self, config: TrainConfig, subset: Path) -> None:
        """Lay out what nodes that begin, or go on, need.

        Raises:
            ArtifactError: there is no space or no permission.
        """
        try:
            self._errors.mkdir(parents=True, exist_ok=True)
            for path in (self._metrics, self.stop, *self._errors.iterdir()):
                path.unlink(missing_ok=True)
            if not self.subset.is_dir():
                temporary = self.folder / ".partial-subset"
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.copytree(subset, temporary)
                temporary.replace(self.subset)
        except OSError as error:
            raise ArtifactError(
                f"cannot lay out a training for its nodes in {self.folder} ({error}); free some "
                "space there, or choose a volume that this step may write to"
            ) from error
        stages.write_json(asdict(config), self._config)

    def offers(self, config: TrainConfig) -> bool:
        """Whether nodes find here what they need, and nobody told them to stop."""
        if self.stop.exists() or not self.subset.is_dir() or not self._config.exists():
            return False
        return self.config() == config

    def config(self) -> TrainConfig:
        """What is trained."""
        return TrainConfig(**json.loads(self._config.read_text()))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add an epoch's metrics; opened and closed, so that another node sees them at once."""
        with self._metrics.open("a") as file:
            # A line break first ends a line that a crash may have torn.
            file.write("\n" + json.dumps([dict(metrics), step]) + "\n")

    def metrics(self) -> Iterator[tuple[dict[str, float], int]]:
        """All metrics so far, in the order they came."""
        text = self._metrics.read_text() if self._metrics.exists() else ""
        for line in text.split("\n"):
            with suppress(ValueError):  # torn, or not yet whole
                metrics, step = json.loads(line)
                yield metrics, step

    @contextmanager
    def errors_of(self, rank: str) -> Iterator[None]:
        """Leave the message of an error for the step."""
        path = self._errors / f"{rank}.json"
        path.unlink(missing_ok=True)
        try:
            yield
        except (ShikeError, ValueError, OSError) as error:
            what = {"message": str(error), "of_another": isinstance(error, PeerError)}
            stages.write_json(what, path)
            raise

    def error(self) -> str | None:
        """What went wrong on a node, if one of them knew."""
        told = [json.loads(path.read_text()) for path in sorted(self._errors.glob("*.json"))]
        return next((str(error["message"]) for error in told if not error["of_another"]), None)


# ---- on a node


def node(*given: dict[str, str], **options: str) -> None:
    """Train as one of several nodes; the SDK copies this function's source into a program.

    In a process it hands over a dictionary, in containers the same by name.
    """
    from components.train_job import run_node

    run_node(**dict(*given, **options))


def run_node(folder: str) -> None:
    """Train on what a step has laid out; torchrun has started this process, perhaps with others.

    Args:
        folder: the shared one, as it is called here.
    """
    shared = Shared(Path(folder))
    with boundary.readable_errors(), shared.errors_of(os.environ.get("RANK", "0")):
        threading.Thread(target=_pass_on, args=(shared.stop,), daemon=True).start()
        stages.train(shared.config(), shared.subset, shared.folder, shared.log)


def _pass_on(stop: Path) -> None:
    # Signals do not come through a shell that is a container's first process.
    while not stop.exists():
        time.sleep(0.5)
    os.kill(os.getpid(), int(stop.read_text()))


# ---- engines


class Engine:
    """One of the SDK's ways to run the nodes of a job.

    Args:
        client: `kubeflow.trainer.TrainerClient`.
        folder: the shared one, as the nodes call it.
        nodes: what each of them asks for.
    """

    poll_s = 1
    """Seconds between two looks at a job."""

    def __init__(self, client: Any, folder: Path, nodes: Nodes) -> None:
        self.client, self.folder, self.nodes = client, folder, nodes

    def submit(self, name: str, num_nodes: int) -> None:
        """Start a job."""
        self._start(name, num_nodes, self.client.get_runtime(self.nodes.runtime))

    def find(self, name: str) -> Any | None:
        """A job, or None if there is none of that name."""
        try:
            return self.client.get_job(name)
        except (RuntimeError, ValueError) as error:
            if _is_missing(error):
                return None
            raise

    def wait(self, name: str, seconds: int, look: Callable[[Any], None]) -> Any | None:
        """Wait for a job to end.

        Args:
            name: of the job.
            seconds: to wait.
            look: called with the job now and then.

        Returns:
            The job, or None if somebody has deleted it.

        Raises:
            TimeoutError: it goes on.
        """
        try:
            return self.client.wait_for_job_status(
                name, set(ENDED), timeout=seconds, polling_interval=self.poll_s, callbacks=[look]
            )
        except (RuntimeError, ValueError) as error:
            if _is_missing(error):
                return None
            raise

    def log_of(self, name: str, node: str) -> list[str]:
        """The lines that a node has printed so far; none before it begins."""
        try:
            return self._read_log(name, node)
        except (RuntimeError, ValueError):
            return []

    def delete(self, name: str) -> None:
        """Remove a job, if there is one, and wait until nothing of it runs.

        Raises:
            TrainJobError: it does not end.
        """
        if self.find(name) is not None:
            self.client.delete_job(name)

    def _start(
        self, name: str, num_nodes: int, runtime: Any, *options: Any, **trainer: Any
    ) -> None:
        from kubeflow.trainer import CustomTrainer
        from kubeflow.trainer.options import Name

        given = {"folder": str(self.folder)}
        whole = CustomTrainer(func=node, func_args=given, num_nodes=num_nodes, **trainer)
        self.client.train(runtime=runtime, trainer=whole, options=[Name(name), *options])

    def _read_log(self, name: str, node: str) -> list[str]:
        return list(self.client.get_job_logs(name, step=node))


class ProcessEngine(Engine):
    """One node, as a process of this machine that shares this program's packages."""

    def submit(self, name: str, num_nodes: int) -> None:
        """Start a job.

        Raises:
            TrainJobError: there would be several nodes.
        """
        if num_nodes > 1:
            raise TrainJobError(
                f"a process is one node, and num_nodes is {num_nodes}; use the backend container"
            )
        # The SDK makes an environment with the first python on PATH, and nothing else is in it.
        here = [str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(os.pathsep)]
        os.environ["PATH"] = os.pathsep.join(dict.fromkeys(here))
        packages = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
        runtime = self.client.get_runtime(self.nodes.runtime)
        runtime.trainer.framework = "python"  # torchrun is not in that environment
        environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(packages)}
        self._start(name, num_nodes, runtime, env=environment)

    def delete(self, name: str) -> None:
        """Remove a job; its process has been told to end."""
        super().delete(name)
        for thread in threading.enumerate():  # each job has one, which has changed the directory
            if thread.name == f"{name}-train":
                thread.join(STOP_S)
        for left in Path(tempfile.gettempdir()).glob(f"{name}*"):
            shutil.rmtree(left, ignore_errors=True)


class ContainerEngine(Engine):
    """Containers of this machine, in a network of their own."""

    def __init__(self, client: Any, folder: Path, nodes: Nodes) -> None:
        super().__init__(client, Path("/workspace"), nodes)
        self._here = folder

    def submit(self, name: str, num_nodes: int) -> None:
        """Start a job."""
        shared = self._mount(name)
        shared.parent.mkdir(parents=True, exist_ok=True)
        shared.unlink(missing_ok=True)
        # The SDK mounts what this name stands for, and nothing else.
        shared.symlink_to(self._here)
        for path in (self._here, *self._here.iterdir()):
            if path.is_dir():  # the user in the containers is another one
                path.chmod(0o777)
        handed_down = {k: v for k, v in os.environ.items() if k.startswith(HANDED_DOWN)}
        runtime = self.client.get_runtime(self.nodes.runtime)
        self._start(name, num_nodes, runtime, image=self.nodes.image, env=handed_down)

    def delete(self, name: str) -> None:
        """Remove the containers and their network."""
        super().delete(name)
        self._mount(name).unlink(missing_ok=True)

    def _mount(self, name: str) -> Path:
        return Path.home() / ".kubeflow" / "trainer" / "containers" / name

    def _read_log(self, name: str, node: str) -> list[str]:
        # A text for each container, and for the name of the first node those of all.
        return str(next(self.client.get_job_logs(name, step=node))).splitlines()


class ClusterEngine(Engine):
    """Kubeflow Trainer 2 on the cluster that this step runs on."""

    poll_s = 5

    def submit(self, name: str, num_nodes: int) -> None:
        """Create a TrainJob."""
        asked = {"cpu": self.nodes.cpu, "memory": self.nodes.memory}
        if self.nodes.gpu_count:  # JSON of a pipeline has no integers
            asked[self.nodes.gpu_type] = str(int(self.nodes.gpu_count))
        # Of pretrained weights; it lies on the volume of the checkpoints.
        weights = {k: v for k, v in os.environ.items() if k == "TORCH_HOME"}
        self._start(
            name,
            num_nodes,
            self.client.get_runtime(self.nodes.runtime),
            _patch(self.nodes),
            image=self.nodes.image,
            env=weights,
            resources_per_node={what: much for what, much in asked.items() if much},
        )

    def delete(self, name: str) -> None:
        """Remove a TrainJob and wait for the end of its pods, which write to the shared folder.

        Raises:
            TrainJobError: they do not end.
        """
        super().delete(name)
        label = f"jobset.sigs.k8s.io/jobset-name={name}"
        api, namespace = self.client.backend.core_api, self.client.backend.namespace
        deadline = time.monotonic() + DELETION_S
        while api.list_namespaced_pod(namespace, label_selector=label).items:
            if time.monotonic() > deadline:
                raise TrainJobError(
                    f"pods of TrainJob {name} still run after its deletion; find out why "
                    f"(kubectl describe pods -l {label}), then run the same command again"
                )
            time.sleep(1.0)


def _engine(nodes: Nodes, folder: Path) -> Engine:
    try:
        from kubeflow.trainer import (
            ContainerBackendConfig,
            LocalProcessBackendConfig,
            TrainerClient,
            TrainingRuntimeSource,
        )
    except ModuleNotFoundError as error:
        raise TrainJobError(
            f"training on several nodes needs the package kubeflow, and {error.name} is not "
            "installed here; install this project with its extra nodes, or set num_nodes to 1"
        ) from error
    # Of what goes wrong it logs the traceback and raises it as well.
    logging.getLogger("kubeflow").setLevel(logging.CRITICAL + 1)
    if nodes.backend == "process":
        return ProcessEngine(TrainerClient(LocalProcessBackendConfig()), folder, nodes)
    if nodes.backend == "container":
        settings = ContainerBackendConfig(
            pull_policy="Never",
            auto_remove=False,  # the folder, which keeps the checkpoint
            runtime_source=TrainingRuntimeSource(sources=[]),  # those that the SDK brings along
        )
        return ContainerEngine(TrainerClient(settings), folder, nodes)
    if not (nodes.claims and nodes.image):
        raise TrainJobError(
            "this pipeline was compiled for one node, so what several of them ask for is not "
            "known; compile it with --num-nodes and --checkpoint-pvc"
        )
    return ClusterEngine(TrainerClient(_cluster_settings()), folder, nodes)


def _cluster_settings() -> Any:
    """Access to the cluster, with patience for a control plane that is away for a moment."""
    from kubeflow.common.utils import is_running_in_k8s
    from kubeflow.trainer import KubernetesBackendConfig
    from kubernetes import client, config
    from urllib3.util import Retry

    settings = client.Configuration()
    load = config.load_incluster_config if is_running_in_k8s() else config.load_kube_config
    load(client_configuration=settings)
    settings.retries = Retry(
        CLUSTER_AWAY_RETRIES,
        backoff_factor=0.5,
        backoff_max=30.0,
        status_forcelist=(429, 500, 502, 503, 504),
        raise_on_status=False,
    )
    return KubernetesBackendConfig(client_configuration=settings)


def _patch(nodes: Nodes) -> Any:
    """What a node's pod asks for beside its image and its resources."""
    from kubeflow.trainer.options import (
        ContainerPatch,
        JobSetSpecPatch,
        JobSetTemplatePatch,
        JobSpecPatch,
        JobTemplatePatch,
        PodSpecPatch,
        PodTemplatePatch,
        ReplicatedJobPatch,
        RuntimePatch,
        TrainingRuntimeSpecPatch,
    )

    memory = {"medium": "Memory", "sizeLimit": nodes.shared_memory}
    volumes: list[dict[str, Any]] = [{"name": "dshm", "emptyDir": memory}]
    mounts = [{"name": "dshm", "mountPath": "/dev/shm"}]
    for number, (path, claim) in enumerate(sorted(nodes.claims.items())):
        name = f"claim-{number}"
        volumes.append({"name": name, "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": name, "mountPath": path})
    pod = PodSpecPatch(
        volumes=volumes,
        containers=[ContainerPatch(name="node", volume_mounts=mounts)],
        image_pull_secrets=[{"name": name} for name in nodes.image_pull_secrets],
        node_selector=nodes.node_selector or None,
        tolerations=nodes.tolerations,
    )
    job = JobTemplatePatch(spec=JobSpecPatch(template=PodTemplatePatch(spec=pod)))
    jobs = JobSetSpecPatch(replicated_jobs=[ReplicatedJobPatch(name="node", template=job)])
    return RuntimePatch(TrainingRuntimeSpecPatch(template=JobSetTemplatePatch(spec=jobs)))


# ---- errors of the SDK, which has no classes for them


@contextmanager
def _sdk_errors(nodes: Nodes) -> Iterator[None]:
    try:
        yield
    except ShikeError:
        raise
    except OSError as error:
        if error.errno is not None:  # of a disk
            raise
        raise TrainJobError(_explain(error, nodes)) from error
    except Exception as error:
        raise TrainJobError(_explain(error, nodes)) from error


def _explain(error: Exception, nodes: Nodes) -> str:
    cause = error.__cause__ or error
    status = getattr(cause, "status", None)
    if status == 403:
        return (
            f"this step's service account may not use TrainJobs ({_said_by_cluster(cause)}); "
            "apply the Role of docs/nodes.md in the namespace of the run"
        )
    if status == 404:
        return (
            f"the cluster has no training runtime {nodes.runtime!r}; install Kubeflow Trainer 2 "
            "with its runtimes (docs/nodes.md), or name another runtime in the parameter nodes"
        )
    told = " ".join(str(error).split())
    if cause is not error:
        told += f": {_said_by_cluster(cause)}"
    return f"the {nodes.backend} backend cannot run the nodes ({told}); see docs/nodes.md"


def _said_by_cluster(error: BaseException) -> str:
    with suppress(AttributeError, TypeError, ValueError, KeyError):
        return str(json.loads(error.body)["message"])  # type: ignore[attr-defined]
    return " ".join(str(error).split())


def _is_missing(error: Exception) -> bool:
    """Whether the SDK means that there is no such job."""
    of_job = "TrainJob" in str(error)
    gone = isinstance(error, ValueError) or getattr(error.__cause__, "status", None) == 404
    return of_job and gone

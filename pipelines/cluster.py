"""What a step asks of Kubernetes; a local run does without all of it."""

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from kfp import dsl, kubernetes
from kfp.dsl import PipelineTask
from tyro.constructors import PrimitiveConstructorSpec

from components import tracking
from components.checks import gib
from components.train_job import Nodes
from shike_core.config import HELD_IN_MEMORY, Device, SubsetConfig

DATA_MOUNT = "/data"
CHECKPOINT_MOUNT = "/checkpoints"
RUN_ID_LABEL = "metadata.labels['pipeline/runid']"
"""The label that holds a KFP run's id on every pod of it."""
SECRET_KEYS = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "MLFLOW_S3_ENDPOINT_URL",
)
"""Keys of the secret that become environment variables of the same name; each may be missing."""

_JSON: Any = PrimitiveConstructorSpec(
    nargs=1,
    metavar="JSON",
    instance_from_str=lambda words: json.loads(words[0]),
    is_instance=lambda value: isinstance(value, dict | list),
    str_from_instance=lambda value: [json.dumps(value)],
)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the steps of a compiled pipeline run.

    The first group are defaults of parameters that the form of the KFP UI asks for; the others are
    fixed when the pipeline is compiled.
    """

    gpu_type: str = "nvidia.com/gpu"
    """Resource name of the GPUs."""
    gpu_count: int = 1
    """GPUs of the train step and of the evaluate step; 0, when compiling, means a pipeline
    without them."""
    cpu: str = "4"
    """Processors that the train step and the evaluate step ask for, and the build step for images
    in files."""
    memory: str = "16Gi"
    """Memory of the train step and of the evaluate step, shared memory included, and of the build
    step for images in files."""
    node_selector: Annotated[dict[str, str], _JSON] = field(default_factory=dict)
    """Labels of the nodes that the train step and the evaluate step may run on, as JSON."""
    tolerations: Annotated[list[dict[str, Any]], _JSON] = field(default_factory=list)
    """Taints that the train step and the evaluate step tolerate, as JSON."""
    mlflow_secret: str = "shike-mlflow"
    """Secret with MLFLOW_TRACKING_URI and, if the server asks for them, MLFLOW_TRACKING_USERNAME
    and MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN."""

    num_nodes: int = 1
    """Machines that train together, with Kubeflow Trainer 2 (docs/nodes.md); each asks for what is
    said of the train step, whose own pod then only waits for them."""
    data_pvc: str = ""
    """Volume claim with the official files of the source, mounted as /data; empty means none."""
    checkpoint_pvc: str = ""
    """Volume claim that keeps checkpoints and the packed images of large sets, mounted as
    /checkpoints, so that a step that is retried or pre-empted goes on; empty means none."""
    image_pull_secrets: tuple[str, ...] = ()
    """Secrets to pull the images with."""
    shared_memory: str = "2Gi"
    """Of /dev/shm in the train step and the evaluate step."""
    retries: int = 2
    """How often a step that failed is tried again."""
    retry_backoff: str = "30s"
    """Wait before the first retry; it doubles, up to ten minutes."""
    train_timeout_hours: float = 48.0
    """After which the train step is ended, and that which builds a subset of images in files; the
    other steps have an hour, the preflight ten minutes."""
    keep_days: float = 14.0
    """How long the cluster keeps the pods and the workflow of a run that ended."""

    def __post_init__(self) -> None:
        for name in ("gpu_count", "retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.num_nodes < 1:
            raise ValueError(f"num_nodes must be at least 1, got {self.num_nodes}")
        if self.num_nodes > 1 and not self.checkpoint_pvc:
            raise ValueError(
                f"num_nodes={self.num_nodes} need a volume that they share: give --checkpoint-pvc, "
                "a claim that is ReadWriteMany"
            )
        gib(self.shared_memory)  # raises what to write
        for name in ("train_timeout_hours", "keep_days"):
            if not 0 < getattr(self, name) < 10_000:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")

    @property
    def device(self) -> Device:
        """What the steps with a model run on; a GPU that was asked for must be there."""
        return "cuda" if self.gpu_count else "cpu"

    @property
    def data_dir(self) -> str:
        """Where the source's files are in a step."""
        return DATA_MOUNT if self.data_pvc else ""

    @property
    def checkpoint_dir(self) -> str:
        """Where checkpoints are kept in a step."""
        return CHECKPOINT_MOUNT if self.checkpoint_pvc else ""

    def shards_dir(self, rule: SubsetConfig) -> str:
        """Where the large files of a packed subset are kept; empty means inside the subset."""
        in_files = rule.dataset not in HELD_IN_MEMORY and not rule.image_size
        packed = in_files and rule.storage == "packed"
        return f"{CHECKPOINT_MOUNT}/shards" if self.checkpoint_pvc and packed else ""

    def nodes(self) -> dict[str, Any]:
        """What each of several nodes asks for, fields of `components.train_job.Nodes`."""
        if self.num_nodes == 1:
            return {}
        from components import images  # after their tag is known

        claims = {DATA_MOUNT: self.data_pvc, CHECKPOINT_MOUNT: self.checkpoint_pvc}
        nodes = Nodes(
            image=images.TRAIN,
            gpu_type=self.gpu_type,
            gpu_count=self.gpu_count,
            cpu=self.cpu,
            memory=self.memory,
            shared_memory=self.shared_memory,
            node_selector=self.node_selector,
            tolerations=self.tolerations,
            claims={path: claim for path, claim in claims.items() if claim},
            image_pull_secrets=list(self.image_pull_secrets),
        )
        return asdict(nodes)

    def config(self) -> dsl.PipelineConfig:
        """Settings of the whole pipeline."""
        return dsl.PipelineConfig(ttl_seconds_after_finished=round(self.keep_days * 86_400))


PARAMETERS = tuple(Cluster.__dataclass_fields__)[:7]
"""Fields of `Cluster` that are parameters of the pipeline, under ``cluster_FIELD``."""


@dataclass(frozen=True)
class Placement:
    """Puts the steps of one pipeline on the cluster, or leaves them as they are.

    Attributes:
        cluster: compile options, or None for a pipeline that runs on this machine.
        asked: pipeline parameters by the field of `Cluster`.
    """

    cluster: Cluster | None
    asked: dict[str, Any]

    def light(self, task: PipelineTask, *, retries: int | None = None, minutes: float = 60) -> None:
        """A step without a model: little memory, no GPU."""
        if self.cluster is None:
            return
        self._common(task, retries, round(60 * minutes))
        task.set_cpu_request("1").set_memory_request("2Gi").set_memory_limit("4Gi")

    def broad(self, task: PipelineTask, *, minutes: float) -> None:
        """A step that reads or writes all images of a large set: processors, no GPU."""
        if self.cluster is None:
            return
        self._common(task, None, round(60 * minutes))
        task.set_cpu_request(self.asked["cpu"])
        task.set_memory_request(self.asked["memory"]).set_memory_limit(self.asked["memory"])

    def all_images(self, task: PipelineTask, rule: SubsetConfig) -> None:
        """The step that builds a subset: of images in files it reads every one."""
        if self.cluster is not None and rule.dataset not in HELD_IN_MEMORY:
            self.broad(task, minutes=60 * self.cluster.train_timeout_hours)
        else:
            self.light(task)

    def heavy(self, task: PipelineTask, *, minutes: float) -> None:
        """A step that runs a model: GPU, shared memory, the nodes that have them."""
        if self.cluster is None:
            return
        self.broad(task, minutes=minutes)
        if self.cluster.gpu_count:
            task.set_accelerator_type(self.asked["gpu_type"])
            task.set_accelerator_limit(self.asked["gpu_count"])
        self.shared_memory(task)
        kubernetes.add_node_selector_json(task, self.asked["node_selector"])
        kubernetes.add_toleration_json(task, self.asked["tolerations"])

    def training(self, task: PipelineTask) -> None:
        """The train step: it has a model, or waits for the nodes that have it."""
        if self.cluster is None:
            return
        place = self.light if self.cluster.num_nodes > 1 else self.heavy
        place(task, minutes=60 * self.cluster.train_timeout_hours)

    def shared_memory(self, task: PipelineTask) -> None:
        """Data loader workers pass images by shared memory; a pod has 64 MiB of it by default."""
        if self.cluster is not None:
            kubernetes.empty_dir_mount(
                task, "dshm", "/dev/shm", medium="Memory", size_limit=self.cluster.shared_memory
            )

    def with_data(self, task: PipelineTask) -> None:
        """Mount the source's files."""
        if self.cluster is not None and self.cluster.data_pvc:
            kubernetes.mount_pvc(task, self.cluster.data_pvc, DATA_MOUNT)

    def with_checkpoints(self, task: PipelineTask) -> None:
        """Mount the volume that outlives a step."""
        if self.cluster is not None and self.cluster.checkpoint_pvc:
            kubernetes.mount_pvc(task, self.cluster.checkpoint_pvc, CHECKPOINT_MOUNT)

    def discarded(self, checkpoint_dir: Any) -> Any:
        """Where the evaluate step discards the checkpoint of its training; empty means nowhere.

        On this machine nothing else keeps what was trained for a run that is made again after one
        that failed later, so `run_local` discards it at the end of the whole run.
        """
        return "" if self.cluster is None else checkpoint_dir

    def _common(self, task: PipelineTask, retries: int | None, seconds: int) -> None:
        assert self.cluster is not None
        number = self.cluster.retries if retries is None else retries
        if number:
            backoff = self.cluster.retry_backoff
            task.set_retry(
                number,
                backoff_duration=backoff,
                backoff_factor=2.0,
                backoff_max_duration="600s",
            )
        kubernetes.set_timeout(task, seconds)
        kubernetes.use_field_path_as_env(task, tracking.KFP_RUN_ID, RUN_ID_LABEL)
        kubernetes.use_secret_as_env(
            task,
            secret_name=self.asked["mlflow_secret"],
            secret_key_to_env={key: key for key in SECRET_KEYS},
            optional=True,
        )
        if self.cluster.image_pull_secrets:
            kubernetes.set_image_pull_secrets(task, list(self.cluster.image_pull_secrets))

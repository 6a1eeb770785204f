"""A training on the nodes of a cluster: the API is one of this machine, the nodes really train."""

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from kubernetes.config import kube_config

from components import train_job
from components.train_job import Nodes, TrainJobError
from shike_core import stages
from shike_core.config import TrainConfig
from shike_core.errors import Interrupted
from tests.components.trainer_api import TrainerApi

CONFIG = TrainConfig(
    stage1_epochs=2,
    stage1_learning_rate=0.02,
    stage1_warmup_start=0.02,
    stage2_epochs=1,
    stage2_learning_rate=0.05,
    stage2_warmup_start=0.05,
    warmup_epochs=1,
    batch_size=30,
    num_experts=2,
    width=4,
    auto_augment=False,
    precision="float32",
    device="cpu",
    checkpoint_every=1,
)
NODES = asdict(
    Nodes(
        image="registry.example/shike-python-train:0123abc",
        gpu_type="amd.com/gpu",
        gpu_count=4,
        cpu="16",
        memory="64Gi",
        shared_memory="8Gi",
        node_selector={"pool": "gpu"},
        tolerations=[{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        claims={"/data": "photographs", "/checkpoints": "kept"},
        image_pull_secrets=["first", "second"],
    )
)


@pytest.fixture
def api(tmp_path, monkeypatch) -> Iterator[TrainerApi]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(train_job.ClusterEngine, "poll_s", 1)
    folder = tmp_path / "cluster"
    folder.mkdir()
    with TrainerApi(folder) as server:
        monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(server.kubeconfig))
        yield server
    assert server.unforeseen == []
    assert server.running == []


class Log(list):
    def __call__(self, metrics, step) -> None:
        self.append((dict(metrics), step))


def train(subset: Path, tmp_path: Path, log=print, config=CONFIG, **nodes) -> dict:
    # JSON of a pipeline has no integers.
    asked = NODES | {"gpu_count": 4.0} | nodes
    return train_job.train(config, subset, tmp_path / "out", log, tmp_path / "kept", 2, asked)


@pytest.mark.slow
def test_two_nodes_train_what_two_processes_train(api, subset, tmp_path, capfd):
    api.away = 2  # for a moment
    log = Log()
    report = train(subset, tmp_path, log)
    stages.train(replace(CONFIG, processes=2), subset, tmp_path / "here", lambda *line: None)
    assert report["processes"] == 2
    assert [step for _, step in log] == [0, 1, 2]
    theirs = json.loads((tmp_path / "here" / "history.json").read_text())
    for (our, _), their in zip(log, theirs, strict=True):
        assert our["train/loss"] == pytest.approx(their["train/loss"], rel=1e-5)
    assert api.jobs == []
    shown = capfd.readouterr().out
    assert "nodes: node-0 Running, node-1 Running" in shown


def test_a_train_job_says_what_its_nodes_ask_for(api, subset, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", "/checkpoints/torch")
    api.program = ["false"]
    with pytest.raises(TrainJobError):
        train(subset, tmp_path)
    (job,) = api.created
    assert job["metadata"]["name"].startswith("shike-")
    spec = job["spec"]
    assert spec["runtimeRef"]["name"] == "torch-distributed"
    assert spec["runtimeRef"]["kind"] == "ClusterTrainingRuntime"
    trainer = spec["trainer"]
    assert trainer["numNodes"] == 2
    assert trainer["image"] == "registry.example/shike-python-train:0123abc"
    assert trainer["env"] == [{"name": "TORCH_HOME", "value": "/checkpoints/torch"}]
    asked = {"cpu": "16", "memory": "64Gi", "amd.com/gpu": "4"}
    assert trainer["resourcesPerNode"] == {"requests": asked, "limits": asked}
    (patch,) = spec["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["imagePullSecrets"] == [{"name": "first"}, {"name": "second"}]
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    (container,) = pod["containers"]
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert container["name"] == "node"
    assert mounted == {
        "/dev/shm": {"emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
        "/data": {"persistentVolumeClaim": {"claimName": "photographs"}},
        "/checkpoints": {"persistentVolumeClaim": {"claimName": "kept"}},
    }
    assert "secret" not in json.dumps(job).replace("imagePullSecrets", "")


@pytest.mark.slow
def test_a_step_that_is_tried_again_follows_the_job_that_still_runs(api, subset, tmp_path):
    def fall_over(metrics, step) -> None:
        raise OSError(28, "No space left on device")  # in the step, not on a node

    config = replace(CONFIG, stage1_epochs=30)
    with pytest.raises(OSError, match="No space left"):
        train(subset, tmp_path, fall_over, config)
    assert len(api.running) == 2
    log = Log()
    train(subset, tmp_path, log, config)
    assert len(api.created) == 1
    assert [step for _, step in log] == list(range(31))
    assert api.jobs == []


def test_a_job_that_failed_is_told_and_replaced_the_next_time(api, subset, tmp_path, capfd):
    report = (
        "echo CUDA driver is too old; echo E1124 02:05:00 torch] failed; echo Traceback; exit 3"
    )
    api.program = ["bash", "-c", report]
    with pytest.raises(TrainJobError) as told:
        train(subset, tmp_path)
    message = str(told.value)
    assert message.startswith("training on 2 nodes failed: node-")
    assert "CUDA driver is too old" in message
    assert "torch]" not in message + capfd.readouterr().out
    assert api.jobs == []
    api.program = None
    assert train(subset, tmp_path)["epochs"] == 3
    assert len(api.created) == 2


@pytest.mark.slow
def test_a_job_of_another_number_of_nodes_is_replaced(api, subset, tmp_path):
    api.program = ["sleep", "60"]
    kept = tmp_path / "kept"
    digest = stages.training_digest(
        CONFIG, json.loads((subset / "subset.json").read_text())["digest"]
    )
    shared = train_job.Shared(kept / digest)
    shared.offer(CONFIG, subset)
    engine = train_job._engine(Nodes(**NODES), shared.folder)
    engine.submit(f"shike-{digest[:16]}", 3)
    assert len(api.running) == 3
    api.program = ["false"]
    with pytest.raises(TrainJobError):
        train(subset, tmp_path)
    assert [job["spec"]["trainer"]["numNodes"] for job in api.created] == [3, 2]


@pytest.mark.slow
def test_a_node_that_is_told_to_leave_has_all_write_a_checkpoint(api, subset, tmp_path, capfd):
    def evict(metrics, step) -> None:
        if step == 0:
            api.evict(1)

    config = replace(CONFIG, stage1_epochs=1000, checkpoint_every=1000)
    with pytest.raises(TrainJobError, match="2 nodes failed: stopped by signal 15 at epoch ") as e:
        train(subset, tmp_path, evict, config)
    assert "\n" not in str(e.value)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert len(list((tmp_path / "kept").glob("*/checkpoint.pt"))) == 1
    assert api.jobs == []


def test_a_step_that_is_told_to_stop_leaves_a_checkpoint_and_no_job(api, subset, tmp_path):
    def stop(metrics, step) -> None:
        if step == 0:
            signal.raise_signal(signal.SIGTERM)

    config = replace(CONFIG, stage1_epochs=1000, checkpoint_every=1000)
    with pytest.raises(Interrupted, match="stopped by signal 15 with the last checkpoint of") as e:
        train(subset, tmp_path, stop, config)
    assert e.value.signal_number == signal.SIGTERM
    assert len(list((tmp_path / "kept").glob("*/checkpoint.pt"))) == 1
    assert api.jobs == []


@pytest.mark.slow
def test_a_job_that_somebody_deletes_is_told(api, subset, tmp_path):
    def delete(metrics, step) -> None:
        if api.jobs:
            api.delete(api.jobs[0])

    config = replace(CONFIG, stage1_epochs=1000)
    with pytest.raises(TrainJobError, match=r"was deleted while it trained, and not by this step"):
        train(subset, tmp_path, delete, config)
    deadline = time.monotonic() + 30
    while api.running:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_job_that_ends_without_results_has_another_volume(api, subset, tmp_path):
    api.program = ["true"]
    with pytest.raises(TrainJobError, match=r"is complete, but its results are not in .* the same"):
        train(subset, tmp_path)


@pytest.mark.parametrize("verb", ["GET", "POST"])
def test_a_permission_that_is_missing_is_told_in_one_line(api, subset, tmp_path, verb):
    api.refused = (verb,)
    with pytest.raises(TrainJobError) as told:
        train(subset, tmp_path)
    message = str(told.value)
    assert message.startswith("this step's service account may not use TrainJobs (trainjobs.")
    assert f"cannot {verb}" in message
    assert "apply the Role of docs/nodes.md" in message
    assert "\n" not in message


def test_a_cluster_without_the_trainer_is_told_in_one_line(api, subset, tmp_path):
    api.installed = False
    with pytest.raises(TrainJobError) as told:
        train(subset, tmp_path)
    message = str(told.value)
    assert message.startswith("the cluster has no training runtime 'torch-distributed'; install")
    assert "\n" not in message
    assert ("POST", "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team-a/trainjobs") not in (
        api.requests
    )

"""What the compiled pipeline asks of Kubernetes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components import images, tracking
from pipelines.cluster import SECRET_KEYS, Cluster
from pipelines.compile import compile_pipeline
from shike_core.config import SubsetConfig
from shike_core.recipes import digits_lt, recipe_named

ROOT = Path(__file__).parents[2]
STEPS = {
    "preflight", "build-subset", "train", "evaluate", "compare-with-champion", "register-model",
    "register-model-2", "close-runs",
}  # fmt: skip
WITH_MODEL = {"train", "evaluate"}


class Compiled:
    """Both documents of a compiled pipeline."""

    def __init__(self, path: Path, cluster: Cluster, recipe: str = "digits-lt") -> None:
        compile_pipeline(recipe_named(recipe), path, cluster, "0123abcdef01")
        self.specification, platform = yaml.safe_load_all(path.read_text())
        kubernetes = platform["platforms"]["kubernetes"]
        self.settings = {
            name.removeprefix("exec-"): settings
            for name, settings in kubernetes["deploymentSpec"]["executors"].items()
        }
        self.pipeline_config = kubernetes.get("pipelineConfig", {})
        self.containers = {
            name.removeprefix("exec-"): executor["container"]
            for name, executor in self.specification["deploymentSpec"]["executors"].items()
        }
        self.parameters = self.specification["root"]["inputDefinitions"]["parameters"]
        self.tasks = {
            name: task
            for component in [
                self.specification["root"],
                *self.specification["components"].values(),
            ]
            for name, task in component.get("dag", {}).get("tasks", {}).items()
            if f"exec-{name}" in self.specification["deploymentSpec"]["executors"]
        }


@pytest.fixture(scope="module")
def default(tmp_path_factory) -> Compiled:
    return Compiled(tmp_path_factory.mktemp("cluster") / "default.yaml", Cluster())


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Compiled:
    cluster = Cluster(
        gpu_type="amd.com/gpu",
        gpu_count=2,
        cpu="8",
        memory="64Gi",
        node_selector={"pool": "gpu"},
        tolerations=[{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        mlflow_secret="tracking",
        data_pvc="cifar",
        checkpoint_pvc="kept",
        image_pull_secrets=("first", "second"),
        shared_memory="8Gi",
        retries=5,
        retry_backoff="7s",
        train_timeout_hours=3.0,
        keep_days=2.0,
    )
    return Compiled(tmp_path_factory.mktemp("cluster") / "full.yaml", cluster)


def parameter(name: str) -> dict:
    return {"componentInputParameter": f"pipelinechannel--{name}"}


def quoted(name: str) -> str:
    return f"{{{{$.inputs.parameters['pipelinechannel--{name}']}}}}"


def test_every_step_has_settings(default):
    assert set(default.settings) == set(default.containers) == STEPS


def test_steps_with_a_model_ask_for_a_gpu(default):
    for name, container in default.containers.items():
        accelerator = container.get("resources", {}).get("accelerator")
        assert (accelerator is not None) == (name in WITH_MODEL)
        if accelerator:
            assert accelerator["resourceType"] == quoted("cluster_gpu_type")
            assert accelerator["resourceCount"] == quoted("cluster_gpu_count")
    assert default.parameters["cluster_gpu_type"]["defaultValue"] == "nvidia.com/gpu"
    assert default.parameters["cluster_gpu_count"]["defaultValue"] == 1
    assert default.parameters["step2_device"]["defaultValue"] == "cuda"
    assert default.parameters["step3_device"]["defaultValue"] == "cuda"


def test_every_step_asks_for_processors_and_memory(default):
    for name, container in default.containers.items():
        resources = container["resources"]
        if name in WITH_MODEL:
            assert resources["resourceCpuRequest"] == quoted("cluster_cpu")
            assert resources["resourceMemoryRequest"] == quoted("cluster_memory")
            assert resources["resourceMemoryLimit"] == quoted("cluster_memory")
        else:
            assert resources["resourceCpuRequest"] == "1"
            assert resources["resourceMemoryLimit"] == "4Gi"


def test_shared_memory_is_mounted_and_looked_at_before(default, full):
    for compiled, size in ((default, "2Gi"), (full, "8Gi")):
        mounted = {
            name: settings["emptyDirMounts"]
            for name, settings in compiled.settings.items()
            if "emptyDirMounts" in settings
        }
        assert set(mounted) == WITH_MODEL | {"preflight"}
        for mounts in mounted.values():
            assert mounts == [
                {
                    "medium": "Memory",
                    "mountPath": "/dev/shm",
                    "sizeLimit": size,
                    "volumeName": "dshm",
                }
            ]
        asked = compiled.tasks["preflight"]["inputs"]["parameters"]["shared_memory"]
        # A light pod on a small node cannot show more, whatever the others will have.
        assert asked["runtimeValue"]["constant"] == "2Gi"


def test_volumes_are_mounted_where_they_are_needed(default, full):
    assert not any("pvcMount" in settings for settings in default.settings.values())
    mounted = {
        name: {mount["mountPath"]: mount["constant"] for mount in settings.get("pvcMount", [])}
        for name, settings in full.settings.items()
    }
    both = {"/data": "cifar", "/checkpoints": "kept"}
    wanted = dict.fromkeys(("preflight", "build-subset", "train", "evaluate"), both)
    assert {name: mounts for name, mounts in mounted.items() if mounts} == wanted
    assert full.parameters["step1_data_dir"]["defaultValue"] == "/data"
    assert full.parameters["step2_checkpoint_dir"]["defaultValue"] == "/checkpoints"
    assert default.parameters["step1_data_dir"]["defaultValue"] == ""
    assert full.parameters["step1_shards_dir"]["defaultValue"] == ""  # CIFAR has no shards


@pytest.mark.parametrize(
    ("rule", "shards"),
    [
        ({"dataset": "imagenet_lt"}, "/checkpoints/shards"),
        ({"dataset": "imagenet_lt", "storage": "referenced"}, ""),
        ({"dataset": "image_folder", "image_size": 32}, ""),
        ({"dataset": "cifar100"}, ""),
    ],
)
def test_shards_of_a_large_set_are_kept_where_checkpoints_are(rule, shards):
    assert Cluster(checkpoint_pvc="kept").shards_dir(SubsetConfig(**rule)) == shards
    assert Cluster().shards_dir(SubsetConfig(**rule)) == ""


def test_what_reads_every_image_of_a_large_set_has_processors_and_time(tmp_path):
    large = Compiled(tmp_path / "large.yaml", Cluster(checkpoint_pvc="kept"), "imagenet-lt")
    resources = large.containers["build-subset"]["resources"]
    assert "cluster_cpu" in resources["resourceCpuRequest"]
    assert "cluster_memory" in resources["resourceMemoryLimit"]
    assert "accelerator" not in resources
    assert int(large.settings["build-subset"]["activeDeadlineSeconds"]) == 48 * 3600
    assert large.parameters["step1_shards_dir"]["defaultValue"] == "/checkpoints/shards"


def test_nodes_and_tolerations_are_json_parameters(full):
    for name in WITH_MODEL:
        settings = full.settings[name]
        assert settings["nodeSelector"]["nodeSelectorJson"] == parameter("cluster_node_selector")
        (toleration,) = settings["tolerations"]
        assert toleration["tolerationJson"] == parameter("cluster_tolerations")
    assert full.parameters["cluster_node_selector"]["defaultValue"] == {"pool": "gpu"}
    assert full.parameters["cluster_tolerations"]["defaultValue"][0]["key"] == "gpu"
    assert full.parameters["cluster_tolerations"]["parameterType"] == "LIST"


def test_images_are_pulled_with_the_secrets_given(default, full):
    assert not any("imagePullSecret" in settings for settings in default.settings.values())
    for settings in full.settings.values():
        assert [s["secretName"] for s in settings["imagePullSecret"]] == ["first", "second"]


def test_the_tracking_server_comes_from_a_secret_that_may_be_missing(full):
    for name, settings in full.settings.items():
        (secret,) = settings["secretAsEnv"]
        assert secret["optional"] is True
        assert [pair["envVar"] for pair in secret["keyToEnv"]] == list(SECRET_KEYS)
        source = secret["secretNameParameter"]["componentInputParameter"]
        assert source.removeprefix("pipelinechannel--") == "cluster_mlflow_secret", name
    assert full.parameters["cluster_mlflow_secret"]["defaultValue"] == "tracking"


def test_every_step_knows_its_pipeline_run(default):
    for settings in default.settings.values():
        (label,) = settings["fieldPathAsEnv"]
        assert label == {
            "name": tracking.KFP_RUN_ID,
            "fieldPath": "metadata.labels['pipeline/runid']",
        }


def test_steps_are_tried_again_with_growing_waits(default, full):
    for compiled, number, wait in ((default, 2, "30s"), (full, 5, "7s")):
        retried = {
            name: task["retryPolicy"]
            for name, task in compiled.tasks.items()
            if "retryPolicy" in task
        }
        assert set(retried) == STEPS - {"preflight"}  # what it finds is still there in 30 s
        for policy in retried.values():
            assert policy["maxRetryCount"] == number
            assert policy["backoffDuration"] == wait
            assert policy["backoffFactor"] == 2
            assert policy["backoffMaxDuration"] == "600s"


def test_steps_end_after_a_time(full):
    seconds = {name: int(s["activeDeadlineSeconds"]) for name, s in full.settings.items()}
    assert seconds.pop("train") == 3 * 3600
    assert seconds.pop("preflight") == 600
    assert set(seconds.values()) == {3600}


def test_what_is_left_of_a_run_goes_away(default, full):
    assert "1209600" in json.dumps(default.pipeline_config)
    assert "172800" in json.dumps(full.pipeline_config)


def test_the_preflight_knows_the_commit(default):
    code = default.tasks["preflight"]["inputs"]["parameters"]["code"]
    assert code["runtimeValue"]["constant"] == "0123abcdef01"


def test_the_image_in_the_cache_key_names_the_commit(tmp_path):
    path = tmp_path / "pipeline.yaml"
    command = [sys.executable, "-m", "pipelines.compile", "--output", str(path)]
    done = subprocess.run(
        [*command, "--tag", "0123abcdef01", "--gpu-count", "0", "--data-pvc", "cifar"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    executors = next(yaml.safe_load_all(path.read_text()))["deploymentSpec"]["executors"]
    for step in ("build-subset", "train"):  # those that may come from the cache
        assert executors[f"exec-{step}"]["container"]["image"].endswith(":0123abcdef01")
    assert "accelerator" not in executors["exec-train"]["container"]["resources"]


def test_a_cluster_without_gpus(tmp_path):
    compiled = Compiled(tmp_path / "cpu.yaml", Cluster(gpu_count=0))
    for container in compiled.containers.values():
        assert "accelerator" not in container["resources"]
    assert compiled.parameters["step2_device"]["defaultValue"] == "cpu"
    assert compiled.parameters["step3_device"]["defaultValue"] == "cpu"


def test_a_trial_takes_two_epochs(tmp_path):
    compiled = Compiled(tmp_path / "smoke.yaml", Cluster(), "cifar100-lt/smoke")
    epochs = [compiled.parameters[f"step2_stage{stage}_epochs"]["defaultValue"] for stage in (1, 2)]
    assert epochs == [1, 1]
    assert compiled.specification["pipelineInfo"]["name"] == "shike-cifar100-lt-smoke"
    assert compiled.parameters["step4_model_name"]["defaultValue"] == "shike-cifar100-lt-smoke"


def test_no_credentials_stand_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:s3cret@tracking.example")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    path = tmp_path / "pipeline.yaml"
    compile_pipeline(digits_lt(), path, Cluster(), "0123abcdef01")
    assert not re.search("s3cret|tracking.example", path.read_text())


@pytest.mark.parametrize(
    ("option", "value"), [("gpu_count", -1), ("retries", -1), ("keep_days", 0.0)]
)
def test_settings_that_cannot_be(option, value):
    with pytest.raises(ValueError, match=f"{option} must be"):
        Cluster(**{option: value})


def test_an_amount_of_memory_that_is_none():
    with pytest.raises(ValueError, match="'2Xi' is no amount of memory"):
        Cluster(shared_memory="2Xi")


def test_the_images_are_those_of_the_module(default):
    assert {container["image"] for container in default.containers.values()} == {
        images.DATA, images.TRAIN, images.EVALUATE, images.REGISTER,
    }  # fmt: skip


# --- several nodes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory) -> Compiled:
    cluster = Cluster(
        num_nodes=2,
        gpu_type="amd.com/gpu",
        gpu_count=4,
        cpu="16",
        memory="64Gi",
        node_selector={"pool": "gpu"},
        tolerations=[{"key": "gpu", "operator": "Exists"}],
        data_pvc="photographs",
        checkpoint_pvc="kept",
        image_pull_secrets=("first",),
        shared_memory="8Gi",
        train_timeout_hours=3.0,
    )
    return Compiled(tmp_path_factory.mktemp("cluster") / "nodes.yaml", cluster)


def test_the_step_of_several_nodes_asks_for_no_gpu_but_hands_on_what_they_need(two_nodes):
    resources = two_nodes.containers["train"]["resources"]
    assert "accelerator" not in resources
    assert resources["resourceMemoryLimit"] == "4Gi"
    assert "accelerator" in two_nodes.containers["evaluate"]["resources"]
    settings = two_nodes.settings["train"]
    assert int(settings["activeDeadlineSeconds"]) == 3 * 3600
    assert not {"nodeSelector", "tolerations", "emptyDirMounts"} & settings.keys()
    mounts = {mount["mountPath"]: mount["constant"] for mount in settings["pvcMount"]}
    assert mounts == {"/data": "photographs", "/checkpoints": "kept"}
    assert two_nodes.parameters["step2_num_nodes"]["defaultValue"] == 2
    assert two_nodes.parameters["step2_device"]["defaultValue"] == "cuda"
    assert two_nodes.parameters["step2_nodes"]["defaultValue"] == {
        "backend": "kubernetes",
        "image": images.TRAIN,
        "runtime": "torch-distributed",
        "gpu_type": "amd.com/gpu",
        "gpu_count": 4,
        "cpu": "16",
        "memory": "64Gi",
        "shared_memory": "8Gi",
        "node_selector": {"pool": "gpu"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "claims": {"/data": "photographs", "/checkpoints": "kept"},
        "image_pull_secrets": ["first"],
    }


def test_one_node_trains_in_the_pod_of_the_step(default):
    assert default.parameters["step2_num_nodes"]["defaultValue"] == 1
    assert default.parameters["step2_nodes"]["defaultValue"] == {}


def test_several_nodes_without_a_shared_volume_are_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"num_nodes=2 need a volume .* --checkpoint-pvc"):
        Cluster(num_nodes=2)
    with pytest.raises(ValueError, match="num_nodes must be at least 1, got 0"):
        Cluster(num_nodes=0)


def test_a_sweep_keeps_one_node(tmp_path):
    command = [sys.executable, "-m", "pipelines.sweep", "--output", str(tmp_path / "sweep.yaml")]
    done = subprocess.run(
        [*command, "--tag", "0123abcdef01", "--num-nodes", "2", "--checkpoint-pvc", "kept"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "a sweep trains each recipe on one machine, got num_nodes=2" in line

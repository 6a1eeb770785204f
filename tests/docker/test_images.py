import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.utils import canonicalize_name

import shike_core
from components import cli as components
from components import images as names
from shike_core import stages
from shike_core.environment import CPU_SETTINGS
from shike_core.recipes import digits_lt

# The images are built with the first of these tests.
pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
BASE = "python:3.11-slim-bookworm"
STEPS = {
    "data": "build-subset",
    "register": "register",
    "train": "train",
    "evaluate": "evaluate",
}
LOCKS = {
    "data": "data",
    "register": "data",
    "mlflow": "server",
    "train": "train",
    "evaluate": "train",
}
SUBSET = ["--dataset", "digits", "--imbalance-factor", "20", "--validation-per-class", "10"]
TINY = [
    *("--num-experts", "2", "--width", "4", "--warmup-epochs", "1", "--batch-size", "32"),
    *("--stage1-learning-rate", "0.05", "--dkt-weight", "1", "--mutual-weight", "0.1"),
    *("--no-flip", "--no-auto-augment", "--cutout-size", "0", "--precision", "float32"),
]
EPOCHS = ["--stage1-epochs", "3", "--stage2-epochs", "1"]

every_image = pytest.mark.parametrize("image", LOCKS)
every_file_system = pytest.mark.parametrize("image", ["data", "mlflow", "train"])
every_step = pytest.mark.parametrize("image", STEPS)


def pins(lock: str) -> dict[str, str]:
    text = (ROOT / "requirements" / f"{lock}.lock").read_text()
    return dict(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", text, flags=re.MULTILINE))


# --- what a person meets ----------------------------------------------------------------------


@every_step
def test_an_image_alone_prints_the_help_of_its_step(images, image):
    done = images.run(image)
    assert done.returncode == 0, done.stderr
    assert f"components {STEPS[image]} [-h]" in done.stdout
    assert not done.stderr


@every_step
def test_there_is_no_entrypoint_in_the_way_of_the_platform(images, image):
    assert not images.inspect(images.name(image))["Config"]["Entrypoint"]
    done = images.run(image, "sh", "-c", "python3 -m kfp.dsl.executor_main --help")
    assert done.returncode == 0, done.stderr
    assert "--component_module_path" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--subset", "/mnt", "--out", "/mnt"],
        ["evaluate", "--subset", "/mnt", "--checkpoint", "/mnt", "--out", "/mnt"],
    ],
)
def test_a_step_in_the_wrong_image_says_so_in_one_line(images, arguments):
    done = images.run("data", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "torch is not installed here" in line


def test_a_place_that_cannot_be_written_is_told_in_one_line(images):
    done = images.run("data", "build-subset", "--dataset", "digits", "--out", "/opt/subset")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "/opt/subset" in line


# --- the steps by hand ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(images, tmp_path_factory) -> Path:
    """The folder where containers cut a subset, trained on it and evaluated."""
    folder = tmp_path_factory.mktemp("work")
    subset, checkpoint = ["--subset", "/mnt/subset"], ["--checkpoint", "/mnt/checkpoint"]
    for image, *arguments in (
        ("data", "build-subset", *SUBSET, "--out", "/mnt/subset"),
        ("train", "train", *subset, *TINY, *EPOCHS, "--out", "/mnt/checkpoint"),
        ("evaluate", "evaluate", *subset, *checkpoint, "--out", "/mnt/evaluation"),
    ):
        done = images.run(image, *arguments, folder=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not done.stderr
    return folder


def test_a_container_cuts_the_subset_that_this_process_cuts(work, tmp_path):
    here = stages.build_subset(digits_lt().subset, None, tmp_path, lambda metrics, step: None)
    there = json.loads((work / "subset" / "subset.json").read_text())
    assert there["digest"] == here["digest"]


def test_containers_train_and_evaluate_as_this_process_does(work, tmp_path):
    subset = ["--subset", str(work / "subset")]
    for arguments in (
        ["train", *subset, *TINY, *EPOCHS, "--out", str(tmp_path / "checkpoint")],
        [
            *("evaluate", *subset, "--checkpoint", str(tmp_path / "checkpoint")),
            *("--out", str(tmp_path / "evaluation")),
        ],
    ):
        components.main(arguments)
    here, there = (
        json.loads((folder / "evaluation" / "report.json").read_text())
        for folder in (tmp_path, work)
    )
    assert there["metrics"] == here["metrics"]
    assert there["metrics"]["test/accuracy"] > 0.1
    here, there = (
        json.loads((folder / "checkpoint" / "train.json").read_text())["final"]
        for folder in (tmp_path, work)
    )
    for final in (here, there):
        del final["train/images_per_second"]
    assert there == here


def docker(*arguments: str) -> str:
    """What docker prints, on either stream."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def wait_for(container: str, pattern: str, patience_s: float = 120) -> None:
    """Until a container has printed it."""
    deadline = time.monotonic() + patience_s
    while not re.search(pattern, docker("logs", container)):
        assert time.monotonic() < deadline, docker("logs", container)
        time.sleep(0.2)


def test_a_stopped_training_leaves_a_checkpoint_and_goes_on(images, work):
    arguments = ["train", "--subset", "/mnt/subset", *TINY, "--checkpoint-dir", "/mnt/kept"]
    arguments += ["--out", "/mnt/stopped", "--stage1-epochs", "60", "--stage2-epochs", "1"]
    volume = ("--volume", f"{work}:/mnt")
    with images.background("train", *arguments, options=volume) as container:
        wait_for(container, r"epoch +1/61")
        docker("stop", "--time", "60", container)
        shown = docker("logs", container)
        assert docker("inspect", "--format", "{{.State.ExitCode}}", container).strip() == "143"
    (kept,) = (work / "kept").glob("*/checkpoint.pt")
    assert f"/mnt/{kept.relative_to(work)}" in shown.splitlines()[-1]
    assert "Traceback" not in shown
    done = images.run("train", *arguments, folder=work)
    assert done.returncode == 0, done.stderr
    report = json.loads((work / "stopped" / "train.json").read_text())
    assert 0 < report["epochs_in_this_call"] < report["epochs"] == 61


def test_the_server_starts_and_may_write_to_its_volume(images):
    command = ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000", "--workers", "1"]
    options = ("--publish", "127.0.0.1::5000", "--volume", "/artifacts", "--user", "10001:0")
    with images.background("mlflow", *command, options=options) as container:
        address = docker("port", container, "5000").strip()
        deadline = time.monotonic() + 180
        while not answers(f"http://{address}/health"):
            assert time.monotonic() < deadline, docker("logs", container)
            time.sleep(0.2)
        with urlopen(f"http://{address}/", timeout=30) as page:
            assert "<title>MLflow</title>" in page.read().decode()
        docker("exec", container, "touch", "/artifacts/of-a-run")


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False


def test_the_server_has_users_and_the_clients_of_its_stores(images):
    program = "import boto3, json, psycopg2, mlflow.server.auth; print(json.dumps(True))"
    assert images.python("mlflow", program)


@pytest.mark.parametrize("image", ["data", "train", "mlflow"])
def test_buckets_can_be_read_with_every_kind_of_credentials(images, image):
    names = "('s3', 'sts', 'sso', 'sso-oidc')"
    program = f"""
import json, botocore.session
session = botocore.session.get_session()
clients = [session.create_client(name, region_name="eu-central-1") for name in {names}]
print(json.dumps([client.meta.service_model.service_name for client in clients]))
"""
    assert images.python(image, program) == ["s3", "sts", "sso", "sso-oidc"]


# --- what is in them --------------------------------------------------------------------------

INSTALLED = """
import importlib.metadata, json, sys
found = importlib.metadata.distributions(path=[p for p in sys.path if "/venv/" in p])
print(json.dumps({d.metadata["Name"]: d.version for d in found}))
"""


@every_file_system
def test_the_packages_are_those_of_the_lock_and_of_these_tests(images, image):
    found = images.python(image, INSTALLED)
    installed = {canonicalize_name(name): version for name, version in found.items()}
    assert installed == pins(LOCKS[image])
    assert installed == {name: importlib.metadata.version(name) for name in installed}


@pytest.mark.parametrize("image", ["data", "register", "mlflow"])
def test_no_torch_where_nothing_computes(images, image):
    assert "torch" not in map(str.lower, images.python(image, INSTALLED))


def test_sizes_stay_in_bounds(images):
    sizes = {image: images.inspect(images.name(image))["Size"] for image in LOCKS}
    base = images.inspect(BASE)["Size"]
    for image in ("data", "register", "mlflow"):
        assert sizes[image] < 1e9
        assert sizes[image] - base < 0.75e9
    for image in ("train", "evaluate"):
        assert sizes[image] - base < 6.5e9


def layers(images, image: str) -> list[str]:
    return images.inspect(images.name(image))["RootFS"]["Layers"]


@pytest.mark.parametrize("pair", [("train", "evaluate"), ("data", "register")])
def test_pairs_share_all_layers(images, pair):
    one, other = (layers(images, image) for image in pair)
    assert one == other


def test_training_adds_to_the_packages_of_the_others(images):
    *packages, _code = layers(images, "data")
    assert layers(images, "train")[: len(packages)] == packages


@every_image
def test_labels_tell_where_an_image_comes_from(images, image):
    config = images.inspect(images.name(image))["Config"]
    lock = (ROOT / "requirements" / f"{LOCKS[image]}.lock").read_bytes()
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == f"shike-python-{image}"
    assert labels["org.opencontainers.image.description"].startswith("SHIKE: ")
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.version"] == shike_core.__version__
    assert labels["org.opencontainers.image.revision"] == images.revision
    assert labels["shike.lock.sha256"] == hashlib.sha256(lock).hexdigest()
    assert f"SHIKE_GIT_COMMIT={images.revision}" in config["Env"]
    done = images.run(image, "cat", "/opt/shike/venv/requirements.lock")
    assert done.stdout.encode() == lock


@every_image
def test_settings_of_the_processor_are_those_of_the_package(images, image):
    environment = images.inspect(images.name(image))["Config"]["Env"]
    assert {f"{name}={value}" for name, value in CPU_SETTINGS.items()} <= set(environment)


@every_image
def test_an_image_does_not_run_as_root(images, image):
    assert images.inspect(images.name(image))["Config"]["User"] == "10001:0"


TOOLS = """
import json, os, shutil
tools = "cc c++ gcc g++ clang clang++ ld make cmake git uv conda".split()
own = os.listdir("/opt/shike/venv/bin")
pip = [name for name in own if name.startswith(("pip", "easy_install", "wheel"))]
print(json.dumps([tool for tool in tools if shutil.which(tool)] + pip))
"""
LEFT_BEHIND = """
import json, os
places = ["/tmp", "/root/.cache", "/var/cache/pip", "/opt/shike/app", "/opt/shike"]
print(json.dumps({p: sorted(os.listdir(p)) for p in places if os.access(p, os.R_OK)}))
"""


@every_file_system
def test_no_tools_that_build_or_install_are_left(images, image):
    assert images.python(image, TOOLS) == []
    done = images.run(image, "python", "-m", "pip", "--version")
    assert "No module named pip" in done.stderr


@pytest.mark.parametrize("image", ["data", "train"])
def test_nothing_else_is_left(images, image):
    command = ["docker", "run", "--rm", "--user", "0:0", "--network", "none", images.name(image)]
    done = subprocess.run(
        [*command, "python", "-c", LEFT_BEHIND], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found.pop("/opt/shike/app") == ["components", "shike_core"]
    assert found.pop("/opt/shike") == ["LICENSE", "app", "bin", "install.py", "venv"]
    assert not any(found.values()), found


@every_image
def test_history_and_environment_name_no_host_and_no_secret(images, image):
    name = images.name(image)
    entries = images.history(name)[len(images.history(BASE)) :]
    entries += sorted(
        set(images.inspect(name)["Config"]["Env"]) - set(images.inspect(BASE)["Config"]["Env"])
    )
    assert len(entries) > 10
    text = "\n".join(entries)
    assert "://" not in text
    assert not re.search(r"(?i)password|secret|token|_key\b|index.url|proxy|@[a-z]", text)


COMPILED = """
import importlib.util, json, pathlib, sys
import kfp.dsl, mlflow.tracking, pandas, pyarrow, sklearn.datasets
import components.cli, components.checks
stale = []
for module in list(sys.modules.values()):
    source = getattr(module, "__file__", None) or ""
    if not (source.endswith(".py") and source.startswith("/opt/shike")):
        continue
    compiled = pathlib.Path(importlib.util.cache_from_source(source))
    if not compiled.is_file():
        stale.append(source)
        continue
    header = compiled.read_bytes()[:16]
    changed = int(pathlib.Path(source).stat().st_mtime) & 0xFFFFFFFF
    by_time = int.from_bytes(header[4:8], "little") == 0
    if by_time and int.from_bytes(header[8:12], "little") != changed:
        stale.append(source)
print(json.dumps([stale, len(sys.modules)]))
"""


@pytest.mark.parametrize("image", ["data", "train"])
def test_nothing_has_to_be_compiled_when_a_step_starts(images, image):
    stale, modules = images.python(image, COMPILED)
    assert modules > 1000
    assert stale == []


@every_step
def test_images_are_called_what_the_pipeline_calls_them(images, image):
    compiled = getattr(names, image.upper()).rpartition(":")[0].rpartition("/")[2]
    assert images.name(image).rpartition(":")[0] == compiled


# --- what is written about them ---------------------------------------------------------------


@pytest.fixture(scope="module")
def documents(images, tag, tmp_path_factory) -> dict[str, str]:
    """The bill of materials of two images."""
    folder = tmp_path_factory.mktemp("sbom")
    command = [sys.executable, str(ROOT / "docker" / "sbom.py"), "--tag", tag, "data", "train"]
    done = subprocess.run(
        [*command, "--output", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {path.name.partition(".")[0]: path.read_text() for path in folder.iterdir()}


# Each address in it takes the validator a tenth of a second.
@pytest.mark.parametrize("one_in", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_a_bill_of_materials_keeps_to_its_standard(documents, one_in):
    document = json.loads(documents["data"])
    document["components"] = document["components"][::one_in]
    assert len(document["components"]) > 200 // one_in
    text = json.dumps(document)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_a_bill_of_materials_lists_what_is_installed(documents, images):
    for image in ("data", "train"):
        document = json.loads(documents[image])
        assert document["metadata"]["component"]["version"] == images.revision
        kinds: dict[str, dict[str, str]] = {"pypi": {}, "deb": {}, "generic": {}}
        for part in document["components"]:
            kind = re.match(r"pkg:(\w+)/", part["purl"])[1]
            kinds[kind][canonicalize_name(part["name"])] = part["version"]
        assert kinds["pypi"] == pins(LOCKS[image])
        assert {"libc6", "openssl"} & kinds["deb"].keys()
        assert kinds["generic"]["python"].startswith("3.11.")
        assert ("torch" in kinds["pypi"]) == (image == "train")
        licensed = [part["name"] for part in document["components"] if part.get("licenses")]
        assert len(licensed) > 50

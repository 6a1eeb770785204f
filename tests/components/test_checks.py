"""What the preflight finds; the tracking server is a real store."""

import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from mlflow import MlflowClient

from components import checks, tracking
from components.checks import Needs, PreflightError, check
from components.preflight import preflight
from shike_core.config import RegisterConfig
from shike_core.data.sources import CIFAR_FILES

ROOT = Path(__file__).parents[2]


def test_all_is_well(store, tmp_path, monkeypatch):
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-1")
    start = time.monotonic()
    lines = check(Needs(dataset="digits", checkpoint_dir=str(tmp_path / "new")), "run")
    assert time.monotonic() - start < 10
    assert [line.partition(":")[0] for line in lines] == [
        "code", "settings", "data", "disk", "checkpoints", "shared memory", "GPU", "tracking",
    ]  # fmt: skip
    client = MlflowClient(store)
    (run,) = tracking.runs_of(client, "kfp-1", "run")
    assert run.info.status == "RUNNING"
    assert client.get_experiment(run.info.experiment_id).name == "digits-lt"
    kept = Path(client.download_artifacts(run.info.run_id, "preflight.txt", str(tmp_path)))
    assert kept.read_text().splitlines() == lines[:-1]


def test_everything_that_is_wrong_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv(tracking.GIT_COMMIT, "0123abcdef01")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(checks, "NVIDIA_DEVICES", tmp_path / "dev")
    monkeypatch.setitem(CIFAR_FILES, "cifar100", unreachable(CIFAR_FILES["cifar100"]))
    (tmp_path / "file").write_text("")
    needs = Needs(
        dataset="cifar100",
        data_dir=str(tmp_path / "empty"),
        checkpoint_dir=str(tmp_path / "file"),
        device="cuda",
        shared_memory="100Ti",
        free_disk_gib=1e9,
        code="fedcba987654",
        evaluate={"calibration_bins": 0},
    )
    with pytest.raises(PreflightError) as found:
        check(needs, "run")
    head, *lines = str(found.value).split("\n  - ")
    assert head == "8 of 8 checks failed, nothing was started:"
    told = dict(line.split(": ", 1) for line in lines)
    assert "commit 0123abcdef01, the pipeline was compiled from fedcba987654" in told["code"]
    assert told["settings"] == "calibration_bins must be at least 1 and finite, got 0"
    assert "has neither cifar-100-python nor cifar-100-python.tar.gz" in told["data"]
    assert "GiB free, 1e+09 GiB are needed" in told["disk"]
    assert "cannot be written by user" in told["checkpoints"]
    assert "100Ti were asked for" in told["shared memory"]
    assert "shows no NVIDIA GPU; give device auto or cpu" in told["GPU"]
    assert "MLFLOW_TRACKING_URI is not set" in told["tracking"]


def unreachable(files):
    from dataclasses import replace

    return replace(files, url="http://127.0.0.1:9/cifar-100-python.tar.gz")


@pytest.mark.parametrize(
    ("register", "told"),
    [
        ({"model_name": "team/model"}, r"model_name must be without / and :, .* got 'team/model'"),
        (
            {"model_name": "m", "metric": "acuracy"},
            "unknown metric 'acuracy'; choose one of accuracy",
        ),
        ({"model_name": "m", "min_accuracy": 57.5}, "min_accuracy must be a fraction"),
    ],
)
def test_what_the_gate_would_refuse_after_hours_is_told_now(store, register, told):
    with pytest.raises(PreflightError, match=f"1 of 8 checks failed(.|\n)*settings: {told}"):
        check(Needs(dataset="digits", register=register), "run")


def test_data_that_is_there_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setitem(CIFAR_FILES, "cifar100", unreachable(CIFAR_FILES["cifar100"]))
    (tmp_path / "cifar-100-python").mkdir()
    found = checks.where_images_come_from("cifar100", tmp_path)
    assert found == f"cifar100 in {tmp_path / 'cifar-100-python'}"


@pytest.mark.parametrize("expected", ["", "0123abc", "0123abcdef0123456789"])
def test_a_commit_may_be_shortened(monkeypatch, expected):
    for commit in ("0123abcdef01", "0123abcdef01-dirty"):
        monkeypatch.setenv(tracking.GIT_COMMIT, commit)
        assert checks.same_code(expected) == commit


def test_in_a_pod_without_gpu_only_the_train_step_can_know(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "NVIDIA_DEVICES", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert "train step looks" in checks.gpu_visible("cuda")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    with pytest.raises(PreflightError, match="no NVIDIA GPU"):
        checks.gpu_visible("cuda")
    (tmp_path / "nvidia0").write_text("")
    assert checks.gpu_visible("cuda") == "there"


def test_an_artifact_store_that_takes_nothing_is_found(store, tmp_path, monkeypatch):
    (tmp_path / "mlartifacts").write_text("a file where the folder should be")
    with pytest.raises(PreflightError, match=r"tracking: .*artifact store does not take files"):
        check(Needs(dataset="digits"), "run")


@pytest.mark.parametrize(
    ("text", "gib"), [("2Gi", 2.0), ("512Mi", 0.5), ("1G", 1e9 / 2**30), ("1073741824", 1.0)]
)
def test_amounts_of_memory(text, gib):
    assert checks.gib(text) == pytest.approx(gib)


def test_wrong_values_stand_in_the_list_too(store):
    needs = Needs(dataset="imagenet", shared_memory="much")
    with pytest.raises(PreflightError, match=r"2 of 8 checks failed") as found:
        check(needs, "run")
    assert "data: unknown dataset 'imagenet'" in str(found.value)
    assert "shared memory: 'much' is no amount of memory" in str(found.value)


@pytest.mark.parametrize("text", ["2Xi", "much", "Gi"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(ValueError, match="write it as in 512Mi or 2Gi"):
        checks.gib(text)


def test_the_step_ends_with_a_list(capsys):
    with pytest.raises(SystemExit) as stop:
        preflight.python_func(
            dataset="digits", data_dir="", checkpoint_dir="", device="cpu", shared_memory="",
            free_disk_gib=1e9, code="", kind="run", eval_batch_size=1, calibration_bins=1,
            eval_device="auto", eval_workers=0, **asdict(RegisterConfig(model_name="m")),
        )  # fmt: skip
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 2 of 8 checks failed, nothing was started:\n  - disk: ")
    assert "\n  - tracking: " in error


# --- the commands of the images --------------------------------------------------------------


def command(process_environment, *arguments: str, **environment: str):
    return subprocess.run(
        [sys.executable, "-m", "components", *arguments],
        cwd=ROOT,
        env=process_environment(**environment),
        capture_output=True,
        text=True,
        check=False,
    )


def test_preflight_by_hand(store, process_environment):
    done = command(
        process_environment, "preflight", "--dataset", "digits", MLFLOW_TRACKING_URI=store
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^[\w ]+: ", done.stdout, flags=re.MULTILINE)) == 8
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("digits-lt").experiment_id])
    assert run.info.status == "FINISHED"


def test_preflight_by_hand_leaves_no_run_open(store, tmp_path, process_environment):
    (tmp_path / "file").write_text("")  # where a folder for artifacts would have to be
    client = MlflowClient(store)
    number = client.create_experiment("digits-lt", artifact_location=str(tmp_path / "file"))
    done = command(
        process_environment, "preflight", "--dataset", "digits", MLFLOW_TRACKING_URI=store
    )
    assert done.returncode == 2
    assert "its artifact store does not take files" in done.stderr
    (run,) = client.search_runs([number])
    assert run.info.status == "FAILED"


def test_registering_by_hand_what_was_not_evaluated(store, process_environment):
    run = tracking.open_run("digits-lt")
    done = command(
        process_environment, "register", "--run-id", run.run_id, "--model-name", "m",
        MLFLOW_TRACKING_URI=store,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"error: run {run.run_id} has no model; evaluate first\n"

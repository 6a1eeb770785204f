"""Runs of a real MLflow store, compared."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from components.tracking import TrackingError
from pipelines import compare as script
from pipelines.compare import compare
from shike_core.evaluate import measure, write_predictions

LABELS = np.repeat(np.arange(3), 20)


@pytest.fixture
def client(store) -> MlflowClient:
    return MlflowClient(store)


def evaluated(client: MlflowClient, folder: Path, name: str, right: int, seed: int = 0) -> str:
    """A finished run with an evaluation; returns its id."""
    predicted = np.where(np.arange(60) % 20 < right, LABELS, (LABELS + 1) % 3)
    logits = 3.0 * torch.nn.functional.one_hot(torch.tensor(predicted), 3)[:, None]
    report = measure(logits, torch.tensor(LABELS), np.array([150, 50, 5]), ["a", "b", "c"], 15)
    report |= {"test_digest": "e" * 64, "train": {"seed": seed}}
    out = folder / name.replace("/", "-") / str(seed)
    out.mkdir(parents=True)
    (out / "report.json").write_text(json.dumps(report))
    write_predictions(out / "predictions.parquet", np.arange(60), LABELS, logits)
    (found,) = client.search_experiments(filter_string="name = 'pets'") or [None]
    experiment = (
        found.experiment_id
        if found
        else client.create_experiment("pets", artifact_location=str(folder / "artifacts"))
    )
    run = client.create_run(experiment, run_name=name, tags={"kind": "run", "weights_digest": name})
    for file in out.iterdir():
        client.log_artifact(run.info.run_id, str(file), "evaluation")
    client.set_terminated(run.info.run_id)
    return run.info.run_id


@pytest.fixture
def runs(client, tmp_path) -> list[str]:
    return [evaluated(client, tmp_path, name, right) for name, right in (("it's a", 8), ("b", 17))]


def test_runs_by_id_and_by_name(runs, tmp_path):
    text = compare([runs[0], "b"], tmp_path / "home")
    (out,) = (tmp_path / "home" / "compare").iterdir()
    assert {path.name for path in out.iterdir()} == {
        "compare.html", "compare.md", "compare.csv", "compare.json"
    }  # fmt: skip
    report = json.loads((out / "compare.json").read_text())
    assert [row["name"] for row in report["runs"]] == ["it's a", "b"]
    assert report["differences"][0]["difference"] == pytest.approx(27 / 60)
    assert "b over all classes: 45.0 points better" in text
    assert f"it's a: run {runs[0]}" in text
    assert text.splitlines()[-1] == f"page: {out / 'compare.html'}"
    assert compare(["b", "it's a"], tmp_path / "home", tmp_path / "again").count(
        "45.0 points worse"
    )


def test_the_latest_two_by_default(runs, client, tmp_path):
    evaluated(client, tmp_path, "c", 10)
    unfinished = client.create_run("1", tags={"kind": "run", "weights_digest": "d"})
    assert "# 2 runs, base b" in compare([], tmp_path / "home")
    client.set_terminated(unfinished.info.run_id, "FAILED")
    assert "# 2 runs, base b" in compare([], tmp_path / "home")


@pytest.mark.parametrize("address", ["pets@champion", "models:/pets@champion", "pets/1"])
def test_registered_models(runs, client, tmp_path, address):
    client.create_registered_model("pets")
    client.create_model_version("pets", f"runs:/{runs[1]}/evaluation", runs[1])
    client.set_registered_model_alias("pets", "champion", "1")
    assert "# 2 runs, base b" in compare([address, runs[0]], tmp_path / "home")


def test_runs_of_one_name_get_their_ids(runs, client, tmp_path):
    second = evaluated(client, tmp_path, "b", 18, seed=1)
    text = compare([runs[1], second], tmp_path / "home")
    assert f"# 2 runs, base b ({runs[1][:6]})" in text


def told(capsys, monkeypatch, *arguments: str) -> str:
    """The one line by which the script refuses."""
    with pytest.raises(SystemExit) as stop:
        script.main(arguments, Path("home"))
    assert str(stop.value.code).startswith("error: ")
    assert "\n" not in str(stop.value.code)
    return str(stop.value.code)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("nobody", "is called 'nobody'; give a run's id or name, or a registered model"),
        ("0" * 32, f"there is no MLflow run {'0' * 32} on sqlite:"),
        ("pets@champion", "has no model pets@champion, or its run is gone"),
        ("models:/pets/7", "has no model pets/7, or its run is gone"),
    ],
)
def test_what_is_not_there(runs, capsys, monkeypatch, wanted, message):
    assert message in told(capsys, monkeypatch, runs[0], wanted)


def test_one_run_and_one_run_twice(runs, capsys, monkeypatch):
    assert "1 evaluation cannot be compared" in told(capsys, monkeypatch, runs[0])
    assert "is there twice" in told(capsys, monkeypatch, runs[0], runs[0])


def test_a_name_that_several_have(runs, client, tmp_path, capsys, monkeypatch):
    second = evaluated(client, tmp_path, "b", 18, seed=1)
    line = told(capsys, monkeypatch, runs[0], "b")
    assert "2 MLflow runs are called 'b'; give the id of one: " in line
    assert second in line
    assert runs[1] in line


def test_artifacts_that_were_deleted(runs, tmp_path, capsys, monkeypatch):
    (stored,) = (tmp_path / "artifacts" / runs[1]).rglob("predictions.parquet")
    stored.unlink()
    line = told(capsys, monkeypatch, *runs)
    assert f"run {runs[1]} has no evaluation/predictions.parquet" in line
    assert "evaluate it again, or leave it out" in line


def test_too_few_runs(client, tmp_path, capsys, monkeypatch):
    assert "has 0 finished runs with an evaluation, and 2 are needed" in told(capsys, monkeypatch)
    evaluated(client, tmp_path, "a", 8)
    assert "has 1 finished run with an evaluation, and 2" in told(capsys, monkeypatch)


def test_no_server_and_no_local_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackingError, match=r"there are no runs in .*home; make some with make"):
        compare([], tmp_path / "home")
    assert not (tmp_path / "home").exists()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(runs, client, tmp_path, browser, width):
    more = [evaluated(client, tmp_path, f"a rather long name {i}", 9, seed=i) for i in range(3)]
    compare([*runs, *more], tmp_path, tmp_path / "out")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get((tmp_path / "out" / "compare.html").as_uri())
    text = browser.find_element("tag name", "body").text
    overflow = "return document.documentElement.scrollWidth - innerWidth"
    wider = browser.execute_script(overflow)
    images = browser.execute_script("return [...document.images].map(i => i.naturalWidth)")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert "5 runs compared" in text
    assert "+45.0" in text
    assert "Over seeds" in text
    assert wider <= 0
    assert images
    assert all(images)

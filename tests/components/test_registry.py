"""The registry of a real store: who is champion, what is written down, and going back."""

import json
import shutil
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from components import tracking
from components.tracking import TrackedRun, TrackingError, registry
from pipelines import rollback as script
from shike_core.config import RegisterConfig
from shike_core.evaluate import measure
from shike_core.gate import decide
from shike_core.report import render_report

CONFIG = RegisterConfig(model_name="pets")
LABELS = torch.arange(3).repeat_interleave(20)


@pytest.fixture
def client(store) -> MlflowClient:
    mlflow.set_tracking_uri(store)
    return MlflowClient(store)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report's page; drawing one for each run takes most of these tests' time."""
    logits = 3.0 * torch.nn.functional.one_hot(LABELS, 3)[:, None]
    report = measure(logits, LABELS, np.array([150, 50, 5]), ["a", "b|", "<c>"], 15)
    path = tmp_path_factory.mktemp("page") / "report.html"
    render_report(report, path)
    return path


@pytest.fixture
def judged(client, tmp_path, page) -> Callable[..., tuple[TrackedRun, str]]:
    """Makes runs that passed the gate; returns a run and the address of its model."""
    experiment = client.create_experiment("pets", artifact_location=str(tmp_path / "artifacts"))

    def make(right: int, weights: str = "", config: RegisterConfig = CONFIG):
        answers = torch.where(torch.arange(60) % 20 < right, LABELS, (LABELS + 1) % 3)
        logits = 3.0 * torch.nn.functional.one_hot(answers, 3)[:, None]
        report = measure(logits, LABELS, np.array([150, 50, 5]), ["a", "b|", "<c>"], 15)
        weights = weights or f"weights {right}"
        report |= {"test_digest": "t" * 64, "export": {"weights_digest": weights}}
        run_id = client.create_run(experiment).info.run_id
        run = TrackedRun(run_id, experiment, client)
        run.tag(weights_digest=weights, test_digest="t" * 64)
        for key, value in report["metrics"].items():
            client.log_metric(run_id, key, value)
        folder = tmp_path / run_id
        folder.mkdir()
        shutil.copy(page, folder)
        (folder / "report.json").write_text(json.dumps(report))
        for file in folder.iterdir():
            client.log_artifact(run_id, str(file), "evaluation")
        with mlflow.start_run(run_id=run_id):
            model = mlflow.pyfunc.log_model(
                name="model", python_model=Constant(), pip_requirements=["mlflow"]
            )
        champion = tracking.champion_of(client, config.model_name)
        candidate = {"weights_digest": weights, "test_digest": "t" * 64}
        decision = decide(config, candidate | {"metrics": report["metrics"]}, champion)
        tracking.store_decision(run, config, decision)
        return run, f"models:/{model.model_id}"

    return make


class Constant(mlflow.pyfunc.PythonModel):
    def predict(self, model_input: list[str]) -> list[str]:
        return model_input


def register(judged_run: tuple[TrackedRun, str], alias: str = "champion") -> str:
    return tracking.register(*judged_run, CONFIG, alias)


def champion(client: MlflowClient) -> str:
    return str(client.get_model_version_by_alias("pets", "champion").version)


def artifact(run: TrackedRun, path: str, tmp_path: Path) -> str:
    return Path(run.client.download_artifacts(run.run_id, path, str(tmp_path))).read_text()


def test_a_decision_is_written_down(judged, client, tmp_path):
    register(judged(10))
    run, _ = judged(9)
    decision = json.loads(artifact(run, "register/decision.json", tmp_path))
    assert (decision["alias"], decision["decided_by"]) == ("challenger", "max_accuracy_drop")
    assert decision["champion"]["version"] == "1"
    assert decision["policy"] == {**decision["policy"], "model_name": "pets", "metric": "accuracy"}
    assert decision["decided_at"].startswith("20")
    rule = decision["rules"][0]
    assert (rule["candidate"], rule["champion"], rule["holds"]) == (0.45, 0.5, False)
    tags = client.get_run(run.run_id).data.tags
    assert (tags["decision"], tags["decision_rule"]) == ("challenger", "max_accuracy_drop")
    page = artifact(run, "evaluation/report.html", tmp_path)
    assert "<strong>Challenger</strong>: test/accuracy 0.4500 against the champion&#x27;s" in page
    assert "Not judged" not in page


def test_a_report_that_is_gone_is_told_and_the_decision_stays(judged, tmp_path, capsys):
    run, _ = judged(10)
    next((tmp_path / "artifacts").rglob("report.html")).unlink()
    candidate = {"weights_digest": "w", "test_digest": "t", "metrics": {}}
    tracking.store_decision(run, CONFIG, decide(CONFIG, candidate, None))
    assert "no report to write the decision into" in capsys.readouterr().out
    assert json.loads(artifact(run, "register/decision.json", tmp_path))["alias"] == "champion"


def test_a_version_has_a_card(judged, client, tmp_path):
    run, uri = judged(12)
    assert register((run, uri)) == "1"
    description = client.get_model_version("pets", "1").description
    assert description == artifact(run, "register/model_card.md", tmp_path)
    for text in (
        "# pets, version 1", "**Champion**", "there is no champion yet",
        "| overall | 60.0 | 47.4 to 71.4 |", "| few-shot | 60.0 | 38.7 to 78.1 |",
        'mlflow.pytorch.load_model("models:/pets/1")', "b\\|", run.run_id,
    ):  # fmt: skip
        assert text in description
    assert "make rollback" in client.get_registered_model("pets").description


def test_a_champion_that_changed_in_between_is_not_overwritten(judged, client):
    register(judged(10))
    slow, fast = judged(12), judged(13)
    register(fast)
    with pytest.raises(TrackingError, match=r"changed from version 1 to version 2 since.*again$"):
        register(slow)
    assert champion(client) == "2"
    assert len(client.search_model_versions("name = 'pets'")) == 2


def test_a_first_champion_in_between(judged, client):
    slow, fast = judged(12), judged(13)
    register(fast)
    with pytest.raises(TrackingError, match=r"changed from none to version 1 since"):
        register(slow)
    assert champion(client) == "1"


def test_a_step_that_is_tried_again_changes_nothing(judged, client):
    register(judged(10))
    run = judged(12)
    assert [register(run), register(run)] == ["2", "2"]
    assert [entry["version"] for entry in tracking.champions(client, "pets")] == ["1", "2"]


def test_two_that_register_the_same_weights_at_once_take_one_version(judged, client):
    runs = [judged(12, weights="same"), judged(12, weights="same")]
    start, taken = threading.Barrier(2), []

    def work(run: tuple[TrackedRun, str]) -> None:
        start.wait()
        taken.append(register(run))

    threads = [threading.Thread(target=work, args=[run]) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == ["1", "1"]
    assert champion(client) == "1"


# --- going back ------------------------------------------------------------------------------


@pytest.fixture
def three(judged, client) -> MlflowClient:
    for right in (10, 12, 14):
        register(judged(right))
    register(judged(5), "challenger")
    return client


def test_back_step_by_step(three):
    assert tracking.rollback(three, "pets") == ("3", "2")
    assert champion(three) == "2"
    undone = three.get_model_version("pets", "3")
    assert undone.tags["decision"] == "rolled back"
    assert undone.tags["rolled_back"].startswith("20")
    assert undone.description.startswith("Rolled back to version 2 by ")
    assert "# pets, version 3" in undone.description
    assert tracking.rollback(three, "pets") == ("2", "1")
    with pytest.raises(TrackingError, match=r"version 1 is the first champion of pets; there is"):
        tracking.rollback(three, "pets")


def test_what_was_taken_back_does_not_come_again_by_itself(three, judged):
    tracking.rollback(three, "pets")
    run, uri = judged(14)  # a scheduled run, whose training came from the cache
    assert registry.load_decision(run)["decided_by"] == "rolled back"
    assert tracking.register(run, uri, CONFIG, registry.load_decision(run)["alias"]) == "3"
    assert champion(three) == "2"
    three.set_registered_model_alias("pets", "champion", "3")  # by hand
    assert registry.load_decision(judged(14)[0])["decided_by"] == "same weights"
    register(judged(16))
    assert tracking.rollback(three, "pets") == ("5", "3")
    assert "rolled_back" not in three.get_model_version("pets", "3").tags
    assert tracking.champion_of(three, "pets")["rolled_back"] == {"weights 16": "5"}


def test_a_version_that_was_deleted_stands_in_nobodys_way(three):
    three.delete_model_version("pets", "2")
    assert [entry["version"] for entry in tracking.champions(three, "pets")] == ["1", "3"]
    assert tracking.rollback(three, "pets") == ("3", "1")


def test_a_champion_that_came_during_a_rollback_stays(three, judged, monkeypatch):
    def another_registers_meanwhile(address: str) -> str:
        register(judged(16))
        return ""

    monkeypatch.setattr(registry, "_why_files_are_gone", another_registers_meanwhile)
    with pytest.raises(TrackingError, match=r"changed from version 3 to version 5 meanwhile; noth"):
        tracking.rollback(three, "pets")
    assert champion(three) == "5"
    assert [e["version"] for e in tracking.champions(three, "pets")] == ["1", "2", "3", "5"]


def test_back_to_a_version(three, judged):
    assert tracking.rollback(three, "pets", "1") == ("3", "1")
    assert register(judged(13)) == "5"  # better than version 1
    assert tracking.rollback(three, "pets") == ("5", "1")


@pytest.mark.parametrize("version", ["4", "3", "99"])
def test_only_an_earlier_champion_comes_back(three, version):
    with pytest.raises(TrackingError, match=rf"version {version} of pets .* these were: 1, 2$"):
        tracking.rollback(three, "pets", version)
    assert champion(three) == "3"


def test_a_version_whose_files_are_gone_does_not_come_back(three, tmp_path):
    for file in (tmp_path / "artifacts").rglob("MLmodel"):
        file.unlink()
    with pytest.raises(TrackingError, match=r"files of pets version 2 are gone .* still version 3"):
        tracking.rollback(three, "pets")
    assert champion(three) == "3"


def test_no_such_model_and_no_champion(client):
    with pytest.raises(TrackingError, match=r"does not tell the champions of nobody .*check the"):
        tracking.rollback(client, "nobody")
    client.create_registered_model("empty")
    with pytest.raises(TrackingError, match=r"empty has no champion"):
        tracking.rollback(client, "empty")


def test_an_alias_that_somebody_moved_by_hand_is_known(three):
    three.set_registered_model_alias("pets", "champion", "4")
    assert tracking.rollback(three, "pets") == ("4", "3")


def test_champions_are_remembered_where_the_alias_was_removed(three, judged):
    three.delete_registered_model_alias("pets", "champion")
    with pytest.raises(TrackingError, match=r"pets has no champion"):
        tracking.rollback(three, "pets")
    assert register(judged(5)) == "4"  # whatever is registered next becomes champion
    assert tracking.rollback(three, "pets") == ("4", "3")


def test_a_champion_of_which_nothing_is_known_is_registered_again(three, judged):
    for tag in ("test_digest", "metrics"):
        three.delete_model_version_tag("pets", "3", tag)
    assert register(judged(14)) == "3"
    known = tracking.champion_of(three, "pets")
    assert known["test_digest"] == "t" * 64
    assert known["metrics"]["test/accuracy"] == pytest.approx(0.7)


def test_a_registry_that_refuses_is_told_in_words(three, store):
    with sqlite3.connect(store.removeprefix("sqlite:///")) as database:
        database.execute(
            "CREATE TRIGGER refuse BEFORE UPDATE ON registered_model_tags "
            "BEGIN SELECT RAISE(ABORT, 'no right to do that'); END"
        )
    with pytest.raises(TrackingError, match=r"does not let pets be changed .*grant EDIT"):
        tracking.rollback(three, "pets")


def test_the_command(three, tmp_path, capsys):
    script.main("pets", show=True, home=tmp_path)
    assert champion(three) == "3"
    script.main("pets", home=tmp_path)
    out = capsys.readouterr().out.splitlines()
    assert "the champion of pets was version 3 and is version 2" in out
    assert out[-1].split() == [
        "version",
        "2",
        "test/accuracy",
        "0.6000",
        "test/few_shot/accuracy",
        "0.6000",
    ]
    with pytest.raises(SystemExit) as stop:
        script.main("pets", to="3", home=tmp_path)
    assert str(stop.value.code).startswith("error: version 3 of pets was not champion before")


def test_minima_of_the_policy_are_parameters_of_the_run(judged, client):
    run, _ = judged(10, config=replace(CONFIG, min_accuracy=0.6))
    assert client.get_run(run.run_id).data.params["register.min_accuracy"] == "0.6"
    assert client.get_run(run.run_id).data.tags["decision_rule"] == "min_accuracy"

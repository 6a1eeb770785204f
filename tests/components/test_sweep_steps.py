from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlflow
import pytest
import torch
from kfp import dsl
from mlflow import MlflowClient

from components import tracking
from components.register_best import register_best
from components.summarise_sweep import summarise_sweep
from pipelines.sweep import differing_values
from shike_core.config import RegisterConfig
from shike_core.recipes import digits_lt, variant
from shike_core.sweep import NOTHING

BASE = digits_lt()
RECIPES = [BASE, variant(BASE, "no-dkt")]
GATE = asdict(RegisterConfig(model_name="swept"))


class Classifier(torch.nn.Module):
    """The smallest that takes images and gives probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3 * 8 * 8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.float().flatten(1)).softmax(1)


@dataclass
class Sweep:
    """A sweep's run and its trainings, as the steps before left them."""

    parent: tracking.TrackedRun
    children: dict[tuple[str, int], tracking.TrackedRun]

    def summarise(self, tmp_path: Path) -> tuple[str, str]:
        """The step; the sweep's run and the chosen one."""
        found = summarise_sweep.python_func(
            evaluated=[["of the", "last recipe"]],
            dataset="digits",
            recipes=[{"name": k, "values": v} for k, v in differing_values(RECIPES).items()],
            imbalance_factors=[20.0],
            seeds=[0.0, 1.0],
            page=dsl.HTML(uri=str(tmp_path / "page")),
        )
        return tuple(found)

    def status(self) -> str:
        return self.parent.client.get_run(self.parent.run_id).info.status


@pytest.fixture
def sweep(store, subset, monkeypatch) -> Sweep:
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-sweep")
    parent = tracking.open_run("digits-lt", "sweep")
    children = {}
    for recipe in RECIPES:
        for seed in (0, 1):
            run = tracking.open_training(subset, replace(recipe.train, seed=seed))
            run.client.log_metric(run.run_id, "test/accuracy", 0.5 + seed / 10)
            run.client.log_metric(run.run_id, "validation/accuracy", 0.1, step=0)
            children[recipe.name, seed] = run
    for (name, seed), value in zip(children, (0.6, 0.8, 0.7, 0.75), strict=True):
        run = children[name, seed]
        run.client.log_metric(run.run_id, "validation/accuracy", value, step=1)
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-other")
    other = tracking.open_training(subset, BASE.train)
    other.client.log_metric(other.run_id, "validation/accuracy", 1.0)
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-sweep")
    return Sweep(parent, children)


def test_the_means_of_this_sweeps_trainings_are_logged_in_its_run(sweep, tmp_path):
    parent, chosen = sweep.summarise(tmp_path)
    assert parent == sweep.parent.run_id
    assert chosen == sweep.children["digits-lt/no-dkt", 1].run_id
    data = MlflowClient().get_run(parent).data
    assert data.metrics["digits-lt/IF20/validation/accuracy_mean"] == pytest.approx(0.7)
    assert data.metrics["digits-lt/no-dkt/IF20/validation/accuracy_mean"] == pytest.approx(0.725)
    assert data.metrics["digits-lt/no-dkt/IF20/test/accuracy_mean"] == pytest.approx(0.55)
    assert data.metrics["digits-lt/no-dkt/IF20/test/accuracy_half_width"] > 0
    assert data.params["sweep.recipes"] == "digits-lt, digits-lt/no-dkt"
    assert data.tags["mlflow.runName"] == "sweep IF20 2 recipes 2 seeds"
    assert (data.tags["chosen_recipe"], data.tags["chosen_run"]) == ("digits-lt/no-dkt", chosen)
    stored = MlflowClient().download_artifacts(parent, "sweep/sweep.html", str(tmp_path))
    assert Path(stored).read_text() == (tmp_path / "page").read_text()


def test_a_summary_that_is_retried_says_the_same(sweep, tmp_path):
    assert sweep.summarise(tmp_path) == sweep.summarise(tmp_path)
    runs = MlflowClient().search_runs([sweep.parent.experiment_id], "tags.kind = 'sweep'")
    assert len(runs) == 1


def test_the_sweep_ends_with_the_registration_of_what_was_chosen(sweep, tmp_path):
    parent, chosen = sweep.summarise(tmp_path)
    assert sweep.status() == "RUNNING"
    run = tracking.attach(chosen)
    tracking.ModelExporter(run)(Classifier(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), tmp_path)
    out = tmp_path / "evaluation"
    out.mkdir()
    (out / "report.json").write_text(
        '{"test_digest": "t", "metrics": {"test/accuracy": 0.6}, "per_class": [], '
        '"export": {"weights_digest": "w"}}'
    )
    run.log_directory(out, "evaluation", "*.json")
    run.tag(weights_digest="w", test_digest="t")
    assert register_best.python_func(sweep_id=parent, chosen=chosen, **GATE) == "1"
    client = MlflowClient()
    version = client.get_model_version_by_alias("swept", "champion")
    assert (str(version.version), version.run_id) == ("1", chosen)
    assert client.get_run(parent).data.tags["registered_version"] == "1"
    assert sweep.status() == "FINISHED"
    assert register_best.python_func(sweep_id=parent, chosen=chosen, **GATE) == "1"
    assert len(client.search_model_versions("name = 'swept'")) == 1
    shown = tracking.sweep_summary(parent, tmp_path)
    assert "model     swept version 1, alias champion" in shown
    assert (tmp_path / "runs" / "kfp-sweep" / "sweep" / "sweep.html").is_file()


def test_nothing_is_registered_where_nothing_was_chosen(sweep, tmp_path, capsys):
    assert register_best.python_func(
        sweep_id=sweep.parent.run_id, chosen=NOTHING, **GATE
    ) == NOTHING  # fmt: skip
    assert MlflowClient().search_registered_models() == []
    assert "nothing is registered" in capsys.readouterr().out
    assert sweep.status() == "FINISHED"


def test_a_sweep_whose_registration_fails_does_not_count_as_finished(sweep, capsys):
    chosen = sweep.children["digits-lt", 0].run_id
    with pytest.raises(SystemExit) as stop:
        register_best.python_func(sweep_id=sweep.parent.run_id, chosen=chosen, **GATE)
    assert stop.value.code == 2
    assert f"error: run {chosen} has no model; evaluate first" in capsys.readouterr().err
    assert sweep.status() == "RUNNING"
    tracking.close_runs("FAILED")
    assert sweep.status() == "FAILED"


def test_runs_on_a_server_are_linked_without_the_password():
    before = mlflow.get_tracking_uri()
    try:
        mlflow.set_tracking_uri("http://me:secret@tracking.example/")
        page = tracking.page("7", "0a1b")
        mlflow.set_tracking_uri("sqlite:///mlflow.db")
        assert tracking.page("7", "0a1b") == ""
    finally:
        mlflow.set_tracking_uri(before)
    place = "?workflowType=machine_learning#/experiments/7/runs/0a1b"
    assert page == f"http://tracking.example/{place}"

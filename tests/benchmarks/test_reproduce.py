"""All experiments about a recipe by one command, on real digits on a CPU."""

import json
from pathlib import Path

import pytest

from benchmarks import reproduce
from benchmarks.runs import OUT_OF_TIME
from shike_core.recipes import recipe_named, variant

QUICK = ["--base", "digits-lt", "--device", "cpu", "--epochs", "2", "--seeds", "0"]
SMALL = ["--set", "width=2", "num_experts=2"]


def call(folder: Path, *more: str) -> int:
    return reproduce.main([str(folder), *QUICK, *more, *SMALL])


def recipes(folder: Path, name: str) -> dict:
    return json.loads((folder / "results" / "digits-lt" / f"{name}.json").read_text())["recipes"]


def test_out_of_time_it_goes_on_and_each_recipe_is_trained_once(tmp_path, capsys) -> None:
    only = ["--only", "headline", "quirks", "random"]
    assert call(tmp_path, *only, "--minutes", "0") == OUT_OF_TIME
    assert "Run the same command again" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
    assert call(tmp_path, *only) == 0
    tables = capsys.readouterr().out
    assert [line for line in tables.splitlines() if line.startswith("==")] == [
        f"== {name}: {reproduce.EXPERIMENTS[name].about}" for name in only[1:]
    ]
    headline, quirks, random = (recipes(tmp_path, name)["digits-lt"] for name in only[1:])
    # The same training, measured twice; its time would differ if it had been trained again.
    assert headline["seeds"][0]["seconds"]["training"] == quirks["seeds"][0]["seconds"]["training"]
    assert headline["subset_digest"] == quirks["subset_digest"] != random["subset_digest"]
    assert "| digits-lt/frozen-batch-norm |" in tables
    # Nothing is left to do, so no time is needed.
    assert call(tmp_path, *only, "--minutes", "0") == 0


def test_choosing_does_not_see_the_test_images(tmp_path) -> None:
    assert call(tmp_path, "--only", "beyond") == 0
    found = recipes(tmp_path, "beyond")
    assert list(found)[:2] == ["digits-lt", "digits-lt/averaged"]
    assert {result["split"] for result in found.values()} == {"validation"}
    info = json.loads(next(tmp_path.glob("*/subset/subset.json")).read_text())
    assert info["rule"]["validation_per_class"] == 50


def test_twice_the_epochs_are_trainings_of_their_own(tmp_path) -> None:
    assert call(tmp_path, "--only", "plus", "plus-long") == 0
    for name, epochs in (("plus", 2), ("plus-long", 4)):
        (base, plus) = recipes(tmp_path, name).values()
        assert base["seeds"][0]["curve"][-1]["epoch"] == epochs - 1
        assert plus["recipe"] == "digits-lt/shike-plus"
    times = reproduce.EXPERIMENTS["plus-long"].times
    assert times * recipe_named("cifar100-lt").train.epochs == 400


def test_every_variant_of_every_experiment_exists() -> None:
    base = recipe_named("cifar100-lt")
    for experiment in reproduce.EXPERIMENTS.values():
        for name in experiment.variants:
            if "=" not in name:
                assert variant(base, name).train != base.train


def test_a_training_that_fails_costs_only_its_own_recipe(tmp_path, monkeypatch, capsys) -> None:
    broken = reproduce.Experiment(about="diverges", variants=("stage1_learning_rate=1e30",))
    monkeypatch.setitem(reproduce.EXPERIMENTS, "precision", broken)
    assert call(tmp_path, "--only", "precision", "imbalance-10") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: precision: digits-lt/stage1_learning_rate=1e30: the loss is")
    assert list(recipes(tmp_path, "precision")) == ["digits-lt"]
    assert list(recipes(tmp_path, "imbalance-10")) == ["digits-lt"]


def test_a_subset_of_another_rule_is_one_line_and_nothing_is_trained(tmp_path, capsys) -> None:
    other = reproduce.with_subset(tmp_path, reproduce.EXPERIMENTS["random"], "digits-lt", None)
    other.rename(tmp_path / "digits-lt")
    assert call(tmp_path, "--only", "imbalance-10", "headline") == 2
    error = capsys.readouterr().err
    assert "holds a subset of another rule (selection); give another folder" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("work"))


def test_files_that_are_not_there_are_told_once(tmp_path, capsys) -> None:
    place = ["--base", "imagenet-lt", "--device", "cpu", "--data-dir", str(tmp_path / "nothing")]
    assert reproduce.main([str(tmp_path / "out"), *place]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "digits"], "unknown recipe 'digits'"),
        (["--set", "widht=3"], "'widht=3' is no FIELD=VALUE"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message, tmp_path, capsys) -> None:
    assert reproduce.main([str(tmp_path), *QUICK, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())

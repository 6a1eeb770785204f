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
    return json.loads((folder / "results" / f"{name}.json").read_text())["recipes"]


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


def test_every_variant_of_every_experiment_exists() -> None:
    base = recipe_named("cifar100-lt")
    for experiment in reproduce.EXPERIMENTS.values():
        for name in experiment.variants:
            if "=" not in name:
                assert variant(base, name).train != base.train


def test_an_experiment_that_fails_costs_only_itself(tmp_path, capsys) -> None:
    # A place that holds another subset than the one that the experiment needs.
    other = reproduce.with_subset(tmp_path, reproduce.EXPERIMENTS["random"], "digits-lt", None)
    other.rename(tmp_path / "digits-lt")
    assert call(tmp_path, "--only", "headline", "imbalance-10") == 2
    error = capsys.readouterr().err
    assert "headline failed" in error
    assert "holds a subset of another rule (selection); give another folder" in error
    assert "error: headline failed, see above; the others were made" in error
    assert list(recipes(tmp_path, "imbalance-10")) == ["digits-lt"]


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

"""Several seeds of a recipe, and recipes against each other, on real digits on a CPU."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from benchmarks import compare_recipes, gpu_headline
from benchmarks.compare_recipes import difference
from benchmarks.runs import (
    OUT_OF_TIME,
    Job,
    _Run,
    _train,
    line_per_range,
    machine,
    with_changes,
    with_epochs,
)
from shike_core import checkpoint as checkpoints
from shike_core import stages
from shike_core.config import SubsetConfig, TrainConfig
from shike_core.environment import CPU_SETTINGS
from shike_core.errors import DivergedError
from shike_core.recipes import RECIPES, recipe_named

QUICK = ["--device", "cpu", "--epochs", "2", "--seeds", "0", "1", "--print-every", "1"]
SMALL = ["--set", "width=2", "num_experts=2"]


@pytest.fixture(scope="module")
def subset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("subset")
    rule = SubsetConfig(dataset="digits", imbalance_factor=20, validation_per_class=5)
    stages.build_subset(rule, None, path, lambda metrics, step: None)
    return path


@pytest.mark.parametrize("users", [{}, dict.fromkeys(CPU_SETTINGS, "7")])
def test_the_processors_settings_are_there_before_torch_is(process_environment, users) -> None:
    environment = {k: v for k, v in process_environment().items() if k not in CPU_SETTINGS}
    seen = subprocess.run(
        [sys.executable, "-c", "import json, os, sys, benchmarks\n"
         "print(json.dumps(['torch' in sys.modules, dict(os.environ)]))"],
        env=environment | users, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    loaded, found = json.loads(seen.stdout)
    assert not loaded
    assert {name: found[name] for name in CPU_SETTINGS} == CPU_SETTINGS | users


def headline(subset: Path, directory: Path, *more: str, recipe: str = "digits-lt") -> int:
    return gpu_headline.main(
        [str(subset), "--recipe", recipe, *QUICK, "--work", str(directory / "work"),
         "--out", str(directory / "out.json"), *more, *SMALL]
    )  # fmt: skip


def without_times(path: Path) -> list[dict]:
    runs = json.loads(path.read_text())["seeds"]
    return [{key: value for key, value in run.items() if key != "seconds"} for run in runs]


def test_the_file_says_what_the_module_promises(subset, tmp_path, capsys) -> None:
    assert headline(subset, tmp_path, "--curve") == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert {
        "device", "recipe", "config", "versions", "commit", "seconds_per_run", "compile_seconds",
        "peak_memory_bytes", "seeds", "accuracy_mean", "accuracy_std", "subset_digest",
        "test_digest", "side_by_side", "split",
    } == report.keys()  # fmt: skip
    assert report["recipe"] == "digits-lt"
    assert report["subset_digest"] == json.loads((subset / "subset.json").read_text())["digest"]
    assert report["versions"]["torch"]
    assert 2**27 < report["peak_memory_bytes"] < 2**36
    assert [run["seed"] for run in report["seeds"]] == [0, 1]
    accuracies = [run["test_accuracy"] for run in report["seeds"]]
    assert all(0 < accuracy < 1 for accuracy in accuracies)
    assert report["accuracy_mean"] == pytest.approx(sum(accuracies) / 2)
    assert report["accuracy_std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    for run in report["seeds"]:
        assert len(run["experts"]) == 2
        assert set(run["shot_groups"]) <= {"many_shot", "medium_shot", "few_shot"}
        assert 0 <= run["expected_calibration_error"] <= 1
        assert 0 <= run["flip_accuracy"] <= 1
        assert run["seconds"]["training"] == pytest.approx(
            run["seconds"]["stage1"] + run["seconds"]["stage2"]
        )
        assert run["seconds"]["evaluation"] > 0
        # What was watched at the end is what was measured.
        assert run["curve"][-1]["test/accuracy"] == pytest.approx(run["test_accuracy"])
    printed = capsys.readouterr().out
    assert "digits-lt seed 1: epochs 1-1  loss" in printed
    assert "s a run (compiling 0.0 s)" in printed


def test_out_of_time_it_stops_and_the_same_command_goes_on(subset, tmp_path, capsys) -> None:
    calls = [headline(subset, tmp_path / "cut", "--minutes", "0")]
    assert calls == [OUT_OF_TIME]
    assert "Run the same command again to go on from there" in capsys.readouterr().err
    assert not (tmp_path / "cut" / "out.json").exists()
    assert list((tmp_path / "cut").rglob("checkpoint.pt"))
    assert headline(subset, tmp_path / "cut") == 0
    assert headline(subset, tmp_path / "whole") == 0
    assert without_times(tmp_path / "cut" / "out.json") == without_times(
        tmp_path / "whole" / "out.json"
    )


def test_seconds_are_shared_as_the_epochs_were_trained(subset, tmp_path) -> None:
    """Measured again by another call, with other seeds, on another machine."""
    assert headline(subset, tmp_path, "--seeds", "0") == 0
    path = next(tmp_path.rglob("checkpoint.pt"))
    state = checkpoints.load(path)
    gibi = {"device": "cuda", "acceleration": "compile", "peak_memory_bytes": 2**40}
    state.costs = [
        gibi | {"trainings": 3, "preparation_seconds": 5.0, "fallbacks": ["no compiler"]},
        gibi | {"trainings": 1, "preparation_seconds": 0.5, "fallbacks": []},
    ]
    checkpoints.save(state, path)
    assert headline(subset, tmp_path) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    first, second = report["seeds"]
    alone = first["seconds"]["stage1"] / 3 + first["seconds"]["stage2"]
    assert report["seconds_per_run"] == pytest.approx((alone + second["seconds"]["training"]) / 2)
    assert report["side_by_side"] == 3
    assert report["compile_seconds"] == pytest.approx(5.5)
    assert report["peak_memory_bytes"] == 2**40
    assert (first["device"], first["acceleration"]) == ("cuda", "compile")
    assert first["fallbacks"] == ["no compiler"]
    assert (second["device"], second["acceleration"], second["fallbacks"]) == ("cpu", "none", [])
    assert "costs" not in first


def test_a_checkpoint_from_before_costs_were_kept_is_measured(subset, tmp_path) -> None:
    assert headline(subset, tmp_path, "--seeds", "0") == 0
    path = next(tmp_path.rglob("checkpoint.pt"))
    state = checkpoints.load(path)
    state.costs = [{} for _ in state.costs]
    checkpoints.save(state, path)
    assert headline(subset, tmp_path, "--seeds", "0") == 0
    report = json.loads((tmp_path / "out.json").read_text())
    (run,) = report["seeds"]
    assert report["seconds_per_run"] == pytest.approx(run["seconds"]["training"])
    assert (run["device"], report["side_by_side"]) == ("cpu", 1)


def test_a_machine_without_git_has_no_commit(monkeypatch) -> None:
    assert machine("cpu")["commit"]
    monkeypatch.setenv("PATH", "/nowhere")
    found = machine("cpu")
    assert found["commit"] is None
    assert found["versions"]["torch"]


def test_a_finished_job_is_only_measured_again(subset, tmp_path) -> None:
    assert headline(subset, tmp_path) == 0
    before = without_times(tmp_path / "out.json")
    assert headline(subset, tmp_path, "--minutes", "0") == 0
    assert without_times(tmp_path / "out.json") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "cifar1000-lt"], "unknown recipe 'cifar1000-lt'"),
        (["--set", "widht=3"], "'widht=3' is no FIELD=VALUE"),
        (["--set", "width=0"], "width must be at least 1"),
        (["--seeds", "0", "1", "0"], "--seeds 0 1 0 repeats one"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message, subset, tmp_path, capsys) -> None:
    paths = ["--work", str(tmp_path), "--out", str(tmp_path / "out.json")]
    assert gpu_headline.main([str(subset), *QUICK, *paths, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_subset_is_one_line(tmp_path, capsys) -> None:
    assert headline(tmp_path / "nothing", tmp_path) == 2
    assert capsys.readouterr().err.startswith("error: ")


# ---- recipes against each other


def compare(subset: Path, directory: Path, *more: str) -> int:
    return compare_recipes.main(
        [str(subset), "--base", "digits-lt", *QUICK, "--work", str(directory / "work"),
         "--out", str(directory / "out.json"), *more, *SMALL]
    )  # fmt: skip


def test_recipes_are_compared_pair_by_pair(subset, tmp_path, capsys) -> None:
    assert compare(subset, tmp_path, "--variants", "no-dkt") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("|")]
    assert rows[0][1:4] == ["recipe", "accuracy", "- base (95 %)"]
    results = json.loads((tmp_path / "out.json").read_text())["recipes"]
    assert [row[1] for row in rows[2:]] == list(results) == ["digits-lt", "digits-lt/no-dkt"]
    base, other = ([run["test_accuracy"] for run in r["seeds"]] for r in results.values())
    mean, half = difference(other, base)
    assert rows[3][3] == f"{100 * mean:+.1f} ± {100 * half:.1f}"
    assert rows[2][3] == ""


def test_what_was_compared_before_is_kept(subset, tmp_path, capsys) -> None:
    assert compare(subset, tmp_path) == 0
    first = json.loads((tmp_path / "out.json").read_text())["recipes"]["digits-lt"]
    assert compare(subset, tmp_path, "--variants", "no-mutual") == 0
    both = json.loads((tmp_path / "out.json").read_text())["recipes"]
    assert both["digits-lt"] == first
    assert set(both) == {"digits-lt", "digits-lt/no-mutual"}
    capsys.readouterr()
    assert compare(subset, tmp_path, "--seeds", "4") == 2
    assert "other seeds; give another file" in capsys.readouterr().err
    assert compare(subset, tmp_path, "--split", "validation") == 2
    assert compare(subset, tmp_path, "--epochs", "3") == 2
    assert capsys.readouterr().err.count("of another subset, split or configuration") == 2
    # What is not asked for now stands in the same table.
    assert compare(subset, tmp_path, "--base", "digits-lt/no-dkt", "--seeds", "0") == 2
    assert "digits-lt of another subset, split or configuration" in capsys.readouterr().err
    (tmp_path / "out.json").write_text("{")
    assert compare(subset, tmp_path) == 2
    assert "is not a file of this script" in capsys.readouterr().err


def test_a_variant_may_be_several_things_at_once(subset, tmp_path) -> None:
    change = "smoothed+no-mutual+weight_decay=0.01"
    assert compare(subset, tmp_path, "--variants", change) == 0
    results = json.loads((tmp_path / "out.json").read_text())["recipes"]
    base, changed = (r["config"] for r in results.values())
    assert list(results) == ["digits-lt", f"digits-lt/{change}"]
    assert {name for name in base if base[name] != changed[name]} == {
        "stage2_label_smoothing", "mutual_weight", "weight_decay",
    }  # fmt: skip
    assert changed["weight_decay"] == 0.01
    assert changed["mutual_weight"] == 0.0
    # Under the same name it is found again, and not trained.
    assert compare(subset, tmp_path, "--variants", change, "--minutes", "0") == 0


def test_variants_of_stage_2_go_on_from_the_stage_1_of_the_base(subset, tmp_path) -> None:
    def compared(directory: Path, base: str, *variants: str) -> dict[str, list[dict]]:
        code = compare_recipes.main(
            [str(subset), "--base", base, "--variants", *variants, *QUICK,
             "--work", str(directory / "work"), "--out", str(directory / "out.json"),
             *SMALL, "stage1_epochs=1", "stage2_epochs=17"]
        )  # fmt: skip
        assert code == 0
        results = json.loads((directory / "out.json").read_text())["recipes"]
        return {name.partition("/")[2]: result["seeds"] for name, result in results.items()}

    def what(runs: list[dict], *keys: str) -> list[list]:
        return [[run[key] for key in keys] for run in runs]

    found = compared(tmp_path, "digits-lt", "logit-adjusted", "smoothed+logit-adjusted", "no-dkt")
    seconds = {name: [run["seconds"]["stage1"] for run in runs] for name, runs in found.items()}
    assert seconds[""] == seconds["logit-adjusted"] == seconds["smoothed+logit-adjusted"]
    assert seconds[""] != seconds["no-dkt"]
    # The same as trained alone.
    alone = compared(tmp_path / "alone", "digits-lt/logit-adjusted", "no-mutual")
    keys = "test_accuracy", "experts", "training_digest"
    assert what(alone["logit-adjusted"], *keys) == what(found["logit-adjusted"], *keys)
    assert what(found[""], *keys) != what(found["logit-adjusted"], *keys)


@pytest.mark.parametrize("change", ["smoothe", "no-dkt+widht=3", "width=0"])
def test_a_wrong_variant_is_one_line(change, subset, tmp_path, capsys) -> None:
    assert compare(subset, tmp_path, "--variants", change) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out.json").exists()


def test_a_training_that_fails_costs_only_its_own_recipe(subset, tmp_path, capsys) -> None:
    broken = "stage1_learning_rate=1e30"
    assert compare(subset, tmp_path, "--variants", broken, "no-dkt") == 2
    shown = capsys.readouterr()
    assert list(json.loads((tmp_path / "out.json").read_text())["recipes"]) == [
        "digits-lt", "digits-lt/no-dkt",
    ]  # fmt: skip
    assert f"digits-lt/{broken}: the loss is not finite" in shown.err
    assert "| digits-lt/no-dkt |" in shown.out


def test_of_trainings_side_by_side_those_that_end_are_measured(subset, tmp_path) -> None:
    config = replace(recipe_named("digits-lt").train, stage1_epochs=1, stage2_epochs=1, width=2,
                     warmup_epochs=1, device="cpu")  # fmt: skip
    sound = Job(name="sound", config=config, seeds=[0], subset=subset, work=tmp_path)
    broken = replace(sound, name="broken", config=replace(config, stage1_warmup_start=1e30))
    runs = [_Run(job, 0) for job in (broken, sound)]
    assert isinstance(_train(runs, sound), DivergedError)
    assert [bool(run.report) for run in runs] == [False, True]
    assert isinstance(_train([_Run(broken, 0)], sound), DivergedError)


def test_time_that_is_up_is_up_for_those_after_a_finished_one(subset, tmp_path, capsys) -> None:
    assert headline(subset, tmp_path, "--seeds", "0") == 0
    assert headline(subset, tmp_path, "--minutes", "0") == OUT_OF_TIME
    assert "stopped by signal 15 at epoch" in capsys.readouterr().err


def test_there_must_be_images_of_the_split(tmp_path, capsys) -> None:
    rule = SubsetConfig(dataset="digits", imbalance_factor=20, validation_per_class=0)
    stages.build_subset(rule, None, tmp_path / "subset", lambda metrics, step: None)
    assert compare(tmp_path / "subset", tmp_path, "--split", "validation") == 2
    assert "holds no validation images; build it with --validation-" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_choosing_among_recipes_does_not_see_the_test_images(subset, tmp_path) -> None:
    assert compare(subset, tmp_path, "--split", "validation") == 0
    report = json.loads((tmp_path / "out.json").read_text())["recipes"]["digits-lt"]
    assert report["split"] == "validation"
    for run in report["seeds"]:
        assert "test_accuracy" not in run
        assert run["accuracy"] == pytest.approx(run["curve"][-1]["validation/accuracy"])


def test_the_interval_by_hand() -> None:
    assert difference([0.5, 0.6], [0.4, 0.3]) == (
        pytest.approx(0.2),
        pytest.approx(12.706 * 0.1),  # differences 0.1 and 0.3: standard error 0.1
    )
    assert difference([0.5], [0.4]) == (pytest.approx(0.1), None)


@pytest.mark.parametrize("seeds", [3, 12])
def test_the_interval_of_many_seeds_is_that_of_the_t_test(seeds) -> None:
    ours, theirs = np.random.default_rng(0).normal(size=(2, seeds))
    interval = ttest_rel(ours, theirs).confidence_interval(0.95)
    half = (interval.high - interval.low) / 2
    assert difference(ours, theirs) == pytest.approx(((ours - theirs).mean(), half), rel=1e-3)


# ---- arguments


def test_epochs_keep_their_proportions() -> None:
    whole = replace(TrainConfig(), averaging_epochs=5.0)
    short = with_epochs(whole, 40)
    assert (short.stage1_epochs, short.stage2_epochs, short.warmup_epochs) == (36, 4, 2)
    assert short.averaging_epochs == 1.0
    longer = with_epochs(whole, 400)
    assert (longer.stage1_epochs, longer.stage2_epochs, longer.warmup_epochs) == (360, 40, 5)
    assert with_epochs(whole, 100).warmup_epochs == whole.warmup_epochs
    assert with_epochs(replace(whole, stage2_epochs=0), 40).warmup_epochs == short.warmup_epochs
    assert (with_epochs(whole, 2).stage2_epochs, with_epochs(whole, 2).warmup_epochs) == (1, 0)
    assert with_epochs(replace(whole, stage2_epochs=0), 2).stage2_epochs == 0
    for recipe in map(recipe_named, RECIPES):
        assert with_epochs(recipe.train, recipe.train.epochs) == recipe.train


def test_changes_of_every_kind() -> None:
    texts = ["batch_size=64", "scale=20.5", "flip=False", "precision=bfloat16"]
    changed = with_changes(TrainConfig(), texts)
    assert changed == replace(
        TrainConfig(), batch_size=64, scale=20.5, flip=False, precision="bfloat16"
    )


def test_a_line_stands_for_a_range_of_epochs(capsys) -> None:
    log = line_per_range("it", 2)
    metrics = {"train/loss": 1.0, "train/accuracy": 0.5, "lr": 0.1, "train/images_per_second": 9.0}
    for epoch in range(5):
        log(metrics | {"validation/accuracy": 0.25}, epoch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines] == ["it: epochs 0-1", "it: epochs 2-3"]
    assert lines[0].endswith("9 images/s  validation/accuracy 0.2500")

import csv
import json
import math
import re
from html.parser import HTMLParser

import pytest

from shike_core import sweep
from shike_core.errors import ArtifactError

BASE, PLAIN = "digits-lt", "digits-lt/no-dkt"
VALUES = {BASE: {"dkt_weight": 1.0, "fusion": True}, PLAIN: {"dkt_weight": 0.0, "fusion": False}}
RECIPES = [{"name": name, "values": values} for name, values in VALUES.items()]


def run(
    recipe: str, seed: int, validation: float | None, factor: float = 20.0, **more
) -> dict[str, object]:
    metrics = {"test/accuracy": 0.5 + seed / 100, "lr": 0.1}
    if validation is not None:
        metrics["validation/accuracy"] = validation
    values = {f"train.{key}": str(value) for key, value in VALUES[recipe].items()}
    return {
        "run_id": f"{recipe}-{factor:g}-{seed}",
        "page": "",
        "status": "FINISHED",
        "params": values | {"train.seed": str(seed), "subset.imbalance_factor": str(factor)},
        "metrics": metrics,
    } | more


def runs(
    base: list[float | None], plain: list[float | None], factor: float = 20.0
) -> list[dict[str, object]]:
    return [
        run(name, seed, value, factor)
        for name, values in ((BASE, base), (PLAIN, plain))
        for seed, value in enumerate(values)
    ]


def choice(base: list[float | None], plain: list[float | None]) -> dict:
    seeds = range(len(base))
    return sweep.summarise(RECIPES, [20.0], list(seeds), runs(base, plain))["choice"]


# --- means -----------------------------------------------------------------------------------


def test_spread_of_three_values_worked_by_hand():
    found = sweep.spread([0.5, 0.6, 0.7])
    assert (found.n, found.mean, found.std) == (3, pytest.approx(0.6), pytest.approx(0.1))
    # Student's t for two degrees of freedom is 4.3027 at 97.5 %.
    assert found.half_width == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)


def test_one_value_has_no_spread():
    assert sweep.spread([0.5]) == sweep.Spread(1, 0.5, None, None)


def test_a_row_for_each_imbalance_and_recipe_in_the_order_asked_for():
    logged = runs([0.6, 0.8], [0.5, 0.5]) + runs([0.4, 0.4], [0.3, 0.3], factor=100.0)
    report = sweep.summarise(RECIPES, [100.0, 20.0], [0, 1], logged)
    assert [(row["imbalance_factor"], row["recipe"]) for row in report["rows"]] == [
        (100.0, BASE), (100.0, PLAIN), (20.0, BASE), (20.0, PLAIN),
    ]  # fmt: skip
    known = report["rows"][2]["metrics"]
    assert known["validation/accuracy"]["mean"] == pytest.approx(0.7)
    assert known["test/accuracy"]["mean"] == pytest.approx(0.505)
    assert set(known) == {"validation/accuracy", "test/accuracy"}
    metrics = sweep.means(report)
    assert metrics["digits-lt/no-dkt/IF100/validation/accuracy_mean"] == pytest.approx(0.3)
    assert metrics["digits-lt/IF20/validation/accuracy_std"] == pytest.approx(0.1 * math.sqrt(2))
    assert metrics["digits-lt/IF20/validation/accuracy_half_width"] > 0
    assert len(metrics) == 4 * 2 * 3


def test_metrics_of_one_seed_have_no_standard_deviation():
    metrics = sweep.means(sweep.summarise(RECIPES, [20.0], [0], runs([0.6], [0.5])))
    assert metrics
    assert all(key.endswith("_mean") for key in metrics)


# --- which run is which ----------------------------------------------------------------------


def test_a_platform_may_have_made_floats_of_integers():
    recipes = [{"name": "few", "values": {"num_experts": 2.0}}]
    params = {"train.num_experts": "2", "train.seed": "1", "subset.imbalance_factor": "20"}
    logged = [run(BASE, 1, 0.5, params=params)]
    (trial,) = sweep.summarise(recipes, [20.0], [1.0], logged)["trials"]
    assert (trial["seed"], trial["run_id"]) == (1, "digits-lt-20-1")


def test_a_training_that_failed_or_never_began_is_named_and_in_no_mean():
    logged = runs([0.6, 0.8], [0.5])
    logged[1] |= {"status": "FAILED", "metrics": {"validation/accuracy": 0.9}}
    report = sweep.summarise(RECIPES, [20.0], [0, 1], logged)
    states = [(x["recipe"], x["seed"], x["state"]) for x in report["trials"]]
    assert states == [
        (BASE, 0, "done"), (BASE, 1, "failed"), (PLAIN, 0, "done"), (PLAIN, 1, "missing"),
    ]  # fmt: skip
    assert [row["metrics"]["validation/accuracy"]["n"] for row in report["rows"]] == [1, 1]


def test_the_run_that_has_results_counts_if_a_training_has_two():
    first = run(BASE, 0, 0.5, status="FAILED", metrics={})
    second = run(BASE, 0, 0.6, run_id="again")
    report = sweep.summarise(RECIPES[:1], [20.0], [0], [first, second])
    assert report["trials"][0]["run_id"] == "again"


def test_what_is_named_twice_counts_once():
    report = sweep.summarise(RECIPES, [20.0, 20.0], [0, 0.0], runs([0.6], [0.5]))
    assert len(report["trials"]) == 2


def test_a_sweep_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"no training: give .* one of sweep_seeds"):
        sweep.summarise(RECIPES, [20.0], [], [])


# --- the choice ------------------------------------------------------------------------------


def test_the_recipe_with_the_highest_mean_validation_accuracy_is_chosen_and_its_best_run():
    found = choice([0.5, 0.9, 0.7], [0.75, 0.8, 0.75])
    assert (found["recipe"], found["run_id"]) == (PLAIN, "digits-lt/no-dkt-20-1")
    assert "76.7 % over 3 seeds" in found["reasons"][0]
    assert "6.7 points ahead of digits-lt" in found["reasons"][1]
    assert found["reasons"][1].endswith("chance may explain it.")


def test_a_lead_that_every_seed_shows_is_not_called_chance():
    found = choice([0.5, 0.6, 0.7], [0.70, 0.81, 0.90])
    assert found["reasons"][1].endswith("seed by seed.")


def test_the_test_set_does_not_choose():
    logged = runs([0.6, 0.6], [0.5, 0.5])
    for entry in logged[2:]:
        entry["metrics"]["test/accuracy"] = 0.99
    assert sweep.summarise(RECIPES, [20.0], [0, 1], logged)["choice"]["recipe"] == BASE


def test_equal_recipes_and_equal_seeds_go_to_the_first():
    found = choice([0.5, 0.5], [0.5, 0.5])
    assert (found["recipe"], found["run_id"]) == (BASE, "digits-lt-20-0")


def test_the_first_imbalance_factor_decides():
    logged = runs([0.6, 0.6], [0.5, 0.5]) + runs([0.1, 0.1], [0.9, 0.9], factor=100.0)
    at = {f: sweep.summarise(RECIPES, f, [0, 1], logged)["choice"] for f in ((20, 100), (100, 20))}
    assert [found["recipe"] for found in at.values()] == [BASE, PLAIN]
    assert at[100, 20]["run_id"] == "digits-lt/no-dkt-100-0"


def test_a_recipe_without_all_its_seeds_is_not_compared():
    report = sweep.summarise(RECIPES, [20.0], [0, 1], runs([0.5, 0.6], [0.9]))
    assert report["choice"]["recipe"] == BASE
    assert report["choice"]["reasons"][-1].startswith("digits-lt/no-dkt lacks the result of a seed")


def test_nothing_is_chosen_without_a_validation_part():
    found = choice([None, None], [None, None])
    assert (found["recipe"], found["run_id"]) == ("", sweep.NOTHING)
    assert "sweep_validation_per_class more than 0" in found["reasons"][0]


def test_nothing_is_chosen_if_every_recipe_lacks_a_seed():
    report = sweep.summarise(RECIPES, [20.0], [0, 1], runs([0.5], [0.9]))
    assert report["choice"]["run_id"] == sweep.NOTHING


# --- what is written -------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs) -> None:
        given = dict(attrs)
        assert tag not in ("script", "link", "img"), "the page is self-contained"
        self.links += [given["href"]] if "href" in given else []
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text.append(data)


@pytest.fixture
def report() -> dict:
    logged = runs([0.6, 0.8], [0.5, 0.5]) + runs([0.4, 0.4], [0.3], factor=100.0)
    logged[0]["page"] = "http://tracking.example/#/runs/a?x=1&y=2"
    return sweep.summarise(RECIPES, [20.0, 100.0], [0, 1], logged)


def test_the_page_says_what_was_chosen_what_came_out_and_what_is_missing(report, tmp_path):
    sweep.write_summary(report, tmp_path)
    page = Page((tmp_path / "sweep.html").read_text())
    assert page.open == []
    text = re.sub(r"\s+", " ", " ".join(page.text))
    assert "Sweep: 2 recipes, 2 seeds" in text
    assert "Chosen: digits-lt " in text
    assert report["choice"]["run_id"] == "digits-lt-20-1"
    for reason in report["choice"]["reasons"]:
        assert reason in text
    assert "did not look at the test set" in text
    assert "only at the first imbalance factor" in text
    assert "70.0 \N{PLUS-MINUS SIGN} 14.1" in text
    assert "0.0 to 100.0" in text  # of two seeds that far apart, cut off at what can be
    assert "1 of 8 gave no result" in text
    assert "missing" in text
    assert page.links == ["http://tracking.example/#/runs/a?x=1&y=2"]
    assert "nan" not in text
    assert "None" not in text


def test_the_page_of_a_sweep_that_chose_nothing(tmp_path):
    report = sweep.summarise(RECIPES[:1], [20.0], [3], [])
    sweep.write_summary(report, tmp_path)
    text = re.sub(r"\s+", " ", " ".join(Page((tmp_path / "sweep.html").read_text()).text))
    assert "Sweep: 1 recipe, 1 seed " in text
    assert "Nothing chosen" in text
    assert "0 of 1 trainings done" in text
    assert "none" not in text.rpartition("Sweep: 1 recipe")[2]  # before it stands the style


def test_names_are_escaped(tmp_path):
    recipes = [{"name": "<b>&", "values": {}}]
    sweep.write_summary(sweep.summarise(recipes, [20.0], [0], []), tmp_path)
    assert "<b>" not in (tmp_path / "sweep.html").read_text()


def test_json_and_csv_hold_the_table(report, tmp_path):
    sweep.write_summary(report, tmp_path)
    assert json.loads((tmp_path / "sweep.json").read_text()) == report
    with (tmp_path / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4 * 2
    assert table[0] | {"std": ""} == {
        "imbalance_factor": "20.0", "recipe": BASE, "metric": "validation/accuracy", "n": "2",
        "mean": table[0]["mean"], "std": "", "half_width": table[0]["half_width"],
    }  # fmt: skip
    assert float(table[0]["mean"]) == pytest.approx(0.7)
    one = [row for row in table if row["n"] == "1"]
    assert one
    assert all(row["std"] == row["half_width"] == "" for row in one)


def test_a_folder_that_is_a_file_is_an_error_for_people(report, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        sweep.write_summary(report, tmp_path / "file")


def test_the_table_for_a_terminal(report):
    lines = sweep.as_text(report).splitlines()
    assert "imbalance factor 20, mean +- standard deviation, %" in lines
    rows = [line.split() for line in lines if line.startswith(BASE)]
    assert rows[0][:4] == [BASE, "2/2", "70.0", "+-14.1"]
    assert rows[3][:3] == [PLAIN, "1/2", "30.0"]
    assert lines[-len(report["choice"]["reasons"]) :] == report["choice"]["reasons"]

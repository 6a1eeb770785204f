"""A sweep: its trainings as a table, the recipe that is best by validation, and a page for people.

Every figure is a fraction here and a percentage on the page.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from shike_core.files import atomic_write
from shike_core.pages import percent, write_page

NOTHING = "none"
"""Stands for the run that was chosen where there is none."""
VALIDATION = "validation/accuracy"
TEST = "test/accuracy"
COLUMNS = {
    VALIDATION: "Validation",
    TEST: "Test",
    "test/many_shot/accuracy": "Many",
    "test/medium_shot/accuracy": "Medium",
    "test/few_shot/accuracy": "Few",
    "test/expected_calibration_error": "ECE",
}
"""Metrics in the table and what they are called there."""

Recipes = Mapping[str, Mapping[str, Any]]
"""Names of recipes, each with the values by which its training differs from the others."""


# --- the trainings ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One training that was asked for, and what came of it."""

    recipe: str
    imbalance_factor: float
    seed: int
    run_id: str
    """Empty if it never began."""
    page: str
    """Address of the run's page, or empty."""
    state: str
    """``done``, ``missing``, or how a run without test metrics stands."""
    metrics: dict[str, float]
    """Those of `COLUMNS` that are known."""


def trials(
    recipes: Recipes,
    imbalance_factors: Sequence[float],
    seeds: Sequence[float],
    runs: Sequence[Mapping[str, Any]],
) -> list[Trial]:
    """Find the run of every training that was asked for.

    Args:
        recipes: that were trained.
        imbalance_factors: of the subsets.
        seeds: of the trainings; a platform may have made floats of them.
        runs: ``run_id``, ``page``, ``status``, ``params`` (texts, with the fields of the
            configurations after ``train.`` and ``subset.``) and ``metrics`` of the runs there are.
    """
    return [
        _trial(name, values, float(factor), int(seed), runs)
        for factor in dict.fromkeys(imbalance_factors)
        for name, values in recipes.items()
        for seed in dict.fromkeys(seeds)
    ]


def _trial(
    name: str,
    values: Mapping[str, Any],
    factor: float,
    seed: int,
    runs: Sequence[Mapping[str, Any]],
) -> Trial:
    wanted = {f"train.{field}": value for field, value in values.items()}
    wanted |= {"train.seed": seed, "subset.imbalance_factor": factor}
    found = [
        run
        for run in runs
        if all(_same(run["params"].get(key, ""), value) for key, value in wanted.items())
    ]
    if not found:
        return Trial(name, factor, seed, "", "", "missing", {})
    run = max(found, key=lambda run: TEST in run["metrics"])
    state = "done" if TEST in run["metrics"] else run["status"].lower()
    metrics = {key: run["metrics"][key] for key in COLUMNS if key in run["metrics"]}
    return Trial(name, factor, seed, run["run_id"], run["page"], state, metrics)


def _same(text: str, value: object) -> bool:
    """Whether a value was logged as this text; 5 and 5.0 are the same."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text == str(value)
    try:
        return math.isclose(float(text), value, rel_tol=1e-12)
    except ValueError:
        return False


# --- their means -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Mean and spread of a figure over seeds."""

    n: int
    mean: float
    std: float | None
    """Standard deviation of one training, by n - 1; None for a single one."""
    half_width: float | None
    """The mean's 95 % interval by Student's t reaches so far to both sides; None as above."""


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and 95 % interval of figures from different seeds."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return Spread(n, fmean(values), None, None)
    deviation = stdev(values)
    half_width = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Spread(n, fmean(values), deviation, half_width)


def rows(found: Sequence[Trial]) -> list[dict[str, Any]]:
    """A row for each imbalance factor and recipe: the spread of every metric that is known."""
    table = []
    for factor, name in dict.fromkeys((x.imbalance_factor, x.recipe) for x in found):
        mine = [x for x in found if (x.imbalance_factor, x.recipe) == (factor, name)]
        known = [x.metrics for x in mine if x.state == "done"]
        values = {key: [m[key] for m in known if key in m] for key in COLUMNS}
        table.append(
            {
                "imbalance_factor": factor,
                "recipe": name,
                "asked": len(mine),
                "done": len(known),
                "metrics": {k: asdict(spread(v)) for k, v in values.items() if v},
            }
        )
    return table


# --- the choice ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The training whose model is registered, and why."""

    recipe: str
    run_id: str
    """`NOTHING` if none was chosen."""
    reasons: list[str]
    """Sentences; the first says what was chosen."""


def choose(found: Sequence[Trial]) -> Choice:
    """Choose by validation, never by the test set.

    The recipe with the highest mean validation accuracy at the first imbalance factor wins; of
    equals the one named first. Of its trainings the one with the highest validation accuracy is
    taken; of equals the one with the lowest seed. A recipe that lacks a seed cannot be compared.
    """
    factor = found[0].imbalance_factor
    at_factor = [x for x in found if x.imbalance_factor == factor]
    where = f"at imbalance factor {factor:g}"
    if not any(VALIDATION in x.metrics for x in at_factor):
        return Choice(
            "",
            NOTHING,
            [
                f"Nothing was chosen: no training {where} has a validation accuracy, and the test "
                "set must not choose. Give sweep_validation_per_class more than 0."
            ],
        )
    by_recipe: dict[str, list[Trial]] = {}
    for trial in at_factor:
        by_recipe.setdefault(trial.recipe, []).append(trial)
    whole = {
        name: [x.metrics[VALIDATION] for x in mine]
        for name, mine in by_recipe.items()
        if all(x.state == "done" and VALIDATION in x.metrics for x in mine)
    }
    left_out = [
        f"{name} lacks the result of a seed {where} and was not compared."
        for name in by_recipe
        if name not in whole
    ]
    if not whole:
        return Choice("", NOTHING, ["Nothing was chosen: every recipe lacks a seed.", *left_out])
    ranked = sorted(whole, key=lambda name: -fmean(whole[name]))  # equals stay in their order
    best = ranked[0]
    seeds = len(whole[best])
    reasons = [
        f"{best} has the highest mean validation accuracy {where}: "
        f"{percent(fmean(whole[best]))} % over {seeds} seed{'s' if seeds != 1 else ''}."
    ]
    if len(ranked) > 1:
        reasons.append(_lead(ranked[1], whole[best], whole[ranked[1]]))
    run = max(by_recipe[best], key=lambda x: (x.metrics[VALIDATION], -x.seed))
    reasons.append(
        f"Of its trainings the one with seed {run.seed} was taken, whose validation accuracy is "
        f"{percent(run.metrics[VALIDATION])} %."
    )
    return Choice(best, run.run_id, reasons + left_out)


def _lead(second: str, best: Sequence[float], other: Sequence[float]) -> str:
    """By how much the best recipe is ahead, seed by seed."""
    lead = spread([a - b for a, b in zip(best, other, strict=True)])
    ahead = f"It is {100 * lead.mean:.1f} points ahead of {second}"
    if lead.half_width is None:
        return f"{ahead}; with one seed nobody knows how much of that is chance."
    low, high = lead.mean - lead.half_width, lead.mean + lead.half_width
    interval = f"{ahead}, 95 % interval {100 * low:.1f} to {100 * high:.1f} seed by seed"
    return f"{interval}: chance may explain it." if low <= 0 else f"{interval}."


# --- the summary -----------------------------------------------------------------------------


def summarise(
    recipes: Sequence[Mapping[str, Any]],
    imbalance_factors: Sequence[float],
    seeds: Sequence[float],
    runs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything the page says.

    Args:
        recipes: ``name`` and ``values`` of each, in the order in which they are shown.
        imbalance_factors: as for `trials`, like the others.
        seeds: see `trials`.
        runs: see `trials`.

    Raises:
        ValueError: there is nothing to sum up.
    """
    by_name = {recipe["name"]: dict(recipe["values"]) for recipe in recipes}
    found = trials(by_name, imbalance_factors, seeds, runs)
    if not found:
        raise ValueError(
            "the sweep has no training: give at least one recipe, one of sweep_imbalance_factors "
            "and one of sweep_seeds"
        )
    return {
        "recipes": by_name,
        "imbalance_factors": list(dict.fromkeys(x.imbalance_factor for x in found)),
        "seeds": list(dict.fromkeys(x.seed for x in found)),
        "rows": rows(found),
        "choice": asdict(choose(found)),
        "trials": [asdict(x) for x in found],
    }


def means(report: Mapping[str, Any]) -> dict[str, float]:
    """The table as metrics, ``RECIPE/IF20/test/accuracy_mean``, ``..._std``, ``..._half_width``.

    The last one is how far the mean's 95 % interval reaches to both sides.
    """
    return {
        f"{row['recipe']}/IF{row['imbalance_factor']:g}/{key}_{part}": known[part]
        for row in report["rows"]
        for key, known in row["metrics"].items()
        for part in ("mean", "std", "half_width")
        if known[part] is not None
    }


def write_summary(report: Mapping[str, Any], out: Path) -> None:
    """Write ``sweep.json``, the table as ``sweep.csv``, and the page ``sweep.html``.

    Raises:
        ArtifactError: the operating system refuses.
    """
    with atomic_write(out / "sweep.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")
    with atomic_write(out / "sweep.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["imbalance_factor", "recipe", "metric", "n", "mean", "std", "half_width"])
        for row in report["rows"]:
            for key, known in row["metrics"].items():
                writer.writerow([row["imbalance_factor"], row["recipe"], key, *known.values()])
    write_page("sweep.html.j2", out / "sweep.html", **report, columns=_known_columns(report))


def as_text(report: Mapping[str, Any]) -> str:
    """The table and the choice for a terminal."""
    columns = _known_columns(report)
    width = max(len(name) for name in report["recipes"])
    lines = []
    for factor in report["imbalance_factors"]:
        title = f"imbalance factor {factor:g}, mean +- standard deviation, %"
        lines += ["", title, " " * width + "".join(f"{x:>13}" for x in ("n", *columns.values()))]
        for row in report["rows"]:
            if row["imbalance_factor"] == factor:
                cells = [f"{row['done']}/{row['asked']}"]
                cells += [_cell(row["metrics"].get(key)) for key in columns]
                lines.append(f"{row['recipe']:<{width}}" + "".join(f"{x:>13}" for x in cells))
    return "\n".join([*lines, "", *report["choice"]["reasons"]])


def _cell(known: Mapping[str, Any] | None) -> str:
    if known is None:
        return "-"
    deviation = "" if known["std"] is None else f" +-{100 * known['std']:.1f}"
    return percent(known["mean"]) + deviation


def _known_columns(report: Mapping[str, Any]) -> dict[str, str]:
    """Columns that at least one row can fill: a set without few-shot classes has no such column."""
    known = {key for row in report["rows"] for key in row["metrics"]}
    return {key: title for key, title in COLUMNS.items() if key in known}

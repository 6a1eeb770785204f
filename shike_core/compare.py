"""Evaluated models side by side: which is better, on which classes, and how sure that is.

Two models that were shown the same test images are compared image by image, which is far sharper
than comparing two accuracies: what both have right, or both have wrong, says nothing.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shike_core.config import INDECISIVE
from shike_core.errors import ComparisonError
from shike_core.files import atomic_write
from shike_core.intervals import holm, mcnemar, paired_difference, wilson_interval
from shike_core.pages import GROUP_COLOURS, data_uri, drawn, group_name, percent, write_page
from shike_core.sweep import spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = {
    "accuracy": "Overall",
    "many_shot/accuracy": "Many",
    "medium_shot/accuracy": "Medium",
    "few_shot/accuracy": "Few",
    "top5_accuracy": "Top 5",
    "mean_class_accuracy": "Mean class",
    "expected_calibration_error": "ECE",
}
"""Columns of the table by the end of the metric's key."""
GROUPS = ("many_shot", "medium_shot", "few_shot")
CLASSES_SHOWN = 8
"""Classes that gained most, and as many that lost most."""
WITHOUT_EFFECT = {"seed", *INDECISIVE}
"""Fields of a training's configuration in which repetitions of one configuration may differ."""


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation left: its report, and its answer for every test image."""

    name: str
    """What it is called in the comparison."""
    report: Mapping[str, Any]
    source_index: NDArray[np.int64]
    """Position of each image in the test split of its source, ascending, (images,)."""
    labels: NDArray[np.int64]
    """(images,)."""
    predicted: NDArray[np.int64]
    """The ensemble's answer, (images,)."""
    page: str = ""
    """Where to read more, or empty."""

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each image is classified rightly, (images,)."""
        return np.equal(self.predicted, self.labels)

    @property
    def group_of(self) -> NDArray[np.str_]:
        """The shot group of each class by the training images of this model, (num_classes,)."""
        return np.array([row["shot_group"] for row in self.report["per_class"]])


# --- reading ---------------------------------------------------------------------------------


def read_evaluation(directory: Path, name: str = "", page: str = "") -> Evaluated:
    """Read what `shike_core.stages.evaluate` wrote.

    Args:
        directory: with ``report.json`` and ``predictions.parquet``.
        name: what to call it; by default as the directory.
        page: where to read more.

    Raises:
        ComparisonError: a file is missing, damaged, or something else.
    """
    name = name or directory.resolve().name
    report = _read_report(directory / "report.json")
    path = directory / "predictions.parquet"
    if not path.is_file():
        raise ComparisonError(
            f"{name} has no stored predictions ({path} is missing), and without them models cannot "
            "be compared image by image; evaluate it again"
        )
    try:
        table = pq.read_table(path, columns=["source_index", "label", "predicted"])
        columns = [table[key].to_numpy().astype(np.int64) for key in table.column_names]
    except (pa.ArrowException, OSError, ValueError) as error:
        shown = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ComparisonError(
            f"{path} is damaged or holds no predictions ({shown}); evaluate {name} again"
        ) from error
    order = np.argsort(columns[0], kind="stable")
    source_index, labels, predicted = (column[order] for column in columns)
    found = Evaluated(name, report, source_index, labels, predicted, page)
    classes = len(report["per_class"])
    if len(table) != report["counts"]["test_images"] or (
        len(table) and not 0 <= found.labels.min() <= found.labels.max() < classes
    ):
        raise ComparisonError(
            f"{path} and report.json beside it are not of the same evaluation ({len(table)} "
            f"predictions, {report['counts']['test_images']} test images of {classes} classes); "
            f"evaluate {name} again"
        )
    return found


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ComparisonError(
            f"{path} cannot be read ({error}); give the directory of an evaluation"
        ) from error
    needed = {"metrics", "per_class", "counts", "test_digest"}
    missing = needed - set(report) if isinstance(report, dict) else needed
    if missing:
        raise ComparisonError(
            f"{path} is not the report of an evaluation (it has no {', '.join(sorted(missing))}); "
            "give the directory of an evaluation"
        )
    return dict(report)


# --- comparing -------------------------------------------------------------------------------


def compare(runs: Sequence[Evaluated], across_test_sets: bool = False) -> dict[str, Any]:
    """Put evaluations side by side, and compare every other one with the first.

    Args:
        runs: two or more; the first is the base.
        across_test_sets: also if they were shown different images; then nothing is tested.

    Returns:
        What the page says, as JSON holds it; every figure is a fraction.

    Raises:
        ComparisonError: there is only one, one comes twice, or they cannot be compared.
    """
    _refuse(runs, across_test_sets)
    base, others = runs[0], runs[1:]
    paired = len({run.report["test_digest"] for run in runs}) == 1
    rows = [_row(base, run) for run in runs]
    facts = [_facts(run) for run in runs]
    fields = dict.fromkeys(key for of_run in facts for key in of_run)
    return {
        "base": base.name,
        "paired": paired,
        "test_images": [len(run.labels) for run in runs],
        "classes": len(base.report["per_class"]),
        "runs": rows,
        "differ": {
            key: [of_run.get(key) for of_run in facts]
            for key in fields
            if len({json.dumps(of_run.get(key)) for of_run in facts}) > 1
        },
        "same_training_counts": len({json.dumps(_training_counts(run)) for run in runs}) == 1,
        "differences": _differences(base, others) if paired else [],
        "agreement": {
            run.name: float((run.predicted == base.predicted).mean()) for run in others if paired
        },
        "changed": {run.name: _changed(base, run) for run in others if paired},
        "configurations": _configurations(runs, [row["metrics"] for row in rows]),
    }


def _refuse(runs: Sequence[Evaluated], across_test_sets: bool) -> None:
    if len(runs) < 2:
        raise ComparisonError(
            f"{len(runs)} evaluation{'' if len(runs) == 1 else 's'} cannot be compared; give two "
            "or more"
        )
    if twice := sorted({run.name for run in runs if [r.name for r in runs].count(run.name) > 1}):
        raise ComparisonError(f"{', '.join(twice)} is there twice; give each evaluation once")
    base = runs[0]
    for run in runs[1:]:
        if (here := _classes(run)) != (there := _classes(base)):
            shown = [
                f"{len(names)} ({', '.join(map(str, names[:3]))} ...)" for names in (here, there)
            ]
            raise ComparisonError(
                f"{run.name} is a model of {shown[0]} classes and {base.name} of {shown[1]}; only "
                "models of the same classes can be compared"
            )
        if across_test_sets:
            continue
        if (here := run.report["test_digest"]) != (there := base.report["test_digest"]):
            raise ComparisonError(
                f"{run.name} was measured on other test images than {base.name} ({here[:12]}, not "
                f"{there[:12]}), so a difference may be one of the images; evaluate both on the "
                "same subset, or add --across-test-sets to see them side by side without tests"
            )
        same = [
            np.array_equal(getattr(run, x), getattr(base, x)) for x in ("source_index", "labels")
        ]
        if not all(same):
            raise ComparisonError(
                f"the predictions of {run.name} and {base.name} are not of the same images, "
                "although their reports say so; evaluate both again"
            )


def _classes(run: Evaluated) -> list[Any]:
    return [row["name"] for row in run.report["per_class"]]


def _row(base: Evaluated, run: Evaluated) -> dict[str, Any]:
    """A run's figures, those of shot groups over the base's classes."""
    group_of_image = base.group_of[run.labels]
    members = {"accuracy": np.ones(len(run.labels), bool)}
    members |= {f"{group}/accuracy": group_of_image == group for group in GROUPS}
    members = {key: inside for key, inside in members.items() if inside.any()}
    of_run = {key: run.report["metrics"].get(f"test/{key}") for key in COLUMNS}
    of_run |= {f"{group}/accuracy": None for group in GROUPS}
    of_run |= {key: float(run.right[inside].mean()) for key, inside in members.items()}
    return {
        "name": run.name,
        "page": run.page,
        "metrics": {key: value for key, value in of_run.items() if value is not None},
        "intervals": {
            key: wilson_interval(int(run.right[inside].sum()), int(inside.sum()))
            for key, inside in members.items()
        },
        "test_digest": run.report["test_digest"],
    }


def _differences(base: Evaluated, others: Sequence[Evaluated]) -> list[dict[str, Any]]:
    group_of_image = base.group_of[base.labels]
    members = {"all": np.ones(len(base.labels), bool)}
    members |= {group: group_of_image == group for group in GROUPS if group in group_of_image}
    rows: list[dict[str, Any]] = []
    for run in others:
        for group, inside in members.items():
            labels = base.labels[inside]
            found = paired_difference(base.right[inside], run.right[inside], labels)
            counts = {"images": len(labels), "classes": len(np.unique(labels))}
            rows.append({"run": run.name, "group": group, **counts, **found._asdict()})
    adjusted = holm([row["p_value"] for row in rows])
    return [row | {"p_adjusted": p} for row, p in zip(rows, adjusted, strict=True)]


def _changed(base: Evaluated, run: Evaluated) -> dict[str, list[dict[str, Any]]]:
    """The classes that gained and lost most."""
    rows = []
    for row in base.report["per_class"]:
        inside = base.labels == row["label"]
        if not inside.any():
            continue
        first, second = base.right[inside], run.right[inside]
        rows.append(
            {
                **{key: row[key] for key in ("label", "name", "shot_group", "train_images")},
                "test_images": int(inside.sum()),
                "base_right": int(first.sum()),
                "run_right": int(second.sum()),
                "difference": float(second.mean() - first.mean()),
                "p_value": mcnemar(int((first > second).sum()), int((second > first).sum())),
            }
        )
    adjusted = holm([row["p_value"] for row in rows])
    rows = [row | {"p_adjusted": p} for row, p in zip(rows, adjusted, strict=True)]
    rows.sort(key=lambda row: (-row["difference"], row["p_value"], row["label"]))
    gained = [row for row in rows if row["difference"] > 0][:CLASSES_SHOWN]
    rows.sort(key=lambda row: (row["difference"], row["p_value"], row["label"]))
    lost = [row for row in rows if row["difference"] < 0][:CLASSES_SHOWN]
    return {"gained": gained, "lost": lost}


def _facts(run: Evaluated) -> dict[str, Any]:
    """What may differ between two runs, by what it is called."""
    subset, train = run.report.get("subset") or {}, run.report.get("train") or {}
    facts = dict(subset.get("rule") or {})
    facts |= {key: value for key, value in train.items() if key not in INDECISIVE}
    facts["calibration bins"] = _calibration_bins(run)
    facts["training images"] = run.report["counts"].get("train_images")
    for key in ("subset_digest", "test_digest"):
        facts[key.replace("_", " ")] = str(run.report.get(key) or "")[:12]
    return {key.replace("_", " "): value for key, value in facts.items()}


def _calibration_bins(run: Evaluated) -> int | None:
    bins: int | None = (run.report.get("config") or {}).get("calibration_bins")
    return bins


def _training_counts(run: Evaluated) -> list[int]:
    return [row["train_images"] for row in run.report["per_class"]]


# --- several seeds ---------------------------------------------------------------------------


def _configurations(
    runs: Sequence[Evaluated], metrics: Sequence[Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Runs that differ in their seed only, together, one of each seed; empty if no two do.

    The first configuration is the base run's; each other one is compared with it seed by seed.
    """
    together: dict[str, dict[int | None, tuple[str, Mapping[str, float]]]] = {}
    for run, of_run in zip(runs, metrics, strict=True):
        train = run.report.get("train") or {}
        kept = {key: value for key, value in train.items() if key not in WITHOUT_EFFECT}
        # The subset of a report is the one it was measured on, which need not be that of training.
        images = [run.report.get(of) for of in ("subset_digest", "trained_on_this_subset")]
        measured = [_training_counts(run), _calibration_bins(run)]
        key = json.dumps([kept, images, *measured], sort_keys=True)
        # The same training once more tells nothing.
        together.setdefault(key, {}).setdefault(train.get("seed"), (run.name, of_run))
    if all(len(members) == 1 for members in together.values()):
        return []
    base = next(iter(together.values()))
    return [
        {
            "runs": [name for name, _ in members.values()],
            "seeds": list(members),
            "metrics": _spreads([of_run for _, of_run in members.values()]),
            "lead": _lead(base, members) if members is not base else {},
        }
        for members in together.values()
    ]


def _lead(base: Mapping[Any, Any], members: Mapping[Any, Any]) -> dict[str, Any]:
    """Mean difference to the base configuration over the seeds that both have, by metric."""
    pairs = [(of_run, base[seed][1]) for seed, (_, of_run) in members.items() if seed in base]
    return _spreads(
        [
            {key: here[key] - there[key] for key in here.keys() & there.keys()}
            for here, there in pairs
        ]
    )


def _spreads(of_runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean and spread of each metric that all have."""
    return {
        key: asdict(spread([of_run[key] for of_run in of_runs]))
        for key in COLUMNS
        if of_runs and all(key in of_run for of_run in of_runs)
    }


# --- writing ---------------------------------------------------------------------------------


def write_comparison(report: Mapping[str, Any], out: Path) -> None:
    """Write ``compare.json``, ``compare.csv`` (a row for each run), ``compare.md``, the page.

    Args:
        report: what `compare` returned.
        out: the directory.

    Raises:
        ArtifactError: the operating system refuses.
    """
    for name, text in (
        ("compare.json", json.dumps(report, indent=1) + "\n"),
        ("compare.csv", _as_csv(report)),
        ("compare.md", as_text(report)),
    ):
        with atomic_write(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
    plot: tuple[str, ...] = ()
    if report["differences"]:
        draw = partial(_draw_differences, report=report)
        plot = tuple(data_uri(drawn(draw, dark)) for dark in (False, True))
    write_page(
        "compare.html.j2", out / "compare.html", **report, columns=known_columns(report), plot=plot
    )


def known_columns(report: Mapping[str, Any]) -> dict[str, str]:
    """Columns that at least one run can fill: a set without few-shot classes has no such column."""
    known = {key for row in report["runs"] for key in row["metrics"]}
    return {key: title for key, title in COLUMNS.items() if key in known}


def as_text(report: Mapping[str, Any]) -> str:
    """The comparison as Markdown, which a terminal can show as it is."""
    columns = known_columns(report)
    lines = [f"# {len(report['runs'])} runs, base {report['base']}", ""]
    lines += ["Accuracy in percent with the 95 % interval that the test images allow.", ""]
    if not report["same_training_counts"]:
        lines += ["Trained on different numbers of images; the shot groups are the base's.", ""]
    lines += _table(
        ["run", *columns.values()],
        [[row["name"], *(_cell(row, key) for key in columns)] for row in report["runs"]],
    )
    if report["differences"]:
        lines += ["", f"## Difference to {report['base']}, points, on the same images", ""]
        lines += _table(
            ["run", "images", "difference", "95 % interval", "p", "p adjusted", "gained", "lost"],
            [_difference_cells(row) for row in report["differences"]],
        )
        lines += ["", *(f"- {sentence(row)}" for row in report["differences"])]
    else:
        lines += ["", "These runs were shown different test images, so nothing is tested."]
    if report["configurations"]:
        lines += ["", "## Over seeds: mean +- standard deviation, percent", ""]
        lines += _table(
            ["runs", "seeds", *columns.values()],
            [
                [
                    ", ".join(row["runs"]),
                    ", ".join(map(str, row["seeds"])),
                    *(_spread_cell(row["metrics"].get(key)) for key in columns),
                ]
                for row in report["configurations"]
            ],
        )
    if report["differ"]:
        lines += ["", "## Where they differ", ""]
        lines += _table(
            ["", *(row["name"] for row in report["runs"])],
            [[key, *map(_shown, values)] for key, values in report["differ"].items()],
        )
    return "\n".join(lines) + "\n"


def sentence(row: Mapping[str, Any]) -> str:
    """What a difference means, in words."""
    where = (
        "over all classes" if row["group"] == "all" else f"on {group_name(row['group'])} classes"
    )
    points = f"{100 * abs(row['difference']):.1f} points"
    if row["p_adjusted"] >= 0.05:
        return f"{row['run']} {where}: {points} of difference, which chance may explain"
    return f"{row['run']} {where}: {points} {'better' if row['difference'] > 0 else 'worse'}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns are in line."""
    escaped = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in escaped) for i in range(len(head))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in escaped
    ]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def _cell(row: Mapping[str, Any], key: str) -> str:
    if key not in row["metrics"]:
        return "-"
    value = percent(row["metrics"][key])
    if key not in row["intervals"]:
        return value
    low, high = row["intervals"][key]
    return f"{value} ({percent(low)} to {percent(high)})"


def _difference_cells(row: Mapping[str, Any]) -> list[str]:
    group = "all" if row["group"] == "all" else group_name(row["group"])
    return [
        f"{row['run']}, {group}",
        str(row["images"]),
        f"{100 * row['difference']:+.1f}",
        f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
        f"{row['p_value']:.2g}",
        f"{row['p_adjusted']:.2g}",
        str(row["only_second"]),
        str(row["only_first"]),
    ]


def _spread_cell(known: Mapping[str, Any] | None) -> str:
    if known is None:
        return "-"
    deviation = "" if known["std"] is None else f" +- {percent(known['std'])}"
    return percent(known["mean"]) + deviation


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "-" if value is None else str(value)


def _as_csv(report: Mapping[str, Any]) -> str:
    columns = known_columns(report)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = [f"{key}/{end}" for key in columns for end in ("low", "high")]
    writer.writerow(["run", *columns, *ends, *report["differ"]])
    for i, row in enumerate(report["runs"]):
        intervals = [x for key in columns for x in row["intervals"].get(key, ("", ""))]
        facts = [values[i] for values in report["differ"].values()]
        writer.writerow(
            [row["name"], *(row["metrics"].get(key, "") for key in columns), *intervals, *facts]
        )
    return text.getvalue()


def _draw_differences(figure: "Figure", report: Mapping[str, Any]) -> None:
    rows = list(reversed(report["differences"]))
    figure.set_size_inches(6.4, 1.2 + 0.36 * len(rows))
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        colour = GROUP_COLOURS.get(row["group"], "#8b949e")
        ends = [100 * (row["difference"] - row["low"]), 100 * (row["high"] - row["difference"])]
        axes.errorbar(
            100 * row["difference"], place, xerr=[[max(end, 0)] for end in ends],
            fmt="o", color=colour, capsize=4, linewidth=2,
        )  # fmt: skip
    names = [
        f"{_short(row['run'])}, {'all' if row['group'] == 'all' else group_name(row['group'])}"
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.axvline(0, color="#8b949e", linestyle="--", linewidth=1)
    axes.set(xlabel="points more than the base", ylim=(-0.6, len(rows) - 0.4))
    axes.grid(axis="x", alpha=0.6)


def _short(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:29]}..."

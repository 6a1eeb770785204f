"""The report a person reads: one HTML page without network or scripts, and its plots as PNG."""

import io
from collections.abc import Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from shike_core.pages import GROUP_COLOURS, data_uri, drawn, group_name, worst_classes, write_page

COLUMNS = {
    "accuracy": "Overall",
    "top5_accuracy": "Top 5",
    "many_shot/accuracy": "Many",
    "medium_shot/accuracy": "Medium",
    "few_shot/accuracy": "Few",
    "expected_calibration_error": "ECE",
}
"""Columns of the results table by the end of the metric's key."""
WORST_CLASSES = 10
MAX_CLASSES_LISTED = 100
MAX_CLASSES_NAMED = 20
MAX_CELLS_ANNOTATED = 12
THUMBNAIL = 96
"""Most pixels a side of an example."""

DECISION, DECISION_END = "<!-- decision -->", "<!-- /decision -->"
"""What the gate says goes between them, when the page is long written."""
_DEFAULTS = {"subset": {}, "train": {}, "history": [], "trained_on_this_subset": True}


def render_report(
    report: Mapping[str, Any],
    path: Path,
    images: Mapping[int, NDArray[np.uint8]] | None = None,
) -> None:
    """Write the page.

    Args:
        report: what `shike_core.evaluate.measure` returns. It may also hold ``subset`` (the
            content of subset.json), ``train`` (the training configuration and the numbers of
            parameters) and ``history`` (the metrics of each epoch); what is missing is left out.
        path: the HTML file.
        images: pixels ``(height, width, 3)`` of the test images in ``examples``, by their row.

    Raises:
        ArtifactError: the file cannot be written.
    """
    light, dark = plots(report), plots(report, dark=True)
    write_page(
        "report.html.j2",
        path,
        **_DEFAULTS | {key: value for key, value in report.items() if key != "examples"},
        plots={name: (data_uri(light[name]), data_uri(dark[name])) for name in light},
        columns={
            key: title for key, title in COLUMNS.items() if f"test/{key}" in report["metrics"]
        },
        classifiers=_classifiers(report),
        configuration=_configuration(report),
        worst=worst_classes(report["per_class"])[:WORST_CLASSES],
        examples=_examples(report, images or {}),
        listed=report["counts"]["classes"] <= MAX_CLASSES_LISTED,
        by_class=_is_by_class(report),
        standard_error=_standard_error(report),
        interval_of={
            "accuracy": "all",
            **{f"{group}/accuracy": group for group in GROUP_COLOURS},
        },
    )


def with_decision(page: str, decision: Mapping[str, Any]) -> str:
    """The page with the gate's decision in its place, in place of an earlier one.

    Args:
        page: written by `render_report`.
        decision: ``alias``, and ``reasons`` as sentences.

    Raises:
        ValueError: the page has no such place.
    """
    before, found, rest = page.partition(DECISION)
    _, ended, after = rest.partition(DECISION_END)
    if not (found and ended):
        raise ValueError("the page has no place for the gate's decision; evaluate the model again")
    told = ". ".join(str(reason) for reason in decision["reasons"])
    told = f"<p><strong>{escape(str(decision['alias']).capitalize())}</strong>: {escape(told)}.</p>"
    return f"{before}{DECISION}{told}{DECISION_END}{after}"


def plots(report: Mapping[str, Any], dark: bool = False) -> dict[str, bytes]:
    """Draw the report's plots.

    Args:
        report: as for `render_report`.
        dark: light ink on dark paper.

    Returns:
        PNG files by name; ``training_curve.png`` only if the report has a history.
    """
    drawings = {
        "per_class_accuracy.png": _draw_per_class_accuracy,
        "best_expert.png": _draw_best_expert,
        "reliability.png": _draw_reliability,
        "confusion_matrix.png": _draw_confusion_matrix,
        "shifts.png": _draw_shifts,
        "class_counts.png": _draw_class_counts,
    }
    if report.get("history"):
        drawings["training_curve.png"] = _draw_training_curve
    return {name: drawn(partial(draw, report=report), dark) for name, draw in drawings.items()}


def _draw_per_class_accuracy(figure: Figure, report: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    tested = [row for row in report["per_class"] if row["accuracy"] is not None]
    for group, colour in GROUP_COLOURS.items():
        if rows := [row for row in tested if row["shot_group"] == group]:
            sizes = [row["train_images"] for row in rows]
            points = [100 * row["accuracy"] for row in rows]
            axes.scatter(sizes, points, s=28, alpha=0.75, color=colour, label=group_name(group))
    _log_scale(axes, axes.xaxis, [row["train_images"] for row in tested])
    axes.set(xlabel="training images of the class", ylabel="accuracy (%)", ylim=(-4, 104))
    axes.grid(alpha=0.6)
    _legend_above(figure)


def _draw_best_expert(figure: Figure, report: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    winners = report["best_expert"]
    totals = np.array([sum(counts.values()) for counts in winners.values()])
    start = np.zeros(len(winners))
    kinds = list(next(iter(winners.values())))
    viridis = matplotlib.colormaps["viridis"]
    for i, kind in enumerate(kinds):
        count = np.array([counts[kind] for counts in winners.values()])
        place = 0.2 + 0.5 * i / max(len(kinds) - 2, 1)
        colour = "#8b949e" if kind == "tie" else viridis(place)
        ink = "#ffffff" if place < 0.5 else "#000000"
        name = kind.replace("_", " ")
        bars = axes.barh(range(len(winners)), count / totals, left=start, color=colour, label=name)
        wide_enough = count / totals >= 0.05
        inside = [str(n) if wide else "" for n, wide in zip(count, wide_enough, strict=True)]
        axes.bar_label(bars, inside, label_type="center", color=ink)
        start += count / totals
    names = ["All" if group == "all" else group_name(group) for group in winners]
    axes.set_yticks(range(len(winners)), names)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g}")
    axes.set(xlabel="classes by their best expert (%); counts inside", xlim=(0, 1))
    _legend_above(figure)


def _draw_reliability(figure: Figure, report: Mapping[str, Any]) -> None:
    upper, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    rows = report["reliability"]
    lower = [row["lower"] for row in rows]
    width = [row["upper"] - row["lower"] for row in rows]
    accuracy = [row["accuracy"] for row in rows]
    upper.bar(lower, accuracy, width, align="edge", color="#3b82c4", alpha=0.55, label="accuracy")
    upper.plot([0, 1], [0, 1], "--", color="#8b949e", label="ideal")
    confidence = [row["confidence"] for row in rows]
    upper.plot(confidence, accuracy, "o", color="#d1495b", markersize=4, label="mean confidence")
    upper.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(0, 1))
    count = np.array([row["num_images"] for row in rows])
    below.bar(lower, 100 * count / count.sum(), width, align="edge", color="#8b949e")
    below.set(xlabel="confidence", ylabel="images (%)")
    _legend_above(figure)


def _draw_confusion_matrix(figure: Figure, report: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    matrix = np.array(report["confusion_matrix"]["matrix"], dtype=np.float64)
    labels = [group_name(label) for label in report["confusion_matrix"]["labels"]]
    axis_name = "shot group of the class"
    if _is_by_class(report):
        order = np.argsort([-row["train_images"] for row in report["per_class"]], kind="stable")
        matrix, labels = matrix[np.ix_(order, order)], [labels[i] for i in order]
        axis_name = "class, largest first"
    of_row = matrix.sum(axis=1, keepdims=True)
    share = 100 * np.divide(matrix, of_row, out=np.zeros_like(matrix), where=of_row > 0)
    # The root shows the few per cent off the diagonal, where the tail is lost.
    image = axes.imshow(share, norm=PowerNorm(0.5, 0, 100), cmap="viridis")
    if len(labels) <= MAX_CLASSES_NAMED:
        figure.set_size_inches(4.6, 4.6)
        names = [name if len(name) <= 18 else f"{name[:15]}..." for name in labels]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(labels) <= MAX_CELLS_ANNOTATED:
        for (i, j), value in np.ndenumerate(share):
            ink = "#000000" if value > 40 else "#ffffff"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=9)
    else:
        figure.colorbar(image, label="of the true class (%)", ticks=[0, 1, 5, 10, 25, 50, 100])
    axes.set(xlabel=f"predicted ({axis_name})", ylabel="true")


def _draw_shifts(figure: Figure, report: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    rows = report["shifts"]
    for key, colour, name in (
        ("accuracy", "#3b82c4", "as it is"),
        ("corrected_accuracy", "#e69f00", "told how frequent classes are"),
    ):
        values = [100 * row[key] for row in rows]
        axes.plot(range(len(rows)), values, marker="o", color=colour, label=name)
    middle = next(i for i, row in enumerate(rows) if row["name"] == "uniform")
    axes.axvline(middle, color="#8b949e", linestyle=":")
    axes.set_xticks(range(len(rows)), [str(row["factor"]) for row in rows])
    axes.set(xlabel="head frequent  <  factor  >  tail frequent")
    axes.set_ylabel("accuracy (%)")
    axes.grid(alpha=0.6)
    _legend_above(figure)


def _draw_class_counts(figure: Figure, report: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    rows = sorted(report["per_class"], key=lambda row: -row["train_images"])
    for group, colour in GROUP_COLOURS.items():
        # Shot groups are ranges of the count, so each is one piece of the sorted classes.
        places = [i for i, row in enumerate(rows) if row["shot_group"] == group]
        if places:
            counts = [rows[i]["train_images"] for i in places]
            edges = [*places, places[-1] + 1]
            axes.stairs(counts, edges, fill=True, color=colour, label=group_name(group))
    sizes = [row["train_images"] for row in rows]
    _log_scale(axes, axes.yaxis, sizes)
    axes.set(xlabel="classes, largest first", ylabel="training images", xlim=(0, len(rows)))
    axes.set_ylim(bottom=max(0.6 * min(sizes), 0.5))
    _legend_above(figure)


def _draw_training_curve(figure: Figure, report: Mapping[str, Any]) -> None:
    history = report["history"]
    keys = dict.fromkeys(key for epoch in history for key in epoch)
    panels = {
        "loss": [key for key in keys if key.startswith("train/loss")],
        "accuracy (%)": [key for key in keys if key.endswith("accuracy")],
        "learning rate": [key for key in keys if key == "lr"],
    }
    panels = {title: shown for title, shown in panels.items() if shown}
    if not panels:
        return
    figure.set_size_inches(4.6, 1.6 + 1.7 * len(panels))
    every_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, shown) in zip(every_axes, panels.items(), strict=True):
        factor = 100 if "%" in title else 1
        for key in shown:
            points = [(i, factor * epoch[key]) for i, epoch in enumerate(history) if key in epoch]
            name = key.removeprefix("train/").replace("_", " ")
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 3 else "")
        if 0 < (boundary := report.get("train", {}).get("stage1_epochs", 0)) < len(history):
            axes.axvline(boundary - 0.5, color="#8b949e", linestyle=":")
        axes.set_ylabel(title)
        axes.grid(alpha=0.6)
        if len(shown) > 1:
            axes.legend(fontsize=9)
    every_axes[-1].set_xlabel("epoch")


def _legend_above(figure: Figure) -> None:
    figure.legend(loc="outside upper center", ncols=4, fontsize=9, columnspacing=1.2)


def _log_scale(axes: Axes, axis: Axis, counts: list[int]) -> None:
    """Logarithmic axis of image counts, with round numbers at the ticks."""
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    decades = range(len(str(max(counts))))
    ticks = [step * 10**d for d in decades for step in (1, 2, 5)]
    axis.set_ticks([tick for tick in ticks if min(counts) / 2 <= tick <= max(counts)])
    axis.set_ticks([], minor=True)
    axis.set_major_formatter("{x:g}")


def _classifiers(report: Mapping[str, Any]) -> dict[str, str]:
    """Prefix of the metric keys of the ensemble and of each expert, by the name on the page."""
    depths = report.get("train", {}).get("expert_depths", [])
    names = {"Ensemble": "test/"}
    for i in range(report["counts"]["experts"]):
        depth = f", depth {depths[i] + 1}" if depths else ""
        names[f"Expert {i}{depth}"] = f"test/expert_{i}/"
    return names


def _configuration(report: Mapping[str, Any]) -> dict[str, Any]:
    """What stands under ``train`` without the depths, which the experts' names already give."""
    return {k: v for k, v in report.get("train", {}).items() if k != "expert_depths"}


def _examples(
    report: Mapping[str, Any], images: Mapping[int, NDArray[np.uint8]]
) -> list[dict[str, Any]]:
    """The examples whose pixels there are, as the page shows them."""
    names = {row["label"]: row["name"] for row in report["per_class"]}
    return [
        {
            "name": names[row["label"]],
            **{
                kind: [
                    {
                        "image": _thumbnail(images[of["row"]]),
                        "predicted": names[of["predicted"]],
                        "probability": of["probability"],
                    }
                    for of in row[kind]
                    if of["row"] in images
                ]
                for kind in ("right", "wrong")
            },
        }
        for row in report.get("examples", [])
    ]


def _thumbnail(pixels: NDArray[np.uint8]) -> str:
    """A small image as the address of an image in the page itself."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return data_uri(buffer.getvalue())


def _standard_error(report: Mapping[str, Any]) -> float:
    """Sampling error of the overall accuracy that the finite test set alone brings."""
    accuracy = report["metrics"]["test/accuracy"]
    return float((accuracy * (1 - accuracy) / report["counts"]["test_images"]) ** 0.5)


def _is_by_class(report: Mapping[str, Any]) -> bool:
    return len(report["confusion_matrix"]["labels"]) == len(report["per_class"])

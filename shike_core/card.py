"""The model card: what a registered model is, how good, from what data, and its limits."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from shike_core.intervals import wilson_interval
from shike_core.pages import group_name, percent, worst_classes

GROUPS = ("many_shot", "medium_shot", "few_shot")
WORST = 3
TRAINING = (
    "network", "width", "num_experts", "classifier", "fusion", "stage1_epochs", "stage2_epochs",
    "batch_size", "seed", "parameters_deployed",
)  # fmt: skip
"""What the card says of the training, as far as it is known."""
_NON_COMMERCIAL = "its images are for non-commercial research and education only"
LICENCES = {
    "digits": "Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998), CC BY 4.0.",
    "cifar10": "CIFAR-10 (Krizhevsky 2009) states none; cite its report.",
    "cifar100": "CIFAR-100 (Krizhevsky 2009) states none; cite its report.",
    "imagenet_lt": f"ImageNet (terms of access): {_NON_COMMERCIAL}.",
    "places_lt": f"Places (terms of access): {_NON_COMMERCIAL}.",
    "inaturalist2018": f"iNaturalist 2018 (terms of the competition): {_NON_COMMERCIAL}.",
}
"""Terms of the data by source; a summary, the source's own text counts."""
UNKNOWN_LICENCE = "not known; whoever provided the images has to say."


def model_card(
    report: Mapping[str, Any],
    model_name: str,
    version: str,
    run_id: str,
    decision: Mapping[str, Any] | None = None,
    commit: str = "",
) -> str:
    """The card as Markdown.

    Args:
        report: of the evaluation, as report.json holds it; what is missing is left out.
        model_name: of the registered model.
        version: of it.
        run_id: of the MLflow run that made it.
        decision: of the gate: ``alias`` and ``reasons``.
        commit: that the code was at.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=False,  # Markdown, escaped by the filter md
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"percent": percent, "md": _escaped}
    tested = [row for row in report["per_class"] if row["accuracy"] is not None]
    sizes = [row["train_images"] for row in report["per_class"]]
    rule = (report.get("subset") or {}).get("rule") or {}
    train = report.get("train") or {}
    return templates.get_template("model_card.md.j2").render(
        title=f"{model_name}, version {version}",
        model_name=model_name,
        version=version,
        run_id=run_id,
        decision=decision,
        commit=commit,
        counts=report["counts"],
        metrics=report["metrics"],
        rows=_accuracies(tested),
        balanced_test=len({row["test_images"] for row in report["per_class"]}) == 1,
        worst=worst_classes(tested)[:WORST],
        rule=rule,
        largest=max(sizes),
        smallest=min(sizes),
        licence=LICENCES.get(rule.get("dataset", ""), UNKNOWN_LICENCE),
        subset_digest=report.get("subset_digest", ""),
        test_digest=report.get("test_digest", ""),
        weights_digest=(report.get("export") or {}).get("weights_digest", ""),
        training={key: train[key] for key in TRAINING if key in train},
    )


def shortened(card: str, limit: int, where: str) -> str:
    """As many whole sections of a card as fit, and where the rest is.

    Args:
        card: Markdown.
        limit: characters.
        where: the whole card lies.
    """
    if len(card) <= limit:
        return card
    pointer = f"\n\nThe whole card: {where}\n"
    kept = card[: limit - len(pointer)]
    end = kept.rfind("\n## ")
    return kept[: end if end > 0 else len(kept)].rstrip() + pointer


def _accuracies(tested: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy and interval over all tested classes and over each shot group that has any."""
    rows = []
    for group in ("all", *GROUPS):
        inside = [row for row in tested if group in ("all", row["shot_group"])]
        if inside:
            images = sum(row["test_images"] for row in inside)
            right = sum(round(row["accuracy"] * row["test_images"]) for row in inside)
            name = "overall" if group == "all" else group_name(group).lower()
            interval = wilson_interval(right, images)
            rows.append({"name": name, "accuracy": right / images, "interval": interval})
    return rows


def _escaped(text: str) -> str:
    """Text that Markdown, and HTML in it, leave as it is."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)

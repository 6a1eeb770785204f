"""The page and its plots: well-formed, self-contained, complete, honest about what is missing."""

import base64
import copy
import io
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shike_core.config import SubsetConfig, TrainConfig
from shike_core.data.long_tail import imbalance_measures
from shike_core.errors import ArtifactError
from shike_core.evaluate import measure
from shike_core.report import plots, render_report, with_decision

VOID = {"meta", "img", "source", "br"}
HOSTILE = '<b>"bold"</b> $x_1$ & co'


class Page(HTMLParser):
    """Checks that tags nest, and collects text, table rows and images."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def measured(class_counts: list[int], names: list[str], num_experts: int, **more: Any) -> Any:
    classes = len(class_counts)
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(classes).repeat(6)
    logits = torch.randn(len(targets), num_experts, classes, generator=generator)
    logits[torch.arange(len(targets)), :, targets] += 1.5
    return measure(logits, targets, np.array(class_counts), names, 15) | more


@pytest.fixture(scope="module")
def report() -> Any:
    history = [
        {"epoch": e, "train/loss": 3.0 - e, "lr": 0.1 * e, "train/accuracy": 0.3} for e in range(2)
    ]
    return measured(
        [150, 120, 50, 8],
        ["cat", HOSTILE, "a name that is very long indeed", "eel"],
        num_experts=2,
        subset={
            "digest": "d" * 64,
            "test_digest": "e" * 64,
            "rule": asdict(SubsetConfig(dataset="digits", imbalance_factor=20)),
            "imbalance": imbalance_measures([150, 120, 50, 8]),
            "identical_images": {"train_in_test": 3, "train_dropped": 0},
        },
        train=asdict(TrainConfig()) | {"parameters": 1277008, "expert_depths": [0, 1]},
        history=history,
    )


@pytest.fixture(scope="module")
def html(report: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    render_report(report, path)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_results_table_ends_with_the_intervals(report: Any, page: Page) -> None:
    row = page.rows[4]
    assert row[0] == "95 % interval, ensemble"
    for cell, group in zip(
        (row[1], *row[3:6]), ("all", "many_shot", "medium_shot", "few_shot"), strict=True
    ):
        low, high = report["intervals"][group]
        assert cell.strip() == f"{100 * low:.1f} to {100 * high:.1f}"
        key = "test/accuracy" if group == "all" else f"test/{group}/accuracy"
        assert low < report["metrics"][key] <= high
    assert (row[2].strip(), row[6].strip()) == ("", "")


def test_calibration_is_told_by_shot_group(report: Any, page: Page) -> None:
    rows = {row[0]: row[1:] for row in page.rows if len(row) == 4}
    for group, name in (("all", "All"), ("few_shot", "Few-shot")):
        row = report["calibration"]["groups"][group]
        figures = [row[k] for k in ("accuracy", "confidence", "expected_calibration_error")]
        assert rows[name] == [f"{100 * value:.1f}" for value in figures]
    assert "The checkpoint has no temperature" in page.text


def test_a_temperature_is_told_with_what_it_does(tmp_path: Path) -> None:
    logits, targets = 4 * torch.randn(60, 1, 3), torch.arange(3).repeat(20)
    scaled = measure(logits, targets, np.array([150, 50, 5]), ["a", "b", "c"], 15, temperature=3.5)
    render_report(scaled, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    row = scaled["calibration"]["groups"]["medium_shot"]
    figures = [
        row[key] for key in (
            "accuracy", "confidence", "expected_calibration_error", "scaled_confidence",
            "scaled_expected_calibration_error",
        )
    ]  # fmt: skip
    assert ["Medium-shot", *(f"{100 * value:.1f}" for value in figures)] in page.rows
    assert "divided by the temperature 3.500" in page.text


def test_the_most_confused_classes_are_told_with_both_directions(page: Page) -> None:
    rows = [row for row in page.rows if len(row) == 3 and " of 6" in row[1]]
    wrong = [int(a.split()[0]) + int(b.split()[0]) for _, a, b in rows]
    assert wrong == sorted(wrong, reverse=True)
    assert wrong[0] > 0


def test_other_class_frequencies_have_a_row_each(report: Any, page: Page) -> None:
    start = page.rows.index(["Frequent", "Factor", "Accuracy", "Corrected"]) + 1
    for row, shift in zip(page.rows[start : start + 11], report["shifts"], strict=True):
        assert row[1:] == [
            str(shift["factor"]),
            *(f"{100 * shift[key]:.1f}" for key in ("accuracy", "corrected_accuracy")),
        ]
    assert [page.rows[start][0], page.rows[start + 10][0]] == ["head", "tail"]


def test_examples_are_in_the_page_with_what_they_were_taken_for(
    report: Any, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(2, 200, 100, 3), dtype=np.uint8)
    examples = [
        {
            "label": 1,
            "right": [{"row": 7, "predicted": 1, "probability": 0.5}],
            "wrong": [{"row": 9, "predicted": 3, "probability": 0.75}],
        },
        {"label": 3, "right": [], "wrong": []},
    ]
    path = tmp_path / "report.html"
    render_report(report | {"examples": examples}, path, dict(zip((7, 9), pixels, strict=True)))
    page = Page(path.read_text())
    start = next(i for i, row in enumerate(page.rows) if row[0] == "Class" and "surest" in row[1])
    assert [row[0] for row in page.rows[start + 1 : start + 3]] == [HOSTILE, "eel"]
    shown = [x for x in page.attributes("img") if "taken for" in str(x["alt"])]
    assert [x["alt"] for x in shown] == [f"right: taken for {HOSTILE}", "wrong: taken for eel"]
    assert "eel, 75 %" in page.text
    content = base64.b64decode(str(shown[0]["src"]).partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (48, 96)


def test_the_contents_lead_to_the_sections(page: Page) -> None:
    ids = {x["id"] for x in page.attributes("section") if "id" in x}
    links = [str(x["href"]) for x in page.attributes("a")]
    assert links
    assert {link.removeprefix("#") for link in links} <= ids


def test_results_table_holds_every_classifier_in_percent(report: Any, page: Page) -> None:
    header = ["", "Overall", "Top 5", "Many", "Medium", "Few", "ECE"]
    assert page.rows[0] == header
    for row, prefix in zip(page.rows[1:4], ("", "expert_0/", "expert_1/"), strict=True):
        keys = [
            "accuracy",
            "top5_accuracy",
            "many_shot/accuracy",
            "medium_shot/accuracy",
            "few_shot/accuracy",
            "expected_calibration_error",
        ]
        values = [report["metrics"][f"test/{prefix}{key}"] for key in keys]
        assert row[1:] == [f"{100 * value:.1f}" for value in values]
    assert [row[0] for row in page.rows[1:4]] == [
        "Ensemble",
        "Expert 0, depth 1",
        "Expert 1, depth 2",
    ]


def test_test_time_augmentation_is_a_table_of_its_own(page: Page, tmp_path: Path) -> None:
    assert "test-time augmentation" not in page.text
    generator = torch.Generator().manual_seed(0)
    logits, flipped = torch.randn(2, 8, 1, 2, generator=generator)
    report = measure(logits, torch.arange(2).repeat(4), np.array([150, 8]), "ab", 15, flipped)
    render_report(report, tmp_path / "report.html")
    augmented = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Apart: with test-time augmentation" in augmented.text
    (row,) = (row for row in augmented.rows if "mirror image" in row[0])
    above = augmented.rows[augmented.rows.index(row) - 1]
    assert above == augmented.rows[0] == ["", "Overall", "Top 5", "Many", "Few", "ECE"]
    keys = ["accuracy", "top5_accuracy", "many_shot/accuracy", "few_shot/accuracy"]
    values = [report["metrics"][f"test/flip/{k}"] for k in (*keys, "expected_calibration_error")]
    assert row[1:] == [f"{100 * value:.1f}" for value in values]
    ordinary = [f"{100 * report['metrics'][f'test/{k}']:.1f}" for k in keys]
    assert augmented.rows[1][1:5] == ordinary != row[1:5]


def test_every_class_and_its_expert_accuracies_are_listed(report: Any, page: Page) -> None:
    rows = {row[0]: row for row in page.rows}
    for entry in report["per_class"]:
        row = rows[entry["name"]]
        assert row[2:4] == [str(entry["train_images"]), str(entry["test_images"])]
        shown = [entry["accuracy"], *entry["expert_accuracy"]]
        assert row[4:] == [f"{100 * value:.1f}" for value in shown]


def test_best_experts_are_counted_by_shot_group(report: Any, page: Page) -> None:
    start = next(i for i, row in enumerate(page.rows) if row[0] == "Classes where best")
    shown = {row[0]: [int(n) for n in row[1:]] for row in page.rows[start + 1 : start + 5]}
    names = {"all": "All", "many_shot": "Many-shot", "medium_shot": "Medium-shot"}
    for group, winners in report["best_expert"].items():
        assert shown[names.get(group, "Few-shot")] == list(winners.values())


def test_data_and_configuration_are_stated(page: Page) -> None:
    text = " ".join(page.text.split())
    for stated in (
        "SHIKE on digits, imbalance factor 20",
        "digest " + "d" * 64,
        "selection first",
        "imbalance factor as it came out 18.75",
        "identical to a test image 3",
        "weight decay 0.0005",
        "parameters 1,277,008",
        "one seed",
    ):
        assert stated in text


def test_page_needs_no_network_and_no_script(html: str, page: Page) -> None:
    without_images = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", html)
    assert "http" not in without_images
    assert "url(" not in without_images
    assert not {"script", "link", "iframe"} & {name for name, _ in page.tags}
    for image in page.attributes("img"):
        assert (image["src"] or "").startswith("data:image/png;base64,")
    for source in page.attributes("source"):
        assert (source["srcset"] or "").startswith("data:image/png;base64,")


def test_every_image_has_a_description(report: Any, page: Page) -> None:
    descriptions = [image["alt"] for image in page.attributes("img")]
    assert len(descriptions) == len(plots(report)) == 7
    assert all(descriptions)
    assert len(set(descriptions)) == 7


def test_names_of_classes_are_escaped(page: Page) -> None:
    assert page.attributes("b") == []
    assert HOSTILE in page.text


def test_plots_are_png_images_for_light_and_dark(report: Any) -> None:
    light, dark = plots(report), plots(report, dark=True)
    assert light.keys() == dark.keys()
    assert light.keys() == {
        "per_class_accuracy.png",
        "best_expert.png",
        "reliability.png",
        "shifts.png",
        "confusion_matrix.png",
        "class_counts.png",
        "training_curve.png",
    }
    for name in light:
        corners = [
            Image.open(io.BytesIO(drawn[name])).convert("L").getpixel((0, 0))
            for drawn in (light, dark)
        ]
        assert corners[0] == 255
        assert corners[1] < 64


def test_nothing_is_nan_where_groups_and_classes_are_empty(tmp_path: Path) -> None:
    """Over 100 classes, all many-shot, one of them untested, one expert, no history."""
    report = measured([200] * 101, [f"class {c}" for c in range(101)], num_experts=1)
    report["per_class"][7] |= {"test_images": 0, "accuracy": None, "expert_accuracy": None}
    render_report(report, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not re.search(r"\b(nan|none|null|undefined)\b", page.text, flags=re.IGNORECASE)
    assert page.rows[0] == ["", "Overall", "Top 5", "Many", "ECE"]
    assert "Few-shot" not in page.text
    assert "training_curve.png" not in plots(report)
    assert len(page.attributes("img")) == 6
    assert "report.json lists all 101 classes" in page.text


def test_a_set_as_unequal_as_its_source_and_its_test_part(report: Any, tmp_path: Path) -> None:
    changed = copy.deepcopy(report)
    changed["subset"]["rule"]["imbalance_factor"] = 0.0
    changed["per_class"][0]["test_images"] += 1
    render_report(changed, tmp_path / "report.html")
    text = " ".join(Page((tmp_path / "report.html").read_text(encoding="utf-8")).text.split())
    assert "SHIKE on digits, imbalance factor of the set itself" in text
    assert "balanced test images" not in text
    assert "on test images as unequal as the test part" in text


def test_a_page_that_cannot_be_written(report: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match="cannot write"):
        render_report(report, tmp_path / "file" / "report.html")


def test_the_gates_decision_goes_into_the_page_that_is_there(report, tmp_path) -> None:
    render_report(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Not judged by the gate yet." in Page(page).text
    judged = with_decision(page, {"alias": "challenger", "reasons": ["a < b", "worse"]})
    assert "Challenger: a < b. worse." in Page(judged).text
    assert "Not judged" not in judged
    again = with_decision(judged, {"alias": "champion", "reasons": ["better"]})
    assert "Champion: better." in Page(again).text
    assert "worse" not in again
    with pytest.raises(ValueError, match="no place for the gate's decision; evaluate"):
        with_decision("<p>another page</p>", {"alias": "champion", "reasons": []})

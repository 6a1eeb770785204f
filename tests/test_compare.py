"""Evaluations side by side: by hand on a few images, and what cannot be compared."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from shike_core import stages
from shike_core.compare import as_text, read_evaluation
from shike_core.errors import ArtifactError, ComparisonError
from shike_core.evaluate import measure, write_predictions

COUNTS = [150, 50, 5]
LABELS = np.repeat(np.arange(3), 10)
NAMES = ["cat", "<b>dog</b>|", "eel"]


def answers(*right: int) -> torch.Tensor:
    """Logits of one expert that has the first so many images of each class right."""
    predicted = np.where(np.tile(np.arange(10), 3) < np.repeat(right, 10), LABELS, (LABELS + 1) % 3)
    return 3.0 * torch.nn.functional.one_hot(torch.tensor(predicted), 3)[:, None]


def write(folder: Path, logits: torch.Tensor, seed: int = 0, **more: Any) -> Path:
    """What an evaluation leaves."""
    counts = np.array(more.pop("class_counts", COUNTS))
    train = {"seed": seed, "device": "cpu", "width": 16} | more.pop("train", {})
    report = measure(logits, torch.tensor(LABELS), counts, NAMES, 15)
    report |= {"test_digest": "e" * 64, "subset_digest": "d" * 64, "train": train}
    report |= {"subset": {"rule": {"dataset": "pets", "imbalance_factor": 30.0}}} | more
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report))
    write_predictions(folder / "predictions.parquet", np.arange(30), LABELS, logits)
    return folder


@pytest.fixture
def two(tmp_path) -> list[Path]:
    """The second is worse on the largest class and better on the smallest."""
    return [
        write(tmp_path / "a", answers(10, 5, 0)),
        write(tmp_path / "b", answers(7, 5, 9), seed=1),
    ]


def test_differences_by_hand(two, tmp_path):
    report = stages.compare(two, tmp_path / "out")
    found = {row["group"]: row for row in report["differences"]}
    assert [row["run"] for row in report["differences"]] == ["b"] * 4
    assert found["all"]["difference"] == pytest.approx(6 / 30)
    assert (found["all"]["only_first"], found["all"]["only_second"]) == (3, 9)
    assert found["all"]["p_value"] == pytest.approx(2 * (1 + 12 + 66 + 220) / 2**12)
    assert found["many_shot"]["difference"] == pytest.approx(-0.3)
    assert found["medium_shot"] | {"run": ""} == {
        "run": "", "group": "medium_shot", "images": 10, "classes": 1, "difference": 0, "low": 0,
        "high": 0, "p_value": 1, "p_adjusted": 1, "only_first": 0, "only_second": 0,
    }  # fmt: skip
    assert found["few_shot"]["p_value"] == pytest.approx(2 / 2**9)
    assert found["few_shot"]["p_adjusted"] == pytest.approx(4 * 2 / 2**9)
    assert 0.6 < found["few_shot"]["low"] < 0.9 < found["few_shot"]["high"] <= 1
    assert report["agreement"] == {"b": pytest.approx(18 / 30)}


def test_classes_that_changed_by_hand(two, tmp_path):
    changed = stages.compare(two, tmp_path / "out")["changed"]["b"]
    (gained,), (lost,) = changed["gained"], changed["lost"]
    assert (gained["name"], gained["base_right"], gained["run_right"]) == ("eel", 0, 9)
    assert (lost["name"], lost["base_right"], lost["run_right"]) == ("cat", 10, 7)
    assert gained["p_adjusted"] == pytest.approx(3 * 2 / 2**9)
    assert lost["difference"] == pytest.approx(-0.3)


def test_intervals_of_the_accuracies(two, tmp_path):
    first, second = stages.compare(two, tmp_path / "out")["runs"]
    assert first["metrics"]["accuracy"] == 0.5
    assert first["intervals"]["accuracy"] == pytest.approx((0.3315, 0.6685), abs=1e-4)
    assert second["intervals"]["few_shot/accuracy"][1] < 1
    assert "expected_calibration_error" not in first["intervals"]


def test_where_runs_differ(tmp_path):
    folders = [write(tmp_path / "a", answers(5, 5, 5))]
    folders += [write(tmp_path / "b", answers(5, 5, 5), seed=3, train={"device": "cuda"})]
    report = stages.compare(folders, tmp_path / "out")
    assert report["differ"] == {"seed": [0, 3]}


def test_seeds_of_two_configurations(tmp_path):
    folders = [
        write(tmp_path / f"{width}-{seed}", answers(right, 5, 5), seed, train={"width": width})
        for width, seed, right in ((16, 0, 4), (16, 1, 7), (32, 0, 7), (32, 1, 10), (32, 2, 10))
    ]
    base, other = stages.compare(folders, tmp_path / "out")["configurations"]
    assert (base["runs"], base["seeds"], base["lead"]) == (["16-0", "16-1"], [0, 1], {})
    assert base["metrics"]["accuracy"]["mean"] == pytest.approx((14 + 17) / 60)
    assert base["metrics"]["accuracy"]["std"] == pytest.approx(3 / 30 / 2**0.5)
    assert other["seeds"] == [0, 1, 2]
    lead = other["lead"]["accuracy"]
    assert (lead["n"], lead["mean"], lead["std"]) == pytest.approx((2, 3 / 30, 0))


def test_runs_of_different_configurations_are_no_seeds(two, tmp_path):
    both = stages.compare(two, tmp_path / "out")
    assert len(both["configurations"]) == 1
    folders = [two[0], write(tmp_path / "c", answers(1, 1, 1), train={"width": 8})]
    assert stages.compare(folders, tmp_path / "out")["configurations"] == []


def test_a_training_made_once_more_is_no_further_seed(tmp_path):
    names = ["a", "again", "b", "b-again"]
    runs = [(0, 16, 4), (0, 16, 4), (0, 32, 7), (0, 32, 7)]
    folders = [
        write(tmp_path / name, answers(right, 5, 5), seed, train={"width": width})
        for name, (seed, width, right) in zip(names, runs, strict=True)
    ]
    assert stages.compare(folders, tmp_path / "out")["configurations"] == []
    folders.append(write(tmp_path / "c", answers(8, 5, 5), 1, train={"width": 32}))
    base, other = stages.compare(folders, tmp_path / "out")["configurations"]
    assert (base["seeds"], other["seeds"]) == ([0], [0, 1])
    assert other["lead"]["accuracy"]["n"] == 1


def test_trainings_on_other_images_are_no_seeds(tmp_path):
    counts = {"class_counts": [140, 50, 5]}
    folders = [write(tmp_path / "a", answers(5, 5, 5))]
    folders.append(write(tmp_path / "b", answers(6, 5, 5), seed=1, **counts))
    assert stages.compare(folders, tmp_path / "out")["configurations"] == []


def test_images_in_another_order_are_the_same(two, tmp_path):
    expected = stages.compare(two, tmp_path / "out")["differences"]
    path = two[1] / "predictions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(np.random.default_rng(0).permutation(30)), path)
    assert stages.compare(two, tmp_path / "out")["differences"] == expected


def test_an_empty_shot_group_is_left_out(tmp_path):
    counts = {"class_counts": [150, 50, 40]}
    folders = [write(tmp_path / name, answers(5, 5, 5), **counts) for name in "ab"]
    report = stages.compare(folders, tmp_path / "out")
    assert [row["group"] for row in report["differences"]] == ["all", "many_shot", "medium_shot"]
    assert "few_shot/accuracy" not in report["runs"][0]["metrics"]
    assert "Few" not in as_text(report)


def test_shot_groups_are_those_of_the_base(two, tmp_path):
    other = write(tmp_path / "c", answers(5, 5, 5), class_counts=[5, 50, 150])
    report = stages.compare([two[0], other], tmp_path / "out")
    assert not report["same_training_counts"]
    few = next(row for row in report["differences"] if row["group"] == "few_shot")
    assert few["difference"] == pytest.approx(0.5)
    assert "shot groups are those of the base" in (tmp_path / "out" / "compare.html").read_text()
    assert "the shot groups are the base's" in (tmp_path / "out" / "compare.md").read_text()


def test_every_table_has_the_base_s_shot_groups(tmp_path):
    """Of the other model the first class is the small one."""
    counts = {"class_counts": [5, 50, 150]}
    folders = [write(tmp_path / f"a{seed}", answers(10, 5, 2), seed) for seed in (0, 1)]
    folders += [write(tmp_path / f"b{seed}", answers(9, 5, 6), seed, **counts) for seed in (0, 1)]
    report = stages.compare(folders, tmp_path / "out")
    few = "few_shot/accuracy"
    assert [row["metrics"][few] for row in report["runs"]] == pytest.approx([0.2, 0.2, 0.6, 0.6])
    assert report["runs"][2]["intervals"][few][0] < 0.6 < report["runs"][2]["intervals"][few][1]
    base, other = report["configurations"]
    assert (base["metrics"][few]["mean"], other["metrics"][few]["mean"]) == pytest.approx(
        (0.2, 0.6)
    )
    assert other["lead"][few]["mean"] == pytest.approx(0.4)


def test_other_bins_of_calibration_are_told_and_make_no_seeds(tmp_path):
    folders = [
        write(tmp_path / str(bins), answers(5, 5, 5), seed, config={"calibration_bins": bins})
        for seed, bins in enumerate((15, 30))
    ]
    report = stages.compare(folders, tmp_path / "out")
    assert report["differ"]["calibration bins"] == [15, 30]
    assert report["configurations"] == []


def test_what_is_written(two, tmp_path):
    report = stages.compare(two, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == json.loads(
        json.dumps(report)
    )
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["a", "b"]
    assert float(rows[1]["few_shot/accuracy"]) == 0.9
    assert [row["seed"] for row in rows] == ["0", "1"]
    text = (tmp_path / "out" / "compare.md").read_text()
    assert text == as_text(report)
    assert "b on Few-shot classes: 90.0 points better" in text
    assert "b on Many-shot classes: 30.0 points of difference, which chance may explain" in text
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "&lt;b&gt;dog" not in page  # that class did not change
    assert not re.search(r"https?://|<script", page)
    assert page.count("data:image/png;base64,") == 2


def test_names_are_as_long_as_it_takes(two, tmp_path):
    folders = [two[0].rename(tmp_path / "x"), two[1].rename(tmp_path / "y")]
    inside = []
    for folder in folders:
        (folder / "evaluation").mkdir()
        for file in ("report.json", "predictions.parquet"):
            (folder / file).rename(folder / "evaluation" / file)
        inside.append(folder / "evaluation")
    report = stages.compare(inside, tmp_path / "out")
    assert [row["name"] for row in report["runs"]] == ["x/evaluation", "y/evaluation"]


def test_ten_thousand_images_take_seconds(tmp_path):
    generator = np.random.default_rng(0)
    names, counts = [f"class {i}" for i in range(100)], np.geomspace(500, 5, 100).astype(int)
    labels = np.tile(np.arange(100), 100)
    folders = []
    for i in range(3):
        logits = torch.tensor(generator.normal(size=(10_000, 1, 100)), dtype=torch.float32)
        logits[np.arange(10_000), 0, labels] += 2
        report = measure(logits, torch.tensor(labels), counts, names, 15)
        folders.append(tmp_path / str(i))
        folders[-1].mkdir()
        (folders[-1] / "report.json").write_text(json.dumps(report | {"test_digest": "e"}))
        write_predictions(folders[-1] / "predictions.parquet", np.arange(10_000), labels, logits)
    report = stages.compare(folders, tmp_path / "out")
    assert len(report["differences"]) == 8
    assert all(row["low"] < 0 < row["high"] for row in report["differences"][:1])


# --- what cannot be compared -----------------------------------------------------------------


def test_one_is_not_enough(two, tmp_path):
    with pytest.raises(ComparisonError, match=r"^1 evaluation cannot be compared; give two"):
        stages.compare(two[:1], tmp_path / "out")
    with pytest.raises(ComparisonError, match=r"^0 evaluations cannot be compared"):
        stages.compare([], tmp_path / "out")


def test_the_same_one_twice(two, tmp_path):
    with pytest.raises(ComparisonError, match=r"a is there twice; give each evaluation once"):
        stages.compare([two[0], two[0]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_test_images(two, tmp_path):
    other = write(tmp_path / "c", answers(9, 9, 9), test_digest="f" * 64)
    with pytest.raises(ComparisonError, match=r"other test images than a \(ffff.*--across-test"):
        stages.compare([two[0], other], tmp_path / "out")
    report = stages.compare([two[0], other], tmp_path / "out", across_test_sets=True)
    assert (report["paired"], report["differences"], report["changed"]) == (False, [], {})
    assert "nothing is tested" in as_text(report)
    assert "different test images" in (tmp_path / "out" / "compare.html").read_text()


def test_predictions_of_other_images_than_the_report_says(two, tmp_path):
    write_predictions(two[1] / "predictions.parquet", np.arange(30) + 1, LABELS, answers(5, 5, 5))
    with pytest.raises(ComparisonError, match=r"not of the same images, although"):
        stages.compare(two, tmp_path / "out")


def test_other_classes(two, tmp_path):
    other = write(tmp_path / "c", answers(5, 5, 5))
    report = json.loads((other / "report.json").read_text())
    report["per_class"].append(report["per_class"][0])
    (other / "report.json").write_text(json.dumps(report))
    with pytest.raises(
        ComparisonError, match=r"c is a model of 4 \(cat, .*\) classes and a of 3 \("
    ):
        stages.compare([two[0], other], tmp_path / "out")
    report["per_class"] = [
        row | {"name": f"other {row['name']}"} for row in report["per_class"][:3]
    ]
    (other / "report.json").write_text(json.dumps(report))
    with pytest.raises(ComparisonError, match=r"only models of the same classes"):
        stages.compare([two[0], other], tmp_path / "out", across_test_sets=True)


def test_no_predictions(two, tmp_path):
    (two[1] / "predictions.parquet").unlink()
    with pytest.raises(ComparisonError, match=r"b has no stored predictions .* evaluate it again"):
        stages.compare(two, tmp_path / "out")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def without_answers(path: Path) -> None:
    pq.write_table(pa.table({"source_index": [1], "label": [0]}), path)


def with_words(path: Path) -> None:
    pq.write_table(pa.table({"source_index": ["x"], "label": [0], "predicted": [0]}), path)


@pytest.mark.parametrize("damage", [cut_off, without_answers, with_words])
def test_damaged_predictions(two, damage):
    damage(two[1] / "predictions.parquet")
    with pytest.raises(ComparisonError, match=r"is damaged or holds no predictions .*b again"):
        read_evaluation(two[1])


def test_predictions_of_another_evaluation(two):
    write_predictions(
        two[1] / "predictions.parquet", np.arange(3), LABELS[:3], answers(5, 5, 5)[:3]
    )
    with pytest.raises(ComparisonError, match=r"not of the same evaluation \(3 predictions, 30"):
        read_evaluation(two[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ("[]", "is not the report"), ('{"metrics": {}}', "it has no counts")],
)
def test_another_file_in_place_of_the_report(two, content, message):
    (two[0] / "report.json").write_text(content)
    with pytest.raises(ComparisonError, match=f"{message}.*give the directory of an evaluation"):
        read_evaluation(two[0])


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ComparisonError, match=r"nowhere/report\.json cannot be read"):
        read_evaluation(tmp_path / "nowhere")


def test_a_place_that_cannot_be_written(two, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="not a directory"):
        stages.compare(two, tmp_path / "file" / "out")

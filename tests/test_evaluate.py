"""Running a small model, and the report's figures on five images worked out by hand."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from shike_core import checkpoint as checkpoints
from shike_core import stages
from shike_core.config import EvaluateConfig, SubsetConfig, TrainConfig
from shike_core.data.augment import normalise
from shike_core.data.loader import ImageTable
from shike_core.data.manifest import read_subset
from shike_core.errors import ArtifactError, CheckpointError
from shike_core.evaluate import choose_examples, measure, predict, write_predictions
from shike_core.intervals import wilson_interval
from shike_core.model import Shike, shike_resnet32
from shike_core.pages import worst_classes

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture
def model() -> Shike:
    torch.manual_seed(0)
    return shike_resnet32(num_classes=3, num_experts=2, width=2)


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (7, 3, 8, 8), generator=generator, dtype=torch.uint8)


@pytest.fixture
def table(images: Tensor) -> ImageTable:
    return ImageTable(images, torch.arange(7) % 3)


def test_predict_gives_the_stage2_logits_in_eval_mode(
    model: Shike, table: ImageTable, images: Tensor
) -> None:
    model.train()
    logits = predict(model, table, MEAN, STD, batch_size=3)
    assert not model.training
    assert (logits.shape, logits.dtype, logits.device.type) == ((7, 2, 3), torch.float32, "cpu")
    with torch.no_grad():
        expected = model(normalise(images, MEAN, STD), stage=2)
    torch.testing.assert_close(logits, expected)


def test_predict_does_not_depend_on_the_batch_size(model: Shike, table: ImageTable) -> None:
    one_by_one = predict(model, table, MEAN, STD, batch_size=1)
    together = predict(model, table, MEAN, STD, batch_size=100)
    torch.testing.assert_close(one_by_one, together, rtol=1e-4, atol=1e-4)


def test_predict_of_mirror_images(model: Shike, table: ImageTable) -> None:
    mirrored = predict(model, table, MEAN, STD, batch_size=3, flip=True)
    turned = ImageTable(table.images.flip(-1), table.labels)
    assert torch.equal(mirrored, predict(model, turned, MEAN, STD, batch_size=3))
    assert not torch.allclose(mirrored, predict(model, table, MEAN, STD, batch_size=3))


def test_predict_refuses_logits_that_are_not_finite(model: Shike, table: ImageTable) -> None:
    with torch.no_grad():
        for parameter in model.stage2_heads[1].parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(CheckpointError, match=r"not finite for 7 of 7 test images.*float32"):
        predict(model, table, MEAN, STD, batch_size=4)


def test_predictions_round_trip(tmp_path: Path) -> None:
    logits = torch.randn(4, 2, 3)
    path = tmp_path / "predictions.parquet"
    write_predictions(path, np.array([9, 8, 7, 6]), np.array([0, 1, 2, 0]), logits)
    table = pq.read_table(path)
    assert table.column_names == [
        "source_index",
        "label",
        "predicted",
        "logits_expert_0",
        "logits_expert_1",
    ]
    assert table["source_index"].to_pylist() == [9, 8, 7, 6]
    assert table["label"].to_pylist() == [0, 1, 2, 0]
    assert table["predicted"].to_pylist() == logits.mean(dim=1).argmax(dim=1).tolist()
    for i in (0, 1):
        assert table.schema.field(f"logits_expert_{i}").type == pa.list_(pa.float32())
        assert table[f"logits_expert_{i}"].to_pylist() == logits[:, i].tolist()


def test_predictions_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match="cannot write"):
        write_predictions(
            tmp_path / "file" / "predictions.parquet",
            np.array([0]),
            np.array([0]),
            torch.zeros(1, 1, 2),
        )


def votes(*by_image: tuple[tuple[int, float], ...], classes: int) -> Tensor:
    """Logits (images, num_experts, classes): each expert gives one class this logit, others 0."""
    logits = torch.zeros(len(by_image), len(by_image[0]), classes)
    for n, experts in enumerate(by_image):
        for expert, (label, strength) in enumerate(experts):
            logits[n, expert, label] = strength
    return logits


LOGITS = votes(
    ((0, 2.0), (0, 1.0)),  # ensemble 0
    ((0, 2.0), (1, 1.0)),  # ensemble 0
    ((1, 2.0), (1, 1.0)),  # ensemble 1
    ((0, 2.0), (1, 3.0)),  # ensemble 1
    ((0, 2.0), (2, 1.0)),  # ensemble 0
    classes=3,
)
TARGETS = torch.tensor([0, 0, 1, 1, 2])
CLASS_COUNTS = np.array([150, 50, 10])
NAMES = ("cat", "dog", "eel")


@pytest.fixture
def report() -> dict[str, Any]:
    return measure(LOGITS, TARGETS, CLASS_COUNTS, NAMES, calibration_bins=15)


def test_metrics_by_hand(report: dict[str, Any]) -> None:
    expected = {
        "test/accuracy": 4 / 5,
        "test/top5_accuracy": 1.0,
        "test/mean_class_accuracy": 2 / 3,
        "test/many_shot/accuracy": 1.0,
        "test/medium_shot/accuracy": 1.0,
        "test/few_shot/accuracy": 0.0,
        "test/expert_0/accuracy": 3 / 5,
        "test/expert_0/top5_accuracy": 1.0,
        "test/expert_0/mean_class_accuracy": 1 / 2,
        "test/expert_0/many_shot/accuracy": 1.0,
        "test/expert_0/medium_shot/accuracy": 0.5,
        "test/expert_0/few_shot/accuracy": 0.0,
        "test/expert_1/accuracy": 4 / 5,
        "test/expert_1/top5_accuracy": 1.0,
        "test/expert_1/mean_class_accuracy": 2.5 / 3,
        "test/expert_1/many_shot/accuracy": 0.5,
        "test/expert_1/medium_shot/accuracy": 1.0,
        "test/expert_1/few_shot/accuracy": 1.0,
    }
    calibration = {
        f"test/{who}expected_calibration_error" for who in ("", "expert_0/", "expert_1/")
    }
    assert report["metrics"].keys() == expected.keys() | calibration
    assert {key: report["metrics"][key] for key in expected} == pytest.approx(expected)


def test_intervals_pairs_and_calibration_by_hand(report: dict[str, Any]) -> None:
    assert report["intervals"].keys() == {"all", "many_shot", "medium_shot", "few_shot"}
    assert report["intervals"]["all"] == list(wilson_interval(4, 5))
    (pair,) = report["confused"]
    (wrong,) = (i for i in range(5) if LOGITS.mean(dim=1)[i].argmax() != TARGETS[i])
    true, other = int(TARGETS[wrong]), int(LOGITS.mean(dim=1)[wrong].argmax())
    assert pair["labels"] == sorted([true, other])
    assert pair["classes"] == [NAMES[label] for label in pair["labels"]]
    assert pair["taken_for_the_other"] == [int(label == true) for label in pair["labels"]]
    assert report["calibration"]["temperature"] is None
    groups = report["calibration"]["groups"]
    assert sum(row["images"] for name, row in groups.items() if name != "all") == 5
    assert groups["all"]["accuracy"] == pytest.approx(4 / 5)
    confidence = LOGITS.mean(dim=1).double().softmax(dim=1).amax(dim=1).mean()
    assert groups["all"]["confidence"] == pytest.approx(float(confidence))


def test_a_temperature_moves_confidence_and_nothing_else() -> None:
    plain, scaled = (
        measure(LOGITS, TARGETS, CLASS_COUNTS, NAMES, 15, temperature=t) for t in (None, 2.0)
    )
    new = scaled["metrics"].pop("test/scaled/expected_calibration_error")
    assert scaled["metrics"] == plain["metrics"]
    by_hand = measure(LOGITS / 2, TARGETS, CLASS_COUNTS, NAMES, 15)
    assert new == by_hand["metrics"]["test/expected_calibration_error"]
    of_few = scaled["calibration"]["groups"]["few_shot"]
    assert of_few["scaled_confidence"] == by_hand["calibration"]["groups"]["few_shot"]["confidence"]


def test_the_surest_right_and_wrong_images_of_the_worst_classes_are_chosen(
    report: dict[str, Any],
) -> None:
    chosen = choose_examples(LOGITS, TARGETS, report["per_class"])
    assert [row["label"] for row in chosen] == [
        row["label"] for row in worst_classes(report["per_class"])
    ]
    probabilities = LOGITS.mean(dim=1).double().softmax(dim=1)
    seen = []
    for row in chosen:
        for kind in ("right", "wrong"):
            for one in row[kind]:
                seen.append(one["row"])
                assert TARGETS[one["row"]] == row["label"]
                assert (one["predicted"] == row["label"]) == (kind == "right")
                assert one["probability"] == float(probabilities[one["row"]].max())
            sure = [one["probability"] for one in row[kind]]
            assert sure == sorted(sure, reverse=True)
    assert sorted(seen) == list(range(5))


FLIPPED = votes(
    ((0, 2.0), (0, 1.0)),
    ((2, 8.0), (2, 8.0)),  # averaged 4.0 for class 2, and class 0 at 0.5
    ((1, 2.0), (1, 1.0)),
    ((0, 2.0), (1, 3.0)),
    ((2, 2.0), (2, 3.0)),  # averaged 1.5 for class 2, and class 0 at 0.5
    classes=3,
)


def test_metrics_over_image_and_mirror_image_by_hand(report: dict[str, Any]) -> None:
    both = measure(LOGITS, TARGETS, CLASS_COUNTS, NAMES, 15, FLIPPED)
    apart = {k: v for k, v in both["metrics"].items() if k.startswith("test/flip/")}
    expected = {
        "test/flip/accuracy": 4 / 5,
        "test/flip/top5_accuracy": 1.0,
        "test/flip/mean_class_accuracy": 2.5 / 3,
        "test/flip/many_shot/accuracy": 0.5,
        "test/flip/medium_shot/accuracy": 1.0,
        "test/flip/few_shot/accuracy": 1.0,
    }
    calibration = apart.pop("test/flip/expected_calibration_error")
    assert apart == pytest.approx(expected)
    averaged = torch.tensor([[1.5, 0, 0], [0.5, 0.25, 4], [0, 1.5, 0], [1, 1.5, 0], [0.5, 0, 1.5]])
    confidence = averaged.double().softmax(dim=1).amax(dim=1)
    right = torch.tensor([1, 0, 1, 1, 1])
    bins = (confidence * 15).ceil()
    gaps = [abs((right - confidence)[bins == b].sum().item()) for b in range(1, 16)]
    assert calibration == pytest.approx(sum(gaps) / 5)
    unchanged = {k: v for k, v in both["metrics"].items() if not k.startswith("test/flip/")}
    assert both | {"metrics": unchanged} == report


def test_mirror_images_that_are_the_images_change_nothing(report: dict[str, Any]) -> None:
    found = measure(LOGITS, TARGETS, CLASS_COUNTS, NAMES, 15, LOGITS)["metrics"]
    for key, value in report["metrics"].items():
        if "expert_" not in key:
            assert found[key.replace("test/", "test/flip/")] == value


def test_rows_of_the_classes_by_hand(report: dict[str, Any]) -> None:
    assert report["per_class"][1] == {
        "label": 1,
        "name": "dog",
        "train_images": 50,
        "shot_group": "medium_shot",
        "test_images": 2,
        "accuracy": 1.0,
        "expert_accuracy": [0.5, 1.0],
        "best_expert": 1,
    }
    assert [row["best_expert"] for row in report["per_class"]] == [0, 1, 1]
    assert report["best_expert"] == {
        "all": {"expert_0": 1, "expert_1": 2, "tie": 0},
        "many_shot": {"expert_0": 1, "expert_1": 0, "tie": 0},
        "medium_shot": {"expert_0": 0, "expert_1": 1, "tie": 0},
        "few_shot": {"expert_0": 0, "expert_1": 1, "tie": 0},
    }


def test_confusion_and_counts_by_hand(report: dict[str, Any]) -> None:
    by_class = {"labels": ["cat", "dog", "eel"], "matrix": [[2, 0, 0], [0, 2, 0], [1, 0, 0]]}
    assert report["confusion_matrix"] == report["confusion_display"] == by_class
    assert report["counts"] == {
        "test_images": 5,
        "train_images": 210,
        "classes": 3,
        "experts": 2,
    }


def test_reliability_rows_are_behind_the_calibration_error(report: dict[str, Any]) -> None:
    rows = report["reliability"]
    assert sum(row["num_images"] for row in rows) == 5
    error = sum(row["num_images"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / 5
    assert report["metrics"]["test/expected_calibration_error"] == pytest.approx(error)


def test_experts_that_answer_alike_tie_everywhere() -> None:
    logits = LOGITS[:, :1].expand(-1, 3, -1)
    report = measure(logits, TARGETS, CLASS_COUNTS, NAMES, calibration_bins=15)
    assert report["best_expert"]["all"] == {"expert_0": 0, "expert_1": 0, "expert_2": 0, "tie": 3}
    assert {row["best_expert"] for row in report["per_class"]} == {"tie"}


def test_a_single_expert_is_the_ensemble() -> None:
    report = measure(LOGITS[:, :1], TARGETS, CLASS_COUNTS, NAMES, calibration_bins=15)
    found = report["metrics"]
    of_expert = {key: value for key, value in found.items() if key.startswith("test/expert_0/")}
    assert len(of_expert) == len(found) / 2
    for key, value in of_expert.items():
        assert found[key.replace("expert_0/", "")] == value


def test_empty_groups_and_untested_classes_are_left_out() -> None:
    """Class 1 is the only medium-shot class and has no test images; no class is few-shot."""
    seen = TARGETS != 1
    report = measure(LOGITS[seen], TARGETS[seen], np.array([150, 50, 120]), NAMES, 15)
    assert not any("few_shot" in key or "medium_shot" in key for key in report["metrics"])
    assert report["metrics"]["test/mean_class_accuracy"] == 0.5
    assert report["best_expert"].keys() == {"all", "many_shot"}
    row = report["per_class"][1]
    assert (row["test_images"], row["accuracy"], row["best_expert"]) == (0, None, None)
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    ("classes", "rows_kept", "rows_shown"), [(20, 20, 20), (21, 21, 3), (100, 100, 3), (101, 3, 3)]
)
def test_large_confusion_matrices_are_by_shot_group(
    classes: int, rows_kept: int, rows_shown: int
) -> None:
    counts = np.geomspace(500, 5, classes).astype(np.int64)
    logits = torch.randn(2 * classes, 2, classes, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(classes).repeat(2)
    report = measure(logits, targets, counts, [str(c) for c in range(classes)], 15)
    assert len(report["confusion_matrix"]["matrix"]) == rows_kept
    assert len(report["confusion_display"]["matrix"]) == rows_shown
    assert np.sum(report["confusion_display"]["matrix"]) == 2 * classes
    if rows_shown == 3:
        assert report["confusion_display"]["labels"] == ["many_shot", "medium_shot", "few_shot"]
        few = report["confusion_display"]["matrix"][2]
        assert sum(few) == 2 * (counts < 20).sum()


def test_class_counts_of_another_data_set_are_refused() -> None:
    with pytest.raises(ValueError, match="3 classes, but there are 2 class counts and 3 class"):
        measure(LOGITS, TARGETS, np.array([150, 50]), NAMES, calibration_bins=15)


TRAIN_CONFIG = TrainConfig(num_experts=2, width=2, stage1_epochs=2, stage2_epochs=1, device="cpu")
CONFIG = EvaluateConfig(device="cpu")


def no_log(metrics: object, step: int) -> None:
    """Forget the metrics."""


@pytest.fixture(scope="module")
def subset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("subset")
    config = SubsetConfig(dataset="digits", imbalance_factor=20)
    stages.build_subset(config, data_dir=None, out=path, log=no_log)
    return path


def write_checkpoint(path: Path, subset: Path, **changes: Any) -> None:
    """A finished training whose weights are the initial ones."""
    data = read_subset(subset, splits=())
    names = changes.get("class_names", list(data.class_names))
    torch.manual_seed(0)
    content: dict[str, Any] = {
        "config": asdict(TRAIN_CONFIG),
        "training_digest": "",
        "subset_digest": data.digest,
        "class_names": names,
        "class_counts": data.class_counts.tolist(),
        "mean": list(data.mean),
        "std": list(data.std),
        "image_size": data.info["image_size"],
        "model": checkpoints.build_model(TRAIN_CONFIG, len(names)).state_dict(),
        "epoch": 3,
        "history": [{"epoch": e, "train/loss": 2.0 - e, "lr": 0.1} for e in range(3)],
    }
    checkpoints.save(checkpoints.Checkpoint(**content | changes), path / stages.CHECKPOINT)


def test_stage_writes_everything_it_measured(subset: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "trained", subset)
    logged: list[tuple[dict[str, float], int]] = []
    report = stages.evaluate(
        CONFIG,
        subset,
        tmp_path / "trained",
        tmp_path / "out",
        lambda metrics, step: logged.append((dict(metrics), step)),
    )
    assert logged == [(report["metrics"], 3)]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    test = read_subset(subset, splits=("test",)).splits["test"]
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    np.testing.assert_array_equal(table["source_index"], test.source_index)
    right = np.mean(np.array(table["label"]) == np.array(table["predicted"]))
    assert report["metrics"]["test/accuracy"] == pytest.approx(right)
    assert len(list((tmp_path / "out" / "plots").glob("*.png"))) == 7
    assert "Expert 1, depth 2" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert report["trained_on_this_subset"]
    assert report["train"]["num_experts"] == 2
    assert 0 < report["train"]["parameters_deployed"] < report["train"]["parameters"]


def test_stage_measures_mirror_images_apart(subset: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "trained", subset)
    config = EvaluateConfig(device="cpu", flip=True)
    report = stages.evaluate(config, subset, tmp_path / "trained", tmp_path / "out", no_log)
    ordinary = {k for k in report["metrics"] if "expert_" not in k and "flip" not in k}
    apart = {k for k in report["metrics"] if k.startswith("test/flip/")}
    assert apart == {key.replace("test/", "test/flip/") for key in ordinary}

    test = read_subset(subset, splits=("test",)).splits["test"]
    trained = checkpoints.load_trained(tmp_path / "trained" / stages.CHECKPOINT)
    pixels = torch.tensor(test.images).permute(0, 3, 1, 2)
    mirrored = torch.tensor(test.images[:, :, ::-1].copy()).permute(0, 3, 1, 2)
    with torch.no_grad():
        of_images, of_mirrored = (
            trained.model(normalise(x, trained.mean, trained.std)).mean(dim=1)
            for x in (pixels, mirrored)
        )
    for prefix, logits in (("test/", of_images), ("test/flip/", of_images + of_mirrored)):
        right = (logits.argmax(dim=1).numpy() == test.labels).mean()
        assert report["metrics"][f"{prefix}accuracy"] == pytest.approx(right)
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    assert table["predicted"].to_pylist() == of_images.argmax(dim=1).tolist()
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "with test-time augmentation" in page


def test_stage_takes_a_plain_network_that_was_never_retrained(subset: Path, tmp_path: Path) -> None:
    config = replace(
        TRAIN_CONFIG, stage1_epochs=3, stage2_epochs=0, fusion=False, classifier="linear"
    )
    torch.manual_seed(0)
    model = checkpoints.build_model(config, 10)
    model.deploy_stage1_heads()
    trained = tmp_path / "trained"
    write_checkpoint(trained, subset, config=asdict(config), model=model.state_dict())
    report = stages.evaluate(CONFIG, subset, trained, tmp_path / "out", no_log)
    assert report["export"]["largest_difference"] < 1e-4
    assert report["train"]["expert_depths"] == []
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Expert 1</th>" in page  # without a depth
    assert "classifier retraining begins" not in page


def test_stage_says_when_the_model_was_trained_on_another_subset(
    subset: Path, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "trained", subset, subset_digest="0" * 64)
    report = stages.evaluate(CONFIG, subset, tmp_path / "trained", tmp_path / "out", no_log)
    assert not report["trained_on_this_subset"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "trained on another subset" in page


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "dog"], "trained for 2 classes, but the subset has 10"),
        ([*"012345678", "cat"], "class 9 named 'cat', but the subset calls it '9'"),
    ],
)
def test_stage_refuses_a_model_of_other_classes(
    subset: Path, tmp_path: Path, names: list[str], message: str
) -> None:
    write_checkpoint(tmp_path / "trained", subset, class_names=names)
    with pytest.raises(CheckpointError, match=message):
        stages.evaluate(CONFIG, subset, tmp_path / "trained", tmp_path / "out", no_log)
    assert not (tmp_path / "out").exists()

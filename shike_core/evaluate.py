"""Running a trained model over the test images, and measuring what it answers."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shike_core import metrics
from shike_core.data.augment import normalise
from shike_core.data.loader import Table
from shike_core.data.long_tail import shot_groups
from shike_core.data.split import Split
from shike_core.data.storage import StoredImages
from shike_core.data.views import EvaluationView
from shike_core.device import whole_float32
from shike_core.errors import CheckpointError
from shike_core.files import atomic_write
from shike_core.intervals import wilson_interval
from shike_core.pages import worst_classes
from shike_core.shifts import accuracy_under_shifts

MAX_CLASSES_KEPT = 100
"""Classes up to which the report holds the whole confusion matrix."""
PAIRS_KEPT = 10
"""Pairs of classes told as the most confused ones."""
CLASSES_WITH_EXAMPLES = 5
EXAMPLES_OF_A_KIND = 4
MAX_CLASSES_SHOWN = 20
"""Classes up to which the confusion matrix is drawn class by class."""


def predict(
    model: nn.Module,
    table: Table,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    flip: bool = False,
) -> Tensor:
    """Logits of every expert's stage-2 head for every image.

    Args:
        model: called as ``model(images, stage=2)``; it is moved to the table's device and left
            in eval mode.
        table: of the images.
        mean: of each channel, as fractions of full brightness.
        std: of each channel, as fractions of full brightness.
        batch_size: images per forward pass.
        flip: show the model each image's mirror image instead.

    Returns:
        float32 (images, num_experts, num_classes) on the CPU.

    Raises:
        CheckpointError: a logit is not finite.
        ShikeError: the images cannot be had.
    """
    model.to(table.device).eval()
    with torch.inference_mode(), whole_float32():
        answers = []
        for pixels in table.batches(batch_size):
            pixels = pixels.flip(-1) if flip else pixels
            answers.append(model(normalise(pixels, mean, std), stage=2).float().cpu())
    logits = torch.cat(answers)  # (images, num_experts, num_classes)
    broken = ~logits.isfinite().flatten(1).all(dim=1)  # (images,)
    if broken.any():
        raise CheckpointError(
            f"the model's logits are not finite for {int(broken.sum())} of {len(logits)} test "
            "images; its weights are damaged or training diverged. Evaluate an earlier "
            "checkpoint, or train again with precision=float32."
        )
    return logits


def write_predictions(
    path: Path, source_index: NDArray[np.int64], labels: NDArray[np.int64], logits: Tensor
) -> None:
    """Write one row per test image: where it came from, its label, the ensemble's answer, logits.

    Columns: ``source_index``, ``label``, ``predicted`` (int64) and for each expert
    ``logits_expert_0`` ... (list of float32, one per class).

    Args:
        path: the Parquet file.
        source_index: position of each image in the test split of its source, (images,).
        labels: (images,).
        logits: (images, num_experts, num_classes).

    Raises:
        ArtifactError: the file cannot be written.
    """
    predicted = metrics.ensemble_logits(logits).argmax(dim=1)
    columns: dict[str, Any] = {
        "source_index": source_index,
        "label": labels,
        "predicted": predicted.numpy(),
    }
    offsets = np.arange(len(labels) + 1, dtype=np.int32) * logits.shape[2]
    for i, of_expert in enumerate(logits.unbind(dim=1)):
        values = of_expert.contiguous().flatten().numpy()
        columns[f"logits_expert_{i}"] = pa.ListArray.from_arrays(offsets, values)
    with atomic_write(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def measure(
    logits: Tensor,
    targets: Tensor,
    class_counts: NDArray[np.int64],
    class_names: Sequence[str],
    calibration_bins: int,
    flipped_logits: Tensor | None = None,
    temperature: float | None = None,
    logit_adjustment: float = 1.0,
) -> dict[str, Any]:
    """Everything the report says about the model's answers, as JSON holds it.

    Shot groups without classes, groups and classes without test images and empty confidence bins
    are left out; a class without test images keeps its row in ``per_class`` with null in place of
    an accuracy.

    Args:
        logits: (images, num_experts, num_classes).
        targets: class labels, (images,).
        class_counts: training images of each class, (num_classes,).
        class_names: one for each class.
        calibration_bins: confidence bins of the expected calibration error.
        flipped_logits: for the images' mirror images, as `logits`; if given, the ensemble's mean
            over image and mirror image is measured too, as ``test/flip/...``, and nowhere else.
        temperature: that calibrates the model; if given, the calibration error of its
            probabilities with it is measured too, as ``test/scaled/...``.
        logit_adjustment: what the model was trained with, see `shike_core.shifts`.

    Returns:
        ``metrics`` (flat, by metric key), ``intervals`` (95 % of the ensemble's accuracy over
        ``all`` and each shot group), ``per_class``, ``best_expert``, ``confused`` (pairs of
        classes, the most confused first), ``shifts`` (see `shike_core.shifts`), ``reliability``,
        ``calibration`` (``temperature``, and of all images and each shot group confidence, accuracy
        and calibration error), ``confusion_matrix``, ``confusion_display`` and ``counts``.
    """
    _, num_experts, num_classes = logits.shape
    if not len(class_counts) == len(class_names) == num_classes:
        raise ValueError(
            f"logits are for {num_classes} classes, but there are {len(class_counts)} class counts "
            f"and {len(class_names)} class names; give one of each for every class"
        )
    groups = {name: torch.as_tensor(labels) for name, labels in shot_groups(class_counts).items()}
    ensemble = metrics.ensemble_logits(logits)
    flat = _summary("test/", ensemble, targets, groups, calibration_bins)
    for i, of_expert in enumerate(logits.unbind(dim=1)):
        flat |= _summary(f"test/expert_{i}/", of_expert, targets, groups, calibration_bins)
    if flipped_logits is not None:
        averaged = (ensemble + metrics.ensemble_logits(flipped_logits)) / 2
        flat |= _summary("test/flip/", averaged, targets, groups, calibration_bins)
    calibration = _calibration(ensemble, targets, groups, calibration_bins, temperature)
    if temperature is not None:
        scaled = calibration["groups"]["all"]["scaled_expected_calibration_error"]
        flat["test/scaled/expected_calibration_error"] = scaled
    per_class = _per_class(logits, targets, class_counts, class_names, groups)
    predicted = ensemble.argmax(dim=1)
    by_group = _confusion(*_as_groups(predicted, targets, groups, num_classes), list(groups))
    by_class = by_group
    if num_classes <= MAX_CLASSES_KEPT:
        by_class = _confusion(predicted, targets, list(class_names))
    return {
        "metrics": flat,
        "intervals": _intervals(per_class),
        "per_class": per_class,
        "best_expert": _best_expert(per_class, num_experts),
        "confused": _most_confused(predicted, targets, class_names),
        "shifts": accuracy_under_shifts(ensemble, targets, class_counts, logit_adjustment),
        "reliability": _rows(metrics.reliability(ensemble, targets, calibration_bins)),
        "calibration": calibration,
        "confusion_matrix": by_class,
        "confusion_display": by_class if num_classes <= MAX_CLASSES_SHOWN else by_group,
        "counts": {
            "test_images": len(targets),
            "train_images": int(class_counts.sum()),
            "classes": num_classes,
            "experts": num_experts,
        },
    }


def _summary(
    prefix: str, logits: Tensor, targets: Tensor, groups: dict[str, Tensor], calibration_bins: int
) -> dict[str, float]:
    """Metrics of one classifier, logits (images, num_classes), by key."""
    values = {
        "accuracy": metrics.accuracy(logits, targets),
        "top5_accuracy": metrics.top_k_accuracy(logits, targets, k=5),
        "mean_class_accuracy": metrics.per_class_accuracy(logits, targets).accuracy.mean(),
        "expected_calibration_error": metrics.expected_calibration_error(
            logits, targets, calibration_bins
        ),
    }
    of_groups = metrics.group_accuracy(logits, targets, groups)
    values |= {f"{name}/accuracy": value for name, value in of_groups.items()}
    return {prefix + key: value.item() for key, value in values.items()}


def _calibration(
    ensemble: Tensor,
    targets: Tensor,
    groups: dict[str, Tensor],
    calibration_bins: int,
    temperature: float | None,
) -> dict[str, Any]:
    """Confidence against accuracy, of all images and of each shot group that has some."""
    members = {"all": torch.ones_like(targets, dtype=torch.bool)}
    members |= {name: torch.isin(targets, labels) for name, labels in groups.items()}
    rows: dict[str, dict[str, float]] = {}
    for name, inside in members.items():
        if not inside.any():
            continue
        logits, labels = ensemble[inside].double(), targets[inside]
        error = metrics.expected_calibration_error(logits, labels, calibration_bins)
        rows[name] = {
            "images": len(labels),
            "accuracy": float(metrics.accuracy(logits, labels)),
            "confidence": float(logits.softmax(dim=1).amax(dim=1).mean()),
            "expected_calibration_error": float(error),
        }
        if temperature is not None:
            logits = logits / temperature
            error = metrics.expected_calibration_error(logits, labels, calibration_bins)
            rows[name] |= {
                "scaled_confidence": float(logits.softmax(dim=1).amax(dim=1).mean()),
                "scaled_expected_calibration_error": float(error),
            }
    return {"temperature": temperature, "groups": rows}


def _per_class(
    logits: Tensor,
    targets: Tensor,
    class_counts: NDArray[np.int64],
    class_names: Sequence[str],
    groups: dict[str, Tensor],
) -> list[dict[str, Any]]:
    group_of = {label: name for name, labels in groups.items() for label in labels.tolist()}
    rows: list[dict[str, Any]] = [
        {
            "label": label,
            "name": name,
            "train_images": int(class_counts[label]),
            "shot_group": group_of[label],
            "test_images": 0,
            "accuracy": None,
            "expert_accuracy": None,
            "best_expert": None,
        }
        for label, name in enumerate(class_names)
    ]
    of_ensemble = metrics.per_class_accuracy(metrics.ensemble_logits(logits), targets)
    of_experts = torch.stack(
        [metrics.per_class_accuracy(z, targets).accuracy for z in logits.unbind(dim=1)], dim=1
    )  # (tested classes, num_experts)
    for label, accuracy, count, by_expert in zip(
        *(column.tolist() for column in (*of_ensemble, of_experts)), strict=True
    ):
        best = [i for i, value in enumerate(by_expert) if value == max(by_expert)]
        rows[label] |= {
            "test_images": count,
            "accuracy": accuracy,
            "expert_accuracy": by_expert,
            "best_expert": best[0] if len(best) == 1 else "tie",
        }
    return rows


def _intervals(per_class: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Of the accuracy over all tested classes and over each shot group that has some."""
    tested = [row for row in per_class if row["accuracy"] is not None]
    found = {}
    for group in ("all", *dict.fromkeys(row["shot_group"] for row in tested)):
        inside = [row for row in tested if group in ("all", row["shot_group"])]
        right = sum(round(row["accuracy"] * row["test_images"]) for row in inside)
        found[group] = list(wilson_interval(right, sum(row["test_images"] for row in inside)))
    return found


def _most_confused(
    predicted: Tensor, targets: Tensor, class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Pairs of classes by the images of either that were taken for the other, most first."""
    wrong = predicted != targets
    both = torch.stack([predicted[wrong], targets[wrong]])  # (2, wrong images)
    pairs, count = torch.unique(both.sort(dim=0).values, dim=1, return_counts=True)
    # Of equals the one whose labels come first.
    order = count.argsort(descending=True, stable=True)[:PAIRS_KEPT]
    images = torch.bincount(targets, minlength=len(class_names))

    def taken_for(true: int, other: int) -> int:
        return int(((targets == true) & (predicted == other)).sum())

    return [
        {
            "classes": [class_names[a], class_names[b]],
            "labels": [a, b],
            "taken_for_the_other": [taken_for(a, b), taken_for(b, a)],
            "test_images": [int(images[a]), int(images[b])],
        }
        for a, b in pairs.T[order].tolist()
    ]


def choose_examples(
    logits: Tensor, targets: Tensor, per_class: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Test images that show how the worst classes are got right and wrong.

    Of each class those are taken of whose answer the model was surest: typical right ones, and the
    wrong ones that hurt most.

    Args:
        logits: (images, num_experts, num_classes).
        targets: class labels, (images,).
        per_class: of `measure`.

    Returns:
        For each of the worst classes ``label``, and for ``right`` and ``wrong`` images ``row``, the
        label ``predicted`` and its ``probability``.
    """
    probabilities = metrics.ensemble_logits(logits).double().softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    chosen = []
    for row in worst_classes(per_class)[:CLASSES_WITH_EXAMPLES]:
        of_class = (targets == row["label"]).nonzero().squeeze(1)
        order = of_class[confidence[of_class].argsort(descending=True, stable=True)]
        is_right = predicted[order] == row["label"]
        found: dict[str, Any] = {"label": row["label"]}
        for kind, rows in (("right", order[is_right]), ("wrong", order[~is_right])):
            found[kind] = [
                {
                    "row": i,
                    "predicted": int(predicted[i]),
                    "probability": float(confidence[i]),
                }
                for i in rows[:EXAMPLES_OF_A_KIND].tolist()
            ]
        chosen.append(found)
    return chosen


def pictures(split: Split, rows: Sequence[int], crop_size: int) -> list[NDArray[np.uint8]]:
    """Some images of a split as the network sees them, each (height, width, 3).

    Args:
        split: of a subset.
        rows: which.
        crop_size: pixels a side, of images in files.

    Raises:
        DatasetError: an image cannot be read.
    """
    if isinstance(split.images, np.ndarray):
        return list(split.images[list(rows)])
    assert isinstance(split.images, StoredImages), "what a source lists is no subset yet"
    view = EvaluationView(crop_size)
    contents = split.images.read(rows)
    return [np.asarray(view(content, row)) for content, row in zip(contents, rows, strict=True)]


def _best_expert(per_class: list[dict[str, Any]], num_experts: int) -> dict[str, dict[str, int]]:
    """Tested classes by their best expert, for each shot group and for all together."""
    names = [f"expert_{i}" for i in range(num_experts)] + ["tie"]
    winners: dict[str, Counter[str]] = {}
    for row in per_class:
        if (best := row["best_expert"]) is not None:
            for group in ("all", row["shot_group"]):
                winner = "tie" if best == "tie" else f"expert_{best}"
                winners.setdefault(group, Counter())[winner] += 1
    order = ("all", "many_shot", "medium_shot", "few_shot")
    return {g: {name: winners[g][name] for name in names} for g in order if g in winners}


def _as_groups(
    predicted: Tensor, targets: Tensor, groups: dict[str, Tensor], num_classes: int
) -> tuple[Tensor, Tensor]:
    """Replace each class label by the position of its shot group."""
    position = torch.empty(num_classes, dtype=torch.int64)
    for i, labels in enumerate(groups.values()):
        position[labels] = i
    return position[predicted], position[targets]


def _confusion(predicted: Tensor, targets: Tensor, labels: list[str]) -> dict[str, Any]:
    matrix = metrics.confusion_matrix(predicted, targets, len(labels))
    return {"labels": labels, "matrix": matrix.tolist()}


def _rows(table: metrics.Reliability) -> list[dict[str, float]]:
    """One dictionary for each filled bin."""
    columns = (column.tolist() for column in table)
    return [dict(zip(table._fields, row, strict=True)) for row in zip(*columns, strict=True)]

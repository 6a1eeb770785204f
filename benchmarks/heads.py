"""Classifier retraining anew on the frozen features of a training, measured on unused images.

    python -m benchmarks.heads SUBSET CHECKPOINT --data-dir FILES \
        --variants rescaled shike-plus stage2_scale=20+stage2_logit_adjustment=1.25 --out FILE

Features of all epochs of stage 2 are computed once, as in the training (augmentation, and BatchNorm
by batches); then heads take seconds, whatever their settings, and are those that the training would
have got but for rounding. They answer for the source's training images that the subset uses
nowhere, so that nothing is chosen on test images. These are as unequal as the subset: accuracies
are means over classes, and a difference is paired by image to the heads that the training has,
with its standard error over images. That holds neither what another stage 1 would change nor that
the best of many was taken.

A variant is a name of docs/method.md or settings joined by ``+``; only those of stage 2 count here,
and its epochs and BatchNorm must be the training's. The file holds ``machine`` as in
`gpu_headline`, ``checkpoint`` (digests, recipe's configuration), ``images``, ``classes`` and
``heads``: of each variant, over ``--seeds`` of first weights, ``accuracy`` (mean over classes),
``shot_groups``, ``expected_calibration_error``, ``difference`` and ``standard_error``, as
fractions.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.runs import CALIBRATION_BINS, EVAL_BATCH_SIZE, exit_code, machine, with_changes
from benchmarks.tables import table
from shike_core.checkpoint import Trained, build_model, load, load_trained
from shike_core.config import HELD_IN_MEMORY, TrainConfig
from shike_core.data.augment import normalise
from shike_core.data.loader import ImageTable
from shike_core.data.long_tail import shot_groups
from shike_core.data.manifest import Subset, read_subset
from shike_core.data.sources import load_source
from shike_core.data.split import Images, Split
from shike_core.device import resolve_device, resolve_precision
from shike_core.losses import balanced_softmax
from shike_core.metrics import ensemble_logits
from shike_core.model import Shike
from shike_core.recipes import VARIANTS
from shike_core.schedule import learning_rate
from shike_core.stages import write_json

Batches = Sequence[tuple[Tensor, Tensor]]
"""Features (batch, num_experts, feature_dim) and targets (batch,) of one epoch."""
DECIDED = ("stage2_epochs", "stage2_batch_norm")
"""Settings of stage 2 that features depend on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; the exit code is that of `benchmarks.runs.exit_code`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subset", type=Path, help="directory written by build-subset")
    parser.add_argument("checkpoint", type=Path, help="of a training on it that has ended")
    parser.add_argument("--data-dir", help="folder with the source's files")
    parser.add_argument("--variants", nargs="+", default=[], help="settings of stage 2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of first weights")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Compute features, train heads, measure, write after each variant, print a table.

    Raises:
        ShikeError: subset, checkpoint, source or device cannot be used.
        ValueError: the checkpoint is of another subset or has no stage 2, a variant is none of
            stage 2, or the source has no images left.
    """
    device = resolve_device(options.device)
    data = read_subset(options.subset, splits=("train", "test", "validation"))
    trained = load_trained(options.checkpoint, device)
    if trained.subset_digest != data.digest:
        raise ValueError(f"{options.checkpoint} was not trained on {options.subset}")
    if not trained.config.stage2_epochs:
        raise ValueError(f"{options.checkpoint} has no classifier retraining (stage2_epochs=0)")
    configs = {name: changed(trained.config, name) for name in ("", *options.variants)}
    unused = unused_images(data, options.data_dir)
    judge = Judge(trained, data, unused, device)
    report: dict[str, Any] = {
        "checkpoint": {
            "training_digest": load(options.checkpoint).training_digest,
            "subset_digest": data.digest,
            "config": vars(trained.config),
        },
        "images": len(unused.labels),
        "classes": len(judge.present),
        "seeds": options.seeds,
        "heads": {"its own": judge.measure([judge.own])},
    }
    epochs = stage2_features(trained, data, device)
    for name, config in configs.items():
        answers = [
            judge.ask(trained_heads(replace(config, seed=seed), trained, epochs))
            for seed in options.seeds
        ]
        report["heads"][name or "as they are"] = judge.measure(answers)
        write_json({"machine": machine(options.device)} | report, options.out)
    print(rendered(report))


def changed(config: TrainConfig, change: str) -> TrainConfig:
    """A configuration with another stage 2.

    Args:
        config: of the training.
        change: nothing, or variants and ``FIELD=VALUE`` joined by ``+``.

    Raises:
        ValueError: there is no such variant or value, or it is not one of stage 2's heads.
    """
    for part in change.split("+") if change else []:
        before = config
        if "=" in part:
            config = with_changes(config, [part])
        elif part in VARIANTS:
            config = replace(config, **VARIANTS[part])
        else:
            raise ValueError(f"unknown variant {part!r}; choose one of {', '.join(VARIANTS)}")
        wrong = [
            name
            for name, value in vars(config).items()
            if value != getattr(before, name) and (name[:7] != "stage2_" or name in DECIDED)
        ]
        if wrong:
            raise ValueError(
                f"{part} changes {', '.join(wrong)}, which the features depend on; train it with "
                "benchmarks.compare_recipes"
            )
    return config


def unused_images(data: Subset, data_dir: str | None) -> Split:
    """The training images of a subset's source that are in none of its splits.

    Raises:
        DatasetError: the source's files cannot be used.
        ValueError: its images are in files or were shrunk, or none are left.
    """
    rule = data.info["rule"]
    if rule["dataset"] not in HELD_IN_MEMORY or rule["image_size"]:
        raise ValueError(
            f"the images left over by a subset are known for {', '.join(HELD_IN_MEMORY)} in their "
            f"own size, not for {rule['dataset']} with image_size={rule['image_size']}"
        )
    source = load_source(rule["dataset"], data_dir)
    used = {image.tobytes() for split in data.splits.values() for image in pixels_of(split)}
    used |= {image.tobytes() for image in pixels_of(source.test)}
    known = {name: label for label, name in enumerate(data.class_names)}
    labels = np.array([known.get(source.class_names[x], -1) for x in source.train.labels])
    kept = [
        i
        for i, image in enumerate(pixels_of(source.train))
        if labels[i] >= 0 and image.tobytes() not in used
    ]
    if not kept:
        raise ValueError("the subset uses all training images of its source; none are left over")
    split = source.train.take(np.array(kept))
    return replace(split, labels=labels[kept])


def pixels_of(split: Split) -> Images:
    """The images of a split that holds them in memory, (n, height, width, 3)."""
    assert isinstance(split.images, np.ndarray), "see HELD_IN_MEMORY"
    return split.images


def stage2_features(trained: Trained, data: Subset, device: torch.device) -> list[Batches]:
    """What stage 2's heads are trained on, epoch by epoch, as the training computes it."""
    config, split = trained.config, data.splits["train"]
    images = ImageTable.from_arrays(pixels_of(split), split.labels, device)
    dtype = resolve_precision(config.precision, device)
    trained.model.train(config.stage2_batch_norm == "train")
    epochs: list[Batches] = [
        [
            (features(trained, pixels, dtype), targets)
            for pixels, targets in images.training_batches(
                config, trained.mean, trained.std, epoch=epoch, dtype=dtype
            )
        ]
        for epoch in range(config.stage1_epochs, config.epochs)
    ]
    trained.model.eval()
    return epochs


@torch.no_grad()
def features(trained: Trained, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 ``(batch, num_experts, feature_dim)`` of normalised images."""
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return trained.model.features(images).float()


def trained_heads(config: TrainConfig, trained: Trained, epochs: Sequence[Batches]) -> Shike:
    """A model of which only the heads of stage 2 are of use.

    Args:
        config: of stage 2, and the seed of the first weights.
        trained: what the features are of.
        epochs: see `stage2_features`.
    """
    device = epochs[0][0][0].device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(config, len(trained.class_counts)).to(device)
    class_counts = torch.tensor(trained.class_counts, device=device)
    model.requires_grad_(False)
    model.stage2_heads.requires_grad_(True)
    optimizer = torch.optim.SGD(
        model.stage2_heads.parameters(),
        lr=config.stage2_learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    for index, batches in enumerate(epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                index,
                epochs=config.stage2_epochs,
                peak=config.stage2_learning_rate,
                warmup_start=config.stage2_warmup_start,
                warmup_epochs=config.warmup_epochs,
                schedule=config.schedule,
            )
        for of_images, targets in batches:
            loss = balanced_softmax(
                model.classify(of_images, stage=2),
                targets,
                class_counts,
                logit_adjustment=config.stage2_logit_adjustment,
                label_smoothing=config.stage2_label_smoothing,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@dataclass(frozen=True)
class Measured:
    """One draw of heads on the unused images."""

    right: npt.NDArray[np.float64]
    """(images,), 1 or 0."""
    confidence: npt.NDArray[np.float64]
    """(images,)."""


class Judge:
    """Measures heads on the unused images, against those that the training has.

    Args:
        trained: the training.
        data: its subset.
        unused: see `unused_images`.
        device: that computes.
    """

    def __init__(self, trained: Trained, data: Subset, unused: Split, device: torch.device) -> None:
        self.labels = unused.labels
        self.groups = shot_groups(data.class_counts)
        counts = np.bincount(self.labels, minlength=len(data.class_names))
        self.present = np.flatnonzero(counts)
        self.weights = (1 / len(self.present) / np.maximum(counts, 1))[self.labels]  # sum to 1
        dtype = resolve_precision(trained.config.precision, device)
        pixels = ImageTable.from_arrays(pixels_of(unused), unused.labels, device)
        trained.model.eval()
        self._features = [
            features(trained, normalise(batch, trained.mean, trained.std), dtype)
            for batch in pixels.batches(EVAL_BATCH_SIZE)
        ]
        self.own = self.ask(trained.model)

    @torch.no_grad()
    def ask(self, model: Shike) -> Measured:
        """What the heads of stage 2 of a model answer."""
        logits = torch.cat([model.classify(batch, stage=2) for batch in self._features])
        probabilities = ensemble_logits(logits).softmax(dim=1).cpu().double().numpy()
        right = probabilities.argmax(axis=1) == self.labels
        return Measured(right.astype(float), probabilities.max(axis=1))

    def measure(self, answers: Sequence[Measured]) -> dict[str, Any]:
        """The mean over some draws of heads, as the module documents it."""
        right = np.mean([answer.right for answer in answers], axis=0)
        change = right - self.own.right
        by_class = {c: right[self.labels == c] for c in self.present}
        calibration_errors = [self._calibration_error(answer) for answer in answers]
        return {
            "accuracy": float(self.weights @ right),
            "shot_groups": {
                name: float(np.mean([by_class[c].mean() for c in labels if c in by_class]))
                for name, labels in self.groups.items()
                if any(c in by_class for c in labels)
            },
            "expected_calibration_error": float(np.mean(calibration_errors)),
            "difference": float(self.weights @ change),
            "standard_error": float(np.sqrt(sum(self._variances(change)))),
        }

    def _variances(self, change: npt.NDArray[np.float64]) -> Iterator[float]:
        """What each class adds to the variance of the mean over classes."""
        for c in self.present:
            of_class = change[self.labels == c]
            if len(of_class) > 1:
                yield float(of_class.var(ddof=1)) / len(of_class) / len(self.present) ** 2

    def _calibration_error(self, answer: Measured) -> float:
        """Expected calibration error with every class counting alike."""
        bins = np.minimum(answer.confidence * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(int)
        gaps = self.weights * (answer.right - answer.confidence)
        return float(np.abs(np.bincount(bins, gaps, CALIBRATION_BINS)).sum())


def rendered(report: dict[str, Any]) -> str:
    """A table for a terminal, in percent and points."""
    groups = list(report["heads"]["its own"]["shot_groups"])
    rows = [["heads", "all", *groups, "ECE", "difference"]]
    for name, row in report["heads"].items():
        figures = [row["accuracy"], *row["shot_groups"].values(), row["expected_calibration_error"]]
        change = f"{100 * row['difference']:+.2f} ± {100 * row['standard_error']:.2f}"
        rows.append([name, *(f"{100 * x:.1f}" for x in figures), change])
    return table(rows)


if __name__ == "__main__":
    sys.exit(main())

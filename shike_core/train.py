"""The training engine: two sibling loops over what they share.

Stage 1 learns the representation, stage 2 retrains the classifier on it (paper section 3).
Order and augmentation of each step are decided by seed, epoch and step alone, so a training that
goes on from a checkpoint, wherever in an epoch it was written, ends with the same weights.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from shike_core import checkpoint as checkpoints
from shike_core.checkpoint import Checkpoint
from shike_core.config import TrainConfig
from shike_core.data.augment import normalise
from shike_core.data.loader import ImageTable, steps_per_epoch, training_batches
from shike_core.errors import DivergedError, InterruptedTraining
from shike_core.losses import balanced_softmax, stage1_loss
from shike_core.model import Shike
from shike_core.model.shike import Stage
from shike_core.schedule import learning_rate

CHECK_EVERY = 50
"""Steps between two looks at whether the loss is finite; each look waits for the device."""


@dataclass(kw_only=True)
class Training:
    """What both stages share: the model, its data, and the state that a checkpoint keeps."""

    model: Shike
    config: TrainConfig
    table: ImageTable
    validation: ImageTable | None
    mean: Sequence[float]
    std: Sequence[float]
    class_counts: Tensor
    dtype: torch.dtype
    state: Checkpoint
    path: Path
    log: Callable[[Mapping[str, float], int], None]
    stop_signal: Callable[[], int | None]
    """The number of the signal that asks to stop, or None."""

    @property
    def device(self) -> torch.device:
        """Where model and data are."""
        return self.table.images.device

    def features(self, images: Tensor) -> Tensor:
        """Features float32 ``(batch, num_experts, feature_dim)``, convolved in `dtype`."""
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=half):
            return self.model.features(images).float()

    def save(self, epoch: int, step: int, sums: Sequence[float], update: "Update | None") -> None:
        """Write the state with which `epoch` goes on at `step`."""
        self.state.epoch, self.state.step, self.state.sums = epoch, step, list(sums)
        self.state.model = self.model.state_dict()
        self.state.optimizer = update.optimizer.state_dict() if update else None
        self.state.scaler = update.scaler.state_dict() if update else None
        checkpoints.save(self.state, self.path)


class Update:
    """Stochastic gradient descent on some parameters, in any precision."""

    def __init__(self, training: Training, parameters: Iterable[nn.Parameter]) -> None:
        config = training.config
        self.optimizer = torch.optim.SGD(
            list(parameters),
            lr=config.stage1_learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        float16 = training.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(training.device.type, enabled=float16)
        if training.state.optimizer is not None:
            self.optimizer.load_state_dict(training.state.optimizer)
            self.scaler.load_state_dict(training.state.scaler or {})
            training.state.optimizer = None  # from here on the running optimiser counts

    def set_learning_rate(self, value: float) -> None:
        """Use this rate from now on."""
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def __call__(self, loss: Tensor) -> None:
        """One step down the gradient of a scalar loss."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


@dataclass
class Epoch:
    """One pass over the training images: its batches, averages, checkpoints and end."""

    training: Training
    update: Update
    index: int
    stage: Stage
    terms: dict[str, Tensor] = field(default_factory=dict)
    sums: Tensor | None = None
    resumed_images: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What is left of the epoch; stops with a checkpoint when a signal asks for it."""
        run = self.training
        first = run.state.step
        if run.state.sums:
            self.resumed_images = run.state.sums[-1]
            self.sums = torch.tensor(run.state.sums, dtype=torch.float64, device=run.device)
        batches = training_batches(
            run.table, run.config, run.mean, run.std, epoch=self.index, first_step=first
        )
        pending: list[dict[str, Tensor]] = []
        last = steps_per_epoch(len(run.table), run.config.batch_size) - 1
        for step, batch in enumerate(batches, start=first):
            yield batch
            pending.append(self.terms)
            if len(pending) == CHECK_EVERY or step == last:
                self._refuse_divergence(pending, step + 1 - len(pending))
                pending = []
            if (signal_number := run.stop_signal()) is not None and step != last:
                self._refuse_divergence(pending, step + 1 - len(pending))
                run.save(self.index, step + 1, self._sums().tolist(), self.update)
                raise InterruptedTraining(signal_number, self.index, step + 1, str(run.path))

    def record(self, logits: Tensor, targets: Tensor, **terms: Tensor) -> None:
        """Add one step to the epoch's averages, without waiting for the device."""
        self.terms = {name: value.detach() for name, value in terms.items()}
        correct = (logits.detach().mean(dim=1).argmax(dim=-1) == targets).sum()
        count = torch.full_like(correct, len(targets))
        values = [value * len(targets) for value in self.terms.values()]
        added = torch.stack([x.double() for x in (*values, correct, count)])
        self.sums = added if self.sums is None else self.sums + added

    def end(self) -> None:
        """Log the averages, write a checkpoint when one is due, stop if asked to."""
        run, config = self.training, self.training.config
        *terms, correct, count = self._sums().tolist()
        seconds = time.perf_counter() - self.started
        metrics = {
            "epoch": self.index,
            "stage": self.stage,
            **{name_of(term): value / count for term, value in zip(self.terms, terms, strict=True)},
            "train/accuracy": correct / count,
            "lr": self.update.optimizer.param_groups[0]["lr"],
            "train/images_per_second": (count - self.resumed_images) / seconds,
        }
        done = self.index + 1
        end_of_stage = done in (config.stage1_epochs, config.epochs)
        signal_number = run.stop_signal()
        due = end_of_stage or done % config.checkpoint_every == 0
        if run.validation is not None and due:
            metrics["validation/accuracy"] = accuracy_on(run, run.validation, self.stage)
        run.state.history.append(metrics)
        run.log(metrics, self.index)
        if due or signal_number is not None:
            run.save(done, 0, [], None if end_of_stage else self.update)
        run.state.step, run.state.sums = 0, []
        if signal_number is not None and done < config.epochs:
            raise InterruptedTraining(signal_number, done, 0, str(run.path))

    def _sums(self) -> Tensor:
        assert self.sums is not None  # an epoch has at least one step
        return self.sums

    def _refuse_divergence(self, pending: list[dict[str, Tensor]], first_step: int) -> None:
        if not pending:
            return
        values = torch.stack([torch.stack(list(terms.values())) for terms in pending]).cpu()
        finite = values.isfinite().all(dim=1)
        if not finite.all():
            worst = int(finite.int().argmin())
            raise DivergedError(self.index, first_step + worst, _shown(pending[worst]))
        # A finite loss may have had a gradient that was not; such weights must not be saved.
        if not math.isfinite(size := weights_norm(self.training.model)):
            last = {**_shown(pending[-1]), "weights": size}
            raise DivergedError(self.index, first_step + len(pending) - 1, last)


def name_of(term: str) -> str:
    """The metric key of a term of the loss."""
    return "train/loss" if term == "total" else f"train/loss_{term}"


def weights_norm(model: nn.Module) -> float:
    """Euclidean norm of all parameters and running statistics; not finite if one of them is not."""
    values = [value for value in model.state_dict().values() if value.is_floating_point()]
    return float(nn.utils.get_total_norm(values))


def _shown(terms: Mapping[str, Tensor]) -> dict[str, float]:
    return {name_of(term): float(value) for term, value in terms.items()}


def fit_stage1(training: Training) -> None:
    """Representation learning: everything but the stage-2 heads is trained (paper section 3).

    Raises:
        DivergedError: the loss is not finite; the last checkpoint stays.
        InterruptedTraining: a signal asked to stop; a checkpoint was written.
    """
    config, model = training.config, training.model
    if training.state.epoch >= config.stage1_epochs:
        return
    model.requires_grad_(True)
    model.stage2_heads.requires_grad_(False)
    update = Update(training, (p for p in model.parameters() if p.requires_grad))
    for index in range(training.state.epoch, config.stage1_epochs):
        update.set_learning_rate(
            learning_rate(
                index,
                epochs=config.stage1_epochs,
                peak=config.stage1_learning_rate,
                warmup_start=config.stage1_warmup_start,
                warmup_epochs=config.warmup_epochs,
            )
        )
        model.train()
        epoch = Epoch(training, update, index, stage=1)
        for images, targets in epoch.batches():
            logits = model.classify(training.features(images), stage=1)
            loss = stage1_loss(
                logits,
                targets,
                dkt_weight=config.dkt_weight,
                mutual_weight=config.mutual_weight,
                temperature=config.temperature,
                kl_reduction=config.kl_reduction,
                detach_teachers=config.detach_teachers,
                teacher_target=config.teacher_target,
            )
            update(loss.total)
            epoch.record(
                logits,
                targets,
                total=loss.total,
                cross_entropy=loss.cross_entropy,
                dkt=loss.dynamic_knowledge_transfer,
                mutual=loss.mutual_distillation,
            )
        epoch.end()


def fit_stage2(training: Training) -> None:
    """Classifier retraining: new heads with balanced softmax on frozen weights (paper section 3).

    BatchNorm's running statistics move unless ``stage2_batch_norm="eval"``; nothing else does.

    Raises:
        DivergedError: the loss is not finite; the last checkpoint stays.
        InterruptedTraining: a signal asked to stop; a checkpoint was written.
    """
    config, model = training.config, training.model
    model.requires_grad_(False)
    model.stage2_heads.requires_grad_(True)
    update = Update(training, model.stage2_heads.parameters())
    for index in range(training.state.epoch, config.epochs):
        update.set_learning_rate(
            learning_rate(
                index - config.stage1_epochs,
                epochs=config.stage2_epochs,
                peak=config.stage2_learning_rate,
                warmup_start=config.stage2_warmup_start,
                warmup_epochs=config.warmup_epochs,
            )
        )
        model.train(config.stage2_batch_norm == "train")
        epoch = Epoch(training, update, index, stage=2)
        for images, targets in epoch.batches():
            with torch.no_grad():
                features = training.features(images)
            logits = model.classify(features, stage=2)
            loss = balanced_softmax(logits, targets, training.class_counts)
            update(loss)
            epoch.record(logits, targets, total=loss)
        epoch.end()


@torch.inference_mode()
def accuracy_on(training: Training, table: ImageTable, stage: Stage) -> float:
    """Top-1 accuracy of the ensemble on a split, with the stage's own heads."""
    training.model.eval()
    correct = 0
    for start in range(0, len(table), 4 * training.config.batch_size):
        rows = slice(start, start + 4 * training.config.batch_size)
        images = normalise(table.images[rows], training.mean, training.std)
        logits = training.model.classify(training.features(images), stage)
        correct += int((logits.mean(dim=1).argmax(dim=-1) == table.labels[rows]).sum())
    return correct / len(table)

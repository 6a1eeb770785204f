"""The training engine: two sibling loops over what they share.

Stage 1 learns the representation, stage 2 retrains the classifier on it (paper section 3).
Order and augmentation of each epoch are decided by seed and epoch alone, for images in files also
by how the subset is packed, so a training that goes
on from a checkpoint, wherever in an epoch it was written, ends with the same weights.

Inside an epoch nothing waits for a GPU: what is measured stays there, one row a step, and is read
while the next epoch runs. So one GPU can also run several trainings at once.

Several processes can train one model, each on its share of every batch. What they measure is summed
before it is read, so all of them see the same and stop at the same step; the first one writes.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shike_core import checkpoint as checkpoints
from shike_core.acceleration import (
    Branches,
    Forward,
    Preparation,
    Shared,
    TrainingStep,
    as_written,
    compile_parts,
    compiled,
)
from shike_core.checkpoint import Checkpoint
from shike_core.config import Acceleration, TrainConfig
from shike_core.data.augment import normalise
from shike_core.data.loader import Table, seed_of, shares, steps_per_epoch
from shike_core.device import peak_memory, upload
from shike_core.distributed import Group
from shike_core.errors import DivergedError, InterruptedTraining, ShikeError
from shike_core.losses import balanced_softmax, consistency, stage1_loss
from shike_core.model import Shike
from shike_core.model.shike import Stage
from shike_core.schedule import learning_rate

STAGE1_TERMS = ("train/loss", "train/loss_cross_entropy", "train/loss_dkt", "train/loss_mutual")
STAGE2_TERMS = ("train/loss",)


@dataclass(kw_only=True)
class Training:
    """What both stages share: the model, its data, and the state that a checkpoint keeps."""

    model: Shike
    config: TrainConfig
    table: Table
    validation: Table | None
    """Images that are not trained on; the accuracy on them is logged with each checkpoint."""
    mean: Sequence[float]
    std: Sequence[float]
    class_counts: Tensor
    dtype: torch.dtype
    acceleration: Acceleration = "none"
    """As `shike_core.device.resolve_acceleration` gives it."""
    state: Checkpoint
    path: Path
    log: Callable[[Mapping[str, float], int], None]
    stop_signal: Callable[[], int | None]
    """The number of the signal that asks to stop, or None."""
    validation_name: str = "validation"
    group: Group = field(default_factory=Group)
    """The processes that train this model together."""
    preparation: Preparation = field(default_factory=Preparation)
    """Shared by trainings side by side: while one of them compiles, none goes on."""
    side_by_side: int = 1
    """Trainings that share the device at the moment, this one included."""

    def __post_init__(self) -> None:
        self._steps: list[TrainingStep] = []
        self._unread: Epoch | None = None  # a finished epoch
        self._preparation_read = 0.0  # seconds that are in the costs of an epoch
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":  # of its own, so that trainings can run side by side
            self._stream = torch.cuda.Stream(self.device)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._clock = self.now()

    @property
    def device(self) -> torch.device:
        """Where the model is and batches are made."""
        return self.table.device

    def on_stream(self) -> AbstractContextManager[object]:
        """A context in which a GPU's work is queued apart from other trainings' work."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @property
    def preparation_seconds(self) -> float:
        """Time that compiling and recording this training's steps has taken."""
        return sum(step.seconds_of_preparation for step in self._steps)

    @property
    def fallbacks(self) -> list[str]:
        """Why steps run slower than `acceleration` says; empty if they do not."""
        return [message for step in self._steps for message in step.fallbacks]

    def step(self, forward: Forward, update: "Update") -> TrainingStep:
        """A step of training as fast as the configuration wants it."""
        if self.acceleration == "compile":
            compile_parts(self.model.parts)
        # Steps of several processes are not recorded, so streams would only be one more thing to go
        # wrong between the gradients and what the processes send each other.
        if self._stream is not None and self.acceleration != "none" and self.group.size == 1:
            self.model.run_experts = Branches(self.model.num_experts, self.device)
        shared = None
        if self.group.size > 1:
            module = Shared(self.model)
            # Its options for this differ between versions of torch.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                module, [name for name, _ in module.named_buffers()]
            )
            shared = DistributedDataParallel(module, gradient_as_bucket_view=True)
        size = self.config.batch_size
        (usual,) = shares(size, size, self.group.part)
        step = TrainingStep(
            forward,
            update,
            self.acceleration,
            usual.stop - usual.start,
            accumulate=update.accumulate,
            discard=update.discard,
            micro_batch_size=self.config.micro_batch_size,
            shared=shared,
            preparation=self.preparation,
        )
        self._steps.append(step)
        return step

    def now(self) -> "Moment":
        """When what has been queued so far will be done."""
        if self._stream is None:
            return Moment(time.perf_counter(), self.preparation.seconds)
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return Moment(event, self.preparation.seconds)

    def seconds_until(self, end: "Moment", next_begin: "Moment") -> float:
        """Time from the beginning of an epoch to its end, without compiling and recording."""
        begin, self._clock = self._clock, next_begin
        return begin.seconds_until(end)

    def features(self, images: Tensor) -> Tensor:
        """Features float32 ``(batch, num_experts, feature_dim)``, convolved in `dtype`."""
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=half):
            return self.model.features(images).float()

    def read_later(self, epoch: "Epoch") -> None:
        """Keep an epoch to be read when the device has had time for it; read the one before."""
        self.read_now()
        self._unread = epoch

    def read_now(self) -> None:
        """Wait for the last epoch, refuse it if it diverged, log it."""
        if self._unread is None:
            return
        epoch, self._unread = self._unread, None
        metrics = epoch.averages()
        self.state.history.append(metrics)
        self.state.costs.append(self._costs())
        self.log(metrics, epoch.index)

    def _costs(self) -> dict[str, Any]:
        before, self._preparation_read = self._preparation_read, self.preparation_seconds
        return {
            "device": self.device.type,
            "acceleration": self.acceleration,
            "fallbacks": self.fallbacks,
            "trainings": self.side_by_side,
            "preparation_seconds": self._preparation_read - before,
            "peak_memory_bytes": peak_memory(self.device),
        }

    def save(self, epoch: int, step: int, sums: Sequence[float], update: "Update | None") -> None:
        """Write the state with which `epoch` goes on at `step`; nobody goes on before it is."""
        self.state.epoch, self.state.step, self.state.sums = epoch, step, list(sums)
        self.state.model = self.model.state_dict()
        self.state.optimizer = update.optimizer.state_dict() if update else None
        self.state.scaler = update.scaler.state_dict() if update else None
        self.state.average = update.average.state_dict() if update and update.average else None
        if self.group.first:
            checkpoints.save(self.state, self.path)
        self.group.barrier()


class Average:
    """Exponential moving average of a model's weights and running statistics."""

    def __init__(self, model: nn.Module, decay: float, state: Mapping[str, Tensor] | None) -> None:
        floats = {n: v for n, v in model.state_dict().items() if v.is_floating_point()}
        self._names, self._model = list(floats), list(floats.values())
        self._values = [(state or floats)[n].to(v.device, copy=True) for n, v in floats.items()]
        self._decay = decay

    def update(self) -> None:
        """Move a little towards the model as it is now."""
        torch._foreach_lerp_(self._values, self._model, 1 - self._decay)

    def replace_model(self) -> None:
        """Put the average in the model's place."""
        torch._foreach_copy_(self._model, self._values)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return dict(zip(self._names, self._values, strict=True))


class Mixup:
    """Every batch mixed with itself in reverse, which is another order (Zhang et al. 2018).

    How much of itself an image keeps is the same for a whole batch and in every process, and
    decided by seed, epoch and step alone.

    Args:
        config: alpha and seed.
        device: of what is mixed.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._alpha, self._seed = config.mixup_alpha, config.seed
        self._kept = torch.ones((), device=device)  # a recorded step finds it there

    def draw(self, epoch: int, step: int) -> None:
        """Mix as this step of this epoch does from now on."""
        generator = np.random.default_rng(seed_of("mixup", self._seed, epoch, step))
        self._kept.fill_(generator.beta(self._alpha, self._alpha))

    def __call__(self, own: Tensor, other: Tensor) -> Tensor:
        """The mean of two tensors of the same shape, by the share that is kept of the first."""
        return torch.lerp(other, own, self._kept.to(own.dtype))


class Update:
    """Stochastic gradient descent on some parameters, in any precision.

    What the experts share learns at `TrainConfig.trunk_learning_rate` times the rate of the others.
    """

    def __init__(
        self, training: Training, parameters: Iterable[nn.Parameter], averaging_epochs: float = 0.0
    ) -> None:
        config, state = training.config, training.state
        trunk = set(training.model.trunk.parameters())
        groups: dict[float, list[nn.Parameter]] = {}  # by the factor on their rate
        for parameter in parameters:
            factor = config.trunk_learning_rate if parameter in trunk else 1.0
            groups.setdefault(factor, []).append(parameter)
        self.optimizer = torch.optim.SGD(
            [{"params": group} for group in groups.values()],
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )
        if config.momentum:
            # A fused first step would not write them if float16's scaler skips it.
            for group in groups.values():
                for parameter in group:
                    buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    self.optimizer.state[parameter]["momentum_buffer"] = buffer
        # A recorded step finds its learning rates on the GPU, where they can be changed.
        self._rates = {factor: torch.zeros((), device=training.device) for factor in groups}
        self.set_learning_rate(config.stage1_learning_rate)
        float16 = training.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(training.device.type, enabled=float16)
        self.average: Average | None = None
        if averaging_epochs:
            steps = averaging_epochs * steps_per_epoch(len(training.table), config.batch_size)
            self.average = Average(training.model, 1 - 1 / max(1.0, steps), state.average)
        if state.optimizer is not None:
            self.optimizer.load_state_dict(state.optimizer)
            if state.scaler:  # empty, if that part was trained where bfloat16 needs none
                self.scaler.load_state_dict(state.scaler)
            state.optimizer = state.average = None  # from here on the running ones count

    def set_learning_rate(self, value: float) -> None:
        """Use this rate from now on."""
        self.rate = value
        groups = self.optimizer.param_groups
        for (factor, rate), group in zip(self._rates.items(), groups, strict=True):
            rate.fill_(factor * value)
            group["lr"] = rate if rate.is_cuda else factor * value

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss to what the next step goes down."""
        self.scaler.scale(loss).backward()

    def discard(self) -> None:
        """Forget what was accumulated."""
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self, loss: Tensor) -> None:
        """One step down the gradient of a scalar loss and of what was accumulated."""
        self.accumulate(loss)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.discard()
        if self.average:
            self.average.update()


@dataclass
class Epoch:
    """One pass over the training images: its batches, averages, checkpoints and end."""

    training: Training
    update: Update
    index: int
    stage: Stage
    terms: Sequence[str]
    """Keys of what every row holds, apart from the number of right answers at its end."""
    rows: list[Tensor] = field(default_factory=list)
    """What was remembered of each step, on the device."""
    sizes: list[int] = field(default_factory=list)
    """Images of each step, of all processes together."""
    weights: list[float] = field(default_factory=list)
    """What this process's images count in the mean of each step."""

    def __post_init__(self) -> None:
        self.first_step = self.training.state.step
        self._rate = self.update.rate  # when this is read, the next epoch may have begun
        self._sums_before = list(self.training.state.sums)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """What is left of the epoch; stops with a checkpoint when a signal asks for it.

        Yields:
            Images and targets of this process, and their share as `TrainingStep` takes it.
        """
        run, group = self.training, self.training.group
        batch_size, images_left = run.config.batch_size, len(run.table)
        images_left -= self.first_step * batch_size
        batches = run.table.training_batches(
            run.config,
            run.mean,
            run.std,
            epoch=self.index,
            first_step=self.first_step,
            dtype=run.dtype,
            part=group.part,
        )
        last = steps_per_epoch(len(run.table), batch_size) - 1
        for step, (images, targets) in enumerate(batches, start=self.first_step):
            size = min(batch_size, images_left)
            images_left -= size
            # A batch of fewer images than processes is given whole to each of them.
            weight = len(targets) / (size if size >= group.size else size * group.size)
            yield images, targets, weight * group.size
            self.sizes.append(size)
            self.weights.append(weight)
            if (signal_number := group.agree(run.stop_signal())) is not None and step != last:
                run.read_now()
                self._send()
                run.save(self.index, step + 1, self._finite_sums(), self.update)
                raise InterruptedTraining(signal_number, self.index, step + 1, str(run.path))

    def end(self) -> None:
        """Have the averages logged, write a checkpoint when one is due, stop if asked to."""
        run, config = self.training, self.training.config
        done = self.index + 1
        end_of_stage = done in (config.stage1_epochs, config.epochs)
        due = end_of_stage or done % config.checkpoint_every == 0
        run.group.copy_first(run.model.buffers())  # running statistics are each process's own
        self._send(run.validation if due else None)
        run.state.step, run.state.sums = 0, []
        run.read_later(self)
        signal_number = run.group.agree(run.stop_signal())
        if due or signal_number is not None or run.device.type == "cpu":
            run.read_now()
        if due or signal_number is not None:
            run.save(done, 0, [], None if end_of_stage else self.update)
        if signal_number is not None and done < config.epochs:
            raise InterruptedTraining(signal_number, done, 0, str(run.path))

    def averages(self) -> dict[str, float]:
        """The epoch's metrics, over images, not batches.

        Raises:
            DivergedError: the loss of a step, or the weights now, are not finite.
        """
        *sums, correct, count = self._finite_sums()
        seconds = self.training.seconds_until(self._end, self._measured)
        metrics = {
            "epoch": self.index,
            "stage": self.stage,
            **{term: value / count for term, value in zip(self.terms, sums, strict=True)},
            "train/accuracy": correct / count,
            "lr": self._rate,
            "train/images_per_second": sum(self.sizes) / seconds,
        }
        if (waited := self.training.table.seconds_waited(self.index)) is not None:
            metrics["train/data_wait"] = waited / seconds
        if self._accuracy is not None:
            metrics[f"{self.training.validation_name}/accuracy"] = float(self._accuracy.read())
        return metrics

    def _send(self, validation: Table | None = None) -> None:
        """Start to bring what was measured to the host."""
        run, group = self.training, self.training.group
        rows = torch.stack(self.rows)  # (steps, terms + 1)
        if group.size > 1:
            # Means count by their images; right answers once, unless all have the same images.
            same = [1.0 if size >= group.size else 1 / group.size for size in self.sizes]
            factors = torch.tensor([self.weights] * (rows.shape[1] - 1) + [same]).T
            rows = group.sum(rows * upload(factors.contiguous(), run.device))
        self._rows = _Sent(rows)
        # A finite loss may have had a gradient that was not; such weights must not be saved.
        self._norm = _Sent(group.sum(weights_norm(run.model)))
        self._end = run.now()
        self._accuracy = _Sent(accuracy_on(run, validation, self.stage)) if validation else None
        self._measured = run.now() if validation else self._end

    def _finite_sums(self) -> list[float]:
        """Sums over the epoch's images of all terms, of right answers, and of 1."""
        rows, norm = self._rows.read(), float(self._norm.read())
        finite = rows.isfinite().all(dim=1)  # (steps,)
        step = int(finite.int().argmin()) if not finite.all() else len(rows) - 1
        if not (finite.all() and math.isfinite(norm)):
            terms = dict(zip(self.terms, rows[step].tolist(), strict=False))
            if finite.all():
                terms["weights"] = norm
            raise DivergedError(self.index, self.first_step + step, terms)
        sums = self._sums_before or [0.0] * (len(self.terms) + 2)
        for row, size in zip(rows.tolist(), self.sizes, strict=True):
            *terms_of_step, correct = row
            added = [*(value * size for value in terms_of_step), correct, size]
            sums = [total + value for total, value in zip(sums, added, strict=True)]
        return sums


@dataclass(frozen=True)
class Moment:
    """A moment of a training, on a GPU by the GPU's clock, which the host may run ahead of."""

    clock: "float | torch.cuda.Event"
    prepared: float
    """Seconds spent compiling and recording until then."""

    def seconds_until(self, later: "Moment") -> float:
        """Time in between without compiling and recording; waits for the later one."""
        if isinstance(later.clock, float):
            assert isinstance(self.clock, float)
            seconds = later.clock - self.clock
        else:
            assert not isinstance(self.clock, float)
            later.clock.synchronize()
            seconds = self.clock.elapsed_time(later.clock) / 1000
        return max(1e-6, seconds - (later.prepared - self.prepared))


class _Sent:
    """A tensor on its way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._arrived: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Tensor:
        """Wait for it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values


def weights_norm(model: nn.Module) -> Tensor:
    """Euclidean norm of all parameters and running statistics; not finite if one of them is not."""
    return nn.utils.get_total_norm(
        [value for value in model.state_dict().values() if value.is_floating_point()]
    )


def fit(trainings: Sequence[Training]) -> None:
    """Train both stages of some models to the end: on a GPU side by side, step by step.

    A small network cannot fill a large GPU, so a second training costs little there. A training
    that fails does not stop the others.

    Raises:
        InterruptedTraining: a signal asked to stop; checkpoints were written.
        DivergedError: a loss is not finite; the last checkpoint stays.
    """
    running = [(training, _both_stages(training)) for training in trainings]
    failures: list[ShikeError] = []
    while running:
        for training, _ in running:
            # A CPU trains one after the other.
            training.side_by_side = len(running) if training.device.type == "cuda" else 1
        for turn in list(running):
            try:
                if _goes_on(*turn):
                    continue
            except ShikeError as error:
                failures.append(error)
            running.remove(turn)
    if failures:
        # Asked to stop, those that were interrupted go on later, and what failed will say so then.
        raise next((x for x in failures if isinstance(x, InterruptedTraining)), failures[0])


def _both_stages(training: Training) -> Iterator[None]:
    yield from fit_stage1(training)
    yield from fit_stage2(training)


def _goes_on(training: Training, steps: Iterator[None]) -> bool:
    """Queue one step for a GPU, or take all of a CPU's; whether there are more."""
    with training.on_stream():
        for _ in steps:
            if training.device.type == "cuda":
                return True
    return False


def fit_stage1(training: Training) -> Iterator[None]:
    """Representation learning: everything but the stage-2 heads is trained (paper section 3).

    With ``trunk_learning_rate=0`` what the experts share stays as it is, running statistics too.

    Yields:
        After each step.

    Raises:
        DivergedError: the loss is not finite; the last checkpoint stays.
        InterruptedTraining: a signal asked to stop; a checkpoint was written.
    """
    config, model = training.config, training.model
    if training.state.epoch >= config.stage1_epochs:
        return

    loss_of = compiled(stage1_loss) if training.acceleration == "compile" else stage1_loss

    mixup = Mixup(config, training.device) if config.mixup_alpha else None

    def row(logits: Tensor, targets: Tensor) -> Tensor:
        loss = loss_of(
            logits,
            targets,
            class_counts=training.class_counts,
            objective=config.stage1_objective,
            dkt_weight=config.dkt_weight,
            mutual_weight=config.mutual_weight,
            temperature=config.temperature,
            mutual_teachers=config.mutual_teachers,
            kl_reduction=config.kl_reduction,
            detach_teachers=config.detach_teachers,
            teacher_target=config.teacher_target,
        )
        return torch.stack([*loss, _right_answers(logits, targets)])

    def forward(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        strong = images[: len(targets)]
        if mixup:
            strong = mixup(strong, strong.flip(0))
        logits = model.classify(training.features(strong), stage=1)
        measured = row(logits, targets)
        if mixup:
            measured = mixup(measured, row(logits, targets.flip(0)))
        if config.consistency_weight:
            with torch.no_grad():
                weak = model.classify(training.features(images[len(targets) :]), stage=1)
            added = config.consistency_weight * consistency(logits, weak, targets)
            total, *terms, right = measured
            measured = torch.stack([total + added, *terms, added, right])
        return measured[0], measured.detach()

    model.requires_grad_(True)
    model.stage2_heads.requires_grad_(False)
    trunk_learns = config.trunk_learning_rate > 0
    model.trunk.requires_grad_(trunk_learns)
    trained = (p for p in model.parameters() if p.requires_grad)
    update = Update(training, trained, config.averaging_epochs)
    step = training.step(forward, update)
    terms = STAGE1_TERMS + ("train/loss_consistency",) * (config.consistency_weight > 0)
    for index in range(training.state.epoch, config.stage1_epochs):
        update.set_learning_rate(
            learning_rate(
                index,
                epochs=config.stage1_epochs,
                peak=config.stage1_learning_rate,
                warmup_start=config.stage1_warmup_start,
                warmup_epochs=config.warmup_epochs,
                schedule=config.schedule,
            )
        )
        model.train()
        model.trunk.train(trunk_learns)
        epoch = Epoch(training, update, index, 1, terms)
        for images, targets, share in epoch.batches():
            if mixup:
                mixup.draw(index, epoch.first_step + len(epoch.rows))
            epoch.rows.append(step(images, targets, share))
            yield
        if index == config.stage1_epochs - 1:
            if update.average:
                update.average.replace_model()
            if not config.stage2_epochs:
                model.deploy_stage1_heads()
        epoch.end()


def fit_stage2(training: Training) -> Iterator[None]:
    """Classifier retraining: new heads with balanced softmax on frozen weights (paper section 3).

    BatchNorm's running statistics move unless ``stage2_batch_norm="eval"``, those of what the
    experts share not with ``trunk_learning_rate=0`` either; nothing else does.

    Yields:
        After each step.

    Raises:
        DivergedError: the loss is not finite; the last checkpoint stays.
        InterruptedTraining: a signal asked to stop; a checkpoint was written.
    """
    config, model = training.config, training.model
    if training.state.epoch >= config.epochs:
        return

    def forward(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            features = training.features(images[: len(targets)])
        logits = model.classify(features, stage=2)
        loss = balanced_softmax(
            logits,
            targets,
            training.class_counts,
            logit_adjustment=config.stage2_logit_adjustment,
            label_smoothing=config.stage2_label_smoothing,
        )
        return loss, torch.stack([loss, _right_answers(logits, targets)]).detach()

    model.requires_grad_(False)
    model.stage2_heads.requires_grad_(True)
    update = Update(training, model.stage2_heads.parameters())
    step = training.step(forward, update)
    for index in range(training.state.epoch, config.epochs):
        update.set_learning_rate(
            learning_rate(
                index - config.stage1_epochs,
                epochs=config.stage2_epochs,
                peak=config.stage2_learning_rate,
                warmup_start=config.stage2_warmup_start,
                warmup_epochs=config.warmup_epochs,
                schedule=config.schedule,
            )
        )
        statistics_move = config.stage2_batch_norm == "train"
        model.train(statistics_move)
        model.trunk.train(statistics_move and config.trunk_learning_rate > 0)
        epoch = Epoch(training, update, index, 2, STAGE2_TERMS)
        for images, targets, share in epoch.batches():
            epoch.rows.append(step(images, targets, share))
            yield
        epoch.end()


def _right_answers(logits: Tensor, targets: Tensor) -> Tensor:
    """How many images the ensemble of ``(batch, num_experts, num_classes)`` gets right."""
    return (logits.mean(dim=1).argmax(dim=-1) == targets).sum().to(logits.dtype)


@torch.inference_mode()
def accuracy_on(training: Training, table: Table, stage: Stage) -> Tensor:
    """Top-1 accuracy of the ensemble on a split with the stage's own heads, on the device."""
    training.model.eval()
    right = torch.zeros((), device=training.device)
    size, part = 4 * training.config.batch_size, training.group.part
    rank, processes = part
    labels_of_batches = table.labels.split(size)[rank::processes]
    with as_written():  # compiling for these batches too would take longer than it saves
        for pixels, labels in zip(table.batches(size, part), labels_of_batches, strict=True):
            images = normalise(pixels, training.mean, training.std)
            logits = training.model.classify(training.features(images), stage)
            right += _right_answers(logits, labels)
    return training.group.sum(right) / len(table)

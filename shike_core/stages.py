"""The verbs of the pipeline: (config, input directories, output directory, log) -> report.

Each stage is called in the same way by a test, by the command line, by a KFP component in-process
or in a container. Between stages only directories pass; each has one writer and one reader in
`shike_core`. Torch is imported inside the stages that need it: the images that build subsets and
register models do not have it.
"""

import itertools
import json
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shike_core.config import (
    INDECISIVE,
    EvaluateConfig,
    PredictConfig,
    RegisterConfig,
    SubsetConfig,
    TrainConfig,
    config_digest,
)
from shike_core.errors import (
    ArtifactError,
    CheckpointError,
    DatasetError,
    InterruptedTraining,
    ShikeError,
)
from shike_core.files import atomic_write
from shike_core.gate import Decision, decide, shot_groups_digest
from shike_core.processes import heard_signals

if TYPE_CHECKING:
    from torch import Tensor

    from shike_core.acceleration import Preparation
    from shike_core.checkpoint import Checkpoint
    from shike_core.data.loader import Table
    from shike_core.data.manifest import Subset
    from shike_core.distributed import Group
    from shike_core.export import Exporter
    from shike_core.train import Training

Log = Callable[[Mapping[str, float], int], None]
"""Receives the metrics of one step (an epoch): ``log({"train/loss": 1.2}, step=3)``."""
Report = dict[str, Any]
"""What a stage found, as JSON would hold it."""


SMALLEST_FOR_LARGE_NETWORKS = 64
"""Pixels a side of images held in memory; these networks make them 32 times smaller."""
FEW_STEPS = 100
"""Batches in an epoch below which a single one matters."""
_OF_STAGE2 = tuple(field.name for field in fields(TrainConfig) if field.name.startswith("stage2_"))
"""Settings that stage 1 does not depend on."""
FORGETTING_STEPS = 100
"""Batches after which 3e-5 of what a running statistic was before is left of it."""
CHECKPOINT = "checkpoint.pt"
"""Name of the checkpoint in the directory that `train` writes and `evaluate` reads."""


def build_subset(
    config: SubsetConfig,
    data_dir: Path | str | None,
    out: Path,
    log: Log,
    shards_dir: str = "",
    workers: int = 0,
) -> Report:
    """Cut a long-tailed subset out of a source and write it.

    A call that was stopped while it read images in files goes on where it was, if it is repeated.

    Args:
        config: the rule.
        data_dir: where the source's files lie, a folder or a URL; None takes the user's cache,
            where CIFAR is put if it is not there.
        out: receives ``train.parquet``, ``test.parquet``, perhaps ``validation.parquet``,
            ``subset.json``, ``class_counts.png`` and, for images in files, ``unreadable.csv``
            (those left out) and, if they are packed, the folder ``shards``.
        log: called once, with the sizes and how unequal they are.
        shards_dir: a folder or URL, reachable where the subset is used, that receives the shards
            in place of `out`.
        workers: processes that read images in files; 0 means as many as there are cores and memory
            for.

    Returns:
        The content of ``subset.json``.

    Raises:
        DatasetError: the source's files cannot be used, or the rule cannot be followed on them.
        ArtifactError: the subset cannot be written.
        InterruptedPacking: a signal asked to stop while images in files were read.
        ValueError: there would be nothing to put into `shards_dir`.
    """
    from shike_core.data.long_tail import cut
    from shike_core.data.manifest import write_subset, write_subset_of_files
    from shike_core.data.sources import load_source

    source = load_source(config.dataset, data_dir)
    splits, identical_images, unreadable = cut(source, config)
    if shards_dir and (identical_images is not None or config.storage != "packed"):
        raise ValueError(
            f"shards_dir={shards_dir} is for images in files that are packed; leave it empty, or "
            "choose storage=packed and image_size=0"
        )
    if identical_images is not None:
        info = write_subset(out, splits, source, config, identical_images, unreadable)
    else:  # the images stay in files
        with stop_signals() as stop_signal:
            info = write_subset_of_files(
                out,
                splits,
                source,
                config,
                shards_dir=shards_dir,
                workers=workers,
                stop_signal=stop_signal,
            )
    sizes = {f"subset/{name}_images": float(size) for name, size in info["sizes"].items()}
    log(sizes | {f"subset/{name}": value for name, value in info["imbalance"].items()}, 0)
    return info


def train(
    config: TrainConfig, subset: Path, out: Path, log: Log, checkpoint_dir: Path | None = None
) -> Report:
    """Train both stages of SHIKE on a subset, or go on where an earlier call was stopped.

    It trains in ``config.processes`` processes, which are started here and end with the call, or is
    one of those that torchrun has started. Then each of them gets the report, and the first one
    logs and writes.

    Args:
        config: everything that decides the weights.
        subset: directory written by `build_subset`.
        out: receives ``checkpoint.pt``, ``history.json`` and ``train.json``.
        log: called once an epoch; after a resumption first with the epochs already done.
        checkpoint_dir: where checkpoints survive if `out` does not; a folder in it belongs to
            this configuration and subset. By default checkpoints are written to `out`.

    Raises:
        DatasetError: the subset cannot be read, or its images are too small for the network.
        CheckpointError: the checkpoint found is damaged or of another configuration, or there are
            no pretrained weights to begin with.
        DeviceError: the device is not there, its memory is too small, or one of several processes
            was killed.
        DivergedError: the loss is not finite; the last good checkpoint stays.
        InterruptedTraining: a signal asked to stop; a checkpoint was written.
        ArtifactError: a result cannot be written.
    """
    from shike_core import distributed
    from shike_core.device import resolve_device

    work: Callable[..., Report] = partial(_train_as_one_of, config, subset, out, checkpoint_dir)
    device = resolve_device(config.device)
    with stop_signals() as stop_signal:
        if distributed.launched():
            with distributed.joined(device) as group:
                return work(group, log, stop_signal)
        asked = 1 if distributed.by_torchrun() else config.processes
        processes = distributed.processes_for(asked, config.batch_size, device)
        if processes > 1:
            report: Report = distributed.start(work, processes, device, log, stop_signal)
            return report
        return work(distributed.Group(), log, stop_signal)


def _train_as_one_of(
    config: TrainConfig,
    subset: Path,
    out: Path,
    checkpoint_dir: Path | None,
    group: "Group",
    log: Log,
    stop_signal: Callable[[], int | None],
) -> Report:
    """What each of the processes that train together does; see `train`."""
    logs = [log if group.first else _log_nothing]
    return _train_all(
        [config], subset, [out], logs, checkpoint_dir, "validation", group, stop_signal
    )[0]


def _log_nothing(metrics: Mapping[str, float], step: int) -> None:
    """The first of several processes logs for all."""


def take_stage1(
    trained: Path,
    config: TrainConfig,
    subset: Path,
    out: Path,
    checkpoint_dir: Path | None = None,
) -> bool:
    """Have `train` begin with classifier retraining: stage 1 is that of another training.

    So other settings of stage 2 cost stage 2 only, and the weights are those of training both
    stages; running statistics are, but for rounding. Does nothing if a checkpoint to go on from
    has finished stage 1 already.

    Args:
        trained: checkpoint of the other training, which has finished stage 1; settings of its stage
            1 and its subset are the same.
        config: as for `train`, like the others.
        subset: see `train`.
        out: receives a checkpoint at the end of stage 1.
        checkpoint_dir: see `train`.

    Returns:
        Whether stage 1 was taken.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, of another stage 1, or not that far, or
            another training's checkpoint lies where this one's belongs.
        DatasetError: the subset cannot be read.
        ArtifactError: the checkpoint cannot be written.
        ValueError: nothing would be left to train, or the other training's stage 2 has moved
            BatchNorm's running statistics, and this one would not forget it.
    """
    import torch

    from shike_core import checkpoint as checkpoints
    from shike_core.data.loader import steps_per_epoch
    from shike_core.data.manifest import read_info

    if not config.stage2_epochs:
        raise ValueError("stage2_epochs=0 leaves nothing to train on another training's stage 1")
    info = read_info(subset)
    subset_digest = info["digest"]
    digest = training_digest(config, subset_digest)
    path = _checkpoint_path(digest, out, checkpoint_dir)
    if path.exists():
        ours = checkpoints.load(path)
        _refuse_other_training(ours, config, subset_digest, digest, path)
        if ours.epoch >= config.stage1_epochs:
            return False
    state = checkpoints.load(trained)
    if differences := _differences(state, config, subset_digest, {*INDECISIVE, *_OF_STAGE2}):
        raise CheckpointError(
            f"stage 1 of {trained} is another one ({'; '.join(differences)}); give a training with "
            "the same settings, apart from those called stage2_..."
        )
    if state.epoch < config.stage1_epochs:
        raise CheckpointError(
            f"{trained} holds {state.epoch} of {config.stage1_epochs} epochs of stage 1; go on "
            "with that training first"
        )
    begun = (state.epoch, state.step) != (config.stage1_epochs, 0)
    if begun and state.train_config.stage2_batch_norm == "train":
        steps = config.stage2_epochs * steps_per_epoch(info["sizes"]["train"], config.batch_size)
        if config.stage2_batch_norm == "eval":
            keeps = "stage2_batch_norm=eval keeps"
        elif steps < FORGETTING_STEPS:
            keeps = f"{steps} steps (not {FORGETTING_STEPS}) do not quite forget"
        else:
            keeps = ""
        if keeps:
            raise ValueError(
                f"{trained} has moved BatchNorm's running statistics in its stage 2, which {keeps}"
                "; train both stages"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        fresh = checkpoints.build_model(config, len(state.class_names)).state_dict()
    heads = {name: value for name, value in fresh.items() if name.startswith("stage2_heads.")}
    state = replace(
        state,
        config=asdict(config),
        training_digest=digest,
        model=state.model | heads,
        epoch=config.stage1_epochs,
        step=0,
        sums=[],
        optimizer=None,
        scaler=None,
        average=None,
        history=state.history[: config.stage1_epochs],
        costs=state.costs[: config.stage1_epochs],
        calibration_temperature=None,
    )
    checkpoints.save(state, path)
    return True


def train_together(
    configs: Sequence[TrainConfig],
    subset: Path,
    outs: Sequence[Path],
    logs: Sequence[Log],
    checkpoint_dir: Path | None = None,
    watch: Literal["validation", "test"] = "validation",
) -> list[Report]:
    """Train several configurations on one subset, seeds for example: on a GPU side by side.

    All in this one process, whose GPU they share.

    Args:
        configs: what differs between them is free, but the device is the first one's.
        subset: as for `train`, like the others; one output directory and one log for each.
        outs: see `train`.
        logs: see `train`.
        checkpoint_dir: see `train`.
        watch: the split whose accuracy is logged with each checkpoint. Watching the test split is
            for comparing a whole curve with a published one; nothing is chosen by it.

    Raises:
        ShikeError: as `train`; a training that fails does not keep the others from finishing.
        ValueError: several processes are asked for as well.
    """
    from shike_core import distributed

    if (asked := max(config.processes for config in configs)) > 1 or distributed.launched():
        how = f"processes={asked}" if asked > 1 else "started by torchrun"
        raise ValueError(
            f"trainings side by side share one process, but this one is {how}; leave processes at "
            "0 and start it without torchrun, or train one configuration at a time"
        )
    with stop_signals() as stop_signal:
        return _train_all(
            configs, subset, outs, logs, checkpoint_dir, watch, distributed.Group(), stop_signal
        )


def _train_all(
    configs: Sequence[TrainConfig],
    subset: Path,
    outs: Sequence[Path],
    logs: Sequence[Log],
    checkpoint_dir: Path | None,
    watch: Literal["validation", "test"],
    group: "Group",
    stop_signal: Callable[[], int | None],
) -> list[Report]:
    import torch

    from shike_core import train as engine
    from shike_core.acceleration import Preparation, as_written
    from shike_core.data.manifest import read_subset
    from shike_core.data.stream import open_tables
    from shike_core.device import (
        enough_memory,
        forget_peak_memory,
        resolve_device,
        whole_float32,
    )
    from shike_core.model.size import size_of

    device = resolve_device(configs[0].device)
    forget_peak_memory(device)
    data = read_subset(subset, splits=("train", watch))
    for config in configs:
        _refuse_small_images(config, data.info)
        images = len(data.splits["train"].labels)
        _refuse_single_pixels(config, data.info, images)
        if group.first:
            _warn_of_small_rest(config.batch_size, images)
    started = time.perf_counter()
    with (
        enough_memory(configs[0].batch_size, len(configs)),
        ExitStack() as opened,
    ):
        tables = {
            name: [
                opened.enter_context(closing(table))
                for table in open_tables(split, configs, device, group.local_size)
            ]
            for name, split in data.splits.items()
        }
        preparation = Preparation()
        trainings = [
            _prepare(
                config,
                data,
                {name: of_each[i] for name, of_each in tables.items()},
                watch,
                out,
                log,
                checkpoint_dir,
                group,
                stop_signal,
                preparation,
            )
            for i, (config, out, log) in enumerate(zip(configs, outs, logs, strict=True))
        ]
        resumed_at = [training.state.epoch for training in trainings]
        failure: ShikeError | None = None
        try:
            with whole_float32(benchmark=True):
                engine.fit(trainings)
        except InterruptedTraining:
            raise
        except ShikeError as error:  # the others have been trained to their end
            failure = error
        finished = [training.state.finished for training in trainings]
        if watch == "validation":
            for training in itertools.compress(trainings, finished):
                _calibrate(training)
    reports = []
    for training, out, epoch in itertools.compress(
        zip(trainings, outs, resumed_at, strict=True), finished
    ):
        model, config = training.model, training.config
        # Older versions of torch compile nothing again that was counted while it was compiled.
        with as_written():
            size = size_of(model, *_pixels(config, data.info))
        report: Report = {
            "training_digest": training.state.training_digest,
            "subset_digest": data.digest,
            "config": asdict(config),
            **size._asdict(),
            "images": len(training.table),
            "device": device.type,
            "processes": group.size,
            "precision": str(training.dtype).removeprefix("torch."),
            "acceleration": training.acceleration,
            "fallbacks": training.fallbacks,
            "torch": torch.__version__,
            "epochs": config.epochs,
            "epochs_in_this_call": config.epochs - epoch,
            "seconds_in_this_call": time.perf_counter() - started,
            "seconds_of_preparation": training.preparation_seconds,
            "seconds_waiting_for_data": training.table.seconds_waited(),
            "final": training.state.history[-1],
            "calibration_temperature": training.state.calibration_temperature,
        }
        if group.first:
            if training.path.parent != out:
                with atomic_write(out / CHECKPOINT) as temporary:
                    shutil.copyfile(training.path, temporary)
            write_json(training.state.history, out / "history.json")
            write_json(report, out / "train.json")
        reports.append(report)
    if failure is not None:
        raise failure
    return reports


def _warn_of_small_rest(batch_size: int, images: int) -> None:
    """Warn if one of few batches in an epoch has far fewer images than the others.

    BatchNorm's statistics of so few move the weights as much as any others: digits-lt with a rest
    of 1 in 14 batches lost 22 points on few-shot classes (docs/results.md).
    """

    def disturbs(size: int) -> bool:
        steps, rest = divmod(images, size)
        return 0 < rest < size / 8 and 0 < steps < FEW_STEPS

    if disturbs(batch_size):
        better = next(size for size in range(batch_size + 1, images + 1) if not disturbs(size))
        warnings.warn(
            f"the last of {images // batch_size + 1} batches of each epoch has "
            f"{images % batch_size} of {batch_size} images, and BatchNorm's statistics of so few "
            f"disturb training; set batch_size to {better}, for example",
            stacklevel=2,
        )


def _calibrate(training: "Training") -> None:
    """Fit the temperature of a finished training on its validation part, and keep it.

    Without such a part, and if the checkpoint had it already, nothing is done.
    """
    from shike_core import checkpoint as checkpoints
    from shike_core.acceleration import as_written
    from shike_core.calibration import fit_temperature
    from shike_core.evaluate import predict as ask
    from shike_core.metrics import ensemble_logits

    table, state, group = training.validation, training.state, training.group
    if table is None or state.calibration_temperature is not None:
        return
    temperature = None
    if group.first:
        batch = 4 * training.config.batch_size
        with as_written():
            logits = ask(training.model, table, training.mean, training.std, batch)
        temperature = _usable_temperature(
            fit_temperature(ensemble_logits(logits), table.labels.cpu())
        )
    state.calibration_temperature = group.gather(temperature)[0]
    if group.first:
        checkpoints.save(state, training.path)
    group.barrier()


def _usable_temperature(temperature: float) -> float | None:
    """None for the lower end, at which a model that is right on every image would be 100 % sure."""
    from shike_core.calibration import LARGEST

    if temperature > 1.01 / LARGEST:
        return temperature
    warnings.warn(
        "every image held out for calibration is classified rightly, which tells no temperature: "
        "the model's confidence stays as it is. A larger validation_per_class would tell more",
        stacklevel=3,
    )
    return None


def _pixels(config: TrainConfig, info: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of what the network sees."""
    if config.crop == "resized":
        return config.crop_size, config.crop_size
    height, width = info["image_size"]
    return height, width


def _refuse_small_images(config: TrainConfig, info: Mapping[str, Any]) -> None:
    """Refuse images that are too small for the network."""
    if config.crop == "resized":
        side = info.get("median_short_side")
        if side is not None and 2 * side < config.crop_size:
            raise DatasetError(
                f"crop_size={config.crop_size}, but half of the images of this subset have a "
                f"shorter side of {side:g} pixels or less and would be enlarged more than twice; "
                f"set crop_size to at most {2 * int(side)}, or build the subset with "
                "image_size and train it with network=resnet32 and crop=padded"
            )
    elif info["image_size"] and config.network != "resnet32":
        height, width = info["image_size"]
        if min(height, width) < SMALLEST_FOR_LARGE_NETWORKS:
            raise DatasetError(
                f"network={config.network} leaves nothing of images of {width} x {height} pixels, "
                f"it needs {SMALLEST_FOR_LARGE_NETWORKS}; set network=resnet32 with width=16, or "
                "build the subset of larger images"
            )


def _refuse_single_pixels(config: TrainConfig, info: Mapping[str, Any], images: int) -> None:
    """Refuse steps of one image whose last features are one pixel: they have no variance."""
    reduced = 4 if config.network == "resnet32" else 32
    alone = images % config.batch_size == 1 or 1 in (config.batch_size, config.micro_batch_size)
    known = config.crop == "resized" or info["image_size"]  # others are refused with their images
    if alone and known and max(_pixels(config, info)) <= reduced:
        raise DatasetError(
            f"of images of {reduced} pixels or less {config.network} makes one pixel a channel, "
            f"and BatchNorm cannot be trained on one image of that; with {images} images "
            f"batch_size={config.batch_size} and micro_batch_size={config.micro_batch_size} have "
            "such a step: choose others, or larger images"
        )


def _prepare(
    config: TrainConfig,
    data: "Subset",
    tables: Mapping[str, "Table"],
    watch: str,
    out: Path,
    log: Log,
    checkpoint_dir: Path | None,
    group: "Group",
    stop_signal: Callable[[], int | None],
    preparation: "Preparation",
) -> "Training":
    """A training as its checkpoint says, or at its beginning; logs the epochs already done."""
    import torch

    from shike_core import checkpoint as checkpoints
    from shike_core.device import resolve_acceleration, resolve_precision, synchronise_batch_norm
    from shike_core.train import Training

    table = tables["train"]
    digest = training_digest(config, data.digest)
    path = _checkpoint_path(digest, out, checkpoint_dir)
    if path.exists():
        state = checkpoints.load(path)
        _refuse_other_training(state, config, data.digest, digest, path)
    else:
        state = checkpoints.Checkpoint(
            config=asdict(config),
            training_digest=digest,
            subset_digest=data.digest,
            class_names=list(data.class_names),
            class_counts=data.class_counts.tolist(),
            mean=list(data.mean),
            std=list(data.std),
            image_size=list(_pixels(config, data.info)),
            model={},
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = checkpoints.build_model(config, len(data.class_names))
    if state.model:
        model.load_state_dict(state.model)
    elif config.pretrained:
        from shike_core.model.pretrained import load_pretrained

        load_pretrained(model, config.network)
    found = group.gather((state.epoch, state.step))
    if len(set(found)) > 1:
        raise CheckpointError(
            f"the processes that train together find different checkpoints {path} (epoch, step: "
            f"{', '.join(map(str, found))}); checkpoint_dir, or the output directory, must be one "
            "that all nodes share"
        )
    if config.batch_norm == "synchronised":
        synchronise_batch_norm(model, table.device)
    for metrics in state.history:
        log(metrics, int(metrics["epoch"]))
    dtype = resolve_precision(config.precision, table.device)
    return Training(
        model=model.to(table.device).to(memory_format=torch.channels_last),
        config=config,
        table=table,
        validation=tables.get(watch),
        validation_name=watch,
        mean=data.mean,
        std=data.std,
        class_counts=torch.tensor(state.class_counts, device=table.device),
        dtype=dtype,
        acceleration=resolve_acceleration(config.acceleration, table.device, dtype),
        state=state,
        path=path,
        log=log,
        stop_signal=stop_signal,
        group=group,
        preparation=preparation,
    )


def evaluate(
    config: EvaluateConfig,
    subset: Path,
    checkpoint: Path,
    out: Path,
    log: Log,
    export: "Exporter | None" = None,
) -> Report:
    """Measure a trained model on the balanced test split, and export it.

    Args:
        config: how to measure.
        subset: directory written by `build_subset`.
        checkpoint: directory written by `train`.
        out: receives ``predictions.parquet``, ``report.json``, ``report.html`` and ``plots/*.png``.
        log: called once, with every metric and the number of epochs trained.
        export: stores the program; by default it becomes ``model.pt2`` in `out`.

    Raises:
        DatasetError: the subset cannot be read.
        DeviceError: there is no such device, or it has too little memory.
        CheckpointError: the checkpoint cannot be used, is for other classes, or its logits are
            not finite.
        ExportError: the exported program does not give the checkpoint's answers.
        ArtifactError: a result cannot be written.
    """
    import numpy as np
    import torch

    from shike_core.checkpoint import load_trained
    from shike_core.data.manifest import read_subset
    from shike_core.data.stream import open_tables
    from shike_core.device import enough_memory, resolve_device
    from shike_core.evaluate import (
        choose_examples,
        measure,
        pictures,
        predict,
        write_predictions,
    )
    from shike_core.export import (
        DeployedModel,
        folded,
        save_program,
        verify_program,
        weights_digest,
    )
    from shike_core.model.size import size_of
    from shike_core.report import plots, render_report

    device = resolve_device(config.device)
    data = read_subset(subset, splits=("test",))
    trained = load_trained(checkpoint / CHECKPOINT, device)
    class_names = trained.class_names or data.class_names
    class_counts = np.array(trained.class_counts or data.class_counts, dtype=np.int64)
    _refuse_other_classes(class_names, data.class_names, checkpoint / CHECKPOINT)
    test = data.splits["test"]
    (table,) = open_tables(test, [replace(trained.config, workers=config.workers)], device)
    batch = config.eval_batch_size

    def ask(flip: bool = False) -> "Tensor":
        with enough_memory(batch, name="eval_batch_size"):
            return predict(trained.model, table, trained.mean, trained.std, batch, flip)

    logits = ask()
    write_predictions(out / "predictions.parquet", test.source_index, test.labels, logits)
    labels = torch.tensor(test.labels)
    report: Report = measure(
        logits,
        labels,
        class_counts,
        class_names,
        config.calibration_bins,
        flipped_logits=ask(flip=True) if config.flip else None,
        temperature=(temperature := trained.calibration_temperature),
        logit_adjustment=trained.config.logit_adjustment,
    )
    deployed = DeployedModel(trained.model.cpu(), trained.mean, trained.std, temperature).eval()
    example = next(table.batches(4)).cpu()
    program = (export or save_program)(folded(deployed), example, out)
    report["export"] = {
        "largest_difference": verify_program(
            program, table, (scaled := logits / (temperature or 1.0)), batch
        ),
        "weights_digest": weights_digest(deployed),
    }
    report |= {
        "config": asdict(config),
        "test_digest": data.test_digest,
        "subset_digest": data.digest,
        "trained_on_this_subset": trained.subset_digest == data.digest,
        "subset": data.info,
        "train": {
            **asdict(trained.config),
            **size_of(trained.model, *_pixels(trained.config, data.info))._asdict(),
            "expert_depths": [e.depth for e in trained.model.experts if trained.config.fusion],
        },
        "history": trained.history,
        "examples": (examples := choose_examples(scaled, labels, report["per_class"])),
    }
    write_json(report, out / "report.json")
    shown = [of["row"] for row in examples for kind in ("right", "wrong") for of in row[kind]]
    images = pictures(test, shown, trained.config.crop_size)
    for name, png in plots(report).items():
        with atomic_write(out / "plots" / name) as temporary:
            temporary.write_bytes(png)
    render_report(report, out / "report.html", dict(zip(shown, images, strict=True)))
    log(report["metrics"], trained.epochs_done)
    return report


def predict(config: PredictConfig, checkpoint: Path, images: Sequence[str]) -> Iterator[Report]:
    """Let a trained model answer for images.

    Args:
        config: how.
        checkpoint: directory written by `train`, or the checkpoint in it.
        images: files, folders, or ``-`` for one image on standard input.

    Yields:
        For each image what `shike_core.inference.answers` says, ``calibrated`` included.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        DatasetError: an image is not there.
    """
    from shike_core.checkpoint import load_trained
    from shike_core.device import resolve_device
    from shike_core.inference import answers, find_images

    names = find_images(images)
    device = resolve_device(config.device)
    path = checkpoint / CHECKPOINT if checkpoint.is_dir() else checkpoint
    yield from answers(load_trained(path, device), names, config, device)


def import_reference(file: Path, out: Path, subset: Path | None = None) -> Report:
    """Turn a checkpoint of the authors' code into one that `evaluate` reads.

    Args:
        file: the authors' ``FILE.pth.tar``.
        out: receives ``checkpoint.pt``.
        subset: what the model was trained on; without it the classes are those of the subset
            it is evaluated on.

    Raises:
        CheckpointError: the file cannot be read, or is not of the authors' network for CIFAR.
        DatasetError: the subset cannot be read.
        ArtifactError: the checkpoint cannot be written.
    """
    from shike_core import checkpoint as checkpoints
    from shike_core.data.manifest import read_subset
    from shike_core.data.sources import CIFAR_MEAN, CIFAR_SIZE, CIFAR_STD

    data = read_subset(subset, splits=()) if subset else None
    imported = checkpoints.import_reference(
        file,
        class_names=list(data.class_names) if data else [],
        class_counts=data.class_counts.tolist() if data else [],
        mean=list(data.mean if data else CIFAR_MEAN),
        std=list(data.std if data else CIFAR_STD),
        image_size=list(data.info["image_size"] if data else CIFAR_SIZE),
        subset_digest=data.digest if data else "",
    )
    checkpoints.save(imported, out / CHECKPOINT)
    return {
        "num_experts": imported.config["num_experts"],
        "num_classes": len(imported.model["stage2_heads.0.weight"]),
    }


def compare_with_champion(
    config: RegisterConfig, evaluation: Path, champion: Mapping[str, Any] | None
) -> Decision:
    """Decide whether an evaluated model may replace the champion. Needs no torch.

    Args:
        config: the margins.
        evaluation: directory written by `evaluate`.
        champion: what `gate.decide` takes of the present champion, or None.

    Raises:
        ArtifactError: the evaluation has no readable report.
    """
    path = evaluation / "report.json"
    try:
        report = json.loads(path.read_text())
        candidate = {
            "test_digest": report["test_digest"],
            "weights_digest": report["export"]["weights_digest"],
            "metrics": report["metrics"],
            "shot_groups": shot_groups_digest(report["per_class"]),
        }
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} cannot be read ({error}); evaluate the model again before registering it"
        ) from error
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is not the report of an evaluation ({error} is wrong or missing); evaluate "
            "the model again before registering it"
        ) from error
    return decide(config, candidate, champion)


def compare(
    evaluations: Sequence[Path],
    out: Path,
    names: Sequence[str] = (),
    pages: Sequence[str] = (),
    across_test_sets: bool = False,
) -> Report:
    """Put evaluated models side by side, and say how sure their differences are. Needs no torch.

    Args:
        evaluations: two or more directories written by `evaluate`; the first is the base.
        out: receives ``compare.html``, ``compare.md``, ``compare.csv`` and ``compare.json``.
        names: what to call them; by default as their directories.
        pages: where to read more of each.
        across_test_sets: also if they were measured on different images; then nothing is tested.

    Raises:
        ComparisonError: an evaluation is not complete, or they cannot be compared.
        ArtifactError: a result cannot be written.
    """
    from shike_core.compare import compare as side_by_side
    from shike_core.compare import read_evaluation, write_comparison

    names = names or _distinct_names(evaluations)
    runs = [
        read_evaluation(directory, name, page)
        for directory, name, page in zip(
            evaluations, names, pages or [""] * len(evaluations), strict=True
        )
    ]
    report = side_by_side(runs, across_test_sets)
    write_comparison(report, out)
    return report


def _distinct_names(directories: Sequence[Path]) -> list[str]:
    """The ends of paths, as long as it takes to tell them apart."""
    parts = [directory.resolve().parts for directory in directories]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(of_path[-length:]) for of_path in parts]
        if len(set(names)) == len({*parts}):
            return names
    return ["/".join(of_path) for of_path in parts]


def training_digest(config: TrainConfig, subset_digest: str) -> str:
    """Identity of a training: what decides its weights, and the subset it is trained on."""
    return config_digest(replace(config, **INDECISIVE), subset_digest)


def _checkpoint_path(digest: str, out: Path, checkpoint_dir: Path | None) -> Path:
    """Where a training keeps its checkpoint, see `train`."""
    return (checkpoint_dir / digest if checkpoint_dir else out) / CHECKPOINT


def discard_checkpoint(digest: str, checkpoint_dir: Path | None) -> None:
    """Remove what `train` kept in a directory, if any, once its results are safe elsewhere.

    Args:
        digest: of the training, see `training_digest`.
        checkpoint_dir: as `train` had it.
    """
    if checkpoint_dir is not None:
        shutil.rmtree(checkpoint_dir / digest, ignore_errors=True)


def write_json(content: object, path: Path) -> None:
    """Write JSON without NaN, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


@contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """Turn the signals that ask to stop into a request that a training looks at after each step.

    Yields:
        A function that returns the number of the signal received, or None.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # Python delivers signals to the main thread only
        return
    numbers = heard_signals()
    before = [signal.signal(n, lambda number, _: received.append(number)) for n in numbers]
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _refuse_other_training(
    state: "Checkpoint", config: TrainConfig, subset_digest: str, digest: str, path: Path
) -> None:
    if state.training_digest == digest:
        return
    differences = _differences(state, config, subset_digest, INDECISIVE)
    differences += [
        f"{name} not known there, {value} here"
        for name, value in asdict(config).items()
        if name not in state.config  # an older version wrote it
    ]
    raise CheckpointError(
        f"{path} belongs to another training ({'; '.join(differences)}); "
        "choose an empty output directory, or the configuration it was made with"
    )


def _differences(
    state: "Checkpoint", config: TrainConfig, subset_digest: str, ignored: Collection[str]
) -> list[str]:
    """What tells two trainings apart, in words."""
    there, here = asdict(state.train_config), asdict(config)
    differences = [
        f"{name} {there[name]} there, {here[name]} here"
        for name in sorted(here)
        if name not in ignored and there[name] != here[name]
    ]
    if state.subset_digest != subset_digest:
        differences.append(f"subset {state.subset_digest[:12]} there, {subset_digest[:12]} here")
    return differences


def _refuse_other_classes(trained: Sequence[str], present: Sequence[str], path: Path) -> None:
    if len(trained) != len(present):
        raise CheckpointError(
            f"{path} was trained for {len(trained)} classes, but the subset has {len(present)}; "
            "evaluate it on a subset of the data set it was trained on"
        )
    for label, (there, here) in enumerate(zip(trained, present, strict=True)):
        if there != here:
            raise CheckpointError(
                f"{path} was trained with class {label} named {there!r}, but the subset calls it "
                f"{here!r}; evaluate it on a subset of the data set it was trained on"
            )

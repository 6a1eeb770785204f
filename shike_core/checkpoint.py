"""Checkpoints on disk: what was trained, on what, and everything needed to go on."""

import io
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shike_core.config import TrainConfig
from shike_core.errors import CheckpointError
from shike_core.files import atomic_write
from shike_core.model import Shike, build_shike

FORMAT = 3
_SCALAR = np.float64().__reduce__()[0]  # numpy's own place for it moves between versions
_NUMPY_SCALARS: list[Any] = [
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]
"""Plain numbers as numpy pickles them: the authors keep their best accuracy as one."""
StateDict = dict[str, Tensor]


@dataclass(kw_only=True)
class Checkpoint:
    """A training in progress or finished; plain data and tensors only."""

    config: dict[str, Any]
    """Fields of the `TrainConfig`."""
    training_digest: str
    """Identity of configuration and subset; see `shike_core.stages.training_digest`."""
    subset_digest: str
    class_names: list[str]
    """Empty if the weights were imported and nobody said."""
    class_counts: list[int]
    """Empty likewise."""
    mean: list[float]
    std: list[float]
    image_size: list[int]
    """Height and width of the images it is for; empty if weights were imported and nobody said."""
    model: StateDict
    epoch: int = 0
    """The epoch to go on with, counted over both stages; `config.epochs` when finished."""
    step: int = 0
    """The step to go on with inside that epoch."""
    sums: list[float] = field(default_factory=list)
    """What the steps before it added to the epoch's averages."""
    optimizer: dict[str, Any] | None = None
    """State of the stage's optimiser; None at the start of a stage."""
    scaler: dict[str, Any] | None = None
    """State of the gradient scaler of float16 training."""
    average: StateDict | None = None
    """Moving average of the model, if the training keeps one."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of every finished epoch."""
    costs: list[dict[str, Any]] = field(default_factory=list)
    """What each of these epochs took: ``device``, ``acceleration``, ``fallbacks`` (why its steps
    ran slower than that), ``trainings`` that shared the device, ``preparation_seconds`` of
    compiling and recording, and ``peak_memory_bytes`` until its end (`shike_core.device`). Empty
    dictionaries for those trained by versions that did not write it down."""
    calibration_temperature: float | None = None
    """Fitted on the validation part when the training ended, see `shike_core.calibration`; None
    before, and without such a part."""

    @property
    def finished(self) -> bool:
        """Whether both stages are done."""
        return self.epoch >= self.train_config.epochs

    @property
    def train_config(self) -> TrainConfig:
        """The configuration the weights were trained with."""
        return TrainConfig(**self.config)


@dataclass(frozen=True)
class Trained:
    """A model ready for use, in evaluation mode, and what it was trained on."""

    model: Shike
    config: TrainConfig
    class_names: tuple[str, ...]
    """Empty if the weights were imported and nobody said."""
    class_counts: tuple[int, ...]
    """Empty likewise."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: tuple[int, int] | None
    """Height and width; None if the weights were imported and nobody said."""
    calibration_temperature: float | None
    """None if no validation part was held out."""
    subset_digest: str
    epochs_done: int
    history: list[dict[str, float]]


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        ArtifactError: it cannot be written; an older file of that name stays as it was.
    """
    content = {name.name: getattr(checkpoint, name.name) for name in fields(checkpoint)}
    buffer = io.BytesIO()  # torch.save itself would hide a full disk behind a RuntimeError
    torch.save({"format": FORMAT, **content}, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path: Path) -> Checkpoint:
    """Read a checkpoint; nothing in the file is executed.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is no checkpoint of ours.
    """
    content = load_tensors(path)
    expected = {"format", *(name.name for name in fields(Checkpoint))}
    if isinstance(content, dict) and isinstance(content.get("history"), list):
        content.setdefault("costs", [{} for _ in content["history"]])  # versions before 2026-12
    if not isinstance(content, dict) or content.keys() != expected or content["format"] != FORMAT:
        raise CheckpointError(
            f"{path} is no checkpoint of format {FORMAT} of this package; for a checkpoint of the "
            "authors' code use `python -m shike_core import-reference`"
        )
    del content["format"]
    try:
        TrainConfig(**content["config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} was trained with a configuration that this version does not know ({error}); "
            "use the version that wrote it"
        ) from error
    return Checkpoint(**content)


def load_tensors(path: Path) -> Any:
    """Read what `torch.save` wrote, as plain data and tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than plain data.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; train first, or check the path")
    try:
        if zipfile.is_zipfile(path):  # torch itself does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if (member := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {member}")
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise anything, AttributeError and IndexError too
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's text advises to execute the file
            reason = "not a file of plain data"
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as a checkpoint ({reason}); "
            "it is damaged or holds more than tensors: use another copy"
        ) from error


def build_model(config: TrainConfig, num_classes: int) -> Shike:
    """The network that a configuration describes, freshly initialised from torch's generator.

    Pretrained weights are not in it: `shike_core.model.pretrained` has those.
    """
    return build_shike(
        config.network,
        num_classes,
        config.num_experts,
        width=config.width,
        scale=config.scale,
        stage2_scale=config.stage2_scale or config.scale,
        alignment_relu=config.alignment_relu,
        fusion=config.fusion,
        classifier=config.classifier,
    )


def load_trained(path: Path, device: str | torch.device = "cpu") -> Trained:
    """Read a checkpoint and build its model in evaluation mode.

    Raises:
        CheckpointError: the file cannot be used, or the training in it has not finished.
    """
    checkpoint = load(path)
    config = checkpoint.train_config
    if not checkpoint.finished:
        raise CheckpointError(
            f"{path} holds {checkpoint.epoch} of {config.epochs} epochs; go on with the training "
            "(the same command resumes it) before evaluating"
        )
    try:
        num_classes = len(checkpoint.model["stage2_heads.0.weight"])
        model = build_model(config, num_classes)
        model.load_state_dict(checkpoint.model)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"the weights in {path} do not fit the configuration stored with them "
            f"({config.num_experts} experts, width {config.width}); write the checkpoint again"
        ) from error
    mean, std = ((x[0], x[1], x[2]) for x in (checkpoint.mean, checkpoint.std))
    return Trained(
        model=model.to(device).eval(),
        config=config,
        class_names=tuple(checkpoint.class_names),
        class_counts=tuple(checkpoint.class_counts),
        mean=mean,
        std=std,
        image_size=(checkpoint.image_size[0], checkpoint.image_size[1])
        if checkpoint.image_size
        else None,
        calibration_temperature=checkpoint.calibration_temperature,
        subset_digest=checkpoint.subset_digest,
        epochs_done=checkpoint.epoch,
        history=checkpoint.history,
    )


def import_reference(path: Path, **origin: Any) -> Checkpoint:
    """Read a checkpoint of the authors' code as a finished training of ours.

    Args:
        path: the authors' file: a state dict, or a dictionary with one under ``state_dict``.
        origin: fields of `Checkpoint` that the authors' file does not have: ``class_names``,
            ``class_counts``, ``mean``, ``std``, ``image_size``, ``subset_digest``.

    Raises:
        CheckpointError: the file cannot be read, or is not of the authors' network for CIFAR.
    """
    content = load_tensors(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not state:
        raise CheckpointError(f"{path} holds no state dict; give a checkpoint of the authors' code")
    model = convert_reference_state_dict(state)
    heads = [name for name in model if name.startswith("stage2_heads.")]
    if not heads or "stem.0.weight" not in model:
        raise CheckpointError(
            f"{path} has no {'stage-2 heads' if not heads else 'first convolution'}; give the "
            "checkpoint of the authors' second stage, which holds the whole network"
        )
    config = TrainConfig(num_experts=len(heads), width=len(model["stem.0.weight"]))
    checkpoint = Checkpoint(
        config=asdict(config),
        training_digest="imported",
        model=model,
        epoch=config.epochs,
        **origin,
    )
    network = build_model(config, len(model[heads[0]]))
    try:
        network.load_state_dict(model)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} does not fit the authors' ResNet-32 network for CIFAR: {error}"
        ) from error
    return checkpoint


def convert_reference_state_dict(state: Mapping[str, Any]) -> StateDict:
    """Turn a state dict of the authors' code into ours.

    Args:
        state: tensors or arrays under the authors' names, with or without the ``module.`` prefix
            of data parallel training. Counters of BatchNorm may be missing; they become 0.

    Returns:
        What ``load_state_dict`` of a `Shike` of the same sizes takes.

    Raises:
        CheckpointError: a name that the authors' network does not have.
    """
    converted: StateDict = {}
    for name, value in state.items():
        ours = _our_name(name.removeprefix("module."))
        tensor = torch.as_tensor(value)
        tensor = tensor.T if "_heads." in ours else tensor
        converted[ours] = tensor.clone(memory_format=torch.contiguous_format)
        if ours.endswith(".running_mean"):
            counter = ours.removesuffix("running_mean") + "num_batches_tracked"
            converted.setdefault(counter, torch.tensor(0))
    return converted


def _our_name(name: str) -> str:
    first, _, rest = name.partition(".")
    index, _, inner = rest.partition(".")
    match first:
        case "conv1":
            return f"stem.0.{rest}"
        case "bn1":
            return f"stem.1.{rest}"
        case "layer1":
            return f"shared_stages.0.{rest}"
        case "layer2":
            return f"shared_stages.1.{rest}"
        case "layer3s":
            return f"experts.{index}.last_stage.{inner}"
        case "shallow_exps" if step := re.fullmatch(
            r"convs\.StridedConv(\d+)\.conv\.([01])\.(\w+)", inner
        ):  # 0 is the convolution, 1 its BatchNorm; ours has a ReLU between two such steps
            position = 3 * int(step[1]) + int(step[2])
            return f"experts.{index}.alignment.{position}.{step[3]}"
        case "classifiers":
            return f"stage1_heads.{index}.{inner}"
        case "rt_classifiers":
            return f"stage2_heads.{index}.{inner}"
    raise CheckpointError(
        f"the parameter {name!r} does not belong to the authors' ResNet-32 network for CIFAR; "
        "only checkpoints of that network can be converted"
    )

"""The ensemble as one program that runs without this package."""

import copy
import hashlib
import io
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from shike_core.data.loader import Table
from shike_core.errors import ExportError
from shike_core.files import atomic_write
from shike_core.model import Shike

PROGRAM = "model.pt2"
TOLERANCE = 1e-3
"""Largest difference of a class probability between the program and the checkpoint."""
PIXELS_COMPARED = 2**25
"""All images of CIFAR, or the first seven hundred photographs."""

Program = Callable[[Tensor], Tensor]
Exporter = Callable[[nn.Module, Tensor, Path], Program]
"""``(module, example images, output directory)`` to the program as read back from its store."""


class DeployedModel(nn.Module):
    """Pixels in, class probabilities out: normalisation, stage-2 heads, mean of the logits.

    Holds a copy of the model without the stage-1 heads.

    Args:
        model: the mixture of experts.
        mean: of each channel, as fractions of full brightness.
        std: of each channel, as fractions of full brightness.
        temperature: that calibrates the probabilities; None leaves them as they are.
    """

    scale: Tensor
    shift: Tensor
    temperature: Tensor | None

    def __init__(
        self,
        model: Shike,
        mean: Sequence[float],
        std: Sequence[float],
        temperature: float | None = None,
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.model.stage1_heads = nn.ModuleList()  # only training needs them
        shape = (1, -1, 1, 1)
        self.register_buffer("scale", 1 / (255 * torch.tensor(std).view(shape)))
        self.register_buffer("shift", -(torch.tensor(mean) / torch.tensor(std)).view(shape))
        # An absent one is no part of the weights, whose digest stays as it was.
        tempered = None if temperature is None else torch.tensor(temperature)
        self.register_buffer("temperature", tempered)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(batch, 3, h, w)``, 0 to 255 as uint8 or float, to ``(batch, classes)``."""
        # By type promotion, not by a cast: a cast would tie the program to one type of image.
        numbers = images * self.scale + self.shift
        # The order of memory in which a CPU convolves fastest; the convolutions keep it.
        logits: Tensor = self.model(numbers.contiguous(memory_format=torch.channels_last), stage=2)
        ensemble = logits.mean(dim=1)
        if self.temperature is not None:
            ensemble = ensemble / self.temperature
        return ensemble.softmax(dim=-1)


def folded(model: nn.Module) -> nn.Module:
    """A copy in which convolutions do as well what the BatchNorm after them does in evaluation.

    The same function up to rounding, with a third fewer steps.

    Args:
        model: in evaluation mode; a BatchNorm stands next to its convolution, as in `backbone`.
    """
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for (name, before), (next_name, after) in pairwise(list(parent.named_children())):
            if isinstance(before, nn.Conv2d) and isinstance(after, nn.BatchNorm2d):
                setattr(parent, name, nn.utils.fuse_conv_bn_eval(before, after))
                setattr(parent, next_name, nn.Identity())
    return model


def save_program(model: nn.Module, example: Tensor, out: Path) -> Program:
    """Write ``model.pt2`` with a dynamic batch, and read it back.

    Args:
        model: a `DeployedModel` in evaluation mode, which may be `folded`.
        example: uint8 ``(batch, 3, h, w)``, batch at least 2.
        out: directory for the program.

    Raises:
        ArtifactError: it cannot be written.
    """
    shapes = [{0: torch.export.Dim.AUTO}]
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    buffer = io.BytesIO()  # torch itself ends the process when the disk is full
    torch.export.save(program, buffer)
    with atomic_write(out / PROGRAM) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    return torch.export.load(out / PROGRAM).module()


@torch.no_grad()
def verify_program(program: Program, table: Table, logits: Tensor, batch_size: int) -> float:
    """Compare a program with the checkpoint it came from, image by image.

    As it runs on the CPU, it is shown no more images than have `PIXELS_COMPARED` together, but one
    batch at least.

    Args:
        program: what an exporter gave back.
        table: of the images.
        logits: the checkpoint's over its temperature, ``(n, num_experts, num_classes)``.
        batch_size: images per call; the last call has fewer.

    Returns:
        The largest difference of a probability.

    Raises:
        ExportError: a probability differs by more than `TOLERANCE`.
    """
    expected = logits.mean(dim=1).softmax(dim=-1)
    answers, pixels = [], 0
    for images in table.batches(batch_size):
        answers.append(program(images.cpu()).to(expected))
        pixels += images[:, 0].numel()
        if pixels >= PIXELS_COMPARED:
            break
    seen = torch.cat(answers)
    difference = (seen - expected[: len(seen)]).abs().amax(dim=1)
    largest = float(difference.max())
    if not largest <= TOLERANCE:  # also refuses NaN
        raise ExportError(
            f"the exported program differs from the checkpoint by {largest:g} in a class "
            f"probability of test image {int(difference.argmax())}, allowed is {TOLERANCE:g}; it "
            "was not registered. Evaluate again with device=cpu; if it stays, report this as a bug"
        )
    return largest


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all weights and buffers of a `DeployedModel`, with their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

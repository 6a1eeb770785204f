"""What this machine can do at best: the network's own convolutions, and copying."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shike_core.checkpoint import build_model
from shike_core.config import TrainConfig
from shike_core.model.backbone import SubsampledPointwise

PASSES = ("forward", "backward_data", "backward_weights")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
COPIES = 5


class Convolution(NamedTuple):
    """The shape of one convolution; square kernels, no bias, one group."""

    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    """Of the input, as the height."""
    kernel: int
    stride: int
    padding: int
    needs_data_gradient: bool
    """Not the first one: nobody asks for the gradient of the images."""

    @property
    def operations(self) -> int:
        """Floating point operations of one pass, two for a multiplication with addition."""
        out_height, out_width = (
            (length + 2 * self.padding - self.kernel) // self.stride + 1
            for length in (self.height, self.width)
        )
        each = self.in_channels * self.kernel**2
        return 2 * self.batch * self.out_channels * out_height * out_width * each


def convolutions_of(config: TrainConfig, num_classes: int, size: int) -> Counter[Convolution]:
    """The convolutions of a forward pass of the network, and how often each is run.

    Args:
        config: of the network, and its batch size.
        num_classes: classes.
        size: height and width of the images.
    """
    found: Counter[Convolution] = Counter()

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        assert (layer.groups, layer.bias) == (1, None)
        subsamples = isinstance(layer, SubsampledPointwise)
        seen = output if subsamples else inputs[0]
        found[
            Convolution(
                batch=config.batch_size,
                in_channels=layer.in_channels,
                out_channels=layer.out_channels,
                height=seen.shape[2],
                width=seen.shape[3],
                kernel=layer.kernel_size[0],
                stride=1 if subsamples else layer.stride[0],
                padding=int(layer.padding[0]),
                needs_data_gradient=layer.in_channels != 3,
            )
        ] += 1

    model = build_model(config, num_classes).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(record)
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return found


def passes_of(
    shape: Convolution, device: torch.device, dtype: torch.dtype, layout: torch.memory_format
) -> dict[str, Callable[[], object]]:
    """The three passes of a convolution on random numbers, each as a function to be timed."""
    kernel = (shape.out_channels, shape.in_channels, shape.kernel, shape.kernel)
    images, weight = (
        torch.randn(*size, device=device).to(dtype).contiguous(memory_format=layout)
        for size in ((shape.batch, shape.in_channels, shape.height, shape.width), kernel)
    )
    stride, padding = [shape.stride] * 2, [shape.padding] * 2
    more = (stride, padding, [1, 1], False, [0, 0], 1)
    convolve, derive = torch.ops.aten.convolution, torch.ops.aten.convolution_backward
    gradient = torch.randn_like(convolve(images, weight, None, *more))
    backward = (gradient, images, weight, None, *more)
    return {
        "forward": lambda: convolve(images, weight, None, *more),
        "backward_data": lambda: derive(*backward, [True, False, False]),
        "backward_weights": lambda: derive(*backward, [False, True, False]),
    }


def measure_convolutions(
    shapes: Counter[Convolution], device: torch.device, dtype: torch.dtype, least_seconds: float
) -> list[dict[str, Any]]:
    """The best time of each pass of each shape, in the better memory layout.

    Returns:
        For each shape its fields, ``count``, ``operations``, and ``seconds`` and ``layout`` of
        each pass; None where the network does not need it.
    """
    rows = []
    for shape, count in shapes.items():
        best: dict[str, tuple[float, str]] = {}
        for layout, memory_format in FORMATS.items():
            for name, run in passes_of(shape, device, dtype, memory_format).items():
                if name != "backward_data" or shape.needs_data_gradient:
                    taken = (best_seconds(run, device, least_seconds), layout)
                    best[name] = min(best.get(name, taken), taken)
        row: dict[str, Any] = shape._asdict() | {"count": count, "operations": shape.operations}
        row["seconds"] = {name: best[name][0] if name in best else None for name in PASSES}
        row["layout"] = {name: best[name][1] if name in best else None for name in PASSES}
        rows.append(row)
    return rows


def network_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What a batch takes in all convolutions together, by pass: ``seconds`` and ``operations``.

    Args:
        rows: as `measure_convolutions` returns them.
    """
    total = {name: {"seconds": 0.0, "operations": 0.0} for name in PASSES}
    for row in rows:
        for name, taken in row["seconds"].items():
            if taken is not None:
                total[name]["seconds"] += row["count"] * taken
                total[name]["operations"] += row["count"] * row["operations"]
    return total


def measure_copy(device: torch.device, size: int) -> float:
    """Bytes read and written in a second by copying an array of `size` bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(COPIES))
    return 2 * size / best


def best_seconds(run: Callable[[], object], device: torch.device, least_seconds: float) -> float:
    """The least time of a call: after one to warm up, at least three and `least_seconds`."""
    run()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < least_seconds:
        taken.append(seconds(run, device))
    return min(taken)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one call, with all that it starts on the device."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

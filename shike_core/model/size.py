"""How large a network is, in parameters and in operations."""

from typing import NamedTuple

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from shike_core.model.shike import Shike


class Size(NamedTuple):
    """Of a network, by the names of a report."""

    parameters: int
    """While it is trained, with the heads of both stages."""
    parameters_deployed: int
    """Without the heads of stage 1."""
    macs: int
    """Multiplications with addition in convolutions and heads, for one image, deployed."""


def size_of(model: Shike, height: int, width: int) -> Size:
    """Count parameters and operations; nothing is computed and the model stays as it is.

    It is counted in evaluation mode: BatchNorm that several processes synchronise refuses to be
    counted while it trains.

    Args:
        model: on any device, in either mode.
        height: of the images, in pixels.
        width: of the images, in pixels.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    shapes = {name: torch.empty_like(x, device="meta") for name, x in model.state_dict().items()}
    images = torch.empty(1, 3, height, width, device="meta")
    training = [module for module in model.modules() if module.training]
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(model, shapes, (images,))
    for module in training:
        module.training = True
    return Size(
        parameters=sum(sizes.values()),
        parameters_deployed=sum(
            size for name, size in sizes.items() if not name.startswith("stage1_heads")
        ),
        macs=counter.get_total_flops() // 2,
    )

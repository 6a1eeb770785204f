"""Which hardware and which number format a run uses."""

import torch

from shike_core.config import Device, Precision
from shike_core.errors import DeviceError


def resolve_device(device: Device) -> torch.device:
    """The device to use; auto takes a GPU if there is one.

    Raises:
        DeviceError: a GPU is asked for and none can be used.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "device=cuda, but torch finds no usable GPU; use device=cpu or device=auto, or check "
            "the driver and that the container was given a GPU"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The format of the convolutions; auto takes half precision where the hardware computes in it.

    Raises:
        DeviceError: float16 on a CPU, where gradients would underflow without any gain.
    """
    if precision == "auto":
        return _fast_dtype(device)
    if precision == "float16" and device.type == "cpu":
        raise DeviceError("precision=float16 needs a GPU; use bfloat16, float32 or auto on a CPU")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
        precision
    ]


def _fast_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware; emulation is slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported())

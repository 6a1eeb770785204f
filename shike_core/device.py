"""Which hardware, which number format and which way of running a step a run uses."""

import importlib.util
import resource
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shike_core.config import Acceleration, Device, Precision
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

    A GPU that does not compute in bfloat16 takes float16: with a warning here, if bfloat16 was
    asked for, and one of `resolve_acceleration`, if steps run slower for it.

    Raises:
        DeviceError: float16 on a CPU, where gradients would underflow without any gain.
    """
    if precision == "auto":
        return _fast_dtype(device)
    if precision == "float16" and device.type == "cpu":
        raise DeviceError("precision=float16 needs a GPU; use bfloat16, float32 or auto on a CPU")
    if precision == "bfloat16" and device.type == "cuda" and not _gpu_has_bfloat16():
        warnings.warn(
            f"precision=bfloat16, but {torch.cuda.get_device_name(device)} does not compute in "
            "it; training in float16 instead",
            stacklevel=2,
        )
        precision = "float16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
        precision
    ]


def _fast_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if _gpu_has_bfloat16() else torch.float16
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def _gpu_has_bfloat16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware; emulation is slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def resolve_acceleration(
    acceleration: Acceleration, device: torch.device, dtype: torch.dtype
) -> Acceleration:
    """How steps run here: ``none``, ``cuda-graph`` or ``compile``; one warning if it must be less.

    Args:
        acceleration: what was asked for; auto takes the most on a GPU, and none on a CPU, where
            convolutions decide and compiling takes longer than it saves, nor with float16, whose
            recorded steps nobody has tried, which is said.
        device: where the steps run.
        dtype: format of the convolutions.
    """
    if acceleration == "auto":
        if device.type == "cpu":
            return "none"
        if dtype == torch.float16:
            warnings.warn(
                "training in float16, whose steps are not recorded by themselves and may take ten "
                "times as long; try acceleration=cuda-graph, or a GPU that computes in bfloat16",
                stacklevel=2,
            )
            return "none"
        acceleration = "compile"
    if acceleration == "compile" and (missing := _missing_to_compile(device)):
        acceleration = "none" if device.type == "cpu" else "cuda-graph"
        warnings.warn(f"cannot compile without {missing}; using {acceleration}", stacklevel=2)
    if acceleration == "cuda-graph" and device.type == "cpu":
        warnings.warn("acceleration=cuda-graph needs a GPU; using none", stacklevel=2)
        return "none"
    return acceleration


def _missing_to_compile(device: torch.device) -> str:
    """What torch.compile needs and does not find, or nothing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton"
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "gcc", "clang")):
        return "a C++ compiler (g++ or clang++)"
    return ""


@contextmanager
def enough_memory(batch_size: int, trainings: int = 1, name: str = "batch_size") -> Iterator[None]:
    """Say what to do when the device's memory does not suffice.

    Args:
        batch_size: images per step.
        trainings: how many run at the same time.
        name: of the setting that decides it.

    Raises:
        DeviceError: in place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = max(1, batch_size // 2)
        fewer = f", or fewer than {trainings} trainings at once" if trainings > 1 else ""
        raise DeviceError(
            f"the device has too little memory for {name}={batch_size} "
            f"({str(error).splitlines()[0]}); try {name}={smaller}{fewer}"
        ) from error


@contextmanager
def whole_float32(benchmark: bool = False) -> Iterator[None]:
    """Convolve float32 in float32 on a GPU too; torch alone takes TF32, the mantissa of float16.

    Args:
        benchmark: whether to look for the fastest convolutions, which pays off where shapes do not
            change.
    """
    with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=False):
        yield


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Let every BatchNorm see the images of all processes that train together; names stay.

    Args:
        model: whose children are replaced.
        device: where it is trained.

    Raises:
        DeviceError: torch has none such for a CPU.
    """
    if device.type == "cpu":
        raise DeviceError("batch_norm=synchronised needs a GPU; use batch_norm=local on a CPU")
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


def peak_memory(device: torch.device) -> int:
    """Most bytes of tensors on a GPU since `forget_peak_memory`, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak_memory(device: torch.device) -> None:
    """Measure a GPU's peak from here on; that of a process is one from its beginning."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor of the CPU to a device, without waiting for what the device is doing."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)

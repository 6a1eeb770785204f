"""What is asked of the hardware, and what the hardware can do."""

from pathlib import Path

import pytest
import torch

from shike_core.device import cpu_has_bfloat16, resolve_device, resolve_precision
from shike_core.errors import DeviceError

CPU = torch.device("cpu")
CPUINFO = Path("/proc/cpuinfo")


def test_a_cpu_can_always_be_asked_for() -> None:
    assert resolve_device("cpu") == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(DeviceError, match="device=cuda, but torch finds no usable GPU; use"):
        resolve_device("cuda")
    assert resolve_device("auto") == CPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_is_taken_by_itself() -> None:
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    assert resolve_precision("auto", torch.device("cuda")) in (torch.bfloat16, torch.float16)
    assert resolve_precision("float16", torch.device("cuda")) == torch.float16


def test_float16_on_a_cpu() -> None:
    with pytest.raises(DeviceError, match="precision=float16 needs a GPU; use bfloat16, float32"):
        resolve_precision("float16", CPU)


def test_precisions_on_a_cpu() -> None:
    assert resolve_precision("float32", CPU) == torch.float32
    assert resolve_precision("bfloat16", CPU) == torch.bfloat16
    fast = torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    assert resolve_precision("auto", CPU) == fast


@pytest.mark.skipif(
    not CPUINFO.exists() or "\nflags" not in CPUINFO.read_text(), reason="not an x86 Linux"
)
def test_bfloat16_is_what_the_kernel_says_of_the_processor() -> None:
    assert cpu_has_bfloat16() == ("avx512_bf16" in CPUINFO.read_text())

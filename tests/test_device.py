"""What is asked of the hardware, and what the hardware can do."""

import warnings
from pathlib import Path

import pytest
import torch

from shike_core import device as module
from shike_core.device import (
    cpu_has_bfloat16,
    enough_memory,
    resolve_acceleration,
    resolve_device,
    resolve_precision,
    upload,
    whole_float32,
)
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


def test_steps_on_a_cpu_run_as_they_are_unless_asked_otherwise() -> None:
    assert resolve_acceleration("auto", CPU, torch.float32) == "none"
    assert resolve_acceleration("none", CPU, torch.float32) == "none"
    assert resolve_acceleration("compile", CPU, torch.float32) == "compile"
    with pytest.warns(UserWarning, match="acceleration=cuda-graph needs a GPU; using none"):
        assert resolve_acceleration("cuda-graph", CPU, torch.float32) == "none"


def test_steps_on_a_gpu_are_compiled_and_recorded_where_that_is_possible(monkeypatch) -> None:
    gpu = torch.device("cuda")  # named, not used
    monkeypatch.setattr(module, "_missing_to_compile", lambda device: "")
    assert resolve_acceleration("auto", gpu, torch.bfloat16) == "compile"
    assert resolve_acceleration("cuda-graph", gpu, torch.float32) == "cuda-graph"
    assert resolve_acceleration("none", gpu, torch.float16) == "none"
    assert resolve_acceleration("cuda-graph", gpu, torch.float16) == "cuda-graph"


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_a_gpu_without_bfloat16_trains_in_float16_and_says_so(precision, monkeypatch) -> None:
    gpu = torch.device("cuda")  # named, not used
    monkeypatch.setattr(module, "_gpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert resolve_precision(precision, gpu) == torch.float16
    asked = [str(warning.message) for warning in caught]
    assert asked == ["precision=bfloat16, but an old GPU does not compute in it; training in "
                     "float16 instead"] * (precision == "bfloat16")  # fmt: skip
    message = "training in float16, whose steps are not recorded .* try acceleration=cuda-graph"
    with pytest.warns(UserWarning, match=message) as caught:
        assert resolve_acceleration("auto", gpu, torch.float16) == "none"
    assert len(caught) == 1


def test_float32_means_float32_and_no_shorter_mantissa() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    with whole_float32():
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.enabled
        with whole_float32(benchmark=True):
            assert not torch.backends.cudnn.allow_tf32
            assert torch.backends.cudnn.benchmark
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == before


def test_without_a_compiler_steps_are_recorded_or_run_as_they_are(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    message = r"cannot compile without a C\+\+ compiler \(g\+\+ or clang\+\+\); using none"
    with pytest.warns(UserWarning, match=message) as caught:
        assert resolve_acceleration("compile", CPU, torch.float32) == "none"
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="cannot compile without .*; using cuda-graph") as caught:
        assert resolve_acceleration("auto", torch.device("cuda"), torch.bfloat16) == "cuda-graph"
    assert len(caught) == 1


def test_memory_that_is_too_small_names_the_batch_to_try() -> None:
    with (
        pytest.raises(DeviceError, match=r"batch_size=96 \(no room\); try batch_size=48$"),
        enough_memory(96),
    ):
        raise torch.OutOfMemoryError("no room\nat all")
    with (
        pytest.raises(DeviceError, match=r"for eval_batch_size=9 .*; try eval_batch_size=4$"),
        enough_memory(9, name="eval_batch_size"),
    ):
        raise torch.OutOfMemoryError("no room")
    with (
        pytest.raises(DeviceError, match="try batch_size=1, or fewer than 3 trainings at once"),
        enough_memory(1, 3),
    ):
        raise torch.OutOfMemoryError("no room")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_that_is_asked_for_too_much_says_what_to_try() -> None:
    with pytest.raises(DeviceError, match="try batch_size=64"), enough_memory(128):
        torch.empty(2**50, device="cuda")


def test_upload_to_a_cpu_is_nothing() -> None:
    values = torch.arange(3)
    assert upload(values, CPU) is values

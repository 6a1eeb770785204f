"""Residual blocks by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shike_core.model.backbone import (
    BasicBlock,
    basic_stage,
    bottleneck_stage,
    cifar_stem,
    init_kaiming_fan_out,
    photograph_stem,
    projection,
)

HEAP_CHECKER = Path("/lib/x86_64-linux-gnu/libc_malloc_debug.so.0")
STRIDED_GRADIENTS = """
import torch
from shike_core.model.backbone import projection

torch.set_num_threads(1)
for channels in (1, 4, 8, 12, 15, 16):
    images = torch.randn(32, channels, 8, 8).to(memory_format=torch.channels_last)
    layer = projection(channels, 8, stride=2).to(memory_format=torch.channels_last)
    for _ in range(20):
        layer(images.requires_grad_()).sum().backward()
        torch.empty(257)
print("sound")
"""


@torch.no_grad()
def test_a_block_whose_second_convolution_is_zero_is_its_shortcut() -> None:
    block, images = BasicBlock(3, 3).eval(), torch.randn(2, 3, 5, 5)
    block.conv2.weight.zero_()
    assert torch.equal(block(images), images.relu())


@torch.no_grad()
def test_a_block_that_changes_shape_has_a_projection() -> None:
    block, images = BasicBlock(2, 3, stride=2).eval(), torch.randn(1, 2, 4, 4)
    block.conv2.weight.zero_()
    projection, norm = block.shortcut
    assert (projection.kernel_size, projection.stride, projection.bias) == ((1, 1), (2, 2), None)
    sampled = torch.einsum("oi,bihw->bohw", projection.weight[:, :, 0, 0], images[..., ::2, ::2])
    expected = (sampled / (1 + norm.eps) ** 0.5).relu()
    torch.testing.assert_close(block(images), expected)


@pytest.mark.parametrize("channels", [1, 4, 8, 15, 16, 24])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_projection_has_the_gradients_of_its_definition(channels, stride) -> None:
    layer = projection(channels, 8, stride).to(memory_format=torch.channels_last)[0]
    images = torch.randn(6, channels, 7, 8)
    given = images.clone(memory_format=torch.channels_last).requires_grad_()
    layer(given).square().sum().backward()
    expected_images, weight = images.double().requires_grad_(), layer.weight.detach().double()
    F.conv2d(expected_images, weight.requires_grad_(), stride=stride).square().sum().backward()
    torch.testing.assert_close(given.grad.double(), expected_images.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not HEAP_CHECKER.exists(), reason="no glibc that checks its heap")
def test_gradients_of_a_projection_stay_inside_their_memory() -> None:
    checked = {"LD_PRELOAD": str(HEAP_CHECKER), "GLIBC_TUNABLES": "glibc.malloc.check=3"}
    command = [sys.executable, "-c", STRIDED_GRADIENTS]
    run = subprocess.run(command, env=os.environ | checked, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "sound\n"), run.stderr


@torch.no_grad()
@pytest.mark.parametrize(("stride", "size"), [(1, (9, 6)), (2, (5, 3))])
def test_a_stage_changes_shape_once(stride, size) -> None:
    stage = basic_stage(2, 4, blocks=3, stride=stride)
    assert stage(torch.zeros(1, 2, 9, 6)).shape == (1, 4, *size)
    assert [len(block.shortcut) for block in stage] == [2, 0, 0]


@torch.no_grad()
def test_the_stem_keeps_the_resolution() -> None:
    stem = cifar_stem(16)
    output = stem(torch.randn(1, 3, 7, 9))
    assert output.shape == (1, 16, 7, 9)
    assert output.min() >= 0
    assert sum(isinstance(part, nn.Conv2d) for part in stem) == 1


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (64, 64), (33, 50)])
def test_the_stem_for_photographs_keeps_a_quarter_of_the_resolution(size) -> None:
    output = photograph_stem(4).eval()(torch.randn(1, 3, *size))
    assert output.shape == (1, 4, *(-(-length // 4) for length in size))
    assert output.min() >= 0


@torch.no_grad()
@pytest.mark.parametrize(("stride", "size"), [(1, (9, 6)), (2, (5, 3))])
def test_a_bottleneck_stage_changes_shape_once(stride, size) -> None:
    stage = bottleneck_stage(4, 2, blocks=3, stride=stride)
    assert stage(torch.zeros(2, 4, 9, 6)).shape == (2, 8, *size)
    assert [block.downsample is not None for block in stage] == [True, False, False]
    assert [block.conv2.stride for block in stage] == [(stride, stride), (1, 1), (1, 1)]


@pytest.mark.parametrize(("channels", "of_each_group"), [(16, 1), (64, 4), (128, 8)])
def test_groups_have_channels_in_proportion(channels, of_each_group) -> None:
    block = bottleneck_stage(8, channels, 1, 1, groups=32, width_per_group=4)[0]
    assert block.conv2.weight.shape == (32 * of_each_group, of_each_group, 3, 3)
    assert block.conv3.out_channels == 4 * channels


def test_groups_without_a_whole_number_of_channels() -> None:
    with pytest.raises(ValueError, match=r"a multiple of 16 with 32 groups .*, got 24"):
        bottleneck_stage(8, 24, 1, 1, groups=32, width_per_group=4)


def test_initial_weights_by_outputs() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(64, 16, 5, bias=False)
    init_kaiming_fan_out(convolution)
    deviation = (2 / (16 * 5 * 5)) ** 0.5
    error = deviation / (2 * convolution.weight.numel()) ** 0.5
    assert convolution.weight.std().item() == pytest.approx(deviation, abs=5 * error)

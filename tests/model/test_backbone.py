"""Residual blocks by hand."""

import pytest
import torch
from torch import nn

from shike_core.model.backbone import BasicBlock, basic_stage, cifar_stem


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

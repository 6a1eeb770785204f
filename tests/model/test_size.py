"""Sizes against published figures and against counting by hand."""

import copy

import pytest
import torch

from shike_core.model import build_shike, shike_resnet32
from shike_core.model.size import size_of


def test_the_papers_network() -> None:
    size = size_of(shike_resnet32(100, 3), 32, 32)
    assert (size.parameters, size.parameters_deployed) == (1_277_008, 1_257_808)
    assert size.macs == pytest.approx(120.1e6, abs=0.05e6)


@pytest.mark.parametrize(
    ("network", "parameters", "billion_macs"),
    [  # as torchvision lists them
        ("resnet50", 25_557_032, 4.089),
        ("resnext50_32x4d", 25_028_904, 4.230),
        ("resnet152", 60_192_808, 11.514),
    ],
)
def test_one_plain_expert_is_the_published_network(network, parameters, billion_macs) -> None:
    with torch.device("meta"):
        plain = build_shike(network, 1000, 1, width=64, fusion=False, classifier="linear")
    size = size_of(plain, 224, 224)
    assert size.parameters_deployed == parameters
    assert size.parameters == parameters + 2048 * 1000 + 1000
    assert size.macs / 1e9 == pytest.approx(billion_macs, abs=0.001)


def test_by_hand() -> None:
    """Width 1, one expert: every convolution has so many products for each of its outputs."""
    model = build_shike("resnet50", 7, 1, width=1)
    stem = 16 * 16 * 3 * 49
    # Stage by stage: pixels in and out, channels in and within, blocks; the output has 4 times as
    # many channels, and the first block a shortcut of its own.
    stages = 0
    for before, after, inputs, inner, blocks in (
        (64, 64, 1, 1, 3), (64, 16, 4, 2, 4), (16, 4, 8, 4, 6), (4, 1, 16, 8, 3),
    ):  # fmt: skip
        stages += before * inputs * inner + after * (9 * inner**2 + 4 * inner**2)
        stages += after * inputs * 4 * inner
        stages += (blocks - 1) * after * (4 * inner**2 + 9 * inner**2 + 4 * inner**2)
    alignment = 9 * (16 * 4 * 8 + 4 * 8 * 16 + 1 * 16 * 32)
    head = 32 * 7
    assert size_of(model, 32, 32).macs == stem + stages + alignment + head


def test_counting_changes_nothing() -> None:
    model = shike_resnet32(3, 2, width=2)
    before = copy.deepcopy(model.state_dict())
    model.experts[0].eval()
    counted = size_of(model, 8, 8)
    assert model.training
    assert not model.experts[0].training
    modes = []
    some = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    some.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    assert size_of(model, 8, 8) == counted
    assert modes == [False]  # one that is synchronised cannot be counted while it trains
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert size_of(model.eval(), 8, 8) == counted
    assert size_of(model, 16, 16).macs > counted.macs

"""Heads, alignment and fusion by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shike_core.model.experts import CosineClassifier, Expert, alignment, head

WIDTHS = (2, 4, 8)


@torch.no_grad()
def test_cosine_classifier_by_hand() -> None:
    head = CosineClassifier(feature_dim=2, num_classes=3, scale=30)
    head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 7.0], [-3.0, -4.0]]))
    logits = head(torch.tensor([[3.0, 4.0], [0.0, 0.1]]))
    expected = torch.tensor([[18.0, 24.0, -30.0], [0.0, 30.0, -24.0]])
    torch.testing.assert_close(logits, expected)


@torch.no_grad()
def test_cosine_logits_do_not_depend_on_lengths() -> None:
    head = CosineClassifier(5, 4)
    features = torch.randn(3, 5)
    before = head(features)
    head.weight.mul_(torch.tensor([[0.1], [2.0], [30.0], [1e4]]))
    torch.testing.assert_close(head(1e3 * features), before)
    assert before.abs().max() <= 30 * (1 + 1e-6)


def test_a_feature_of_zeros_gives_zeros_and_finite_gradients() -> None:
    features = torch.zeros(1, 5, requires_grad=True)
    logits = CosineClassifier(5, 4)(features)
    assert logits.tolist() == [[0.0] * 4]
    logits.sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


@torch.no_grad()
def test_a_linear_head_is_a_product_and_a_bias() -> None:
    linear, features = head(2, 3, "linear"), torch.tensor([[3.0, 4.0], [0.0, 0.1]])
    torch.testing.assert_close(linear(features), F.linear(features, linear.weight, linear.bias))
    linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 7.0], [-3.0, -4.0]]))
    linear.bias.copy_(torch.tensor([0.5, 0.0, -1.0]))
    expected = torch.tensor([[3.5, 28.0, -26.0], [0.5, 0.7, -1.4]])
    torch.testing.assert_close(linear(features), expected)


def test_a_linear_head_starts_as_the_framework_has_it() -> None:
    states = []
    for make in (lambda: head(16, 10, "linear"), lambda: nn.Linear(16, 10)):
        torch.manual_seed(0)
        states.append(make().state_dict())
    assert states[0].keys() == {"weight", "bias"}
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_head_is_a_cosine_classifier_unless_told() -> None:
    cosine = head(2, 3, scale=7)
    assert isinstance(cosine, CosineClassifier)
    assert cosine.scale == 7
    assert isinstance(head(2, 3, "cosine"), CosineClassifier)


@pytest.mark.parametrize(
    ("depth", "relu", "expected"),
    [
        (0, "first", "CBR CB"),
        (0, "all", "CBR CBR"),
        (0, "none", "CB CB"),
        (1, "first", "CBR"),
        (1, "none", "CB"),
    ],
)
def test_alignment_has_a_step_for_each_stage_below_the_last(depth, relu, expected) -> None:
    steps = alignment(WIDTHS, depth, relu)
    letters = {nn.Conv2d: "C", nn.BatchNorm2d: "B", nn.ReLU: "R"}
    assert "".join(letters[type(step)] for step in steps) == expected.replace(" ", "")
    channels = [(s.in_channels, s.out_channels) for s in steps if isinstance(s, nn.Conv2d)]
    assert channels == [(2, 4), (4, 8)][depth:]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_alignment_reaches_the_last_stages_shape_from_every_depth(stages) -> None:
    widths = [3 * 2**i for i in range(stages)]
    for depth in range(stages - 1):
        shallow = torch.zeros(1, widths[depth], 32 // 2**depth, 24 // 2**depth)
        deep = alignment(widths, depth, "first").eval()(shallow)
        assert deep.shape == (1, widths[-1], 32 // 2 ** (stages - 1), 24 // 2 ** (stages - 1))


@torch.no_grad()
@pytest.mark.parametrize("depth", [0, 1])
def test_fusion_is_the_mean_of_products(depth) -> None:
    shared = [torch.randn(2, 2, 8, 8), torch.randn(2, 4, 4, 4)]
    last = nn.Conv2d(4, 8, 3, stride=2, padding=1)
    align = alignment(WIDTHS, depth, "first").eval()
    features = Expert(last, align, depth)(shared)
    deep, shallow = last(shared[1]), align(shared[depth])
    for image in range(2):
        for channel in range(8):
            products = [
                (deep[image, channel, y, x] * shallow[image, channel, y, x]).item()
                for y in range(2)
                for x in range(2)
            ]
            expected = math.fsum(products) / 4
            assert features[image, channel].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@torch.no_grad()
def test_an_expert_without_fusion_is_its_last_stage() -> None:
    shared = [torch.full((2, 2, 8, 8), torch.nan), torch.randn(2, 4, 4, 4)]
    last = nn.Conv2d(4, 8, 3, stride=2, padding=1)
    expert = Expert(last, None, depth=0)
    torch.testing.assert_close(expert(shared), last(shared[1]).mean(dim=(2, 3)))
    assert expert.state_dict().keys() == {"last_stage.weight", "last_stage.bias"}

"""The whole network: against the authors' figures, its size, and any number of experts."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from shike_core.checkpoint import convert_reference_state_dict
from shike_core.model import (
    Shike,
    build_shike,
    shike_resnet32,
    shike_resnet50,
    shike_resnet152,
    shike_resnext50_32x4d,
)
from shike_core.model.backbone import BACKBONES, BasicBlock, basic_stage, cifar_stem, init_kaiming
from shike_core.model.experts import CosineClassifier, alignment


@pytest.fixture
def authors(reference) -> Shike:
    """Our network with the authors' weights."""
    state = {k.removeprefix("state."): v for k, v in reference.items() if k.startswith("state.")}
    num_experts = len(reference["features_eval"])
    model = shike_resnet32(state["classifiers.0.weight"].shape[1], num_experts)
    model.load_state_dict(convert_reference_state_dict(state))
    return model


def assert_figures(ours: torch.Tensor, theirs: np.ndarray, within: float = 1e-5) -> None:
    """Ours has the batch first, theirs the experts; `within` is a part of their mean size."""
    np.testing.assert_allclose(
        ours.transpose(0, 1).numpy(), theirs, rtol=1e-5, atol=within * np.abs(theirs).mean()
    )


@torch.no_grad()
def test_features_and_logits_are_those_of_the_authors(reference, authors) -> None:
    images = torch.from_numpy(reference["images"])
    authors.eval()
    features = authors.features(images)
    assert_figures(features, reference["features_eval"])
    for stage in (1, 2):
        assert_figures(authors(images, stage=stage), reference[f"logits_stage{stage}_eval"])
        assert torch.equal(authors(images, stage=stage), authors.classify(features, stage))


@torch.no_grad()
def test_logits_in_training_mode_are_those_of_the_authors(reference, authors) -> None:
    images = torch.from_numpy(reference["images"])
    theirs = reference["logits_stage1_train"]
    # BatchNorm over eight images: the authors' own figures are 1.7e-5 from ours in float64, and
    # how far ours in float32 are is up to the processor.
    assert_figures(authors.train()(images, stage=1), theirs, within=4e-5)
    assert_figures(authors.double()(images.double(), stage=1), theirs, within=2e-5)


@contextmanager
def counted_operations(model: nn.Module) -> Iterator[list[int]]:
    """Collect the multiplications of every convolution and every head that runs inside."""
    counts: list[int] = []

    def count(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        per_output = next(module.parameters())[0].numel()
        counts.append(output[0].numel() * per_output)

    heads = (*model.stage1_heads, *model.stage2_heads)
    parts = [m for m in model.modules() if isinstance(m, nn.Conv2d) or m in heads]
    hooks = [part.register_forward_hook(count) for part in parts]
    yield counts
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_size_of_the_papers_network() -> None:
    model = shike_resnet32(num_classes=100, num_experts=3).eval()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == 1_277_008
    deployed = [n for name, n in sizes.items() if not name.startswith("stage1_heads")]
    assert sum(deployed) == 1_257_808
    with counted_operations(model) as counts:
        model(torch.zeros(1, 3, 32, 32))
    assert sum(counts) == pytest.approx(120.1e6, abs=0.05e6)


@torch.no_grad()
def test_without_fusion_nothing_of_it_is_left() -> None:
    torch.manual_seed(0)
    plain, fused = shike_resnet32(5, 3, width=2, fusion=False), shike_resnet32(5, 3, width=2)
    missing = {name for name in fused.state_dict() if ".alignment." in name}
    assert missing
    assert plain.state_dict().keys() == fused.state_dict().keys() - missing
    images = torch.randn(4, 3, 16, 16)
    deep = nn.Sequential(plain.stem, *plain.shared_stages).eval()(images)
    features = plain.eval().features(images)
    for i, expert in enumerate(plain.experts):
        expected = expert.last_stage(deep).mean(dim=(2, 3))
        torch.testing.assert_close(features[:, i], expected)


@torch.no_grad()
def test_one_plain_expert_is_the_ordinary_resnet32() -> None:
    """The size that He et al. 2016 give in table 6, and projections instead of padded shortcuts."""
    model = shike_resnet32(10, 1, fusion=False, classifier="linear").eval()
    stage1_heads = 10 * 64 + 10
    deployed = sum(p.numel() for p in model.parameters()) - stage1_heads
    projections = 16 * 32 + 32 * 64 + 2 * (32 + 64)  # with their BatchNorm
    assert deployed == 464_154 + projections
    with counted_operations(model) as counts:
        model(torch.zeros(1, 3, 32, 32))
    assert sum(counts) == pytest.approx(69.12e6, abs=0.01e6)


@torch.no_grad()
def test_linear_heads_of_both_stages() -> None:
    torch.manual_seed(0)
    model = shike_resnet32(5, 2, width=2, classifier="linear").eval()
    features = torch.randn(3, 2, 8)
    for stage, heads in ((1, model.stage1_heads), (2, model.stage2_heads)):
        logits = model.classify(features, stage)
        for i, head in enumerate(heads):
            torch.testing.assert_close(logits[:, i], features[:, i] @ head.weight.T + head.bias)


@torch.no_grad()
def test_cosine_heads_of_either_stage_have_their_own_scale() -> None:
    torch.manual_seed(0)
    model = shike_resnet32(5, 2, width=2, scale=30.0, stage2_scale=20.0).eval()
    same = shike_resnet32(5, 2, width=2, scale=12.0)
    features = torch.randn(3, 2, 8)
    model.deploy_stage1_heads()  # of the same weights
    of_stage1, of_stage2 = (model.classify(features, stage) for stage in (1, 2))
    torch.testing.assert_close(of_stage2, of_stage1 * 20 / 30)
    assert {head.scale for head in (*same.stage1_heads, *same.stage2_heads)} == {12.0}


@torch.no_grad()
@pytest.mark.parametrize("classifier", ["cosine", "linear"])
def test_deploying_the_heads_of_stage_1_copies_them(classifier) -> None:
    torch.manual_seed(0)
    model, images = shike_resnet32(5, 2, width=2, classifier=classifier), torch.randn(4, 3, 8, 8)
    model.eval().requires_grad_(True)
    of_stage1, others = model(images, stage=1), model.features(images)
    parameters = list(model.stage2_heads.parameters())
    with torch.enable_grad():
        model.deploy_stage1_heads()
    assert torch.equal(model(images, stage=2), of_stage1)
    assert torch.equal(model.features(images), others)
    assert all(p.is_leaf and p.grad is None for p in parameters)
    assert [id(p) for p in model.stage2_heads.parameters()] == [id(p) for p in parameters]
    for head in model.stage1_heads:  # a copy, not the same heads twice
        head.weight.neg_()
    assert torch.equal(model(images, stage=2), of_stage1)


@torch.no_grad()
@pytest.mark.parametrize("num_classes", [2, 10, 365])
@pytest.mark.parametrize("num_experts", [1, 2, 4, 5])
def test_shapes_and_cycling_depths(num_classes, num_experts) -> None:
    model = shike_resnet32(num_classes, num_experts, width=4).eval()
    assert (model.num_classes, model.num_experts) == (num_classes, num_experts)
    assert [expert.depth for expert in model.experts] == [0, 1, 0, 1, 0][:num_experts]
    images = torch.zeros(2, 3, 32, 32)
    assert (
        model.features(images).shape == (2, num_experts, model.feature_dim) == (2, num_experts, 16)
    )
    assert model(images, stage=1).shape == (2, num_experts, num_classes)
    assert model(images).shape == (2, num_experts, num_classes)


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (7, 5), (33, 17), (64, 96)])
def test_images_of_any_size(size) -> None:
    model = shike_resnet32(3, 2, width=2).eval()
    assert model(torch.ones(1, 3, *size)).shape == (1, 2, 3)


@torch.no_grad()
def test_the_stages_have_heads_of_their_own_and_stage_2_is_the_default() -> None:
    torch.manual_seed(0)
    model, images = shike_resnet32(3, 2, width=2).eval(), torch.randn(4, 3, 16, 16)
    before = model(images, stage=1), model(images, stage=2)
    assert torch.equal(model(images), before[1])
    assert not torch.allclose(*before)
    for head in model.stage2_heads:
        head.weight.neg_()
    assert torch.equal(model(images, stage=1), before[0])
    torch.testing.assert_close(model(images, stage=2), -before[1])


def test_a_loss_reaches_everything_but_the_other_stages_heads() -> None:
    model = shike_resnet32(3, 3, width=2)
    model(torch.randn(4, 3, 16, 16), stage=1).square().sum().backward()
    untouched = {name for name, p in model.named_parameters() if p.grad is None}
    assert untouched == {f"stage2_heads.{i}.weight" for i in range(3)}


@torch.no_grad()
def test_one_experts_last_stage_is_no_business_of_the_others() -> None:
    torch.manual_seed(0)
    model, images = shike_resnet32(3, 3, width=2).eval(), torch.randn(4, 3, 16, 16)
    before = model(images)
    for parameter in model.experts[1].parameters():
        parameter.add_(0.1)
    same = [
        torch.equal(a, b) for a, b in zip(before.unbind(1), model(images).unbind(1), strict=True)
    ]
    assert same == [True, False, True]


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = shike_resnet32(100, 3)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        fan_in = module.weight[0].numel()
        if "alignment" in name:  # the framework's default: uniform up to 1 / sqrt(fan in)
            assert module.weight.abs().max().item() <= 1 / math.sqrt(fan_in)
        else:
            deviation = math.sqrt(2 / fan_in)
            samples = module.weight.numel()
            error = deviation / math.sqrt(2 * samples)
            assert module.weight.std().item() == pytest.approx(deviation, abs=5 * error), name
    for head in (*model.stage1_heads, *model.stage2_heads):
        torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(100))


def test_the_order_in_which_initial_weights_are_drawn() -> None:
    """A seed gives the weights it always gave: new parts must not draw before the old ones."""
    torch.manual_seed(0)
    model = shike_resnet32(5, 3, width=2)
    torch.manual_seed(0)
    trunk = [cifar_stem(2), basic_stage(2, 2, 5, 1), basic_stage(2, 4, 5, 2)]
    last_stages = [basic_stage(4, 8, 5, 2) for _ in range(3)]
    alignments = [alignment((2, 4, 8), depth, "first") for depth in (0, 1, 0)]
    heads = [CosineClassifier(8, 5) for _ in range(6)]
    for part in (*trunk, *last_stages):
        init_kaiming(part)
    expected = [value for part in trunk for value in part.state_dict().values()]
    for last_stage, align in zip(last_stages, alignments, strict=True):
        expected += [*last_stage.state_dict().values(), *align.state_dict().values()]
    expected += [part.weight for part in heads]
    ours = model.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_the_seed_decides_the_initial_weights() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(shike_resnet32(3, 2, width=2).state_dict())
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["stem.0.weight"], other["stem.0.weight"])


def test_the_stages_have_five_blocks_each() -> None:
    model = shike_resnet32(3, 2)
    stages = [*model.shared_stages, *(expert.last_stage for expert in model.experts)]
    assert [[type(block) for block in stage] for stage in stages] == [[BasicBlock] * 5] * 4
    assert [stage[-1].conv2.out_channels for stage in stages] == [16, 32, 64, 64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 10, "num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"num_classes": 10, "num_experts": -3}, "num_experts must be at least 1, got -3"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"num_classes": 0}, "num_classes must be at least 2, got 0"),
    ],
)
def test_too_few_experts_or_classes(arguments, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        shike_resnet32(**arguments)


# The larger networks.

LARGER = [name for name in BACKBONES if name != "resnet32"]


@torch.no_grad()
@pytest.mark.parametrize("network", LARGER)
@pytest.mark.parametrize("num_experts", [1, 3, 5])
def test_shapes_and_depths_of_the_larger_networks(network, num_experts) -> None:
    model = build_shike(network, 7, num_experts, width=16).eval()
    assert [expert.depth for expert in model.experts] == [0, 1, 2, 0, 1][:num_experts]
    assert model.feature_dim == 32 * 16
    images = torch.randn(2, 3, 40, 72)
    assert model.features(images).shape == (2, num_experts, 512)
    assert model(images).shape == (2, num_experts, 7)
    stages = [*model.shared_stages, *(expert.last_stage for expert in model.experts)]
    assert [len(stage) for stage in stages[:4]] == list(BACKBONES[network].blocks)


@torch.no_grad()
@pytest.mark.parametrize(("depth", "convolutions"), [(0, 3), (1, 2), (2, 1)])
def test_the_alignment_has_a_step_for_each_stage_below_the_last(depth, convolutions) -> None:
    expert = build_shike("resnet50", 7, 3, width=1).experts[depth]
    strides = [part.stride for part in expert.alignment if isinstance(part, nn.Conv2d)]
    assert strides == [(2, 2)] * convolutions
    assert sum(isinstance(part, nn.ReLU) for part in expert.alignment) == 1


def test_published_widths_are_the_defaults() -> None:
    with torch.device("meta"):
        models = [make(9) for make in (shike_resnet50, shike_resnext50_32x4d, shike_resnet152)]
    assert [model.feature_dim for model in models] == [2048] * 3
    assert [model.stem[0].out_channels for model in models] == [64] * 3
    groups = [model.shared_stages[0][0].conv2.groups for model in models]
    assert groups == [1, 32, 1]


def test_initial_weights_of_the_larger_networks() -> None:
    torch.manual_seed(0)
    model = build_shike("resnext50_32x4d", 5, 2, width=16)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        if not isinstance(module, nn.Conv2d):
            continue
        if "alignment" in name:  # the framework's default: uniform up to 1 / sqrt(fan in)
            assert module.weight.abs().max().item() <= 1 / math.sqrt(module.weight[0].numel())
        else:  # as torchvision has it
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            deviation = math.sqrt(2 / fan_out)
            error = deviation / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(deviation, abs=5 * error), name


@pytest.mark.parametrize("network", BACKBONES)
def test_a_loss_reaches_the_trunk_and_every_expert(network) -> None:
    model = build_shike(network, 3, 3, width=16)
    model(torch.randn(2, 3, 64, 64), stage=1).square().sum().backward()
    untouched = {name for name, p in model.named_parameters() if p.grad is None}
    assert untouched == {f"stage2_heads.{i}.weight" for i in range(3)}
    trunk = {id(parameter) for parameter in model.trunk.parameters()}
    shared = {name for name, p in model.named_parameters() if id(p) in trunk}
    assert shared == {n for n, _ in model.named_parameters() if n.startswith(("stem", "shared"))}

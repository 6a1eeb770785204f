"""The mixture: a shared trunk, experts of different depth, two sets of heads."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from shike_core.config import AlignmentRelu, Classifier, Network
from shike_core.model.backbone import BACKBONES, init_kaiming
from shike_core.model.experts import Expert, alignment, head

Stage = Literal[1, 2]


RunExperts = Callable[[Iterable[nn.Module], Sequence[Tensor]], list[Tensor]]
"""The experts and the shared stages' outputs to one feature ``(batch, feature_dim)`` of each."""


def one_after_the_other(experts: Iterable[nn.Module], shared: Sequence[Tensor]) -> list[Tensor]:
    """See `RunExperts`."""
    return [expert(shared) for expert in experts]


class Shike(nn.Module):
    """Self-heterogeneous mixture of experts (paper section 3, figure 2).

    Args:
        stem: images to the first shared stage's input.
        shared_stages: stages that all experts share, shallow to deep.
        last_stages: one own last stage for each expert.
        widths: channels after each shared stage, then after the last stage.
        num_classes: classes.
        scale: of stage 1's cosine heads.
        stage2_scale: of stage 2's cosine heads.
        alignment_relu: after which alignment steps a ReLU stands.
        fusion: without it every expert is its last stage alone and has no alignment.
        classifier: kind of the heads.
        initialise: gives stem and stages their first weights; the alignments keep the framework's.
    """

    def __init__(
        self,
        *,
        stem: nn.Module,
        shared_stages: Sequence[nn.Module],
        last_stages: Sequence[nn.Module],
        widths: Sequence[int],
        num_classes: int,
        scale: float,
        stage2_scale: float,
        alignment_relu: AlignmentRelu,
        fusion: bool = True,
        classifier: Classifier = "cosine",
        initialise: Callable[[nn.Module], None] = init_kaiming,
    ) -> None:
        super().__init__()
        self.run_experts: RunExperts = one_after_the_other
        """How the experts are run; an engine may know a faster way."""
        self.num_experts = len(last_stages)
        self.num_classes = num_classes
        self.feature_dim = widths[-1]
        self.stem = stem
        self.shared_stages = nn.ModuleList(shared_stages)
        depths = [index % len(shared_stages) for index in range(self.num_experts)]
        self.experts = nn.ModuleList(
            Expert(stage, alignment(widths, depth, alignment_relu) if fusion else None, depth)
            for stage, depth in zip(last_stages, depths, strict=True)
        )
        self.stage1_heads, self.stage2_heads = (
            nn.ModuleList(
                head(self.feature_dim, num_classes, classifier, scale_of_stage) for _ in last_stages
            )
            for scale_of_stage in (scale, stage2_scale)
        )
        for module in (self.stem, self.shared_stages, *last_stages):
            initialise(module)

    @property
    def trunk(self) -> nn.ModuleList:
        """What the experts share: the stem and the shared stages."""
        return nn.ModuleList([self.stem, self.shared_stages])

    @property
    def parts(self) -> list[nn.Module]:
        """What features are made of, one after the other: stem, blocks, alignments."""
        stages = [*self.shared_stages, *(expert.last_stage for expert in self.experts)]
        blocks = [block for stage in stages for block in stage.children()]
        alignments = [e.alignment for e in self.experts if e.alignment is not None]
        return [self.stem, *blocks, *alignments]

    def features(self, images: Tensor) -> Tensor:
        """Map normalised images ``(batch, 3, h, w)`` to ``(batch, num_experts, feature_dim)``."""
        outputs = [self.stem(images)]
        for stage in self.shared_stages:
            outputs.append(stage(outputs[-1]))
        return torch.stack(self.run_experts(self.experts, outputs[1:]), dim=1)

    def classify(self, features: Tensor, stage: Stage) -> Tensor:
        """Map ``(batch, num_experts, feature_dim)`` to ``(batch, num_experts, num_classes)``."""
        heads = self.stage1_heads if stage == 1 else self.stage2_heads
        return torch.stack([head(features[:, i]) for i, head in enumerate(heads)], dim=1)

    def deploy_stage1_heads(self) -> None:
        """Copy stage 1's heads into stage 2's, for a training without classifier retraining."""
        self.stage2_heads.load_state_dict(self.stage1_heads.state_dict())

    def forward(self, images: Tensor, stage: Stage = 2) -> Tensor:
        """Map normalised images ``(batch, 3, h, w)`` to ``(batch, num_experts, num_classes)``."""
        return self.classify(self.features(images), stage)


def build_shike(
    network: Network,
    num_classes: int,
    num_experts: int = 3,
    *,
    width: int,
    scale: float = 30.0,
    stage2_scale: float | None = None,
    alignment_relu: AlignmentRelu = "first",
    fusion: bool = True,
    classifier: Classifier = "cosine",
) -> Shike:
    """SHIKE on a network of `BACKBONES`, with random weights; each expert has its own last stage.

    Args:
        network: where stem and stages come from.
        num_classes: classes, at least 2.
        num_experts: experts, at least 1; expert i fuses shared stage i modulo their number.
        width: channels of the stem, and the first stage is made with; the later ones with twice
            as many each. As published it is 16 in ResNet-32, 64 in the others.
        scale: of the cosine heads.
        stage2_scale: of stage 2's cosine heads, if theirs is another one.
        alignment_relu: after which alignment steps a ReLU stands.
        fusion: without it every expert is its last stage alone and has no alignment.
        classifier: kind of the heads.

    Raises:
        ValueError: fewer than 2 classes or no expert, or a width that grouped convolutions do not
            divide.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    backbone = BACKBONES[network]
    channels = [width * 2**index for index in range(len(backbone.blocks))]
    widths = [width, *(backbone.expansion * channel for channel in channels)]  # after the stem too

    def stage(index: int) -> nn.Module:
        stride = 1 if index == 0 else 2
        return backbone.stage(widths[index], channels[index], backbone.blocks[index], stride)

    last = len(channels) - 1
    return Shike(
        stem=backbone.stem(width),
        shared_stages=[stage(index) for index in range(last)],
        last_stages=[stage(last) for _ in range(num_experts)],
        widths=widths[1:],
        num_classes=num_classes,
        scale=scale,
        stage2_scale=scale if stage2_scale is None else stage2_scale,
        alignment_relu=alignment_relu,
        fusion=fusion,
        classifier=classifier,
        initialise=backbone.initialise,
    )


shike_resnet32 = partial(build_shike, "resnet32", width=16)
"""The authors' network for CIFAR: 3 stages of 5 basic blocks."""
shike_resnet50 = partial(build_shike, "resnet50", width=64)
"""On 4 stages of 3, 4, 6 and 3 bottleneck blocks."""
shike_resnext50_32x4d = partial(build_shike, "resnext50_32x4d", width=64)
"""As ResNet-50, with 32 groups of 4 channels in the first stage's 3x3 convolutions."""
shike_resnet152 = partial(build_shike, "resnet152", width=64)
"""On 4 stages of 3, 8, 36 and 3 bottleneck blocks."""

"""The mixture: a shared trunk, experts of different depth, two sets of heads."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from shike_core.config import AlignmentRelu, Classifier
from shike_core.model.backbone import basic_stage, cifar_stem, init_kaiming
from shike_core.model.experts import Expert, alignment, head

Stage = Literal[1, 2]


class Shike(nn.Module):
    """Self-heterogeneous mixture of experts (paper section 3, figure 2).

    Args:
        stem: images to the first shared stage's input.
        shared_stages: stages that all experts share, shallow to deep.
        last_stages: one own last stage for each expert.
        widths: channels after each shared stage, then after the last stage.
        num_classes: classes.
        scale: of the cosine heads.
        alignment_relu: after which alignment steps a ReLU stands.
        fusion: without it every expert is its last stage alone and has no alignment.
        classifier: kind of the heads.
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
        alignment_relu: AlignmentRelu,
        fusion: bool = True,
        classifier: Classifier = "cosine",
    ) -> None:
        super().__init__()
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
                head(self.feature_dim, num_classes, classifier, scale) for _ in last_stages
            )
            for _ in (1, 2)
        )
        for module in (self.stem, self.shared_stages, *last_stages):
            init_kaiming(module)  # the alignments keep the framework's default

    def features(self, images: Tensor) -> Tensor:
        """Map normalised images ``(batch, 3, h, w)`` to ``(batch, num_experts, feature_dim)``."""
        outputs = [self.stem(images)]
        for stage in self.shared_stages:
            outputs.append(stage(outputs[-1]))
        return torch.stack([expert(outputs[1:]) for expert in self.experts], dim=1)

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


def shike_resnet32(
    num_classes: int,
    num_experts: int = 3,
    *,
    width: int = 16,
    scale: float = 30.0,
    alignment_relu: AlignmentRelu = "first",
    fusion: bool = True,
    classifier: Classifier = "cosine",
) -> Shike:
    """SHIKE on ResNet-32 in the CIFAR form: 3 stages of 5 basic blocks, the last one per expert.

    Args:
        num_classes: classes, at least 2.
        num_experts: experts, at least 1; expert i fuses shared stage i modulo 2.
        width: channels of the first stage; the later stages have 2 and 4 times as many.
        scale: of the cosine heads.
        alignment_relu: after which alignment steps a ReLU stands.
        fusion: without it every expert is its last stage alone and has no alignment.
        classifier: kind of the heads.

    Raises:
        ValueError: fewer than 2 classes or no expert.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    widths = (width, 2 * width, 4 * width)
    blocks = 5
    return Shike(
        stem=cifar_stem(width),
        shared_stages=[
            basic_stage(width, widths[0], blocks, stride=1),
            basic_stage(widths[0], widths[1], blocks, stride=2),
        ],
        last_stages=[
            basic_stage(widths[1], widths[2], blocks, stride=2) for _ in range(num_experts)
        ],
        widths=widths,
        num_classes=num_classes,
        scale=scale,
        alignment_relu=alignment_relu,
        fusion=fusion,
        classifier=classifier,
    )

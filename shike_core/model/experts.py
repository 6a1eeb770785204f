"""What each expert owns: alignment and fusion of a shallow feature (DKF), and its heads."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shike_core.config import AlignmentRelu, Classifier
from shike_core.model.backbone import Steps


class CosineClassifier(nn.Module):
    """Logits are scaled cosine similarities of feature and class weight, without bias.

    Class weights start uniform in (-1, 1), normalised per class.
    """

    def __init__(self, feature_dim: int, num_classes: int, scale: float = 30.0) -> None:
        super().__init__()
        self.scale = scale
        weight = torch.empty(num_classes, feature_dim).uniform_(-1, 1)
        self.weight = nn.Parameter(F.normalize(weight, dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(batch, feature_dim)`` to ``(batch, num_classes)``."""
        return self.scale * F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


def head(
    feature_dim: int, num_classes: int, classifier: Classifier = "cosine", scale: float = 30.0
) -> nn.Module:
    """One expert's classifier; ``linear`` has a bias and starts as the framework has it.

    Args:
        feature_dim: length of a feature.
        num_classes: classes.
        classifier: cosine similarity times `scale`, or a plain linear layer.
        scale: of the cosine head.
    """
    if classifier == "linear":
        return nn.Linear(feature_dim, num_classes)
    return CosineClassifier(feature_dim, num_classes, scale)


def alignment(widths: Sequence[int], depth: int, relu: AlignmentRelu) -> nn.Sequential:
    """Stride-2 convolutions that bring a shared stage's output to the last stage's shape.

    Args:
        widths: channels of every stage, the last one included.
        depth: the shared stage to start from; one step for each stage below the last.
        relu: after which steps a ReLU stands.
    """
    steps: list[nn.Module] = []
    for index, (before, after) in enumerate(zip(widths[depth:], widths[depth + 1 :], strict=False)):
        steps += [
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(after),
        ]
        if relu == "all" or (relu == "first" and index == 0):
            steps.append(nn.ReLU())
    return Steps(*steps)


class Expert(nn.Module):
    """The last stage of the backbone, fused with one shallow feature (paper section 3, DKF).

    Args:
        last_stage: the expert's own copy of it.
        align: brings the shallow feature to the deep one's shape; None means no fusion.
        depth: of the shared stage whose output is the shallow feature.
    """

    def __init__(self, last_stage: nn.Module, align: nn.Module | None, depth: int) -> None:
        super().__init__()
        self.last_stage = last_stage
        self.alignment = align
        self.depth = depth

    def forward(self, shared: Sequence[Tensor]) -> Tensor:
        """Map the shared stages' outputs to one feature.

        Args:
            shared: output of every shared stage, shallow to deep, each ``(batch, c, h, w)``.

        Returns:
            ``(batch, feature_dim)``.
        """
        feature: Tensor = self.last_stage(shared[-1])
        if self.alignment is not None:
            feature = feature * self.alignment(shared[self.depth])
        return feature.mean(dim=(2, 3))

"""The network: trunk, experts with depth-wise knowledge fusion, cosine heads."""

from shike_core.model.experts import CosineClassifier
from shike_core.model.shike import (
    Shike,
    build_shike,
    shike_resnet32,
    shike_resnet50,
    shike_resnet152,
    shike_resnext50_32x4d,
)

__all__ = [
    "CosineClassifier",
    "Shike",
    "build_shike",
    "shike_resnet32",
    "shike_resnet50",
    "shike_resnet152",
    "shike_resnext50_32x4d",
]

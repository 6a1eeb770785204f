"""The network: trunk, experts with depth-wise knowledge fusion, cosine heads."""

from shike_core.model.experts import CosineClassifier
from shike_core.model.shike import Shike, shike_resnet32

__all__ = ["CosineClassifier", "Shike", "shike_resnet32"]

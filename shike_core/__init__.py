"""SHIKE (CVPR 2023) for long-tailed image classification: data, model, training, evaluation."""

__version__ = "0.1.0"

"""Parameters and multiplications of the networks of the recipes.

    python -m benchmarks.network_sizes

For each the mixture, and the plain network it is made from: one expert without fusion, with a
linear head. The mixture has the heads of both stages while it is trained, of one when deployed.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from shike_core.checkpoint import build_model
from shike_core.config import TrainConfig
from shike_core.model.size import Size, size_of
from shike_core.recipes import recipe_named

CLASSES = {
    "cifar100-lt": 100,
    "imagenet-lt": 1000,
    "imagenet-lt-resnext50": 1000,
    "inaturalist2018": 8142,
    "places-lt": 365,
}
"""Of the data sets, by recipe."""
CIFAR_SIZE = 32
"""Pixels a side of images that are not cropped to a size."""


def size(config: TrainConfig, num_classes: int) -> Size:
    """Of the network that a configuration trains, on images as large as it trains on."""
    pixels = config.crop_size if config.crop == "resized" else CIFAR_SIZE
    with torch.device("meta"):
        return size_of(build_model(config, num_classes), pixels, pixels)


def table() -> str:
    """All of them as Markdown."""
    lines = [
        "| recipe | network | classes | plain: million parameters | GMAC "
        "| SHIKE: million parameters | of them deployed | GMAC |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, num_classes in CLASSES.items():
        config = recipe_named(name).train
        mixture = size(config, num_classes)
        plain = size(replace(config, num_experts=1, fusion=False, classifier="linear"), num_classes)
        lines.append(
            f"| {name} | {config.network} | {num_classes} "
            f"| {plain.parameters_deployed / 1e6:.2f} | {plain.macs / 1e9:.3f} "
            f"| {mixture.parameters / 1e6:.2f} | {mixture.parameters_deployed / 1e6:.2f} "
            f"| {mixture.macs / 1e9:.3f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())

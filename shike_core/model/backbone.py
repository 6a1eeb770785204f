"""ResNet stages in the CIFAR form (He et al. 2016, section 4.2), shortcuts of option B."""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, in_channels, h, w)`` to ``(batch, channels, h / stride, w / stride)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


def basic_stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    """A stage of basic blocks; the first block changes width and resolution."""
    return nn.Sequential(
        BasicBlock(in_channels, channels, stride),
        *(BasicBlock(channels, channels) for _ in range(blocks - 1)),
    )


def cifar_stem(channels: int) -> nn.Sequential:
    """One 3x3 convolution at full resolution."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )


def init_kaiming(module: nn.Module) -> None:
    """Kaiming normal weights for every convolution inside."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)

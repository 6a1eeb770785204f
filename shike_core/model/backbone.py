"""The parts of ResNets, in the form for CIFAR and in the form for photographs.

The first is He et al. 2016, section 4.2, with shortcuts of option B. The second is torchvision's,
which has the stride of a block in its 3x3 convolution, so that torchvision's weights fit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from shike_core.config import Network


class Steps(nn.Sequential):
    """Modules one after the other, which torch 2.11 compiles too: `nn.Sequential` it does not."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply all of them."""
        for step in self:
            x = step(x)
        return x


class SubsampledPointwise(nn.Conv2d):
    """A strided 1x1 convolution that drops the pixels it does not see before it multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, in_channels, h, w)`` to ``(batch, channels, h / stride, w / stride)``."""
        height, width = self.stride
        return F.conv2d(x[:, :, ::height, ::width], self.weight, self.bias)


def projection(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """The shortcut of a block that changes width or resolution (option B).

    With fewer inputs than one vector register holds, oneDNN's gradient of a strided 1x1
    convolution writes past its workspace if the images are channels-last: wrong gradients, or a
    crash much later (uxlfoundation/oneDNN issue 6035; 8 inputs with AVX2, 16 with AVX-512). The
    same convolution on subsampled images is the same function and does not go that way.
    """
    convolution = SubsampledPointwise if stride != 1 and in_channels < 16 else nn.Conv2d
    return nn.Sequential(
        convolution(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
    )


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
            self.shortcut = projection(in_channels, channels, stride)

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
    return Steps(
        nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )


def bottleneck_stage(
    in_channels: int,
    channels: int,
    blocks: int,
    stride: int,
    *,
    groups: int = 1,
    width_per_group: int = 64,
) -> nn.Sequential:
    """A stage of bottleneck blocks; the first block changes width and resolution.

    Args:
        in_channels: of the input.
        channels: a quarter of those of the output.
        blocks: their number.
        stride: of the first block.
        groups: of the 3x3 convolutions; more than one makes a ResNeXt (Xie et al. 2017).
        width_per_group: channels of each group where `channels` is 64.

    Raises:
        ValueError: a group would not have a whole number of channels.
    """
    from torchvision.models.resnet import Bottleneck  # seconds that ResNet-32 can do without

    if channels * width_per_group % 64:
        raise ValueError(
            f"width must be a multiple of {64 // width_per_group} with {groups} groups of "
            f"convolutions, got {channels}"
        )
    out_channels = channels * Bottleneck.expansion
    shortcut = projection(in_channels, out_channels, stride)
    block = partial(Bottleneck, planes=channels, groups=groups, base_width=width_per_group)
    return nn.Sequential(
        block(in_channels, stride=stride, downsample=shortcut),
        *(block(out_channels) for _ in range(blocks - 1)),
    )


def photograph_stem(channels: int) -> nn.Sequential:
    """A 7x7 convolution and a pooling, to a quarter of the resolution."""
    return Steps(
        nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )


def init_kaiming(module: nn.Module) -> None:
    """Kaiming normal weights for every convolution inside, by its inputs (the authors')."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)


def init_kaiming_fan_out(module: nn.Module) -> None:
    """Kaiming normal weights for every convolution inside, by its outputs (torchvision's)."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


@dataclass(frozen=True)
class Backbone:
    """What a network is made of."""

    stem: Callable[[int], nn.Module]
    """From the channels of its output."""
    stage: Callable[[int, int, int, int], nn.Module]
    """From channels of the input, channels, blocks and stride."""
    blocks: tuple[int, ...]
    """Of each stage, shallow to deep; the last stage is an expert's own."""
    expansion: int
    """Channels that a stage gives over the channels it is made with."""
    initialise: Callable[[nn.Module], None]
    """Gives stem and stages their first weights."""


_resnet = partial(
    Backbone, stem=photograph_stem, stage=bottleneck_stage, expansion=4,
    initialise=init_kaiming_fan_out,
)  # fmt: skip
BACKBONES: dict[Network, Backbone] = {
    "resnet32": Backbone(cifar_stem, basic_stage, (5, 5, 5), 1, init_kaiming),
    "resnet50": _resnet(blocks=(3, 4, 6, 3)),
    "resnext50_32x4d": _resnet(
        stage=partial(bottleneck_stage, groups=32, width_per_group=4), blocks=(3, 4, 6, 3)
    ),
    "resnet152": _resnet(blocks=(3, 8, 36, 3)),
}
"""Networks by the name in a configuration; torchvision has the larger ones under the same."""

"""The list of convolutions against known figures, the timed passes against autograd."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from benchmarks.ceilings import (
    PASSES,
    Convolution,
    best_seconds,
    convolutions_of,
    measure_convolutions,
    measure_copy,
    network_of,
    passes_of,
)
from shike_core.config import TrainConfig

CPU = torch.device("cpu")
STRIDED = Convolution(
    batch=2, in_channels=3, out_channels=4, height=6, width=5, kernel=3, stride=2, padding=1,
    needs_data_gradient=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "million_macs"),
    [
        (TrainConfig(), 120.1),
        # ResNet-32 with parameter-free shortcuts has 68.9, and two of ours have a convolution.
        (TrainConfig(num_experts=1, fusion=False), 68.9 + 2 * 0.131),
    ],
)
def test_the_network_has_as_many_operations_as_the_literature_says(config, million_macs) -> None:
    shapes = convolutions_of(config, num_classes=100, size=32)
    operations = sum(count * shape.operations for shape, count in shapes.items())
    assert operations / 2 / config.batch_size / 1e6 == pytest.approx(million_macs, abs=0.1)
    assert sum(not shape.needs_data_gradient for shape in shapes.elements()) == 1


def test_no_strided_convolution_of_few_channels_is_timed() -> None:
    """The library's gradient of one damages memory; the network subsamples in its place."""
    shapes = convolutions_of(TrainConfig(width=4, batch_size=2), num_classes=3, size=8)
    pointwise = [shape for shape in shapes if shape.kernel == 1]
    assert pointwise
    assert {(shape.stride, shape.height) for shape in pointwise} <= {(1, 4), (1, 2)}
    pointwise = [shape for shape in convolutions_of(TrainConfig(), 3, 8) if shape.kernel == 1]
    assert {shape.stride for shape in pointwise} == {2}


def test_operations_of_a_convolution_by_hand() -> None:
    # An output of 3 x 3 for each of 2 images and 4 channels, each of 3 * 9 multiplications.
    assert STRIDED.operations == 2 * (2 * 4 * 3 * 3) * (3 * 9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_passes_are_those_of_autograd(layout) -> None:
    torch.manual_seed(0)
    runs = passes_of(STRIDED, CPU, torch.float32, layout)
    torch.manual_seed(0)
    images, weight = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3)
    images.requires_grad_(), weight.requires_grad_()
    out = F.conv2d(images, weight, stride=2, padding=1)
    torch.testing.assert_close(runs["forward"](), out.detach())
    derivatives = torch.autograd.grad(out, (images, weight), torch.ones_like(out))
    for index, name in enumerate(PASSES[1:]):
        passed = runs[name]()
        assert passed[1 - index] is None
        assert passed[index].shape == derivatives[index].shape


def test_each_pass_of_each_shape_is_timed_unless_the_network_does_not_need_it() -> None:
    shapes = Counter({STRIDED: 3, STRIDED._replace(needs_data_gradient=False): 1})
    rows = measure_convolutions(shapes, CPU, torch.float32, least_seconds=0.0)
    assert [row["count"] for row in rows] == [3, 1]
    assert rows[1]["seconds"]["backward_data"] is None
    times = [row["seconds"][name] for row in rows for name in PASSES]
    assert all(taken > 0 for taken in times if taken is not None)


def test_the_networks_total_counts_each_shape_as_often_as_it_is_run() -> None:
    rows = [
        {"count": 3, "operations": 10, "seconds": {"forward": 1.0, "backward_data": 2.0}},
        {"count": 1, "operations": 7, "seconds": {"forward": 0.5, "backward_data": None}},
    ]
    total = network_of(rows)
    assert total["forward"] == {"seconds": 3.5, "operations": 37}
    assert total["backward_data"] == {"seconds": 6.0, "operations": 30}


def test_a_copy_counts_reading_and_writing() -> None:
    assert measure_copy(CPU, 2**22) > 0


def test_the_best_of_three_calls_after_one_to_warm_up() -> None:
    calls = []
    assert best_seconds(lambda: calls.append(1), CPU, least_seconds=0.0) < 1
    assert len(calls) == 4

"""The measurement of memory on allocations whose size is known, and what it finds."""

import json

import pytest
import torch

from benchmarks.distillation_memory import Point, cpu_peak, fit, gpu_peak, loss_bytes, main, points

CPU = torch.device("cpu")


def test_the_peak_is_what_lives_at_the_same_time() -> None:
    def run() -> None:
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(500, dtype=torch.uint8)
        del first
        third = torch.empty(700, dtype=torch.uint8)
        del second, third

    assert cpu_peak(run) == 1500


def test_cross_entropy_alone_takes_three_times_the_logits() -> None:
    """Log-probabilities, their gradient, and the gradient of the logits."""
    logits = 4 * 8 * 3 * 1000
    taken = loss_bytes(Point(8, 3, 1000), CPU, dkt_weight=0.0, mutual_weight=0.0)
    assert taken == pytest.approx(3 * logits, rel=0.01)


def test_distillation_takes_memory_linear_in_batch_classes_and_experts() -> None:
    def taken(*shape: int) -> int:
        return loss_bytes(Point(*shape), CPU, dkt_weight=0.1, mutual_weight=0.01)

    base = taken(8, 3, 2000)
    assert taken(16, 3, 2000) == pytest.approx(2 * base, rel=0.01)
    assert taken(8, 3, 4000) == pytest.approx(2 * base, rel=0.01)
    one_expert_more = taken(8, 4, 2000) - base
    assert taken(8, 9, 2000) == pytest.approx(base + 6 * one_expert_more, rel=0.01)
    assert base < 11 * 4 * 8 * 3 * 2000  # the pairs of experts are not held


def test_the_fit_by_hand() -> None:
    rows = [
        {"batch_size": b, "num_experts": e, "num_classes": c, "bytes": 4 * b * c * (8 * e + 6)}
        for b, e, c in ((2, 1, 5), (2, 3, 5), (4, 3, 7))
    ]
    fitted = fit(rows)
    assert (fitted["per_logit"], fitted["per_class"]) == pytest.approx((8, 6))
    assert fitted["largest_deviation"] == pytest.approx(0, abs=1e-9)
    rows[1]["bytes"] *= 2
    assert fit(rows)["largest_deviation"] > 0.1


def test_one_value_varies_at_a_time() -> None:
    assert points([1, 2], [3], [4, 5]) == [Point(1, 3, 5), Point(2, 3, 5), Point(2, 3, 4)]


def test_what_is_written_and_printed(tmp_path, capsys) -> None:
    path = tmp_path / "memory.json"
    sizes = ["--batch-sizes", "4", "8", "--experts", "1", "2", "--classes", "500", "1000"]
    assert main([*sizes, "--device", "cpu", "--out", str(path)]) == 0
    written = json.loads(path.read_text())
    assert len(written["points"]) == 4
    assert written["fit"]["largest_deviation"] < 0.01
    for row in written["points"]:
        assert row["bytes"] > 2 * row["cross_entropy_bytes"]
    assert "| 8 | 2 | 1000 | 0.06 |" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_peak_on_a_gpu() -> None:
    device = torch.device("cuda")
    kept = torch.empty(2**20, dtype=torch.uint8, device=device)
    assert gpu_peak(lambda: torch.empty_like(kept).add_(1), device) == 2**20

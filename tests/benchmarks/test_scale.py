"""One small case as a command, gone on with, and its arithmetic."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import scale

ROOT = Path(__file__).parents[2]


def run(out: Path) -> str:
    command = [sys.executable, "-m", "benchmarks.scale", "--quick", "--rounds", "2"]
    command += ["--threads", "1", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_small_case_is_measured_once(tmp_path) -> None:
    out = tmp_path / "scale.json"
    printed = run(out)
    (case,) = json.loads(out.read_text())["cases"]
    assert (case["network"], case["size"], case["batch_size"]) == ("resnet50", 32, 2)
    rates = case["images_per_second"]
    assert list(rates) == ["plain", "shike"] == list(case["peak_memory_bytes"])
    assert case["ratios"]["shike"]["runs"] == pytest.approx(
        [a / b for a, b in zip(rates["shike"]["runs"], rates["plain"]["runs"], strict=True)]
    )
    # Three experts' last stages, 15.0 million parameters each, with gradients and momentum.
    assert (
        case["peak_memory_bytes"]["shike"] > case["peak_memory_bytes"]["plain"] + 2 * 3 * 4 * 15e6
    )
    assert "computed" in printed
    again = run(out)
    assert json.loads(out.read_text())["cases"] == [case]
    assert again.splitlines()[1:] == printed.splitlines()[1:]


def test_the_hours_of_a_whole_training_are_computed() -> None:
    report = {
        "device": "a machine",
        "versions": {"torch": "0"},
        "cases": [
            {
                "network": "resnet50", "size": 224, "batch_size": 8,
                "images_per_second": {"plain": {"median": 6435.9}, "shike": {"median": 1000.0}},
                "ratios": {"shike": {"median": 0.155}},
                "peak_memory_bytes": {"plain": 2**30, "shike": 3 * 2**29},
            }
        ],
    }  # fmt: skip
    lines = [line.split() for line in scale.render(report).splitlines()]
    # 200 * 115,846 / 3600 = 6,435.9
    assert lines[-2] == ["resnet50", "224", "8", "plain", "6,435.9", "1.00", "1.0"]
    assert lines[-1] == ["resnet50", "224", "8", "shike", "1,000.0", "0.15", "1.50", "6.4"]


def test_every_case_is_a_network_that_can_be_trained() -> None:
    for cases in (*scale.CASES.values(), scale.QUICK):
        assert len(set(cases)) == len(cases)
        for case in cases:
            assert scale.training(case, "none", "cpu").network == case.network

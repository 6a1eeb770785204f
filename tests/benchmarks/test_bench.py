"""The benchmark as a command, and its arithmetic by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import bench
from benchmarks.bench import shares_of_ceiling
from benchmarks.figures import ratios, summary

ROOT = Path(__file__).parents[2]
PARTS = {"data", "update", "training", "stage1", "stage2"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory, process_environment) -> tuple[dict, str]:
    """The file and the output of one small benchmark."""
    out = tmp_path_factory.mktemp("bench") / "new" / "bench.json"
    command = [sys.executable, "-m", "benchmarks.bench", "--device", "cpu", "--threads", "1"]
    done = subprocess.run(
        [*command, "--quick", "--out", str(out)], cwd=ROOT, env=process_environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


@pytest.mark.slow
def test_the_file_has_every_documented_key(quick) -> None:
    report, _ = quick
    assert set(report) == {
        "date", "commit", "settings", "environment", "hardware", "versions", "seconds", "subset",
        "images_per_second", "ratios", "plain_workers", "peak_memory_bytes", "growth", "ceilings",
        "share_of_ceiling", "loading",
    }  # fmt: skip
    assert report["environment"]["GOMP_SPINCOUNT"] == "10000"
    assert report["hardware"]["type"] == "cpu"
    assert {"python", "torch", "torchvision"} <= set(report["versions"])
    assert set(report["growth"]) == {"batch_size", "num_experts", "num_classes", "images"}
    assert set(report["plain_workers"]) == {"0", "1"}


@pytest.mark.slow
def test_every_form_and_part_is_measured_in_each_round(quick) -> None:
    report, _ = quick
    speed = report["images_per_second"]
    forms = list(dict.fromkeys(["plain", "engine-float32", f"engine-{auto(report)}"]))
    assert set(speed) == PARTS
    for forms_of_part in speed.values():
        assert list(forms_of_part) == forms
        for x in forms_of_part.values():
            assert len(x["runs"]) == report["settings"]["rounds"]
            assert 0 < x["lowest"] <= x["median"] <= x["highest"]
    assert list(report["peak_memory_bytes"]) == list(report["share_of_ceiling"]) == forms
    for part, ratio in report["ratios"].items():
        for form, x in ratio.items():
            runs = zip(speed[part][form]["runs"], speed[part]["plain"]["runs"], strict=True)
            assert x["runs"] == pytest.approx([ours / plain for ours, plain in runs])


def auto(report: dict) -> str:
    return report["hardware"]["auto_precision"]


@pytest.mark.slow
def test_memory_ceilings_and_growth_are_plausible(quick) -> None:
    report, _ = quick
    for x in report["peak_memory_bytes"].values():
        assert 100 * 2**20 < x["start"] < x["peak"] < 20 * 2**30
    for shares in report["share_of_ceiling"].values():
        assert all(0 < share < 2 for share in shares.values())
    ceilings = report["ceilings"]
    assert 1e8 < ceilings["copy_bytes_per_second"] < 1e13
    for precision, network in ceilings["network"].items():
        shapes = ceilings["convolutions"][precision]
        forward = sum(x["count"] * x["operations"] for x in shapes)
        assert network["forward"]["operations"] == forward
        assert 0 < network["backward_data"]["operations"] < forward  # not of the images
        assert all(x["seconds"] > 0 for x in network.values())
    small, large = report["growth"]["images"]
    assert large["bytes"] > small["bytes"]


@pytest.mark.slow
def test_the_ratios_come_first_on_the_terminal(quick) -> None:
    report, output = quick
    form = f"engine-{auto(report)}"
    ratio = report["ratios"]["training"][form]["median"]
    claims = [line for line in output.splitlines()[:2] if line.startswith(form)]
    assert claims == [line for line in claims if f"{ratio:.2f} times" in line] != []
    for title in ("data only", "whole training", "peak memory", "GFLOP/s", "copying", "wrote"):
        assert title in output


def test_a_subset_that_is_not_there_ends_with_its_message(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--subset", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="there is no"):
        bench.main()


def test_a_summary_by_hand() -> None:
    assert summary([3.0, 1.0, 2.0]) == {
        "median": 2.0, "lowest": 1.0, "highest": 3.0, "runs": [3.0, 1.0, 2.0],
    }  # fmt: skip


def test_ratios_are_taken_within_a_round() -> None:
    runs = {"data": {"plain": [1.0, 10.0, 2.0], "engine-float32": [2.0, 20.0, 6.0]}}
    assert ratios(runs)["data"]["engine-float32"]["runs"] == [2.0, 2.0, 3.0]
    assert list(ratios(runs)["data"]) == ["engine-float32"]


def test_shares_of_the_ceiling_by_hand() -> None:
    network = {
        name: {"seconds": seconds, "operations": 1}
        for name, seconds in (("forward", 1.0), ("backward_data", 1.0), ("backward_weights", 2.0))
    }
    ceilings = {"network": {"float32": network}, "copy_bytes_per_second": 150.0}
    rates = {"data": 1.0, "update": 1.25, "training": 1.0}
    speed = {part: {"plain": {"median": rate}} for part, rate in rates.items()}
    shares = shares_of_ceiling(speed, ceilings, batch_size=10, image_size=[2, 1])["plain"]
    # 6 values, each 1 byte read and 4 written: 0.2 s. A batch of 10 takes 4 s, an image 0.4 s;
    # in stage 2 0.1 s, and of ten epochs one is of stage 2.
    assert shares == pytest.approx({"data": 0.2, "update": 0.5, "training": 0.37})


def test_two_reports_of_one_day_are_two_files(tmp_path) -> None:
    morning, evening = "2026-11-27 08:05:59+0000", "2026-11-27 17:54:30+0000"
    assert bench.dated(tmp_path, morning) == tmp_path / "bench-2026-11-27-0805.json"
    assert bench.dated(tmp_path, evening) != bench.dated(tmp_path, morning)

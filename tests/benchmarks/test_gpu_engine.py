"""Measuring the engine's ways of running a step; here on a CPU, where there is one."""

import json

import pytest

from benchmarks import gpu_engine
from shike_core import stages
from shike_core.config import SubsetConfig


@pytest.fixture(scope="module")
def subset(tmp_path_factory):
    path = tmp_path_factory.mktemp("subset")
    rule = SubsetConfig(dataset="digits", imbalance_factor=20, validation_per_class=10)
    stages.build_subset(rule, None, path, lambda metrics, step: None)
    return path


def test_every_case_has_its_speeds(subset, tmp_path, capsys) -> None:
    out = tmp_path / "out.json"
    arguments = ["--recipe", "digits-lt", "--epochs", "1", "--device", "cpu", "--out", str(out)]
    ways = ["--accelerations", "none", "--side-by-side", "1", "2"]
    assert gpu_engine.main([str(subset), *arguments, *ways]) == 0
    found = json.loads(out.read_text())
    assert [case["side_by_side"] for case in found["cases"]] == [1, 2]
    assert found["machine"]["device"]
    assert found["data_images_per_second"] > 1000
    for case in found["cases"]:
        assert case["acceleration"] == "none"
        assert case["stage2"]["images_per_second"] > case["stage1"]["images_per_second"] > 0
        steps = 60 * 12 * case["stage1"]["milliseconds_per_step"]
        steps += 10 * 12 * case["stage2"]["milliseconds_per_step"]
        assert case["seconds_per_run"] == pytest.approx(steps / 1000)
    assert "none, 2 side by side: stage 1:" in capsys.readouterr().out


def test_a_missing_subset_is_one_line(tmp_path, capsys) -> None:
    assert gpu_engine.main([str(tmp_path), "--out", str(tmp_path / "out.json")]) == 2
    assert capsys.readouterr().err.startswith("error: ")

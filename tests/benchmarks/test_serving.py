"""The benchmark of serving, on a small model."""

import json
from dataclasses import asdict

import pytest

from benchmarks import serving
from shike_core import checkpoint as checkpoints
from shike_core.config import TrainConfig

CONFIG = TrainConfig(num_experts=2, width=2, stage1_epochs=1, stage2_epochs=0)


def write(path, **changes) -> None:
    content = {
        "config": asdict(CONFIG), "training_digest": "t", "subset_digest": "s",
        "class_names": ["a", "b", "c"], "class_counts": [3, 2, 1], "mean": [0.5] * 3,
        "std": [0.2] * 3, "image_size": [8, 8], "epoch": 1,
        "model": checkpoints.build_model(CONFIG, 3).state_dict(),
    }  # fmt: skip
    checkpoints.save(checkpoints.Checkpoint(**content | changes), path)


def test_both_forms_are_timed_at_each_size(tmp_path, capsys):
    write(tmp_path / "checkpoint.pt", calibration_temperature=2.0)
    serving.main(tmp_path, tmp_path / "out.json", batch_sizes=(1, 4), seconds=0.0)
    table = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["batch_size"] for row in report["rows"]] == [1, 4]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["1", "4"]
    for row in report["rows"]:
        assert row["calls"] >= 5
        assert row["program"]["median_ms"] <= row["program"]["p95_ms"]
        rate = row["batch_size"] / row["program"]["median_ms"] * 1000
        assert row["program"]["images_per_second"] == pytest.approx(rate)
    assert report["versions"]["torch"]


def test_a_checkpoint_that_cannot_be_served(tmp_path):
    write(tmp_path / "checkpoint.pt", image_size=[])
    with pytest.raises(SystemExit, match="does not say which size"):
        serving.main(tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="there is no checkpoint"):
        serving.main(tmp_path / "lost")

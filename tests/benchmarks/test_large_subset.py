"""The generated images, and one small run of everything."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.large_subset import make_images
from shike_core.data.pack import prepare

ROOT = Path(__file__).parents[2]


def test_images_are_readable_and_no_two_alike(tmp_path) -> None:
    table = make_images(tmp_path / "images", images=600, classes=5)
    frame = pd.read_parquet(table)
    counts = frame.groupby(["split", "label"]).size()
    # 500 ** (-c / 4) scaled to a sum of 600: 473.3, 100.1, 21.2, 4.5, 0.9; at least 2.
    assert counts["train"].tolist() == [473, 100, 21, 4, 2]
    assert counts["test"].tolist() == [3] * 5
    contents = [(tmp_path / "images" / path).read_bytes() for path in frame["path"]]
    assert len({hashlib.sha256(content).digest() for content in contents}) == 615
    assert {prepare(content)[1:] for content in contents} == {(8, 8)}
    before = table.stat().st_mtime_ns
    assert make_images(tmp_path / "images", images=600, classes=5).stat().st_mtime_ns == before


def test_a_small_run(tmp_path) -> None:
    command = [sys.executable, "-m", "benchmarks.large_subset", "--work", str(tmp_path / "work")]
    command += ["--images", "300", "--classes", "4", "--workers", "1"]
    command += ["--out", str(tmp_path / "report.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["images"], report["classes"]) == (300, 4)
    assert 300 < report["file_bytes"] < 2000
    for storage in ("packed", "referenced"):
        built, read = report[storage]["build"], report[storage]["read"]
        assert built["images_per_second"] * built["seconds"] == pytest.approx(312)
        assert (built["workers"], built["worker_bytes"]) == (0, 0)
        assert 2**25 < built["parent_bytes"] < 2**30
        assert 2**25 < read["process_bytes"] < 2**30
        assert storage in done.stdout
    stored = [report[storage]["build"]["subset_bytes"] for storage in ("packed", "referenced")]
    assert stored[0] > stored[1] + 300 * 300

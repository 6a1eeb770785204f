"""A small run of everything, and what is done to images by hand."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import loading

ROOT = Path(__file__).parents[2]


@pytest.fixture
def photographs(tmp_path) -> Path:
    """Three generated ones, one of them deeper."""
    (tmp_path / "photographs" / "more").mkdir(parents=True)
    for name, content in zip(("a.jpg", "b.JPEG", "more/c.jpg"), loading.generated(3), strict=True):
        (tmp_path / "photographs" / name).write_bytes(content)
    return tmp_path / "photographs"


def test_generated_files_are_like_photographs() -> None:
    contents = loading.generated(4)
    assert len(set(contents)) == 4
    assert 90_000 < sum(map(len, contents)) / len(contents) < 130_000
    image = Image.open(io.BytesIO(contents[0]))
    assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")


@pytest.mark.slow
def test_a_small_run(photographs, tmp_path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.loading", "--rounds", "2", "--images", "8"]
    command += ["--photographs", str(photographs), "--workers", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert (report["images"], report["workers"], report["rounds"]) == (8, 1, 2)
    assert set(report["images_per_second"]) == {"one_core", "loader"}
    assert list(report["images_per_second"]["loader"]["training"]) == [
        "plain", "referenced", "packed", "packed_256",
    ]  # fmt: skip
    for where, parts in report["images_per_second"].items():
        assert set(parts) == {"training", "evaluation"}
        for part, forms in parts.items():
            for form, x in forms.items():
                assert len(x["runs"]) == 2
                assert x["lowest"] > 0
                if form != "plain":
                    first = x["runs"][0] / forms["plain"]["runs"][0]
                    assert report["ratios"][where][part][form]["runs"][0] == pytest.approx(first)
    assert "8 photographs" in done.stdout
    assert "packed 256" in done.stdout


def test_a_folder_without_photographs_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["loading", "--photographs", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        loading.main()
    assert stop.value.code == (
        f"error: {tmp_path} has no .jpg or .jpeg files; name a folder of photographs"
    )


def test_every_form_goes_through_all_images(photographs, tmp_path) -> None:
    contents = [path.read_bytes() for path in loading.find_photographs(photographs)]
    loading.lay_out(contents, tmp_path / "images", 8)
    for part in loading.PARTS:
        assert loading.plain_loader(tmp_path / "images", part, workers=1)() == 8
        with loading.stream(
            tmp_path / "packed", tmp_path / "images", loading.STORAGES["packed_256"], part, 1
        ) as epoch:
            assert epoch() == 8

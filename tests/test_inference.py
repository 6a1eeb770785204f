"""Images that people hand in: right ones, odd ones, and what is no image."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shike_core import checkpoint as checkpoints
from shike_core.checkpoint import Trained
from shike_core.cli import print_answers
from shike_core.config import PredictConfig, TrainConfig
from shike_core.data.views import EvaluationView
from shike_core.errors import DatasetError
from shike_core.inference import answers, find_images, read_image

CONFIG = TrainConfig(num_experts=2, width=2)


def untrained(config: TrainConfig = CONFIG, **changes) -> Trained:
    torch.manual_seed(0)
    model = Trained(
        model=checkpoints.build_model(config, num_classes=3).eval(),
        config=config,
        class_names=("cat", "dog", "owl"),
        class_counts=(9, 3, 1),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.2, 0.1),
        image_size=(8, 10),
        calibration_temperature=2.0,
        subset_digest="s",
        epochs_done=1,
        history=[],
    )
    return replace(model, **changes)


def photograph(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def ask(trained: Trained, names: list[str], **changes) -> list[dict]:
    return list(answers(trained, names, PredictConfig(**changes), torch.device("cpu")))


# --- finding them


def test_files_and_the_images_of_folders_in_order(tmp_path):
    for name in ("b.png", "a/z.JPG", "a/b c/ä.webp", "a/readme.txt", "odd.bin"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    found = find_images([str(tmp_path / "in" / "odd.bin"), str(tmp_path / "in"), "-"])
    names = ["in/odd.bin", "in/a/b c/ä.webp", "in/a/z.JPG", "in/b.png"]
    assert found == [*(str(tmp_path / name) for name in names), "-"]


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"no image or folder .*/lost\.png"):
        find_images([str(tmp_path / "lost.png")])
    with pytest.raises(DatasetError, match=r"cannot look at .*File name too long"):
        find_images([str(tmp_path / ("a" * 300))])
    with pytest.raises(DatasetError, match="has no images in it"):
        find_images([str(tmp_path)])
    with pytest.raises(DatasetError, match="no images were given"):
        find_images([])


@pytest.mark.parametrize("output", ["text", "json", "csv"])
def test_a_name_in_another_coding_is_printed(output, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", screen)
    best = {"class": "cat", "label": 0, "probability": 1.0}
    row = {"image": "gr\udcfcn.png", "calibrated": True, "top": [best], "experts": [best]}
    assert print_answers([row], output) == 0
    shown = b"gr\\udcfcn.png" if output == "json" else b"gr\xfcn.png"
    assert shown in screen.buffer.getvalue()


# --- what the network is shown


def test_an_image_of_the_right_size_stays_as_it_is():
    image = photograph(10, 8)
    assert (read_image(encoded(image), untrained(), resize=False) == np.asarray(image)).all()


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_other_modes_become_colours(mode):
    odd = photograph(10, 8).convert(mode)
    content = encoded(odd, "TIFF" if mode == "CMYK" else "PNG")
    pixels = read_image(content, untrained(), resize=False)
    assert (pixels.shape, pixels.dtype) == ((8, 10, 3), np.uint8)
    assert (pixels == np.asarray(odd.convert("RGB"))).all()


def test_an_image_of_more_than_8_bits_is_refused():
    content = encoded(Image.fromarray(np.full((8, 10), 3000, np.uint16)), "PNG")
    with pytest.raises(ValueError, match=r"more than 8 bits \(mode I;16\); save it with 8 bits"):
        read_image(content, untrained(), resize=False)


def test_an_image_of_another_size_is_refused_unless_it_may_be_resized():
    content = encoded(photograph(40, 16))
    with pytest.raises(ValueError, match=r"40 x 16 pixels, .* is for 10 x 8; .*--resize"):
        read_image(content, untrained(), resize=False)
    pixels = read_image(content, untrained(), resize=True)
    middle = photograph(40, 16).crop((10, 0, 30, 16)).resize((10, 8), Image.Resampling.BOX)
    assert (pixels == np.asarray(middle)).all()
    small = read_image(encoded(photograph(5, 4)), untrained(), resize=True)
    assert small.shape == (8, 10, 3)


def test_a_photograph_is_seen_as_in_the_evaluation():
    config = replace(CONFIG, crop="resized", crop_size=32, auto_augment=False, cutout_size=0)
    content = encoded(photograph(90, 60), "JPEG")
    pixels = read_image(content, untrained(config), resize=False)
    assert (pixels == np.asarray(EvaluationView(32)(content, 0))).all()


def test_an_imported_model_without_a_size_says_so():
    with pytest.raises(ValueError, match="does not say which size"):
        read_image(encoded(photograph(10, 8)), untrained(image_size=None), resize=False)


# --- the answers


def test_probabilities_are_those_of_the_scaled_mean_of_the_logits(tmp_path):
    trained, image = untrained(), photograph(10, 8)
    image.save(tmp_path / "a.png")
    (row,) = ask(trained, [str(tmp_path / "a.png")], top=2)
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (trained.mean, trained.std))
    with torch.no_grad():
        logits = trained.model((pixels - mean) / std, stage=2)[0]
    expected = (logits.mean(dim=0) / 2).softmax(dim=0)
    order = expected.argsort(descending=True)[:2].tolist()
    assert [best["label"] for best in row["top"]] == order
    assert row["class"] == trained.class_names[order[0]]
    assert row["probability"] == pytest.approx(float(expected.max()), abs=1e-6)
    assert [e["probability"] for e in row["experts"]] == pytest.approx(
        (logits / 2).softmax(dim=1).amax(dim=1).tolist(), abs=1e-6
    )
    assert row["calibrated"]
    (plain,) = ask(
        replace(trained, calibration_temperature=None, class_names=()), [str(tmp_path / "a.png")]
    )
    assert not plain["calibrated"]
    assert plain["class"] == f"class {order[0]}"
    assert len(plain["top"]) == 3
    assert sum(best["probability"] for best in plain["top"]) == pytest.approx(1)


def test_what_is_no_image_does_not_keep_the_others_from_being_answered(tmp_path):
    contents = {
        "0.png": encoded(photograph(10, 8)),
        "1.png": b"",
        "2.png": b"no image",
        "3.png": encoded(photograph(10, 8))[:-40],
        "4.png": encoded(photograph(9, 8)),
        "5.png": encoded(photograph(10, 8), "BMP"),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    rows = ask(untrained(), find_images([str(tmp_path)]), predict_batch_size=2)
    assert [Path(row["image"]).name for row in rows] == list(contents)
    assert ["error" in row for row in rows] == [False, True, True, True, True, False]
    errors = [row.get("error", "") for row in rows]
    assert errors[1] == "the file is empty"
    assert errors[2] == "not an image that can be read"
    assert "truncated" in errors[3]
    assert rows[0]["probability"] == pytest.approx(rows[5]["probability"], abs=1e-6)


def test_a_batch_without_a_single_image(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"bad")
    assert "error" in ask(untrained(), [str(tmp_path / "bad.png")])[0]


def test_one_image_on_standard_input(monkeypatch):
    content = io.TextIOWrapper(io.BytesIO(encoded(photograph(10, 8))))
    monkeypatch.setattr(sys, "stdin", content)
    (row,) = ask(untrained(), ["-"])
    assert (row["image"], len(row["experts"])) == ("-", 2)

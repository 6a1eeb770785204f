"""The whole pipeline on a tree like ImageNet-LT's: 1,000 classes of photographs, ResNet-50."""

import json
import subprocess
import sys
from pathlib import Path

import mlflow.pytorch
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

ROOT = Path(__file__).parents[2]
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "photographs"
CLASSES = 1000
LARGEST = 5
SIZE = (500, 375)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="there are no photographs"),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """Parts of real photographs as JPEG files of the usual size, and how many train each class."""
    root = tmp_path_factory.mktemp("tree")
    generator = np.random.default_rng(0)
    photographs = [Image.open(path).convert("RGB") for path in sorted(PHOTOGRAPHS.iterdir())]
    counts = np.rint(LARGEST ** (1 - np.arange(CLASSES) / (CLASSES - 1))).astype(int)
    for label in range(CLASSES):
        for part, count in (("train", counts[label]), ("test", 1)):
            folder = root / part / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                photograph = photographs[generator.integers(len(photographs))]
                share = generator.uniform(0.7, 1.0)
                width, height = (share * length for length in photograph.size)
                left = generator.uniform(0, photograph.width - width)
                top = generator.uniform(0, photograph.height - height)
                box = (left, top, left + width, top + height)
                image = photograph.resize(SIZE, Image.Resampling.BICUBIC, box)
                image.save(folder / f"{number}.JPEG", quality=92)
    (root / "train" / "n00000000" / "0.JPEG").write_bytes(
        (root / "train" / "n00000000" / "0.JPEG").read_bytes()[:9000]
    )
    return root, counts


@pytest.fixture(scope="module")
def done(tree, empty_mlflow_database, tmp_path_factory, process_environment) -> tuple[Path, str]:
    """Home and output of a run with a few dozen steps."""
    home = tmp_path_factory.mktemp("home")
    (home / "mlflow.db").write_bytes(empty_mlflow_database.read_bytes())
    command = [sys.executable, "-m", "pipelines.run_local", "--home", str(home)]
    command += ["--recipe", "imagenet-lt/smoke", "--data-dir", str(tree[0])]
    command += ["--subset.dataset", "image_folder", "--train.crop-size", "64"]
    command += ["--train.batch-size", "64", "--evaluate.eval-batch-size", "50"]
    finished = subprocess.run(
        command, cwd=ROOT, env=process_environment(), capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return home, finished.stdout


def test_a_long_tail_of_photographs_is_trained_on(tree, done):
    home, output = done
    _, counts = tree
    assert counts.sum() == 2467
    (subset,) = home.glob("runs/**/subset.json")
    info = json.loads(subset.read_text())
    assert info["sizes"] == {"train": 2466, "test": 1000}
    assert info["class_counts"] == [4, *counts[1:]]
    assert info["unreadable"] == {"train": 1, "test": 0}
    assert "n00000000/0.JPEG" in (subset.parent / "unreadable.csv").read_text()
    (report,) = home.glob("runs/**/train.json")
    found = json.loads(report.read_text())
    assert found["epochs"] == 2
    assert round(found["parameters"] / 1e6, 2) == 132.98  # as docs/method.md says
    for word in ("ensemble", "shike-imagenet-lt-smoke version 1, alias champion"):
        assert word in output


def test_its_model_is_registered_and_answers(done):
    home, _ = done
    uri = f"sqlite:///{home}/mlflow.db"
    client = MlflowClient(uri)
    version = client.get_model_version_by_alias("shike-imagenet-lt-smoke", "champion")
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert {"train/data_wait", "train/loss"} <= set(run.data.metrics)
    with Image.open(next(PHOTOGRAPHS.iterdir())) as photograph:
        pixels = np.array(photograph.convert("RGB").resize((64, 64)))
    images = torch.from_numpy(pixels).permute(2, 0, 1).repeat(2, 1, 1, 1)
    mlflow.set_tracking_uri(uri)
    probabilities = mlflow.pytorch.load_model(version.source)(images)
    assert probabilities.shape == (2, CLASSES)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(2), atol=1e-4)

"""The champion in use: MLflow's own server, asked over HTTP, and the command that predicts."""

import io
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tyro
from mlflow import MlflowClient
from PIL import Image

from components import tracking
from pipelines import predict, serve
from shike_core import stages
from shike_core.config import EvaluateConfig, RegisterConfig, SubsetConfig, TrainConfig
from shike_core.gate import decide

ROOT = Path(__file__).parents[2]
CONFIG = TrainConfig(
    stage1_epochs=2, stage2_epochs=1, warmup_epochs=1, batch_size=32, num_experts=2, width=4,
    crop_padding=1, flip=False, auto_augment=False, cutout_size=0, precision="float32",
    device="cpu",
)  # fmt: skip


def quiet(metrics: object, step: int) -> None:
    """Nobody looks at these metrics."""


@dataclass
class Champion:
    """A registered model of the digits, and what its evaluation stored."""

    store: str
    run_id: str
    images: np.ndarray
    """Uint8 (n, 8, 8, 3)."""
    logits: np.ndarray
    """(n, experts, classes), of the checkpoint."""
    temperature: float

    def probabilities(self, n: int) -> np.ndarray:
        scaled = np.exp(self.logits[:n].mean(axis=1) / self.temperature)
        return scaled / scaled.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def champion(empty_mlflow_database, tmp_path_factory) -> Champion:
    home = tmp_path_factory.mktemp("champion")
    (home / "mlflow.db").write_bytes(empty_mlflow_database.read_bytes())
    store = f"sqlite:///{home}/mlflow.db"
    subset, trained, evaluation = (home / name for name in ("subset", "trained", "evaluation"))
    rule = SubsetConfig(dataset="digits", imbalance_factor=20, validation_per_class=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        stages.build_subset(rule, None, subset, quiet)
        run = tracking.open_training(subset, CONFIG)
        report = stages.train(CONFIG, subset, trained, quiet)
        tracking.log_training(run, report, trained)
        exporter = tracking.ModelExporter(run)
        found = stages.evaluate(
            EvaluateConfig(), subset, trained, evaluation, quiet, export=exporter
        )
        tracking.log_evaluation(run, EvaluateConfig(), found, evaluation, exporter.model_uri)
        config = RegisterConfig(model_name="pets")
        decision = stages.compare_with_champion(config, evaluation, None)
        assert decision == decide(config, decision.candidate, None)
        tracking.store_decision(run, config, decision)
        assert tracking.register(run, exporter.model_uri, config, decision.alias) == "1"
    stored = pq.read_table(evaluation / "predictions.parquet").to_pydict()
    logits = np.stack([stored["logits_expert_0"], stored["logits_expert_1"]], axis=1)
    images = [_decoded(x) for x in pq.read_table(subset / "test.parquet")["image"].to_pylist()]
    return Champion(
        store, run.run_id, np.stack(images), logits, found["calibration"]["temperature"]
    )


def _decoded(cell: Any) -> np.ndarray:
    content = cell["bytes"] if isinstance(cell, dict) else cell
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


# --- over HTTP


@pytest.fixture(scope="module")
def address(champion, free_port, process_environment, tmp_path_factory) -> Iterator[str]:
    """Of ``make serve``'s server."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "pipelines.serve", "pets", "--port", str(port)],
            cwd=ROOT, env=process_environment(MLFLOW_TRACKING_URI=champion.store),
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        server.terminate()
        server.wait(60)


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(300):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.4)
        else:
            return
    raise AssertionError(log.read_text())


def post(address: str, body: object) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_the_server_gives_the_calibrated_probabilities_of_the_checkpoint(champion, address):
    pixels = champion.images[:40].transpose(0, 3, 1, 2)
    answer = post(address, {"inputs": pixels.tolist()})["predictions"]
    np.testing.assert_allclose(answer, champion.probabilities(40), atol=1e-4)
    assert np.allclose(np.sum(answer, axis=1), 1, atol=1e-5)
    one = post(address, {"inputs": pixels[:1].tolist()})["predictions"]
    np.testing.assert_allclose(one, answer[:1], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": np.zeros((1, 3, 4, 4), int).tolist()}, "shape"),
        ({"inputs": np.full((1, 3, 8, 8), 300).tolist()}, "out of bounds for uint8"),
        ({"images": []}, "inputs"),
    ],
    ids=["size", "range", "key"],
)
def test_the_server_says_what_is_wrong_and_goes_on(body, message, champion, address):
    with pytest.raises(urllib.error.HTTPError) as error:
        post(address, body)
    assert error.value.code == 400
    assert message in error.value.read().decode()
    pixels = champion.images[:1].transpose(0, 3, 1, 2)
    assert len(post(address, {"inputs": pixels.tolist()})["predictions"][0]) == 10


# --- by the command


def test_the_champion_answers_for_files(champion, tmp_path, process_environment):
    for i in range(3):
        Image.fromarray(champion.images[i]).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_text("no image")
    command = [sys.executable, "-m", "pipelines.predict", str(tmp_path), "--model", "pets"]
    done = subprocess.run(
        [*command, "--output", "json", "--top", "2"], cwd=ROOT,
        env=process_environment(MLFLOW_TRACKING_URI=champion.store), capture_output=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"error: {tmp_path}/3.png: not an image that can be read" in done.stderr.decode()
    assert "error: 1 of the images cannot be used" in done.stderr.decode()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    expected = np.sort(champion.probabilities(3), axis=1)[:, ::-1][:, :2]
    got = [[best["probability"] for best in row["top"]] for row in rows]
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.fixture
def of_champion(champion, monkeypatch) -> None:
    """Commands that this process runs use the champion's store."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", champion.store)


def test_a_person_reads_it_of_one_image_on_standard_input(
    champion, of_champion, tmp_path, monkeypatch, capsys
):
    Image.fromarray(champion.images[0]).resize((20, 16)).save(tmp_path / "0.png")
    with (tmp_path / "0.png").open() as image:
        monkeypatch.setattr(sys, "stdin", image)
        tyro.cli(predict.main, args=["-", "--model", champion.run_id, "--resize"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "-"
    assert len(lines) == 6
    assert all(line.endswith(" %") for line in lines[:5])
    assert lines[5].startswith("  expert 0: ")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [(predict.main, ["0.png", "--model", "dogs"]), (serve.main, ["dogs"])],
    ids=["predict", "serve"],
)
def test_a_model_that_is_not_there(command, arguments, of_champion):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(command, args=arguments)
    (line,) = str(stop.value).splitlines()
    assert line.startswith("error: ")
    assert "has no model dogs@champion" in line


def test_a_model_whose_files_are_gone_is_not_served(champion, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", champion.store)
    client = MlflowClient(champion.store)
    assert tracking.address_to_serve(client, "pets/1") == "models:/pets/1"
    path = Path(client.get_model_version("pets", "1").source or "")
    model = client.get_logged_model(path.name)
    files = Path(str(model.artifact_location).removeprefix("file://"))
    moved = files.rename(tmp_path / "moved")
    try:
        with pytest.raises(tracking.TrackingError, match=r"files of pets@champion are gone"):
            tracking.address_to_serve(client, "pets")
    finally:
        moved.rename(files)

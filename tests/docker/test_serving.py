"""The service for KServe: the container that its manifest describes, against a real server."""

import json
import subprocess
import time
from pathlib import Path
from urllib.request import Request, urlopen

import mlflow
import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient

from components.tracking import ModelExporter, TrackedRun
from shike_core.export import DeployedModel
from shike_core.model import shike_resnet32

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]  # it may have to build the images

ROOT = Path(__file__).parents[2]


def test_the_manifest_serves_the_champion(images, mlflow_server, free_port, tmp_path, monkeypatch):
    server, port = mlflow_server(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "artifacts"), 0
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    mlflow.set_tracking_uri(server.uri)
    pixels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    model = DeployedModel(shike_resnet32(5, 2, width=2), (0.5,) * 3, (0.2,) * 3, 1.5).eval()
    client = MlflowClient()
    experiment = client.create_experiment("pets")
    run = TrackedRun(client.create_run(experiment).info.run_id, experiment, client)
    exporter = ModelExporter(run)
    expected = exporter(model, pixels, tmp_path)(pixels).detach().numpy()
    version = mlflow.register_model(exporter.model_uri, "pets").version
    client.set_registered_model_alias("pets", "champion", version)

    port = free_port()
    text = (ROOT / "docker" / "kserve.yaml").read_text().replace("8080", str(port))
    text = text.replace("${IMAGE}", images.name("evaluate")).replace("${MODEL}", "pets")
    service = yaml.safe_load(text)
    predictor = service["spec"]["predictor"]
    (told,) = predictor["containers"]
    assert told["image"] == images.name("evaluate")
    assert told["securityContext"]["readOnlyRootFilesystem"]
    assert told["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    assert predictor["volumes"] == [{"name": "tmp", "emptyDir": {}}]
    path, probed = told["readinessProbe"]["httpGet"].values()
    assert probed == told["ports"][0]["containerPort"] == port

    # `images` gives it the manifest's rights; the engine's host network stands for the cluster's.
    options = ("--network", "host", "--env", f"MLFLOW_TRACKING_URI={server.uri}")
    command = [*told["command"], *told["args"]]
    with images.background("evaluate", *command, options=options) as container:
        wait_for(f"http://127.0.0.1:{port}{path}", container)
        body = json.dumps({"inputs": pixels.tolist()}).encode()
        address = f"http://127.0.0.1:{port}/invocations"
        with urlopen(Request(address, body, {"Content-Type": "application/json"})) as answer:
            probabilities = json.load(answer)["predictions"]
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def wait_for(url: str, container: str) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            urlopen(url, timeout=5).close()
        except OSError:
            logs = subprocess.run(
                ["docker", "logs", container], capture_output=True, text=True, check=True
            )
            assert time.monotonic() < deadline, logs.stdout + logs.stderr
            time.sleep(0.5)
        else:
            return

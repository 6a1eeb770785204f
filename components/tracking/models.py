"""The exported model as MLflow stores it."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Metric
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

from components.tracking.connection import TrackingError, patient, time_for_files
from components.tracking.runs import MODEL_URI, TrackedRun, last_step


@dataclass
class ModelExporter:
    """Stores a model with MLflow as a ``pt2`` program, and gives back what was stored."""

    run: TrackedRun
    model_uri: str = ""

    @patient
    def __call__(self, model: Any, example: Any, out: Path) -> Callable[[Any], Any]:
        """Export and log a module; return the program as loaded from the server.

        Args:
            model: module, uint8 images ``(batch, 3, h, w)`` to probabilities.
            example: uint8 images, more than one, so that the batch is dynamic.
            out: not used; the server stores the program.
        """
        import mlflow.pytorch
        import torch

        images = example.numpy()
        probabilities = model(example).detach().numpy()
        signature = ModelSignature(
            Schema([TensorSpec(images.dtype, (-1, *images.shape[1:]))]),
            Schema([TensorSpec(probabilities.dtype, (-1, probabilities.shape[1]))]),
        )
        mlflow.set_experiment(experiment_id=self.run.experiment_id)
        # It misses pip in environments made without it, and only names it without a version.
        logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)
        with time_for_files():
            info = Model.log(
                None,
                mlflow.pytorch,
                run_id=self.run.run_id,
                name="model",
                step=last_step(self.run) + 1,  # or MLflow ties the metrics of epoch 0 to the model
                pytorch_model=model,
                signature=signature,
                input_example=images,
                serialization_format="pt2",
                pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", "numpy"],
            )
            self.model_uri = f"models:/{info.model_id}"
            program: Callable[[Any], Any] = mlflow.pytorch.load_model(self.model_uri)
        return program

    @patient
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log final metrics, tied to the model and the test set."""
        model_id = self.model_uri.rpartition("/")[2]
        inputs = self.run.client.get_run(self.run.run_id).inputs
        assert inputs is not None  # the train step logged them
        test = [
            entry.dataset
            for entry in inputs.dataset_inputs
            if any(tag.value == "test" for tag in entry.tags)
        ]
        now = int(time.time() * 1000)
        entities = [
            Metric(
                key,
                value,
                now,
                step,
                model_id=model_id,
                dataset_name=test[0].name if test else None,
                dataset_digest=test[0].digest if test else None,
                run_id=self.run.run_id,
            )
            for key, value in metrics.items()
        ]
        self.run.client.log_batch(self.run.run_id, metrics=entities)


def model_of(run: TrackedRun) -> str:
    """The address of the model that an evaluation exported and found equal to the checkpoint.

    What a run lists as its models may hold others: of an export that was stopped half-way.

    Raises:
        TrackingError: there is none.
    """
    found = run.client.get_run(run.run_id)
    if uri := found.data.tags.get(MODEL_URI):
        return str(uri)
    models = found.outputs.model_outputs if found.outputs else []
    if len(models) != 1:  # before there was the tag
        raise TrackingError(f"run {run.run_id} has no model; evaluate first")
    return f"models:/{models[0].model_id}"

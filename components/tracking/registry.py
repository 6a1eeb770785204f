"""Registered models: their champion, and the versions that a gate let in."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from components.tracking.connection import TrackingError, reason
from components.tracking.runs import TrackedRun
from shike_core.config import RegisterConfig
from shike_core.gate import Decision

VERSION_TAGS = (
    "dataset",
    "imbalance_factor",
    "subset_digest",
    "test_digest",
    "training_digest",
    "weights_digest",
    "kfp_run_id",
    "mlflow.source.git.commit",
)
"""Tags that a registered version takes over from its run."""


MAX_TAG = 5000
"""Characters that every store takes in a version's tag."""


def champion_of(client: mlflow.MlflowClient, model_name: str) -> dict[str, Any] | None:
    """What the registry says of the present champion, or None if there is none.

    Raises:
        TrackingError: the server does not answer, which says nothing of a champion.
    """
    try:
        # A server with users calls what is not there forbidden; a search tells the two apart.
        if not client.search_registered_models(f"name = '{model_name}'"):
            return None
        version = client.get_model_version_by_alias(model_name, "champion")
    except MlflowException as error:
        # No such model and no such alias, in MLflow's words.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise TrackingError(
            f"the registry does not tell the champion of {model_name} ({reason(error)}); nothing "
            "was registered: run the step again when the server is back"
        ) from error
    return {
        "version": str(version.version),
        "test_digest": version.tags.get("test_digest", ""),
        "weights_digest": version.tags.get("weights_digest", ""),
        "metrics": json.loads(version.tags.get("metrics", "{}")),
    }


def store_decision(run: TrackedRun, config: RegisterConfig, decision: Decision) -> None:
    """Write down who may become champion and why: a JSON artifact and a tag."""
    # Parameters cannot change, but a model may be judged again, by hand or under another name.
    if "register.model_name" not in run.client.get_run(run.run_id).data.params:
        run.log_params("register", config)
    written = asdict(decision) | {"rule": asdict(config)}
    run.client.log_dict(run.run_id, written, "register/decision.json")
    run.tag(decision=decision.alias)


def load_decision(run: TrackedRun) -> dict[str, Any]:
    """The decision that `store_decision` wrote down."""
    text = mlflow.artifacts.load_text(f"runs:/{run.run_id}/register/decision.json")
    decision: dict[str, Any] = json.loads(text)
    return decision


def register(run: TrackedRun, model_uri: str, config: RegisterConfig, alias: str) -> str:
    """Register a model once and move an alias to it.

    Args:
        run: the run that made the model.
        model_uri: ``models:/m-...`` as stored by `ModelExporter`.
        config: the registered model's name.
        alias: ``champion`` or ``challenger``.

    Returns:
        The version's number; the one already there if these weights were registered before.
    """
    data = run.client.get_run(run.run_id).data
    weights = data.tags["weights_digest"]
    found = _versions_with(run.client, config.model_name, weights)
    if found:
        version = min(found, key=int)
    else:
        tags: dict[str, Any] = {key: data.tags[key] for key in VERSION_TAGS if key in data.tags}
        tags["metrics"] = json.dumps({k: data.metrics[k] for k in _test_keys(data.metrics)})
        tags["configuration"] = json.dumps(
            {key: value for key, value in data.params.items() if key.startswith("train.")}
        )[:MAX_TAG]
        version = str(mlflow.register_model(model_uri, config.model_name, tags=tags).version)
    run.client.set_registered_model_alias(config.model_name, alias, version)
    run.client.set_model_version_tag(config.model_name, version, "decision", alias)
    reasons = "\n".join(f"- {reason}" for reason in load_decision(run)["reasons"])
    run.client.update_model_version(config.model_name, version, f"{alias} because:\n\n{reasons}")
    run.tag(registered_model=config.model_name, registered_version=version)
    return version


def _versions_with(client: mlflow.MlflowClient, name: str, weights: str) -> list[str]:
    versions = client.search_model_versions(f"name = '{name}'")
    return [str(v.version) for v in versions if v.tags.get("weights_digest") == weights]


def _test_keys(metrics: Mapping[str, float]) -> list[str]:
    return sorted(key for key in metrics if key.startswith("test/") and "expert_" not in key)

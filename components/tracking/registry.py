"""Registered models: their champion, and the versions that a gate let in."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException

from components.tracking.connection import TrackingError, reason, without_password
from components.tracking.runs import TrackedRun, fetch_evaluation, user
from shike_core.card import model_card, shortened
from shike_core.config import RegisterConfig
from shike_core.gate import Decision

VERSION_TAGS = (
    "dataset",
    "imbalance_factor",
    "subset_digest",
    "test_digest",
    "training_digest",
    "weights_digest",
    "shot_groups",
    "variant",
    "seed",
    "kfp_run_id",
    "mlflow.source.git.commit",
)
"""Tags that a registered version takes over from its run."""
CHAMPION = "champion"
CHAMPIONS = "champions"
"""Tag of a registered model: the versions that were champion, the present one last, as JSON."""
ROLLED_BACK = "rolled_back"
"""Tag of a version from which somebody went back: when, and who."""
REMEMBERED = 200
"""Champions kept in that tag."""
MAX_DESCRIPTION = 5000
"""Characters that every store takes in a version's description."""


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
        versions = client.search_model_versions(f"name = '{model_name}'")
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
        "shot_groups": version.tags.get("shot_groups", ""),
        "rolled_back": {
            v.tags["weights_digest"]: str(v.version)
            for v in versions
            if ROLLED_BACK in v.tags and "weights_digest" in v.tags
        },
    }


def store_decision(run: TrackedRun, config: RegisterConfig, decision: Decision) -> None:
    """Write down who may become champion and why: a JSON artifact, tags, a line in the report."""
    from shike_core.report import with_decision  # brings matplotlib, which other steps do without

    # Parameters cannot change, but a model may be judged again, by hand or under another name.
    if "register.model_name" not in run.client.get_run(run.run_id).data.params:
        run.log_params("register", config)
    written = asdict(decision) | {"policy": asdict(config), "decided_at": _now()}
    run.client.log_dict(run.run_id, written, "register/decision.json")
    run.tag(decision=decision.alias, decision_rule=decision.decided_by)
    with tempfile.TemporaryDirectory() as directory:
        try:
            name = "evaluation/report.html"
            page = Path(run.client.download_artifacts(run.run_id, name, directory))
        except Exception as error:  # each store raises its own
            print(f"no report to write the decision into ({reason(error)})", flush=True)
            return
        page.write_text(with_decision(page.read_text(encoding="utf-8"), written), encoding="utf-8")
        run.client.log_artifact(run.run_id, str(page), "evaluation")


def load_decision(run: TrackedRun) -> dict[str, Any]:
    """The decision that `store_decision` wrote down."""
    text = mlflow.artifacts.load_text(f"runs:/{run.run_id}/register/decision.json")
    decision: dict[str, Any] = json.loads(text)
    return decision


def register(run: TrackedRun, model_uri: str, config: RegisterConfig, alias: str) -> str:
    """Register a model once and move an alias to it.

    Args:
        run: the run that made the model, in which the gate's decision is stored.
        model_uri: ``models:/m-...`` as stored by `ModelExporter`.
        config: the registered model's name.
        alias: ``champion`` or ``challenger``.

    Returns:
        The version's number; the one already there if these weights were registered before.

    Raises:
        TrackingError: another model became champion since the gate looked, and nothing was changed;
            or the registry refuses.
    """
    with _changing(config.model_name):
        return _register(run, model_uri, config, alias)


def _register(run: TrackedRun, model_uri: str, config: RegisterConfig, alias: str) -> str:
    client, name = run.client, config.model_name
    data, decision = client.get_run(run.run_id).data, load_decision(run)
    weights = data.tags["weights_digest"]
    if alias == CHAMPION:
        _refuse_other_champion(client, name, decision, weights)
    tags: dict[str, Any] = {key: data.tags[key] for key in VERSION_TAGS if key in data.tags}
    tags["metrics"] = json.dumps({k: data.metrics[k] for k in _test_keys(data.metrics)})
    is_new = not _versions_with(client, name, weights)
    if is_new:
        mlflow.register_model(model_uri, name, tags=tags)
    # Of two that registered the same weights at the same time both take the older version.
    version = min(_versions_with(client, name, weights), key=int)
    if not is_new:  # measured once more; the card will tell of that, and so must what is compared
        for key, value in tags.items():
            _set(client.set_model_version_tag, name, version, key, value)
    if alias == CHAMPION:
        _refuse_other_champion(client, name, decision, weights)
        _remember_champion(client, name, version)
    _set(client.set_registered_model_alias, name, alias, version)
    _set(client.set_model_version_tag, name, version, "decision", alias)
    client.update_model_version(name, version, _described(run, name, version, decision))
    if not client.get_registered_model(name).description:
        client.update_registered_model(
            name,
            "Models of the SHIKE pipeline. The alias champion is the one to use; each version's "
            "card says how good it is and why it was let in. `make rollback` goes back to the "
            "champion before.",
        )
    run.tag(registered_model=name, registered_version=version)
    return version


def champions(client: mlflow.MlflowClient, model_name: str) -> list[dict[str, Any]]:
    """The versions that were champion, the present one last, with what is known of each.

    Those that somebody has deleted are left out: there is no way back to them.

    Raises:
        TrackingError: there is no such model.
    """
    found = []
    try:
        for version in _champions(client, model_name):
            with _unless_missing():
                tags = client.get_model_version(model_name, version).tags
                found.append({"version": version, "tags": tags})
    except MlflowException as error:
        raise TrackingError(
            f"the registry does not tell the champions of {model_name} ({reason(error)}); check "
            "the model's name and MLFLOW_TRACKING_URI"
        ) from error
    return found


def rollback(client: mlflow.MlflowClient, model_name: str, version: str = "") -> tuple[str, str]:
    """Make an earlier champion the champion again.

    Args:
        client: of the server.
        model_name: of the registered model.
        version: which; by default the one before the present one.

    Returns:
        The version that was champion, and the one that is now.

    Raises:
        TrackingError: there is none to go back to, its files are gone, or another model became
            champion meanwhile, and nothing was changed; or the registry refuses.
    """
    known = [entry["version"] for entry in champions(client, model_name)]
    if not known:
        raise TrackingError(f"{model_name} has no champion, so there is nothing to go back from")
    present, earlier = known[-1], known[:-1]
    if not earlier:
        raise TrackingError(
            f"version {present} is the first champion of {model_name}; there is none before it"
        )
    target = version or earlier[-1]
    if target not in earlier:
        raise TrackingError(
            f"version {target} of {model_name} was not champion before version {present}; these "
            f"were: {', '.join(dict.fromkeys(earlier))}"
        )
    if gone := _why_files_are_gone(f"models:/{model_name}/{target}"):
        raise TrackingError(
            f"the files of {model_name} version {target} are gone ({gone}); the champion "
            f"is still version {present}. Name another with VERSION="
        )
    kept = earlier[: len(earlier) - earlier[::-1].index(target)]
    with _changing(model_name):
        _roll_back(client, model_name, present, target, kept)
    return present, target


def _roll_back(
    client: mlflow.MlflowClient, model_name: str, present: str, target: str, kept: list[str]
) -> None:
    if (now_there := _champions(client, model_name)[-1:]) != [present]:
        instead = f"version {now_there[0]}" if now_there else "none"
        raise TrackingError(
            f"the champion of {model_name} changed from version {present} to {instead} meanwhile; "
            "nothing was overwritten. Look with --show, and do it again"
        )
    client.set_registered_model_tag(model_name, CHAMPIONS, json.dumps(kept))
    client.set_registered_model_alias(model_name, CHAMPION, target)
    who, now = user() or "somebody", _now()
    line = f"Rolled back to version {target} by {who}, {now}."
    client.set_model_version_tag(model_name, present, "decision", "rolled back")
    client.set_model_version_tag(model_name, present, ROLLED_BACK, f"{now} by {who}")
    client.set_model_version_tag(model_name, target, "decision", CHAMPION)
    client.delete_model_version_tag(model_name, target, ROLLED_BACK)
    before = client.get_model_version(model_name, present).description or ""
    described = shortened(f"{line}\n\n{before}", MAX_DESCRIPTION, "artifact register/model_card.md")
    client.update_model_version(model_name, present, described)


@contextmanager
def _unless_missing() -> Iterator[None]:
    """Go on where the registry says that there is no such thing."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


@contextmanager
def _changing(model_name: str) -> Iterator[None]:
    """Say in words that the registry is away, or its rules for this user are in the way."""
    try:
        yield
    except MlflowException as error:
        raise TrackingError(
            f"the registry does not let {model_name} be changed ({reason(error)}); have its owner "
            "or the server's admin grant EDIT, or wait until it is back, and do the same again: "
            "what was trained and measured is in its run"
        ) from error


def address_to_serve(client: mlflow.MlflowClient, model: str) -> str:
    """The address of a registered model whose files are there.

    Args:
        client: of the server.
        model: its name, whose champion is meant, ``NAME@ALIAS`` or ``NAME/VERSION``.

    Raises:
        TrackingError: there is no such version, or its files are gone.
    """
    wanted = model if "@" in model or "/" in model else f"{model}@{CHAMPION}"
    address = f"models:/{wanted}"
    try:
        if "@" in wanted:
            client.get_model_version_by_alias(*wanted.rsplit("@", 1))
        else:
            client.get_model_version(*wanted.rsplit("/", 1))
    except MlflowException as error:
        raise TrackingError(
            f"{without_password(mlflow.get_tracking_uri())} has no model {wanted} "
            f"({reason(error)}); the page Models shows what there is, make run registers one"
        ) from error
    if gone := _why_files_are_gone(address):
        raise TrackingError(
            f"the files of {wanted} are gone ({gone}); serve another version, or go back to the "
            "champion before with make rollback"
        )
    return address


def _why_files_are_gone(address: str) -> str:
    """What a store says of a model whose files are not there; empty if they are."""
    try:
        mlflow.models.get_model_info(address)
    except Exception as error:  # each store raises its own
        return reason(error) or type(error).__name__
    return ""


def _champions(client: mlflow.MlflowClient, name: str) -> list[str]:
    """Versions that were champion, the present one last, whoever moved the alias."""
    model = client.get_registered_model(name)
    return _remembered(model) if CHAMPION in model.aliases else []


def _remembered(model: RegisteredModel) -> list[str]:
    """The same, and also where somebody has taken the alias away."""
    known = [str(version) for version in json.loads(model.tags.get(CHAMPIONS, "[]"))]
    present = [str(model.aliases[CHAMPION])] if CHAMPION in model.aliases else known[-1:]
    return known if known[-1:] == present else known + present


def _remember_champion(client: mlflow.MlflowClient, name: str, version: str) -> None:
    known = _remembered(client.get_registered_model(name))
    if known[-1:] != [version]:
        remembered = json.dumps([*known, version][-REMEMBERED:])
        _set(client.set_registered_model_tag, name, CHAMPIONS, remembered)


def _refuse_other_champion(
    client: mlflow.MlflowClient, name: str, decision: Mapping[str, Any], weights: str
) -> None:
    """The registry has no way to move an alias only if it is where it was; this comes close."""
    present = champion_of(client, name)
    compared = decision["champion"]
    if present is None or present["weights_digest"] == weights:
        return
    if compared is None or compared["version"] != present["version"]:
        before = f"version {compared['version']}" if compared else "none"
        raise TrackingError(
            f"the champion of {name} changed from {before} to version {present['version']} since "
            "this model was compared with it; nothing was overwritten. Compare and register again"
        )


def _described(run: TrackedRun, name: str, version: str, decision: Mapping[str, Any]) -> str:
    """The model card, which is stored as well, or what is left of it without a report."""
    commit = run.client.get_run(run.run_id).data.tags.get("mlflow.source.git.commit", "")
    with tempfile.TemporaryDirectory() as directory:
        try:
            found = fetch_evaluation(run, Path(directory))
            report = json.loads((found / "report.json").read_text())
            card = model_card(report, name, version, run.run_id, decision, commit)
        except (TrackingError, ValueError, KeyError):
            reasons = "\n".join(f"- {why}" for why in decision["reasons"])
            return f"{decision['alias']} because:\n\n{reasons}"
    run.store_text(card, "register/model_card.md")
    return shortened(card, MAX_DESCRIPTION, f"artifact register/model_card.md of run {run.run_id}")


def _set(call: Callable[..., object], *arguments: str) -> None:
    """Set what another may set for the first time at the same time: then the store refuses one."""
    try:
        call(*arguments)
    except MlflowException:
        call(*arguments)  # it is there now, and can be changed


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions_with(client: mlflow.MlflowClient, name: str, weights: str) -> list[str]:
    versions = client.search_model_versions(f"name = '{name}'")
    return [str(v.version) for v in versions if v.tags.get("weights_digest") == weights]


def _test_keys(metrics: Mapping[str, float]) -> list[str]:
    return sorted(key for key in metrics if key.startswith("test/") and "expert_" not in key)

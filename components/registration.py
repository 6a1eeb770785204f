"""From a finished evaluation in MLflow to a registered version, without the evaluation's files."""

import tempfile
from pathlib import Path

from components import tracking
from shike_core import stages
from shike_core.config import RegisterConfig
from shike_core.gate import Decision
from shike_core.sweep import NOTHING


def register(config: RegisterConfig, run_id: str) -> tuple[str, Decision]:
    """Let the model of a run pass the gate, and register it under the alias that results.

    Args:
        config: name of the model, and what may get worse.
        run_id: the MLflow run that the evaluation was logged in.

    Returns:
        The version, and why it got its alias.

    Raises:
        TrackingError: the server does not answer, or the run has no evaluation.
    """
    run = tracking.attach(run_id)
    model_uri = tracking.model_of(run)
    champion = tracking.champion_of(run.client, config.model_name)
    with tempfile.TemporaryDirectory() as directory:
        evaluation = tracking.fetch_evaluation(run, Path(directory))
        decision = stages.compare_with_champion(config, evaluation, champion)
    tracking.store_decision(run, config, decision)
    return tracking.register(run, model_uri, config, decision.alias), decision


def register_best(config: RegisterConfig, sweep_id: str, chosen: str) -> str:
    """Register what a sweep chose, if anything, and finish the sweep's run.

    Args:
        config: as for `register`.
        sweep_id: MLflow run of the sweep.
        chosen: MLflow run of the training chosen, or `NOTHING`.

    Returns:
        The version, or `NOTHING`.
    """
    sweep, version = tracking.attach(sweep_id), NOTHING
    if chosen != NOTHING:
        version, decision = register(config, chosen)
        sweep.tag(
            registered_model=config.model_name,
            registered_version=version,
            decision=decision.alias,
        )
        print(f"{config.model_name} version {version}, alias {decision.alias}", flush=True)
        print("\n".join(decision.reasons), flush=True)
    else:
        print("nothing was chosen, so nothing is registered", flush=True)
    sweep.finish()
    return version

"""The run of a sweep, and the trainings below it."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric

from components.tracking.connection import connect, page, patience_s
from components.tracking.runs import (
    KFP_RUN_ID,
    TrackedRun,
    all_runs,
    attach,
    runs_of,
    where_to_look,
)
from shike_core.sweep import as_text, means


def trainings() -> list[dict[str, Any]]:
    """What the server knows of every training of this pipeline run, the oldest first.

    Raises:
        TrackingError: the server does not answer in time.
    """
    client = connect(patience_s())
    return [
        {
            "run_id": run.info.run_id,
            "page": page(run.info.experiment_id, run.info.run_id),
            "status": run.info.status,
            "params": run.data.params,
            "metrics": run.data.metrics,
        }
        for run in runs_of(client, os.environ.get(KFP_RUN_ID, ""), "run")
    ]


def log_sweep(run: TrackedRun, report: Mapping[str, Any], out: Path) -> None:
    """Store what was asked for, the means, and the files that tell of them.

    Args:
        run: of the sweep.
        report: made by `shike_core.sweep.summarise`.
        out: directory with what `shike_core.sweep.write_summary` wrote.
    """
    recipes, seeds, factors = (report[key] for key in ("recipes", "seeds", "imbalance_factors"))
    shown = " ".join(f"IF{factor:g}" for factor in factors)
    name = f"sweep {shown} {len(recipes)} recipes {len(seeds)} seeds"
    run.client.update_run(run.run_id, name=name)
    run.log_params("sweep", {"recipes": ", ".join(recipes), "seeds": seeds, "factors": factors})
    now = int(time.time() * 1000)
    run.log_metrics(Metric(key, value, now, 0) for key, value in means(report).items())
    run.log_directory(out, "sweep", "*")
    run.tag(chosen_recipe=report["choice"]["recipe"], chosen_run=report["choice"]["run_id"])


def sweep_summary(run_id: str, home: Path) -> str:
    """What came out of a sweep: means, the registered model, where to look.

    Args:
        run_id: of the sweep's finished run.
        home: directory of local runs, which receives the page.
    """
    run = attach(run_id)
    tags = run.client.get_run(run_id).data.tags
    folder = home / "runs" / tags["kfp_run_id"]
    files = Path(run.client.download_artifacts(run_id, "sweep", str(folder)))
    lines = [as_text(json.loads((files / "sweep.json").read_text())), ""]
    if "registered_model" in tags:
        name, version = tags["registered_model"], tags["registered_version"]
        lines.append(f"model     {name} version {version}, alias {tags['decision']}")
    lines += [f"page      {files / 'sweep.html'}", f"MLflow    {where_to_look(run)}"]
    lines.append(f"all runs  {all_runs(run)}")
    return "\n".join(lines)

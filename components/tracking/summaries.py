"""What came out of a run, for a terminal."""

from pathlib import Path

from components.tracking.registry import load_decision
from components.tracking.runs import all_runs, attach, where_to_look


def summary(run_id: str, home: Path) -> str:
    """What came out of a run: accuracies, the registered model, where to look.

    Args:
        run_id: of a finished run.
        home: directory of local runs, which receives the HTML report.
    """
    run = attach(run_id)
    data = run.client.get_run(run_id).data
    groups = ["", "many_shot/", "medium_shot/", "few_shot/"]
    titles = ["overall", "many", "medium", "few"]
    shown = [
        (group, title)
        for group, title in zip(groups, titles, strict=True)
        if f"test/{group}accuracy" in data.metrics
    ]
    experts = int(data.params["train.num_experts"])
    rows = [("ensemble", "test/")] + [(f"expert {i}", f"test/expert_{i}/") for i in range(experts)]
    lines = ["", f"{'accuracy, %':<14}" + "".join(f"{title:>9}" for _, title in shown)]
    for name, prefix in rows:
        cells = [100 * data.metrics[f"{prefix}{group}accuracy"] for group, _ in shown]
        lines.append(f"{name:<14}" + "".join(f"{cell:>9.1f}" for cell in cells))
    name, version = data.tags["registered_model"], data.tags["registered_version"]
    decision = load_decision(run)
    # With the decision, which the step that evaluated could not know.
    report = run.client.download_artifacts(
        run_id, "evaluation/report.html", str(home / "runs" / data.tags["kfp_run_id"])
    )
    lines += [
        "",
        f"model     {name} version {version}, alias {decision['alias']}",
        *(f"          {reason}" for reason in decision["reasons"]),
        f"report    {report}",
        f"MLflow    {where_to_look(run)}",
        f"all runs  {all_runs(run)}",
    ]
    return "\n".join(lines)

"""The steps that every pipeline begins and ends with."""

from collections.abc import Mapping

from kfp.dsl import PipelineTask

from components.checks import gib
from components.close_runs import close_runs
from components.preflight import preflight
from pipelines.cluster import Placement

FREE_DISK_GIB = 2.0
"""Room that a step needs on a cluster's node for what it writes."""
FREE_DISK_HERE_GIB = 0.5
SHARED_MEMORY_SHOWN = "2Gi"
"""As much as a light pod on a small node can show of what the steps with a model will have."""


def closing_step(on: Placement) -> PipelineTask:
    """The task of an exit handler: whatever happens, no MLflow run stays open."""
    task = close_runs().set_display_name("close runs")
    task.set_caching_options(False)
    on.light(task)
    return task


def preflight_step(
    on: Placement,
    *,
    dataset: object,
    data_dir: object,
    checkpoint_dir: object,
    device: object,
    code: str,
    kind: str,
    evaluate: Mapping[str, object],
    register: Mapping[str, object],
) -> PipelineTask:
    """Find out in seconds what would stop the run later; open the MLflow run.

    Args:
        on: where it runs.
        dataset: a name or the pipeline's parameter, like the next three.
        data_dir: where the source's files are.
        checkpoint_dir: where checkpoints are kept.
        device: what the model will run on.
        code: commit that the images have to hold; empty means any.
        kind: of the MLflow run, see `components.tracking.open_run`.
        evaluate: settings of the evaluate step, fields of `EvaluateConfig` but for ``flip``.
        register: settings of the gate, fields of `RegisterConfig`.
    """
    shared_memory = on.cluster.shared_memory if on.cluster else ""
    task = preflight(
        dataset=dataset,
        data_dir=data_dir,
        checkpoint_dir=checkpoint_dir,
        device=device,
        shared_memory=shared_memory and min(shared_memory, SHARED_MEMORY_SHOWN, key=gib),
        free_disk_gib=FREE_DISK_GIB if on.cluster else FREE_DISK_HERE_GIB,
        code=code,
        kind=kind,
        eval_batch_size=evaluate["eval_batch_size"],
        calibration_bins=evaluate["calibration_bins"],
        eval_device=evaluate["device"],
        eval_workers=evaluate["workers"],
        **register,
    ).set_display_name("preflight")
    task.set_caching_options(False)  # the place may have changed
    on.light(task, retries=0, minutes=10)
    on.shared_memory(task)
    on.with_data(task)
    on.with_checkpoints(task)
    return task

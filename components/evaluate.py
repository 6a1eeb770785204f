"""Step 3: measure the model on the balanced test set and export it."""

from typing import NamedTuple

from kfp import dsl

from components import images


@dsl.component(base_image=images.EVALUATE, install_kfp_package=False)
def evaluate(
    subset: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Input[dsl.Model],
    eval_batch_size: int,
    calibration_bins: int,
    flip: bool,
    device: str,
    workers: int,
    checkpoint_dir: str,
    evaluation: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    confusion: dsl.Output[dsl.ClassificationMetrics],
) -> NamedTuple("Evaluated", [("run_id", str), ("model_uri", str)]):  # type: ignore[valid-type]
    """Measure a checkpoint and export it; returns the MLflow run and the model's address in it.

    What the training kept in `checkpoint_dir` is discarded then: that it has come here shows that
    the platform has stored it.
    """
    import json
    import shutil
    from pathlib import Path

    from components import boundary, tracking
    from shike_core import stages
    from shike_core.config import EvaluateConfig

    with boundary.readable_errors():
        config = EvaluateConfig(
            eval_batch_size=eval_batch_size,
            calibration_bins=calibration_bins,
            flip=flip,
            device=device,
            workers=workers,
        )
        data, out = Path(subset.path), Path(evaluation.path)
        run = tracking.open_evaluation(data, Path(checkpoint.path))
        exporter = tracking.ModelExporter(run)
        found = stages.evaluate(
            config, data, Path(checkpoint.path), out, exporter.log, export=exporter
        )
        tracking.log_evaluation(run, config, found, out, exporter.model_uri)
        shutil.copyfile(out / "report.html", report.path)
        boundary.show_in_kfp(found, metrics, confusion)
        trained = json.loads((Path(checkpoint.path) / "train.json").read_text())
        stages.discard_checkpoint(
            trained["training_digest"], boundary.optional_path(checkpoint_dir)
        )
    return run.run_id, exporter.model_uri

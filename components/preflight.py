"""Step 0: find out in seconds what would stop the run later."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.DATA, install_kfp_package=False)
def preflight(
    dataset: str,
    data_dir: str,
    checkpoint_dir: str,
    device: str,
    shared_memory: str,
    free_disk_gib: float,
    code: str,
    kind: str,
    eval_batch_size: int,
    calibration_bins: int,
    eval_device: str,
    eval_workers: int,
    model_name: str,
    metric: str,
    max_accuracy_drop: float,
    max_few_shot_drop: float,
    max_medium_shot_drop: float,
    max_many_shot_drop: float,
    min_accuracy: float,
    min_few_shot_accuracy: float,
) -> None:
    """Check server, data, disk, memory, GPU, code and later settings; open the MLflow run."""
    from components import boundary, checks

    with boundary.readable_errors():
        needs = checks.Needs(
            dataset=dataset,
            data_dir=data_dir,
            checkpoint_dir=checkpoint_dir,
            device=device,
            shared_memory=shared_memory,
            free_disk_gib=free_disk_gib,
            code=code,
            evaluate={
                "eval_batch_size": eval_batch_size,
                "calibration_bins": calibration_bins,
                "device": eval_device,
                "workers": eval_workers,
            },
            register={
                "model_name": model_name,
                "metric": metric,
                "max_accuracy_drop": max_accuracy_drop,
                "max_few_shot_drop": max_few_shot_drop,
                "max_medium_shot_drop": max_medium_shot_drop,
                "max_many_shot_drop": max_many_shot_drop,
                "min_accuracy": min_accuracy,
                "min_few_shot_accuracy": min_few_shot_accuracy,
            },
        )
        boundary.print_lines(checks.check(needs, kind))

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
) -> None:
    """Check server, data, disk, memory, GPU and code; open the MLflow run."""
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
        )
        boundary.print_lines(checks.check(needs, kind))

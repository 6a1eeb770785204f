"""The last step, whatever happened before: no MLflow run stays open."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.DATA, install_kfp_package=False)
def close_runs(status: dsl.PipelineTaskFinalStatus) -> None:
    """Close the MLflow runs that the pipeline run left open, as failed or as killed."""
    from components import boundary, tracking

    with boundary.readable_errors():
        boundary.print_lines(tracking.close_runs(status.state))

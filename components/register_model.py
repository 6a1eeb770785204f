"""Step 4, after the gate: register the exported model under its alias."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.REGISTER, install_kfp_package=False)
def register_model(run_id: str, model_uri: str, model_name: str, alias: str) -> str:
    """Register a model once and move the alias to it; returns the version."""
    from components import boundary, tracking
    from shike_core.config import RegisterConfig

    with boundary.readable_errors():
        run = tracking.attach(run_id)
        version = tracking.register(run, model_uri, RegisterConfig(model_name=model_name), alias)
        run.finish()
    return version

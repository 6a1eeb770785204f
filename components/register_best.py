"""Sweep, last: the chosen model passes the gate like any other, and the sweep ends."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.REGISTER, install_kfp_package=False)
def register_best(
    sweep_id: str,
    chosen: str,
    model_name: str,
    max_accuracy_drop: float,
    max_few_shot_drop: float,
) -> str:
    """Register the chosen model, if one was chosen; returns the version or none."""
    from components import boundary, registration
    from shike_core.config import RegisterConfig

    with boundary.readable_errors():
        config = RegisterConfig(
            model_name=model_name,
            max_accuracy_drop=max_accuracy_drop,
            max_few_shot_drop=max_few_shot_drop,
        )
        return registration.register_best(config, sweep_id, chosen)

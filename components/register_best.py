"""Sweep, last: the chosen model passes the gate like any other, and the sweep ends."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.REGISTER, install_kfp_package=False)
def register_best(
    sweep_id: str,
    chosen: str,
    model_name: str,
    metric: str,
    max_accuracy_drop: float,
    max_few_shot_drop: float,
    max_medium_shot_drop: float,
    max_many_shot_drop: float,
    min_accuracy: float,
    min_few_shot_accuracy: float,
) -> str:
    """Register the chosen model, if one was chosen; returns the version or none."""
    from components import boundary, registration
    from shike_core.config import RegisterConfig

    with boundary.readable_errors():
        config = RegisterConfig(
            model_name=model_name,
            metric=metric,
            max_accuracy_drop=max_accuracy_drop,
            max_few_shot_drop=max_few_shot_drop,
            max_medium_shot_drop=max_medium_shot_drop,
            max_many_shot_drop=max_many_shot_drop,
            min_accuracy=min_accuracy,
            min_few_shot_accuracy=min_few_shot_accuracy,
        )
        return registration.register_best(config, sweep_id, chosen)

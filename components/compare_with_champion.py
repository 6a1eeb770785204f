"""Step 4, the gate: may the new model replace the champion?"""

from kfp import dsl

from components import images


@dsl.component(base_image=images.REGISTER, install_kfp_package=False)
def compare_with_champion(
    evaluation: dsl.Input[dsl.Artifact],
    run_id: str,
    model_name: str,
    metric: str,
    max_accuracy_drop: float,
    max_few_shot_drop: float,
    max_medium_shot_drop: float,
    max_many_shot_drop: float,
    min_accuracy: float,
    min_few_shot_accuracy: float,
) -> str:
    """Decide which alias the new model gets: champion or challenger."""
    from pathlib import Path

    from components import boundary, tracking
    from shike_core import stages
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
        run = tracking.attach(run_id)
        champion = tracking.champion_of(run.client, config.model_name)
        decision = stages.compare_with_champion(config, Path(evaluation.path), champion)
        tracking.store_decision(run, config, decision)
    return decision.alias

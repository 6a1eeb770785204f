"""The training pipeline: preflight, build the subset, train, evaluate, register."""

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.build_subset import build_subset
from components.compare_with_champion import compare_with_champion
from components.evaluate import evaluate
from components.register_model import register_model
from components.train import train
from pipelines.cluster import Cluster, Placement
from pipelines.steps import closing_step, preflight_step
from shike_core.config import Recipe


def training_pipeline(
    recipe: Recipe, cluster: Cluster | None = None, code: str = ""
) -> BaseComponent:
    """The pipeline with a recipe's values as defaults of its parameters.

    Parameters are named after the step and the configuration's field, so that a form which sorts
    them keeps a step's parameters together and the steps in their order.

    Args:
        recipe: the values.
        cluster: what the steps ask of Kubernetes; None for a run on this machine.
        code: commit that the images have to hold; empty means any.
    """
    subset_config, train_config = recipe.subset, recipe.train
    evaluate_config, register_config = recipe.evaluate, recipe.register
    place = cluster or Cluster()
    nodes = place.nodes()

    @dsl.pipeline(
        name=f"shike-{recipe.name.replace('/', '-')}",
        description="Long-tailed classification by SHIKE.",
        pipeline_config=place.config(),
    )
    def shike(
        cluster_gpu_type: str = place.gpu_type,
        cluster_gpu_count: int = place.gpu_count,
        cluster_cpu: str = place.cpu,
        cluster_memory: str = place.memory,
        cluster_node_selector: dict = place.node_selector,  # type: ignore[type-arg]
        cluster_tolerations: list = place.tolerations,  # type: ignore[type-arg]
        cluster_mlflow_secret: str = place.mlflow_secret,
        step1_dataset: str = subset_config.dataset,
        step1_data_dir: str = place.data_dir,
        step1_shards_dir: str = place.shards_dir(subset_config),
        step1_imbalance_factor: float = subset_config.imbalance_factor,
        step1_profile: str = subset_config.profile,
        step1_selection: str = subset_config.selection,
        step1_class_order: str = subset_config.class_order,
        step1_subset_seed: int = subset_config.subset_seed,
        step1_validation_per_class: int = subset_config.validation_per_class,
        step1_leakage: str = subset_config.leakage,
        step1_num_classes: int = subset_config.num_classes,
        step1_image_size: int = subset_config.image_size,
        step1_test_per_class: int = subset_config.test_per_class,
        step1_short_side: int = subset_config.short_side,
        step1_storage: str = subset_config.storage,
        step1_shard_mib: int = subset_config.shard_mib,
        step1_max_unreadable: float = subset_config.max_unreadable,
        step2_network: str = train_config.network,
        step2_pretrained: bool = train_config.pretrained,
        step2_num_experts: int = train_config.num_experts,
        step2_width: int = train_config.width,
        step2_scale: float = train_config.scale,
        step2_alignment_relu: str = train_config.alignment_relu,
        step2_fusion: bool = train_config.fusion,
        step2_classifier: str = train_config.classifier,
        step2_batch_size: int = train_config.batch_size,
        step2_micro_batch_size: int = train_config.micro_batch_size,
        step2_batch_norm: str = train_config.batch_norm,
        step2_stage1_epochs: int = train_config.stage1_epochs,
        step2_stage1_learning_rate: float = train_config.stage1_learning_rate,
        step2_stage1_warmup_start: float = train_config.stage1_warmup_start,
        step2_stage2_epochs: int = train_config.stage2_epochs,
        step2_stage2_learning_rate: float = train_config.stage2_learning_rate,
        step2_stage2_warmup_start: float = train_config.stage2_warmup_start,
        step2_warmup_epochs: int = train_config.warmup_epochs,
        step2_schedule: str = train_config.schedule,
        step2_trunk_learning_rate: float = train_config.trunk_learning_rate,
        step2_momentum: float = train_config.momentum,
        step2_weight_decay: float = train_config.weight_decay,
        step2_stage1_objective: str = train_config.stage1_objective,
        step2_stage2_label_smoothing: float = train_config.stage2_label_smoothing,
        step2_stage2_logit_adjustment: float = train_config.stage2_logit_adjustment,
        step2_stage2_scale: float = train_config.stage2_scale,
        step2_averaging_epochs: float = train_config.averaging_epochs,
        step2_dkt_weight: float = train_config.dkt_weight,
        step2_mutual_weight: float = train_config.mutual_weight,
        step2_temperature: float = train_config.temperature,
        step2_mutual_teachers: str = train_config.mutual_teachers,
        step2_consistency_weight: float = train_config.consistency_weight,
        step2_mixup_alpha: float = train_config.mixup_alpha,
        step2_kl_reduction: str = train_config.kl_reduction,
        step2_detach_teachers: bool = train_config.detach_teachers,
        step2_teacher_target: str = train_config.teacher_target,
        step2_stage2_batch_norm: str = train_config.stage2_batch_norm,
        step2_crop: str = train_config.crop,
        step2_crop_size: int = train_config.crop_size,
        step2_crop_padding: int = train_config.crop_padding,
        step2_flip: bool = train_config.flip,
        step2_auto_augment: bool = train_config.auto_augment,
        step2_cutout_size: int = train_config.cutout_size,
        step2_rand_augment: int = train_config.rand_augment,
        step2_rand_augment_magnitude: int = train_config.rand_augment_magnitude,
        step2_color_jitter: float = train_config.color_jitter,
        step2_seed: int = train_config.seed,
        step2_precision: str = train_config.precision,
        step2_device: str = train_config.device,
        step2_acceleration: str = train_config.acceleration,
        step2_processes: int = train_config.processes,
        step2_workers: int = train_config.workers,
        step2_checkpoint_every: int = train_config.checkpoint_every,
        step2_checkpoint_dir: str = place.checkpoint_dir,
        step2_stage1_from: str = "",
        step2_num_nodes: int = place.num_nodes,
        step2_nodes: dict = nodes,  # type: ignore[type-arg]
        step3_eval_batch_size: int = evaluate_config.eval_batch_size,
        step3_calibration_bins: int = evaluate_config.calibration_bins,
        step3_flip: bool = evaluate_config.flip,
        step3_device: str = evaluate_config.device,
        step3_workers: int = evaluate_config.workers,
        step4_model_name: str = register_config.model_name,
        step4_metric: str = register_config.metric,
        step4_max_accuracy_drop: float = register_config.max_accuracy_drop,
        step4_max_few_shot_drop: float = register_config.max_few_shot_drop,
        step4_max_medium_shot_drop: float = register_config.max_medium_shot_drop,
        step4_max_many_shot_drop: float = register_config.max_many_shot_drop,
        step4_min_accuracy: float = register_config.min_accuracy,
        step4_min_few_shot_accuracy: float = register_config.min_few_shot_accuracy,
    ) -> None:
        on = Placement(
            cluster,
            {
                "gpu_type": cluster_gpu_type,
                "gpu_count": cluster_gpu_count,
                "cpu": cluster_cpu,
                "memory": cluster_memory,
                "node_selector": cluster_node_selector,
                "tolerations": cluster_tolerations,
                "mlflow_secret": cluster_mlflow_secret,
            },
        )

        of_evaluate = {
            "eval_batch_size": step3_eval_batch_size,
            "calibration_bins": step3_calibration_bins,
            "device": step3_device,
            "workers": step3_workers,
        }
        of_gate = {
            "model_name": step4_model_name,
            "metric": step4_metric,
            "max_accuracy_drop": step4_max_accuracy_drop,
            "max_few_shot_drop": step4_max_few_shot_drop,
            "max_medium_shot_drop": step4_max_medium_shot_drop,
            "max_many_shot_drop": step4_max_many_shot_drop,
            "min_accuracy": step4_min_accuracy,
            "min_few_shot_accuracy": step4_min_few_shot_accuracy,
        }

        with dsl.ExitHandler(closing_step(on), name="pipeline"):
            # 0. Find out in seconds what would stop the run later; open the MLflow run.
            checked = preflight_step(
                on,
                dataset=step1_dataset,
                data_dir=step1_data_dir,
                checkpoint_dir=step2_checkpoint_dir,
                device=step2_device,
                code=code,
                kind="run",
                evaluate=of_evaluate,
                register=of_gate,
            )

            # 1. Build the long-tailed subset.
            subset = build_subset(
                dataset=step1_dataset,
                data_dir=step1_data_dir,
                shards_dir=step1_shards_dir,
                imbalance_factor=step1_imbalance_factor,
                profile=step1_profile,
                selection=step1_selection,
                class_order=step1_class_order,
                subset_seed=step1_subset_seed,
                validation_per_class=step1_validation_per_class,
                leakage=step1_leakage,
                num_classes=step1_num_classes,
                image_size=step1_image_size,
                test_per_class=step1_test_per_class,
                short_side=step1_short_side,
                storage=step1_storage,
                shard_mib=step1_shard_mib,
                max_unreadable=step1_max_unreadable,
            ).set_display_name("build subset")
            subset.after(checked)
            on.all_images(subset, subset_config)
            on.with_data(subset)
            on.with_checkpoints(subset)

            # 2. Train both stages.
            training = train(
                subset=subset.outputs["subset"],
                network=step2_network,
                pretrained=step2_pretrained,
                num_experts=step2_num_experts,
                width=step2_width,
                scale=step2_scale,
                alignment_relu=step2_alignment_relu,
                fusion=step2_fusion,
                classifier=step2_classifier,
                batch_size=step2_batch_size,
                micro_batch_size=step2_micro_batch_size,
                batch_norm=step2_batch_norm,
                stage1_epochs=step2_stage1_epochs,
                stage1_learning_rate=step2_stage1_learning_rate,
                stage1_warmup_start=step2_stage1_warmup_start,
                stage2_epochs=step2_stage2_epochs,
                stage2_learning_rate=step2_stage2_learning_rate,
                stage2_warmup_start=step2_stage2_warmup_start,
                warmup_epochs=step2_warmup_epochs,
                schedule=step2_schedule,
                trunk_learning_rate=step2_trunk_learning_rate,
                momentum=step2_momentum,
                weight_decay=step2_weight_decay,
                stage1_objective=step2_stage1_objective,
                stage2_label_smoothing=step2_stage2_label_smoothing,
                stage2_logit_adjustment=step2_stage2_logit_adjustment,
                stage2_scale=step2_stage2_scale,
                averaging_epochs=step2_averaging_epochs,
                dkt_weight=step2_dkt_weight,
                mutual_weight=step2_mutual_weight,
                temperature=step2_temperature,
                mutual_teachers=step2_mutual_teachers,
                consistency_weight=step2_consistency_weight,
                mixup_alpha=step2_mixup_alpha,
                kl_reduction=step2_kl_reduction,
                detach_teachers=step2_detach_teachers,
                teacher_target=step2_teacher_target,
                stage2_batch_norm=step2_stage2_batch_norm,
                crop=step2_crop,
                crop_size=step2_crop_size,
                crop_padding=step2_crop_padding,
                flip=step2_flip,
                auto_augment=step2_auto_augment,
                cutout_size=step2_cutout_size,
                rand_augment=step2_rand_augment,
                rand_augment_magnitude=step2_rand_augment_magnitude,
                color_jitter=step2_color_jitter,
                seed=step2_seed,
                precision=step2_precision,
                device=step2_device,
                acceleration=step2_acceleration,
                processes=step2_processes,
                workers=step2_workers,
                checkpoint_every=step2_checkpoint_every,
                checkpoint_dir=step2_checkpoint_dir,
                stage1_from=step2_stage1_from,
                num_nodes=step2_num_nodes,
                nodes=step2_nodes,
            ).set_display_name("train")
            on.training(training)
            on.with_data(training)  # images that were left where they are
            on.with_checkpoints(training)

            # 3. Measure on the balanced test set, and export.
            evaluation = evaluate(
                subset=subset.outputs["subset"],
                checkpoint=training.outputs["checkpoint"],
                flip=step3_flip,
                **of_evaluate,
                checkpoint_dir=on.discarded(step2_checkpoint_dir),
            ).set_display_name("evaluate")
            evaluation.set_caching_options(False)  # it logs into this run
            on.heavy(evaluation, minutes=60)
            on.with_data(evaluation)
            on.with_checkpoints(evaluation)

            # 4. Compare with the champion, and register under the alias that results.
            gate = compare_with_champion(
                evaluation=evaluation.outputs["evaluation"],
                run_id=evaluation.outputs["run_id"],
                **of_gate,
            ).set_display_name("compare with champion")
            gate.set_caching_options(False)  # the champion may have changed
            on.light(gate)
            with dsl.If(gate.output == "champion", name="passes the gate"):
                champion = register_model(
                    run_id=evaluation.outputs["run_id"],
                    model_uri=evaluation.outputs["model_uri"],
                    model_name=step4_model_name,
                    alias="champion",
                ).set_display_name("register champion")
                champion.set_caching_options(False)
                on.light(champion)
            with dsl.Else(name="does not"):
                challenger = register_model(
                    run_id=evaluation.outputs["run_id"],
                    model_uri=evaluation.outputs["model_uri"],
                    model_name=step4_model_name,
                    alias="challenger",
                ).set_display_name("register challenger")
                challenger.set_caching_options(False)
                on.light(challenger)

    return shike

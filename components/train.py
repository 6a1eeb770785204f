"""Step 2: train both stages of SHIKE."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def train(
    subset: dsl.Input[dsl.Dataset],
    network: str,
    pretrained: bool,
    num_experts: int,
    width: int,
    scale: float,
    alignment_relu: str,
    fusion: bool,
    classifier: str,
    batch_size: int,
    micro_batch_size: int,
    batch_norm: str,
    stage1_epochs: int,
    stage1_learning_rate: float,
    stage1_warmup_start: float,
    stage2_epochs: int,
    stage2_learning_rate: float,
    stage2_warmup_start: float,
    warmup_epochs: int,
    schedule: str,
    trunk_learning_rate: float,
    momentum: float,
    weight_decay: float,
    stage1_objective: str,
    stage2_label_smoothing: float,
    stage2_logit_adjustment: float,
    stage2_scale: float,
    averaging_epochs: float,
    dkt_weight: float,
    mutual_weight: float,
    temperature: float,
    mutual_teachers: str,
    consistency_weight: float,
    mixup_alpha: float,
    kl_reduction: str,
    detach_teachers: bool,
    teacher_target: str,
    stage2_batch_norm: str,
    crop: str,
    crop_size: int,
    crop_padding: int,
    flip: bool,
    auto_augment: bool,
    cutout_size: int,
    rand_augment: int,
    rand_augment_magnitude: int,
    color_jitter: float,
    seed: int,
    precision: str,
    device: str,
    acceleration: str,
    processes: int,
    workers: int,
    checkpoint_every: int,
    checkpoint_dir: str,
    stage1_from: str,
    num_nodes: int,
    nodes: dict,  # type: ignore[type-arg]
    checkpoint: dsl.Output[dsl.Model],
) -> None:
    """Train SHIKE."""
    from pathlib import Path

    from components import boundary, tracking, train_job
    from shike_core.config import TrainConfig

    with boundary.readable_errors():
        config = TrainConfig(
            network=network,
            pretrained=pretrained,
            num_experts=num_experts,
            width=width,
            scale=scale,
            alignment_relu=alignment_relu,
            fusion=fusion,
            classifier=classifier,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            batch_norm=batch_norm,
            stage1_epochs=stage1_epochs,
            stage1_learning_rate=stage1_learning_rate,
            stage1_warmup_start=stage1_warmup_start,
            stage2_epochs=stage2_epochs,
            stage2_learning_rate=stage2_learning_rate,
            stage2_warmup_start=stage2_warmup_start,
            warmup_epochs=warmup_epochs,
            schedule=schedule,
            trunk_learning_rate=trunk_learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
            stage1_objective=stage1_objective,
            stage2_label_smoothing=stage2_label_smoothing,
            stage2_logit_adjustment=stage2_logit_adjustment,
            stage2_scale=stage2_scale,
            averaging_epochs=averaging_epochs,
            dkt_weight=dkt_weight,
            mutual_weight=mutual_weight,
            temperature=temperature,
            mutual_teachers=mutual_teachers,
            consistency_weight=consistency_weight,
            mixup_alpha=mixup_alpha,
            kl_reduction=kl_reduction,
            detach_teachers=detach_teachers,
            teacher_target=teacher_target,
            stage2_batch_norm=stage2_batch_norm,
            crop=crop,
            crop_size=crop_size,
            crop_padding=crop_padding,
            flip=flip,
            auto_augment=auto_augment,
            cutout_size=cutout_size,
            rand_augment=rand_augment,
            rand_augment_magnitude=rand_augment_magnitude,
            color_jitter=color_jitter,
            seed=seed,
            precision=precision,
            device=device,
            acceleration=acceleration,
            processes=processes,
            workers=workers,
            checkpoint_every=checkpoint_every,
        )
        data, out = Path(subset.path), Path(checkpoint.path)
        resumable = boundary.optional_path(checkpoint_dir)
        boundary.keep_weights(resumable)
        run = tracking.open_training(data, config)
        with tracking.live_log(run, boundary.console(config.epochs), out) as log:
            tracking.take_stage1(run, stage1_from, config, data, out, resumable)
            report = train_job.train(config, data, out, log, resumable, num_nodes, nodes)
        tracking.log_training(run, report, out)
        tracking.hand_on(run, out)
        checkpoint.metadata["training_digest"] = report["training_digest"]

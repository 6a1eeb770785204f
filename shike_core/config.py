"""What a run is made of: frozen dataclasses, checked where they are built.

Every default of the project stands here or in `shike_core.recipes`; the pipeline and the command
line quote them. A value that cannot work raises `ValueError` with what to do.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

Dataset = Literal[
    "digits",
    "cifar10",
    "cifar100",
    "imagenet_lt",
    "places_lt",
    "inaturalist2018",
    "image_folder",
    "table",
]
HELD_IN_MEMORY = ("digits", "cifar10", "cifar100")
"""Data sets that are arrays, not files."""
Profile = Literal["exp", "step"]
Selection = Literal["first", "random"]
ClassOrder = Literal["label", "shuffled"]
Leakage = Literal["keep", "drop", "refuse"]
Storage = Literal["packed", "referenced"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
KlReduction = Literal["mean", "batchmean"]
TeacherTarget = Literal["zero", "masked"]
MutualTeachers = Literal["all", "correct"]
AlignmentRelu = Literal["first", "all", "none"]
Classifier = Literal["cosine", "linear"]
Objective = Literal["cross_entropy", "balanced_softmax"]
GateMetric = Literal["accuracy", "mean_class_accuracy"]
Acceleration = Literal["auto", "none", "cuda-graph", "compile"]
BatchNormMode = Literal["train", "eval"]
BatchNormScope = Literal["local", "synchronised"]
Network = Literal["resnet32", "resnet50", "resnext50_32x4d", "resnet152"]
Schedule = Literal["cosine", "step"]
Crop = Literal["padded", "resized"]


def _as_declared(config: object) -> None:
    """Turn whole numbers into the fractions that fields are declared as.

    5 and 5.0 compare equal, but not as the texts that identities are made of.
    """
    for declared in fields(config):  # type: ignore[arg-type]
        value = getattr(config, declared.name)
        if declared.type is float and isinstance(value, int):
            object.__setattr__(config, declared.name, float(value))


def _one_of(name: str, value: object, choices: object) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(map(str, allowed))}")


def _at_least(name: str, value: float, least: float) -> None:
    if not least <= value < float("inf"):  # also refuses NaN
        raise ValueError(f"{name} must be at least {least} and finite, got {value}")


def _seed(name: str, value: int) -> None:
    if not 0 <= value < 2**32:  # what every generator takes
        raise ValueError(f"{name} must be at least 0 and below 2**32, got {value}")


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """The rule by which a long-tailed subset is cut out of a balanced source."""

    dataset: Dataset
    """Where the images come from."""
    imbalance_factor: float = 100.0
    """Images of the largest class over images of the smallest, at least 1: 100 means 100:1; 0
    leaves the classes as large as they are in the source, for one that is long-tailed already."""
    profile: Profile = "exp"
    """How class sizes fall: exponentially, or in one step after half of the classes."""
    selection: Selection = "first"
    """Which images of a class: the first in file order (the authors' rule), or a random draw."""
    class_order: ClassOrder = "label"
    """Which class is largest: label 0 downwards, or a shuffled order."""
    subset_seed: int = 0
    """Seed of the random selection, the shuffled class order and the validation draw."""
    validation_per_class: int = 0
    """Images per class held out of the training images for validation; 0 means none."""
    leakage: Leakage = "keep"
    """Training images identical to a test image: keep and report them, drop them, or refuse."""
    num_classes: int = 0
    """Take only the classes of the lowest labels, for a smaller problem; 0 means all."""
    image_size: int = 0
    """Shrink every image to a square of this many pixels a side, held in memory while training; 0
    means as it is."""
    test_per_class: int = 0
    """Images per class held out as the test set of a source that has none."""
    short_side: int = 0
    """Shrink images of files so that the shorter side has this many pixels; 0 means as they are."""
    storage: Storage = "packed"
    """What becomes of images in files: copied into a few large files, or left where they are."""
    shard_mib: int = 256
    """Size of one of these large files, in MiB."""
    max_unreadable: float = 0.001
    """Largest fraction of images in files that may be unreadable; they are left out."""

    def __post_init__(self) -> None:
        _as_declared(self)
        _one_of("dataset", self.dataset, Dataset)
        _one_of("profile", self.profile, Profile)
        _one_of("selection", self.selection, Selection)
        _one_of("class_order", self.class_order, ClassOrder)
        _one_of("leakage", self.leakage, Leakage)
        _one_of("storage", self.storage, Storage)
        if self.imbalance_factor != 0 and not 1 <= self.imbalance_factor < float("inf"):
            factor, hint = self.imbalance_factor, ""
            if 0 < factor < 1:
                hint = f"; {factor:g} is probably meant as {1 / factor:g}"
            raise ValueError(
                f"imbalance_factor must be at least 1, got {factor:g}: "
                "100 means that the largest class has 100 images for each of the smallest, 0 that "
                f"the classes stay as large as they are in the source{hint}"
            )
        _seed("subset_seed", self.subset_seed)
        _at_least("validation_per_class", self.validation_per_class, 0)
        _at_least("test_per_class", self.test_per_class, 0)
        _at_least("shard_mib", self.shard_mib, 1)
        if not 0 <= self.max_unreadable < 1:
            raise ValueError(
                f"max_unreadable must be at least 0 and below 1, got {self.max_unreadable}; 0.001 "
                "means one image in a thousand"
            )
        for name, least in (("num_classes", 2), ("image_size", 4), ("short_side", 4)):
            if getattr(self, name) != 0:
                _at_least(name, getattr(self, name), least)
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        """Refuse values that would silently do nothing."""
        for name in ("profile", "selection", "class_order"):
            default = getattr(type(self), name)
            if not self.imbalance_factor and (value := getattr(self, name)) != default:
                raise ValueError(
                    f"{name}={value} is for cutting classes down, and imbalance_factor=0 leaves "
                    f"them as they are; set {name} to {default}, or imbalance_factor to 1 or more"
                )
        if self.image_size and self.short_side:
            raise ValueError(
                f"image_size ({self.image_size}) makes squares and short_side ({self.short_side}) "
                "keeps the shape; give one of them"
            )
        if self.short_side and self.dataset in HELD_IN_MEMORY:
            raise ValueError(
                f"short_side is for images in files, and those of {self.dataset} are not; set "
                "image_size to shrink them"
            )
        if self.storage == "referenced" and self.short_side:
            raise ValueError(
                f"storage=referenced leaves images as they are, but short_side is "
                f"{self.short_side}; set it to 0, or choose storage=packed"
            )
        if self.storage == "referenced" and (self.image_size or self.dataset in HELD_IN_MEMORY):
            why = "image_size" if self.image_size else f"dataset={self.dataset}"
            raise ValueError(
                f"storage=referenced leaves images in their files, and with {why} they are held "
                "in memory; choose storage=packed"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the trained weights; the defaults are the authors' recipe.

    Values by the authors' CIFAR100-LT recipe (200 epochs); see docs/method.md.
    """

    network: Network = "resnet32"
    """Backbone: ResNet-32 in the CIFAR form, or one of the larger networks for photographs."""
    pretrained: bool = False
    """Start from torchvision's ImageNet weights; for the larger networks."""
    num_experts: int = 3
    """Experts of the mixture; expert i fuses the shared depth i modulo the number of depths."""
    width: int = 16
    """Channels of the first stage: 16 in ResNet-32, 64 in the larger networks as published; each
    later stage has twice as many."""
    scale: float = 30.0
    """Factor on the cosine similarities of the classifier heads."""
    alignment_relu: AlignmentRelu = "first"
    """After which alignment convolutions a ReLU stands; the authors have it after the first."""
    fusion: bool = True
    """Depth-wise knowledge fusion; without it every expert sees its own last stage only."""
    classifier: Classifier = "cosine"
    """Heads: scaled cosine similarity (the authors'), or a plain linear layer with bias."""
    batch_size: int = 128
    """Images per step, of all processes together."""
    micro_batch_size: int = 0
    """Images per process and forward pass; gradients are added up to batch_size. 0 means the whole
    share of a process. Less memory, the same gradients but for BatchNorm, which sees fewer."""
    batch_norm: BatchNormScope = "local"
    """Whose images BatchNorm sees in training: those of one process, or those of all of them."""
    stage1_epochs: int = 180
    """Epochs of representation learning."""
    stage1_learning_rate: float = 0.15
    """Peak learning rate of representation learning."""
    stage1_warmup_start: float = 0.025
    """Learning rate of the first epoch of representation learning."""
    stage2_epochs: int = 20
    """Epochs of classifier retraining; 0 means none: the heads of stage 1 are deployed."""
    stage2_learning_rate: float = 0.1
    """Peak learning rate of classifier retraining."""
    stage2_warmup_start: float = 0.0375
    """Learning rate of the first epoch of classifier retraining."""
    warmup_epochs: int = 5
    """Epochs over which the learning rate rises linearly to its peak, in either stage."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after the warm-up: along half a cosine, or to a tenth after each
    third of the stage."""
    trunk_learning_rate: float = 1.0
    """Factor on the learning rate of what the experts share; 0 freezes it, if it is pretrained."""
    momentum: float = 0.9
    """Momentum of stochastic gradient descent."""
    weight_decay: float = 5e-4
    """Weight decay on every trained parameter."""
    stage1_objective: Objective = "cross_entropy"
    """What every expert learns from the labels in representation learning."""
    stage2_label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes in classifier retraining."""
    stage2_logit_adjustment: float = 1.0
    """Factor on the logarithm of the class counts in classifier retraining: 1 is balanced softmax,
    more favours the small classes, 0 is plain cross-entropy."""
    stage2_scale: float = 0.0
    """Factor on the cosine similarities of the retrained heads: a smaller one is less sure of
    itself; 0 means the same as scale."""
    averaging_epochs: float = 0.0
    """Time constant of an exponential moving average of the weights, which replaces them at the
    end of representation learning; 0 means no average."""
    dkt_weight: float = 10.0
    """Weight of dynamic knowledge transfer, in the units of kl_reduction."""
    mutual_weight: float = 1.0
    """Weight of mutual distillation, in the units of kl_reduction."""
    temperature: float = 1.0
    """Temperature of mutual distillation."""
    mutual_teachers: MutualTeachers = "all"
    """Who teaches in mutual distillation: every expert, or of an image those that are right."""
    consistency_weight: float = 0.0
    """Weight of the loss by which every expert answers for an augmented image as it does for one
    that is only cropped and mirrored; 0 means that no such images are made."""
    mixup_alpha: float = 0.0
    """Alpha of the Beta distribution that says how images, and their losses, are mixed in pairs in
    representation learning; 0 means that they are not."""
    kl_reduction: KlReduction = "mean"
    """Mean over batch and classes (the authors'), or over the batch only (transfers between
    numbers of classes: divide the authors' weights by the number of classes)."""
    detach_teachers: bool = False
    """Stop the gradient through the distillation targets; the authors let it flow."""
    teacher_target: TeacherTarget = "zero"
    """Target class in the transfer's teacher: at logit 0 (the authors'), or masked out."""
    stage2_batch_norm: BatchNormMode = "train"
    """BatchNorm during classifier retraining: running statistics move (the authors'), or not."""
    crop: Crop = "padded"
    """Random crops: of the image's own size after padding it, or of a random part of the image
    resized to crop_size."""
    crop_size: int = 224
    """Pixels a side of resized crops."""
    crop_padding: int = 4
    """Pixels of zero padding before a random crop of the image's own size; 0 means no crop."""
    flip: bool = True
    """Mirror half of the images."""
    auto_augment: bool = True
    """AutoAugment with the 25 sub-policies found on CIFAR-10."""
    cutout_size: int = 16
    """Side of the square hole cut out of every image, in pixels; 0 means none."""
    rand_augment: int = 0
    """Operations of RandAugment on every resized crop; 0 means none."""
    rand_augment_magnitude: int = 9
    """Strength of these operations, 0 to 30."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation of resized crops; 0 means
    none."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and the augmentation."""
    precision: Precision = "auto"
    """Number format of the convolutions; auto takes half precision where the hardware has it.
    The losses are always computed in float32."""
    device: Device = "auto"
    """Where to train; auto takes a GPU if there is one."""
    acceleration: Acceleration = "auto"
    """How a step runs: none is one kernel after the other, cuda-graph replays a recorded step,
    compile also fuses its kernels; auto is compile on a GPU, and none on a CPU and in float16."""
    processes: int = 0
    """Processes that train together, one for each GPU; 0 means as many as there are GPUs, and one
    on a CPU. Under torchrun their number is torchrun's."""
    workers: int = 0
    """Processes that decode images which are not held in memory, for each one that trains; 0 means
    one for each core, shared among them."""
    checkpoint_every: int = 10
    """Epochs between two checkpoints; the last epoch of a stage always has one."""

    def __post_init__(self) -> None:
        _as_declared(self)
        for name, choices in (
            ("network", Network),
            ("schedule", Schedule),
            ("crop", Crop),
            ("alignment_relu", AlignmentRelu),
            ("classifier", Classifier),
            ("stage1_objective", Objective),
            ("acceleration", Acceleration),
            ("kl_reduction", KlReduction),
            ("teacher_target", TeacherTarget),
            ("mutual_teachers", MutualTeachers),
            ("stage2_batch_norm", BatchNormMode),
            ("batch_norm", BatchNormScope),
            ("precision", Precision),
            ("device", Device),
        ):
            _one_of(name, getattr(self, name), choices)
        _seed("seed", self.seed)
        for name in ("momentum", "stage2_label_smoothing"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
        for name in (
            "num_experts", "width", "batch_size", "stage1_epochs", "checkpoint_every", "crop_size",
        ):  # fmt: skip
            _at_least(name, getattr(self, name), 1)
        for name in (
            "stage2_epochs", "warmup_epochs", "weight_decay", "dkt_weight", "mutual_weight",
            "crop_padding", "cutout_size", "averaging_epochs", "consistency_weight",
            "trunk_learning_rate", "rand_augment", "color_jitter", "workers",
            "processes", "micro_batch_size", "stage2_logit_adjustment", "stage2_scale",
            "mixup_alpha",
        ):  # fmt: skip
            _at_least(name, getattr(self, name), 0)
        for name in (
            "scale", "temperature", "stage1_learning_rate", "stage1_warmup_start",
            "stage2_learning_rate", "stage2_warmup_start",
        ):  # fmt: skip
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {value}")
        if not 0 <= self.rand_augment_magnitude <= 30:
            raise ValueError(
                "rand_augment_magnitude must be between 0 and 30, got "
                f"{self.rand_augment_magnitude}"
            )
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        """Refuse values that would silently do nothing."""
        for name in ("micro_batch_size", "processes"):
            if (value := getattr(self, name)) > self.batch_size:
                raise ValueError(
                    f"{name}={value} is more than batch_size={self.batch_size}; set it to 0, or "
                    "batch_size to more"
                )
        if self.pretrained and self.network == "resnet32":
            raise ValueError(
                "there are no pretrained weights for resnet32; choose a larger network, or "
                "pretrained=False"
            )
        if self.network != "resnet32" and self.width == 16:
            raise ValueError(
                f"width=16 is that of resnet32, and {self.network} is published with width=64; "
                "set it"
            )
        if self.network == "resnext50_32x4d" and self.width % 16:
            raise ValueError(f"width must be a multiple of 16 for {self.network}, got {self.width}")
        if self.pretrained and self.width != 64:
            raise ValueError(f"pretrained weights are for width=64, got {self.width}")
        if not self.trunk_learning_rate and not self.pretrained:
            raise ValueError(
                "trunk_learning_rate=0 freezes what the experts share, which without pretrained "
                "weights is noise; set pretrained=True"
            )
        if self.crop == "resized":
            wrong = [name for name in ("auto_augment", "cutout_size") if getattr(self, name)]
            advice = "crop=padded, or rand_augment and color_jitter in their place"
        else:
            wrong = [name for name in ("rand_augment", "color_jitter") if getattr(self, name)]
            advice = "crop=resized"
        if wrong:
            raise ValueError(
                f"{' and '.join(wrong)} cannot be had with crop={self.crop}; choose {advice}, or "
                "set them to 0"
            )
        for name, without in (
            ("stage2_label_smoothing", 0), ("stage2_logit_adjustment", 1),
            ("stage2_batch_norm", "train"), ("stage2_scale", 0),
        ):  # fmt: skip
            if not self.stage2_epochs and (value := getattr(self, name)) != without:
                raise ValueError(
                    f"{name}={value} is for classifier retraining, and stage2_epochs=0 leaves it "
                    f"out; set it to {without}, or stage2_epochs to more"
                )
        if self.classifier == "linear" and self.stage2_scale:
            raise ValueError(
                f"stage2_scale={self.stage2_scale} is for cosine heads, and classifier=linear has "
                "none; set it to 0, or classifier to cosine"
            )
        if self.mutual_teachers == "correct" and not self.mutual_weight:
            raise ValueError(
                "mutual_teachers=correct is for mutual distillation, and mutual_weight=0 leaves it "
                "out; set it to all, or mutual_weight to more"
            )
        if self.crop == "resized" and self.consistency_weight:
            raise ValueError("consistency_weight is for crop=padded; set it to 0")
        if self.mixup_alpha and self.consistency_weight:
            raise ValueError(
                f"consistency_weight={self.consistency_weight} compares views of one image, and "
                f"mixup_alpha={self.mixup_alpha} mixes two; set one of them to 0"
            )

    @property
    def epochs(self) -> int:
        """Epochs of both stages together."""
        return self.stage1_epochs + self.stage2_epochs

    @property
    def logit_adjustment(self) -> float:
        """Times ``log n`` that the loss adds to the logits of the heads that are deployed."""
        if self.stage2_epochs:
            return self.stage2_logit_adjustment
        return 1.0 if self.stage1_objective == "balanced_softmax" else 0.0


INDECISIVE: dict[str, Any] = {
    "device": "auto",
    "checkpoint_every": 1,
    "acceleration": "auto",
    "processes": 0,
    "micro_batch_size": 0,
    "workers": 0,
}
"""Fields of a training's configuration that do not change its weights, and what stands for them.

Several processes, and small forward passes, give the same gradients up to rounding except for
BatchNorm, which normalises by the images it sees at a time. A training may go on with others.
"""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How a checkpoint is measured on the balanced test split."""

    eval_batch_size: int = 500
    """Images per forward pass."""
    calibration_bins: int = 15
    """Confidence bins of the expected calibration error."""
    flip: bool = False
    """Also measure the mean over each image and its mirror image, reported apart."""
    device: Device = "auto"
    """Where to run the model; auto takes a GPU if there is one."""
    workers: int = 0
    """Processes that decode images which are not held in memory; 0 means one for each core."""

    def __post_init__(self) -> None:
        _as_declared(self)
        _one_of("device", self.device, Device)
        _at_least("workers", self.workers, 0)
        _at_least("eval_batch_size", self.eval_batch_size, 1)
        _at_least("calibration_bins", self.calibration_bins, 1)


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """How a model answers for images that a person hands it."""

    top: int = 5
    """Classes told for each image, the likeliest first."""
    resize: bool = False
    """Fit images of another size to a network that takes one size only."""
    predict_batch_size: int = 64
    """Images per forward pass."""
    device: Device = "auto"
    """Where to run the model; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        _as_declared(self)
        _one_of("device", self.device, Device)
        _at_least("top", self.top, 1)
        _at_least("predict_batch_size", self.predict_batch_size, 1)


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """When a new model may replace the champion. Accuracies are fractions, 0.01 is one point.

    By default nothing is given for anything: neither overall nor few-shot accuracy may fall, so a
    model that is better overall because it gave up the tail is refused. What the head may pay for
    the tail is free.
    """

    model_name: str
    """Name of the registered model."""
    metric: GateMetric = "accuracy"
    """What counts as overall: every test image alike, or every class alike."""
    max_accuracy_drop: float = 0.0
    """By how much overall test accuracy may fall below the champion's."""
    max_few_shot_drop: float = 0.0
    """By how much few-shot test accuracy may fall below the champion's."""
    max_medium_shot_drop: float = 1.0
    """By how much medium-shot test accuracy may fall below the champion's; 1 is no limit."""
    max_many_shot_drop: float = 1.0
    """By how much many-shot test accuracy may fall below the champion's; 1 is no limit."""
    min_accuracy: float = 0.0
    """Overall test accuracy that a champion needs, even the first one."""
    min_few_shot_accuracy: float = 0.0
    """Few-shot test accuracy that a champion needs, even the first one."""

    def __post_init__(self) -> None:
        _as_declared(self)
        if not self.model_name.strip():
            raise ValueError("model_name is empty; give the registered model a name")
        # Some separate name and version in model URIs, the others end a text in MLflow's filters.
        if set(self.model_name) & set("/:'\"`"):
            raise ValueError(
                f"model_name must be without / and :, and without quotes, got {self.model_name!r}"
            )
        _one_of("metric", self.metric, GateMetric)
        for name in (
            "max_accuracy_drop", "max_few_shot_drop", "max_medium_shot_drop", "max_many_shot_drop",
        ):  # fmt: skip
            _at_least(name, getattr(self, name), 0)
        for name in ("min_accuracy", "min_few_shot_accuracy"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be a fraction between 0 and 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A full configuration of the pipeline, one part for each step."""

    name: str
    subset: SubsetConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    register: RegisterConfig


def config_digest(config: object, *more: str) -> str:
    """SHA-256 of a configuration and of what it is applied to, as 16 hexadecimal digits.

    Args:
        config: a dataclass of this module.
        more: further identities, such as the subset's digest.
    """
    values: dict[str, Any] = asdict(config)  # type: ignore[call-overload]
    text = json.dumps([values, *more], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

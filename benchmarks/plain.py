"""The plain form of the authors' recipe, against which the engine is measured.

As one writes it with torchvision: images as PIL, transforms image by image in a `DataLoader`, the
network in float32 and in the framework's own memory layout, nothing compiled or fused. Network,
losses and schedule are those of `shike_core`, so that only the engine differs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from shike_core.checkpoint import build_model
from shike_core.config import TrainConfig
from shike_core.data.manifest import Subset
from shike_core.data.sources import Split
from shike_core.device import resolve_device
from shike_core.losses import balanced_softmax, stage1_loss
from shike_core.model import Shike
from shike_core.schedule import learning_rate

Log = Callable[[Mapping[str, float], int], None]
Loader = DataLoader[tuple[Tensor, int]]
NOT_IN_THE_RECIPE = (
    "stage1_objective", "stage2_label_smoothing", "averaging_epochs", "stage2_batch_norm",
    "stage2_logit_adjustment", "consistency_weight", "mixup_alpha",
    "network", "schedule", "trunk_learning_rate", "crop",
)  # fmt: skip
"""Options of the engine that the plain form does not have, beyond the authors' values."""


class Images(Dataset[tuple[Tensor, int]]):
    """A split whose images are transformed one at a time when they are asked for."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.labels = pixels(split), split.labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def pixels(split: Split) -> npt.NDArray[np.uint8]:
    """The images of a split that is held in memory."""
    assert isinstance(split.images, np.ndarray)
    return split.images


class Cutout:
    """Black out a square around a random pixel, cut off at the border (DeVries & Taylor 2017)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        """Cut a hole into an image ``(3, h, w)``."""
        height, width = image.shape[1:]
        top = int(torch.randint(height, ())) - self.size // 2
        left = int(torch.randint(width, ())) - self.size // 2
        image[:, max(top, 0) : top + self.size, max(left, 0) : left + self.size] = 0
        return image


def make_transform(
    config: TrainConfig, size: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image], Tensor]:
    """The recipe's augmentation of one image, and normalisation.

    Args:
        config: which of the operations, and their sizes.
        size: height and width of an image.
        mean: of each channel, for values 0 to 1.
        std: of each channel, for values 0 to 1.
    """
    steps: list[Callable[[Any], Any]] = []
    if config.crop_padding:
        steps.append(transforms.RandomCrop(size, padding=config.crop_padding))
    if config.flip:
        steps.append(transforms.RandomHorizontalFlip())
    if config.auto_augment:
        policy = transforms.AutoAugmentPolicy.CIFAR10
        steps.append(transforms.AutoAugment(policy, fill=(128, 128, 128)))
    steps.append(transforms.ToTensor())
    if config.cutout_size:
        steps.append(Cutout(config.cutout_size))
    steps.append(transforms.Normalize(mean, std))
    whole: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
    return whole


def make_loader(config: TrainConfig, subset: Subset, workers: int) -> Loader:
    """Shuffled batches of the training split; workers stay alive between epochs."""
    split = subset.splits["train"]
    transform = make_transform(config, pixels(split).shape[1:3], subset.mean, subset.std)
    return DataLoader(
        Images(split, transform),
        batch_size=config.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=resolve_device(config.device).type == "cuda",
    )


def stage1_update(
    model: Shike,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    images: Tensor,
    targets: Tensor,
) -> float:
    """One step of representation learning; its loss."""
    loss = stage1_loss(
        model(images, stage=1),
        targets,
        dkt_weight=config.dkt_weight,
        mutual_weight=config.mutual_weight,
        temperature=config.temperature,
        mutual_teachers=config.mutual_teachers,
        kl_reduction=config.kl_reduction,
        detach_teachers=config.detach_teachers,
        teacher_target=config.teacher_target,
    )
    optimizer.zero_grad()
    loss.total.backward()
    optimizer.step()
    return loss.total.item()


def stage2_update(
    model: Shike,
    optimizer: torch.optim.Optimizer,
    class_counts: Tensor,
    images: Tensor,
    targets: Tensor,
) -> float:
    """One step of classifier retraining, where all but the heads is frozen; its loss."""
    loss = balanced_softmax(model(images, stage=2), targets, class_counts)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def make_optimizer(config: TrainConfig, model: Shike) -> torch.optim.SGD:
    """Stochastic gradient descent on what is not frozen."""
    return torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.stage1_learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def train_plain(config: TrainConfig, subset: Subset, log: Log, *, workers: int = 0) -> Shike:
    """Train both stages; no checkpoints, no validation.

    Args:
        config: the recipe; precision and acceleration do not matter.
        subset: with the split ``train``.
        log: called once an epoch with ``train/loss``, the mean over the images.
        workers: processes that transform images.

    Raises:
        ValueError: an option that the authors' recipe does not have.
    """
    refuse_extensions(config)
    device = resolve_device(config.device)
    torch.manual_seed(config.seed)
    model = build_model(config, len(subset.class_names)).to(device)
    loader = make_loader(config, subset, workers)
    class_counts = torch.tensor(subset.class_counts, device=device)

    model.stage2_heads.requires_grad_(False)
    optimizer = make_optimizer(config, model)
    update = partial(stage1_update, model, optimizer, config)
    model.train()
    for epoch in range(config.stage1_epochs):
        optimizer.param_groups[0]["lr"] = learning_rate(
            epoch,
            epochs=config.stage1_epochs,
            peak=config.stage1_learning_rate,
            warmup_start=config.stage1_warmup_start,
            warmup_epochs=config.warmup_epochs,
        )
        log({"train/loss": fit_epoch(loader, update, device)}, epoch)

    if not config.stage2_epochs:
        model.deploy_stage1_heads()
    model.requires_grad_(False)
    model.stage2_heads.requires_grad_(True)
    optimizer = make_optimizer(config, model)
    update = partial(stage2_update, model, optimizer, class_counts)
    for epoch in range(config.stage2_epochs):
        optimizer.param_groups[0]["lr"] = learning_rate(
            epoch,
            epochs=config.stage2_epochs,
            peak=config.stage2_learning_rate,
            warmup_start=config.stage2_warmup_start,
            warmup_epochs=config.warmup_epochs,
        )
        log({"train/loss": fit_epoch(loader, update, device)}, config.stage1_epochs + epoch)
    return model


def fit_epoch(
    loader: Loader, update: Callable[[Tensor, Tensor], float], device: torch.device
) -> float:
    """One pass over the images; the mean of the losses over them."""
    total, count = 0.0, 0
    for images, targets in loader:
        total += update(images.to(device), targets.to(device)) * len(targets)
        count += len(targets)
    return total / count


def refuse_extensions(config: TrainConfig) -> None:
    """Compare with the authors' recipe where the plain form has no choice.

    Raises:
        ValueError: an option that the plain form would ignore is set.
    """
    authors = TrainConfig()
    for name in NOT_IN_THE_RECIPE:
        if (value := getattr(config, name)) != getattr(authors, name):
            raise ValueError(
                f"the plain form knows only {name}={getattr(authors, name)!r}, got {value!r}; "
                "compare the engine with it on the authors' recipe"
            )

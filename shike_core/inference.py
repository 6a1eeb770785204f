"""What a trained model says of images that a person hands it: files, folders, standard input."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from shike_core.checkpoint import Trained
from shike_core.config import PredictConfig
from shike_core.data.augment import normalise
from shike_core.data.listed import IMAGE_SUFFIXES
from shike_core.data.pack import prepare
from shike_core.data.views import EvaluationView, decoded
from shike_core.device import enough_memory, whole_float32
from shike_core.errors import DatasetError
from shike_core.metrics import ensemble_logits

STDIN = "-"
"""Stands for one image on standard input."""


def find_images(arguments: Sequence[str]) -> list[str]:
    """The image files that arguments name, those of a folder in order.

    Args:
        arguments: files, folders, which are searched through, or `STDIN`.

    Raises:
        DatasetError: an argument is not there or may not be read, or a folder has no images in it.
    """
    try:
        found = _found_images(arguments)
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise DatasetError(
            f"cannot look at {error.filename} ({error.strerror}); check the path and its rights"
        ) from error
    if not found:
        raise DatasetError(f"no images were given; name files or folders, or {STDIN} for one image")
    return found


def _found_images(arguments: Sequence[str]) -> list[str]:
    found: list[str] = []
    for argument in arguments:
        path = Path(argument)
        if argument == STDIN or path.is_file():
            found.append(argument)
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise DatasetError(
                    f"{argument} has no images in it (files ending with "
                    f"{' '.join(IMAGE_SUFFIXES)}); give a folder that has, or the files themselves"
                )
            found += [str(p) for p in inside]
        else:
            raise DatasetError(f"there is no image or folder {argument}; check the path")
    return found


def read_image(content: bytes, trained: Trained, resize: bool) -> npt.NDArray[np.uint8]:
    """An image as the model is shown it, as in the evaluation of its kind of network.

    Args:
        content: of a file in any mode; it becomes RGB as in training.
        trained: the model.
        resize: fit an image of another size to a network that takes one size only: the largest
            part in the middle, shrunk or enlarged.

    Returns:
        Pixels ``(height, width, 3)``.

    Raises:
        ValueError: it is not an image, it is damaged, or of another size.
    """
    _, width, height = prepare(content)
    if trained.config.crop == "resized":
        return np.asarray(EvaluationView(trained.config.crop_size)(content, 0))
    wanted = trained.image_size
    if wanted is None:
        raise ValueError(
            "the checkpoint does not say which size of image it is for; train again, or import "
            "it together with its subset"
        )
    image = decoded(content)
    if (height, width) != wanted:
        if not resize:
            raise ValueError(
                f"{width} x {height} pixels, but the model is for {wanted[1]} x {wanted[0]}; "
                "resize it, or have that done with --resize"
            )
        shrinks = width >= wanted[1] and height >= wanted[0]
        # Shrunk as build_subset does it with image_size.
        method = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
        image = ImageOps.fit(image, (wanted[1], wanted[0]), method)
    return np.asarray(image)


def answers(
    trained: Trained, names: Sequence[str], config: PredictConfig, device: torch.device
) -> Iterator[dict[str, Any]]:
    """What the model says of each image, in order, a batch at a time.

    Args:
        trained: the model, on `device`.
        names: from `find_images`.
        config: how.
        device: that computes.

    Yields:
        ``image``, and either ``error`` or ``class``, ``label``, ``probability``, ``top`` (the
        likeliest classes), ``experts`` (the answer of each) and ``calibrated``: whether the
        checkpoint has a temperature. It was fitted to the ensemble, and the experts'
        probabilities are taken with it as well.

    Raises:
        DeviceError: the device has too little memory for a batch.
    """
    for start in range(0, len(names), config.predict_batch_size):
        rows: list[dict[str, Any]] = []
        pixels: list[npt.NDArray[np.uint8]] = []
        for name in names[start : start + config.predict_batch_size]:
            rows.append({"image": name})
            try:
                pixels.append(read_image(_content(name), trained, config.resize))
            except (OSError, ValueError) as error:
                rows[-1]["error"] = str(error)
        readable = [row for row in rows if "error" not in row]
        if readable:
            with enough_memory(config.predict_batch_size, name="predict_batch_size"):
                logits = _logits(trained, np.stack(pixels), device)
            for row, of_image in zip(readable, logits, strict=True):
                row |= _told(of_image, trained, config.top)
        yield from rows


def _content(name: str) -> bytes:
    return sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()


@torch.inference_mode()
def _logits(trained: Trained, pixels: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    """(images, num_experts, num_classes), divided by the temperature, on the CPU."""
    images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
    images = normalise(images, trained.mean, trained.std)
    with whole_float32():
        logits: Tensor = trained.model(images, stage=2).float().cpu()
    return logits / (trained.calibration_temperature or 1.0)


def _told(logits: Tensor, trained: Trained, top: int) -> dict[str, Any]:
    """One image's answer, of logits (num_experts, num_classes)."""
    ensemble = ensemble_logits(logits[None])[0].softmax(dim=0)
    likeliest = ensemble.topk(min(top, len(ensemble)))
    best = [
        {"class": _class_name(trained, label), "label": label, "probability": probability}
        for probability, label in zip(*(column.tolist() for column in likeliest), strict=True)
    ]
    experts = [
        {"class": _class_name(trained, int(p.argmax())), "probability": float(p.max())}
        for p in logits.softmax(dim=1)
    ]
    calibrated = trained.calibration_temperature is not None
    return best[0] | {"top": best, "experts": experts, "calibrated": calibrated}


def _class_name(trained: Trained, label: int) -> str:
    return trained.class_names[label] if trained.class_names else f"class {label}"

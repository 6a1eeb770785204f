"""ImageNet weights to start a training from: torchvision's, copied into trunk and experts."""

import hashlib
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torchvision.models import get_model_weights

from shike_core.config import Network
from shike_core.errors import CheckpointError
from shike_core.model.shike import Shike


def load_pretrained(model: Shike, network: Network) -> None:
    """Copy the first version of torchvision's ImageNet weights into a new model.

    Stem and shared stages get theirs, and the last stage of every expert a copy of the same one,
    with the running statistics. Alignments and heads have none and stay as they are.

    Args:
        model: of this network, in its published width.
        network: one of the larger networks.

    Raises:
        CheckpointError: the file of weights is not there and cannot be fetched, or is another.
    """
    state = fetch(network)
    places = {"conv1": ["stem.0"], "bn1": ["stem.1"]}
    for index in range(len(model.shared_stages)):
        places[f"layer{index + 1}"] = [f"shared_stages.{index}"]
    experts = range(model.num_experts)
    places[f"layer{len(model.shared_stages) + 1}"] = [f"experts.{i}.last_stage" for i in experts]
    for theirs, ours in places.items():
        part = {
            name.removeprefix(f"{theirs}."): value
            for name, value in state.items()
            if name.startswith(f"{theirs}.")
        }
        for place in ours:
            model.get_submodule(place).load_state_dict(part)


def fetch(network: Network) -> dict[str, Tensor]:
    """Read torchvision's weights from torch's cache, where they are put if they are not there.

    Either way the file must be the one whose SHA-256 begins as its name says.

    Raises:
        CheckpointError: see `load_pretrained`.
    """
    weights = get_model_weights(network).IMAGENET1K_V1
    name = Path(urlsplit(weights.url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    digest = name.rpartition("-")[2].removesuffix(".pth")
    try:
        if path.exists():  # torch itself checks what it downloads, not what it finds
            _check(path, digest)
        state: dict[str, Tensor] = weights.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except (OSError, HTTPException, RuntimeError, UnpicklingError) as error:
        # Torch's text on pickles advises to execute them.
        reason = "more than tensors" if isinstance(error, UnpicklingError) else error
        raise CheckpointError(
            f"the pretrained weights of {network} cannot be had ({reason}); put {weights.url} as "
            f"{path} by hand, or under another folder that TORCH_HOME names, or train with "
            "pretrained=False"
        ) from error
    return state


def _check(path: Path, digest: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(digest):
        raise OSError(f"{path.name} has the SHA-256 {found[: len(digest)]}..., another file")

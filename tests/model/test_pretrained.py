"""Pretrained weights: files as torchvision has them, fetched from this machine, and bad ones."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model_weights

from shike_core.errors import CheckpointError
from shike_core.model import build_shike
from shike_core.model.pretrained import fetch, load_pretrained

State = dict[str, Tensor]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Where torch keeps files, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def publish(tmp_path, monkeypatch) -> Callable[[str, State], Path]:
    """Lets torchvision's address of a network's weights name a file with this content."""

    def publish(network: str, state: State) -> Path:
        path = tmp_path / "published.pth"
        torch.save(state, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path = path.rename(tmp_path / f"{network}-{digest[:8]}.pth")
        weights = get_model_weights(network).IMAGENET1K_V1
        monkeypatch.setattr(weights.value, "url", path.as_uri())
        return path

    return publish


@torch.no_grad()
def trained(network: str) -> nn.Module:
    """Torchvision's own network with random weights and statistics that have moved."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(network)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias)
    model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("network", ["resnet50", "resnext50_32x4d"])
def test_features_are_those_of_torchvisions_network(network, cache, publish) -> None:
    theirs = trained(network)
    published = publish(network, theirs.state_dict())
    cache.mkdir(parents=True)
    published = published.rename(cache / published.name)  # by hand
    ours = build_shike(network, 5, 2, width=64).eval()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    load_pretrained(ours, network)
    published.unlink()  # a hundred megabytes
    images = torch.randn(2, 3, 96, 64)
    layers = list(theirs.children())[:-2]  # without pooling and classifier
    expected = nn.Sequential(*layers)(images)
    for expert in ours.experts:
        found = nn.Sequential(ours.stem, *ours.shared_stages, expert.last_stage)(images)
        assert torch.equal(found, expected)
    changed = {n for n, value in ours.state_dict().items() if not torch.equal(value, before[n])}
    kept = {name for name in before if "alignment" in name or "heads" in name}
    assert changed == before.keys() - kept


def test_every_value_of_the_deepest_network_has_its_place(monkeypatch) -> None:
    theirs = torchvision.models.resnet152().state_dict()
    monkeypatch.setattr("shike_core.model.pretrained.fetch", lambda network: theirs)
    with torch.device("meta"):
        ours = build_shike("resnet152", 5, 2, width=64, fusion=False)
    ours.to_empty(device="cpu")
    load_pretrained(ours, "resnet152")
    last_stage = ours.experts[1].last_stage
    values = [*ours.trunk.state_dict().values(), *last_stage.state_dict().values()]
    expected = [value for name, value in theirs.items() if not name.startswith("fc.")]
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))


# Files.

TINY = {"conv1.weight": torch.arange(4.0)}


def test_a_file_is_fetched_once(cache, publish) -> None:
    published = publish("resnet50", TINY)
    assert fetch("resnet50").keys() == TINY.keys()
    assert (cache / published.name).read_bytes() == published.read_bytes()
    published.unlink()
    assert torch.equal(fetch("resnet50")["conv1.weight"], TINY["conv1.weight"])


def test_what_cannot_be_fetched_can_be_put_by_hand(cache, publish) -> None:
    published = publish("resnet152", TINY)
    address, content = published.as_uri(), published.read_bytes()
    published.unlink()
    with pytest.raises(CheckpointError) as caught:
        fetch("resnet152")
    message = str(caught.value)
    assert "the pretrained weights of resnet152 cannot be had" in message
    assert f"put {address} as {cache / published.name} by hand" in message
    assert "pretrained=False" in message
    assert "\n" not in message
    (cache / published.name).write_bytes(content)
    assert fetch("resnet152").keys() == TINY.keys()


def test_another_file_of_that_name_is_not_taken(cache, publish) -> None:
    published = publish("resnet50", TINY)
    cache.mkdir(parents=True)
    torch.save({"conv1.weight": torch.zeros(4)}, cache / published.name)
    with pytest.raises(CheckpointError, match=r"has the SHA-256 \w{8}\.\.\., another file"):
        fetch("resnet50")


def test_a_download_that_is_another_file_is_not_kept(cache, publish) -> None:
    published = publish("resnet50", TINY)
    torch.save({"conv1.weight": torch.zeros(4)}, published)
    with pytest.raises(CheckpointError, match="invalid hash value"):
        fetch("resnet50")
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, publish, monkeypatch) -> None:
    publish("resnet50", TINY)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"Not a directory.* another folder that TORCH_HOME"):
        fetch("resnet50")


def test_nothing_in_a_file_is_executed(cache, publish, tmp_path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "executed",)

    publish("resnet50", {"conv1.weight": Malicious()})
    with pytest.raises(CheckpointError, match="more than tensors"):
        fetch("resnet50")
    assert not (tmp_path / "executed").exists()


def test_the_files_are_those_that_torchvision_names() -> None:
    for network in ("resnet50", "resnext50_32x4d", "resnet152"):
        name = Path(get_model_weights(network).IMAGENET1K_V1.url).name
        assert name.startswith(f"{network}-")
        assert len(name) == len(f"{network}-") + 8 + len(".pth")

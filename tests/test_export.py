"""The program that is deployed, on real digits."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import BatchNorm2d

from shike_core import export
from shike_core.data.augment import normalise
from shike_core.data.loader import ImageTable
from shike_core.errors import ArtifactError, ExportError
from shike_core.export import (
    PROGRAM,
    TOLERANCE,
    DeployedModel,
    Program,
    folded,
    save_program,
    verify_program,
    weights_digest,
)
from shike_core.model import Shike, build_shike, shike_resnet32
from shike_core.model.backbone import BACKBONES

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.3, 0.4)

ELSEWHERE = """
import json, sys
import numpy as np
import torch
sys.modules["shike_core"] = None  # importing it would raise ImportError
program = torch.export.load(sys.argv[1]).module()
images = torch.from_numpy(np.load(sys.argv[2]))
with torch.no_grad():
    parts = {
        "uint8": [program(images)],
        "float": [program(images.float())],
        "one by one": [program(images[i : i + 1]) for i in range(len(images))],
        "five": [program(part) for part in images.split(5)],
    }
print(json.dumps({name: torch.cat(part).tolist() for name, part in parts.items()}))
"""


def network(seed: int = 0) -> Shike:
    torch.manual_seed(seed)
    model = shike_resnet32(num_classes=10, num_experts=2, width=2)
    with torch.no_grad():  # as a trained one, it has running statistics of its own
        model.train()(torch.randn(64, 3, 8, 8))
    return model.eval()


@pytest.fixture
def deployed() -> DeployedModel:
    return DeployedModel(network(), MEAN, STD).eval()


@pytest.fixture(scope="module")
def stored(images, tmp_path_factory) -> tuple[Path, Program]:
    """The directory that has the program, and the program as read back."""
    directory = tmp_path_factory.mktemp("program")
    program = save_program(
        folded(DeployedModel(network(), MEAN, STD).eval()), images[:4], directory
    )
    return directory, program


@pytest.fixture(scope="session")
def images(digits) -> Tensor:
    """Uint8 (33, 3, 8, 8)."""
    return torch.tensor(digits.test.images[:33]).permute(0, 3, 1, 2)


@pytest.fixture(scope="session")
def table(images) -> ImageTable:
    return ImageTable(images, torch.zeros(len(images), dtype=torch.int64))


@pytest.fixture
def logits(deployed, images) -> Tensor:
    with torch.no_grad():
        return deployed.model(normalise(images, MEAN, STD), stage=2)


def test_the_deployed_model_averages_the_logits_of_normalised_images(deployed, images, logits):
    with torch.no_grad():
        answers = deployed(images)
        of_floats = deployed(images.float())
    expected = np.exp(logits.double().numpy().mean(axis=1))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(answers.numpy(), expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(answers, of_floats)
    assert len(set(answers.argmax(dim=1).tolist())) > 1  # the answers depend on the image


def test_the_program_runs_without_this_package(stored, images, logits, tmp_path):
    np.save(tmp_path / "images.npy", images.numpy())
    run = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, stored[0] / PROGRAM, tmp_path / "images.npy"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    expected = logits.mean(dim=1).softmax(dim=-1)
    for name, answers in json.loads(run.stdout).items():
        torch.testing.assert_close(
            torch.tensor(answers), expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_folded_network_is_the_same_function_without_batch_norms(backbone):
    torch.manual_seed(0)
    model = build_shike(backbone, 10, 2, width=16)
    with torch.no_grad():
        for layer in model.modules():  # as trained ones, none of them does nothing
            if isinstance(layer, BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_()
        pixels = torch.randn(8, 3, 32, 32)
        model.train()(pixels)
        expected = model.eval()(pixels)
        torch.testing.assert_close(folded(model)(pixels), expected, rtol=1e-4, atol=1e-4)
    assert not [layer for layer in folded(model).modules() if isinstance(layer, BatchNorm2d)]
    assert [layer for layer in model.modules() if isinstance(layer, BatchNorm2d)]  # a copy was made


def test_the_program_of_a_plain_network(images, table, tmp_path):
    torch.manual_seed(0)
    model = shike_resnet32(10, 1, width=2, fusion=False, classifier="linear").eval()
    with torch.no_grad():
        logits = model(normalise(images, MEAN, STD), stage=2)
    program = save_program(DeployedModel(model, MEAN, STD).eval(), images[:4], tmp_path)
    assert 0 <= verify_program(program, table, logits, 8) < 1e-5


def test_the_program_leaves_the_stage1_heads_behind(stored):
    names = torch.export.load(stored[0] / PROGRAM).state_dict
    assert {name for name in names if "stage2_heads" in name}
    assert not {name for name in names if "stage1_heads" in name}


def test_making_the_deployed_model_leaves_the_model_whole(images):
    model = network()
    DeployedModel(model, MEAN, STD)
    assert len(model.stage1_heads) == 2
    assert model(normalise(images, MEAN, STD), stage=1).shape == (33, 2, 10)


def test_the_program_is_the_checkpoint_in_every_batch_size(stored, table, logits):
    directory, program = stored
    for batch_size in (1, 4, 32, 33, 100):
        assert 0 <= verify_program(program, table, logits, batch_size) < 1e-5
    assert [path.name for path in directory.iterdir()] == [PROGRAM]


def test_a_program_of_other_weights_is_refused(stored, images, table):
    other = network(seed=1)
    with torch.no_grad():
        logits = other(normalise(images, MEAN, STD), stage=2)
    with pytest.raises(ExportError, match=r"differs from the checkpoint by 0\.\d+ in a class"):
        verify_program(stored[1], table, logits, 16)


def test_one_wrong_image_is_found_and_named(deployed, images, table, logits):
    def wrong_for_image_21(part: Tensor) -> Tensor:
        answers = deployed(part)
        hit = (part == images[21]).flatten(1).all(dim=1)
        return answers + 2 * TOLERANCE * hit[:, None]

    with pytest.raises(ExportError, match=r"by 0\.00\d+ .* of test image 21, allowed is 0\.001"):
        verify_program(wrong_for_image_21, table, logits, 10)


def test_the_first_images_are_enough_if_they_are_large(deployed, table, logits, monkeypatch):
    sizes = []

    def counted(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return deployed(part)

    assert export.PIXELS_COMPARED > 10_000 * 32 * 32  # all of CIFAR's test images
    monkeypatch.setattr(export, "PIXELS_COMPARED", 20 * 8 * 8)
    assert verify_program(counted, table, logits, 7) < 1e-5
    assert sizes == [7, 7, 7]


def test_answers_that_are_not_numbers_are_refused(deployed, table, logits):
    with pytest.raises(ExportError, match="by nan"):
        verify_program(lambda part: deployed(part) * torch.nan, table, logits, 16)


def test_a_program_in_training_mode_is_refused(deployed, table, logits):
    with pytest.raises(ExportError):
        verify_program(deployed.train(), table, logits, 16)


def test_a_program_that_cannot_be_written(deployed, images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file, not a directory"):
        save_program(deployed, images[:4], tmp_path / "file")


def test_a_full_disk_leaves_no_half_a_program(deployed, images, full_disk):
    with pytest.raises(ArtifactError, match="the disk is full"):
        save_program(deployed, images[:4], full_disk)
    assert list(Path(full_disk).iterdir()) == []


def test_a_temperature_divides_the_mean_of_the_logits(images, tmp_path):
    model, two = network(), DeployedModel(network(), MEAN, STD, temperature=2.0).eval()
    plain = DeployedModel(model, MEAN, STD).eval()
    with torch.no_grad():
        logits = model(normalise(images, MEAN, STD), stage=2).mean(dim=1)
        expected = (logits / 2).softmax(dim=1)
        torch.testing.assert_close(two(images), expected)
        program = save_program(two, images[:4], tmp_path)
        torch.testing.assert_close(program(images), expected, atol=1e-6, rtol=0)
        assert (two(images).argmax(dim=1) == plain(images).argmax(dim=1)).all()
    assert weights_digest(two) != weights_digest(plain)


def test_the_digest_is_of_all_that_is_deployed():
    def digest(model: Shike, mean=MEAN, std=STD) -> str:
        return weights_digest(DeployedModel(model, mean, std))

    expected = digest(network())
    assert digest(network()) == expected
    assert len(expected) == 64
    assert digest(network(), mean=(0.3, 0.4, 0.6)) != expected
    assert digest(network(), std=(0.2, 0.3, 0.5)) != expected
    model = network()
    state = model.state_dict()
    for name, deployed in (
        ("stem.0.weight", True),
        ("shared_stages.1.4.bn2.bias", True),
        ("shared_stages.0.0.bn1.running_var", True),
        ("experts.1.alignment.0.weight", True),
        ("experts.0.last_stage.4.bn2.num_batches_tracked", True),
        ("stage1_heads.1.weight", False),
        ("stage2_heads.1.weight", True),
    ):
        before = state[name].clone()
        state[name].view(-1)[-1:].add_(1)
        assert (digest(model) != expected) == deployed, name
        state[name].copy_(before)
    assert digest(model) == expected


def test_the_digest_does_not_depend_on_the_layout_in_memory():
    model = network()
    expected = weights_digest(model)
    assert weights_digest(model.to(memory_format=torch.channels_last)) == expected

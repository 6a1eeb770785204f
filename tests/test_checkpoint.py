"""Checkpoints: round trips, the authors' state dicts, and every kind of bad file."""

import pickle
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shike_core import checkpoint as checkpoints
from shike_core import stages
from shike_core.checkpoint import Checkpoint, convert_reference_state_dict
from shike_core.config import EvaluateConfig, SubsetConfig, TrainConfig
from shike_core.errors import ArtifactError, CheckpointError
from shike_core.model import Shike, shike_resnet32

CONFIG = TrainConfig(num_experts=2, width=2, stage1_epochs=2, stage2_epochs=1)


def a_checkpoint(**changes) -> Checkpoint:
    model = checkpoints.build_model(CONFIG, num_classes=3)
    plain = Checkpoint(
        config=asdict(CONFIG),
        training_digest="t" * 16,
        subset_digest="s" * 64,
        class_names=["cat", "dog", "owl"],
        class_counts=[9, 3, 1],
        mean=[0.5, 0.4, 0.3],
        std=[0.2, 0.2, 0.1],
        image_size=[32, 32],
        model=model.state_dict(),
        epoch=3,
        history=[{"epoch": 0, "train/loss": 2.5}],
    )
    return replace(plain, **changes)


def assert_same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


# Round trips.


def test_save_and_load_keep_everything(tmp_path) -> None:
    optimizer = {"state": {0: {"momentum_buffer": torch.randn(3)}}, "param_groups": [{"lr": 0.1}]}
    before = a_checkpoint(epoch=1, step=7, sums=[1.5, 2.0], optimizer=optimizer)
    checkpoints.save(before, tmp_path / "new" / "checkpoint.pt")
    after = checkpoints.load(tmp_path / "new" / "checkpoint.pt")
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "checkpoint.pt"]
    assert_same_state(before.model, after.model)
    momentum = after.optimizer["state"][0].pop("momentum_buffer")
    assert torch.equal(momentum, optimizer["state"][0].pop("momentum_buffer"))
    for field in fields(Checkpoint):
        if field.name != "model":
            assert getattr(after, field.name) == getattr(before, field.name)
    assert after.train_config == CONFIG


@torch.no_grad()
def test_a_checkpoint_from_before_costs_were_kept(tmp_path) -> None:
    state = a_checkpoint(history=[{"epoch": 0}, {"epoch": 1}])
    checkpoints.save(state, tmp_path / "c.pt")
    content = torch.load(tmp_path / "c.pt", weights_only=True)
    del content["costs"]
    torch.save(content, tmp_path / "older.pt")
    assert checkpoints.load(tmp_path / "older.pt").costs == [{}, {}]


def test_load_trained_gives_the_model_ready_for_use(tmp_path) -> None:
    saved = a_checkpoint()
    checkpoints.save(saved, tmp_path / "checkpoint.pt")
    trained = checkpoints.load_trained(tmp_path / "checkpoint.pt")
    assert not trained.model.training
    assert_same_state(trained.model.state_dict(), saved.model)
    assert trained.model(torch.zeros(1, 3, 8, 8)).shape == (1, 2, 3)
    assert trained.config == CONFIG
    assert (trained.class_names, trained.class_counts) == (("cat", "dog", "owl"), (9, 3, 1))
    assert (trained.mean, trained.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert (trained.epochs_done, trained.history) == (3, saved.history)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, {"alignment"}),
        ({"fusion": False}, set()),
        ({"classifier": "linear"}, {"alignment", "bias"}),
        ({"fusion": False, "classifier": "linear"}, {"bias"}),
    ],
)
def test_the_configuration_decides_the_network(tmp_path, changes, parts) -> None:
    config = replace(CONFIG, **changes)
    state = checkpoints.build_model(config, num_classes=3).state_dict()
    found = {"alignment" for name in state if ".alignment." in name}
    found |= {"bias" for name in state if re.fullmatch(r"stage[12]_heads\.\d\.bias", name)}
    assert found == parts
    checkpoints.save(a_checkpoint(config=asdict(config), model=state), tmp_path / "checkpoint.pt")
    trained = checkpoints.load_trained(tmp_path / "checkpoint.pt")
    assert_same_state(trained.model.state_dict(), state)
    other = replace(config, fusion=not config.fusion)
    checkpoints.save(a_checkpoint(config=asdict(other), model=state), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="do not fit the configuration stored with them"):
        checkpoints.load_trained(tmp_path / "other.pt")


@pytest.mark.parametrize("network", ["resnet50", "resnext50_32x4d", "resnet152"])
def test_the_larger_networks(tmp_path, network) -> None:
    config = TrainConfig(network=network, width=32, num_experts=1, fusion=False)
    state = checkpoints.build_model(config, num_classes=3).state_dict()
    saved = a_checkpoint(config=asdict(config), model=state, epoch=config.epochs)
    checkpoints.save(saved, tmp_path / "checkpoint.pt")
    trained = checkpoints.load_trained(tmp_path / "checkpoint.pt")
    assert_same_state(trained.model.state_dict(), state)
    depths = {"resnet50": 6, "resnext50_32x4d": 6, "resnet152": 36}
    assert len(trained.model.shared_stages[2]) == depths[network]


def test_pretrained_weights_are_not_asked_for_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    config = TrainConfig(network="resnet50", width=64, pretrained=True, num_experts=1, fusion=False)
    state = checkpoints.build_model(config, num_classes=3).state_dict()
    saved = a_checkpoint(config=asdict(config), model=state, epoch=config.epochs)
    checkpoints.save(saved, tmp_path / "checkpoint.pt")
    trained = checkpoints.load_trained(tmp_path / "checkpoint.pt")
    (tmp_path / "checkpoint.pt").unlink()  # a hundred megabytes
    assert_same_state(trained.model.state_dict(), state)
    assert not (tmp_path / "torch").exists()


# Bad files.


def test_a_missing_checkpoint(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*none\.pt"):
        checkpoints.load(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoints.load(tmp_path)  # a directory


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", bytes(range(256)) * 9], ids=len)
def test_a_file_that_is_something_else(tmp_path, content) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"\({len(content)} bytes\) cannot be read"):
        checkpoints.load(path)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99, 0.9999])
def test_a_truncated_file(tmp_path, share) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoints.save(a_checkpoint(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        checkpoints.load(path)


def test_a_flipped_bit_is_found_wherever_it_matters(tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    saved = a_checkpoint()
    checkpoints.save(saved, path)
    whole, found = path.read_bytes(), 0
    generator = np.random.default_rng(0)
    for position in generator.integers(len(whole), size=60).tolist():
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        try:
            assert_same_state(checkpoints.load_trained(path).model.state_dict(), saved.model)
        except CheckpointError:
            found += 1
    assert found > 10


def test_one_wrong_weight_is_found(tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    saved = a_checkpoint()
    # Three weights side by side: the four bytes of one turn up elsewhere among random weights
    # about once in a hundred runs.
    row = torch.tensor([0.123456789, 0.234567891, 0.345678912])
    saved.model["stem.0.weight"][0, 0, 0] = row
    checkpoints.save(saved, path)
    needle = row.numpy().tobytes()
    assert path.read_bytes().count(needle) == 1
    row[1] = 0.334567891
    path.write_bytes(path.read_bytes().replace(needle, row.numpy().tobytes()))
    with pytest.raises(CheckpointError, match="wrong checksum"):
        checkpoints.load(path)


class Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("write", ["pickle", "torch"])
def test_nothing_in_a_file_is_executed(tmp_path, write) -> None:
    path, victim = tmp_path / "checkpoint.pt", tmp_path / "executed"
    if write == "torch":
        torch.save({"format": checkpoints.FORMAT, "model": Malicious(victim)}, path)
    else:
        path.write_bytes(pickle.dumps(Malicious(victim), protocol=2))
    with pytest.raises(CheckpointError, match="not a file of plain data"):
        checkpoints.load(path)
    assert not victim.exists()
    torch.load(path, weights_only=False) if write == "torch" else pickle.loads(path.read_bytes())
    assert victim.exists()  # the file was able to


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {}},
        {"format": 99},
        [1, 2],
        {"format": checkpoints.FORMAT},
        {**asdict(a_checkpoint()), "format": checkpoints.FORMAT, "more": 1},
    ],
    ids=["authors", "other format", "list", "fields missing", "field too many"],
)
def test_another_programs_checkpoint(tmp_path, content) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint of format 3 .* import-reference"):
        checkpoints.load(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_experts": 0}, "num_experts must be at least 1"), ({"new": 1}, "new")],
)
def test_the_configuration_of_another_version(tmp_path, change, message) -> None:
    checkpoints.save(a_checkpoint(config=asdict(CONFIG) | change), tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=f"does not know .*{message}"):
        checkpoints.load(tmp_path / "checkpoint.pt")


def test_weights_that_do_not_fit_their_configuration(tmp_path) -> None:
    saved = a_checkpoint(config=asdict(CONFIG) | {"num_experts": 3})
    checkpoints.save(saved, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"do not fit .*3 experts, width 2"):
        checkpoints.load_trained(tmp_path / "checkpoint.pt")


def test_an_unfinished_training_is_not_evaluated(tmp_path) -> None:
    checkpoints.save(a_checkpoint(epoch=1), tmp_path / "checkpoint.pt")
    assert not checkpoints.load(tmp_path / "checkpoint.pt").finished
    with pytest.raises(CheckpointError, match="holds 1 of 3 epochs; go on with the training"):
        checkpoints.load_trained(tmp_path / "checkpoint.pt")


def test_a_full_disk_keeps_the_older_checkpoint(full_disk) -> None:
    path = full_disk / "checkpoint.pt"
    checkpoints.save(a_checkpoint(model={}), path)
    with pytest.raises(ArtifactError, match="the disk is full"):
        checkpoints.save(a_checkpoint(), path)
    assert checkpoints.load(path).model == {}
    assert list(full_disk.iterdir()) == [path]


# The authors' state dicts.


def authors_state_dict(model: Shike, counters: bool = True) -> dict[str, Tensor]:
    """A model's state under the authors' names, in their layout."""
    parts: dict[str, nn.Module] = {
        "conv1": model.stem[0],
        "bn1": model.stem[1],
        "layer1": model.shared_stages[0],
        "layer2": model.shared_stages[1],
    }
    for m, expert in enumerate(model.experts):
        parts[f"layer3s.{m}"] = expert.last_stage
        parts[f"classifiers.{m}"] = model.stage1_heads[m]
        parts[f"rt_classifiers.{m}"] = model.stage2_heads[m]
        steps = [part for part in expert.alignment if not isinstance(part, nn.ReLU)]
        for index, part in enumerate(steps):
            step, place = divmod(index, 2)
            parts[f"shallow_exps.{m}.convs.StridedConv{step}.conv.{place}"] = part
    return {
        f"{prefix}.{name}": tensor.T if "classifiers" in prefix else tensor
        for prefix, part in parts.items()
        for name, tensor in part.state_dict().items()
        if counters or not name.endswith("num_batches_tracked")
    }


def trained_for_a_step(num_classes: int, num_experts: int) -> Shike:
    """A model whose BatchNorm statistics have moved."""
    torch.manual_seed(0)
    model = shike_resnet32(num_classes, num_experts, width=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.train()(torch.randn(4, 3, 8, 8))
    return model


def test_the_authors_names_are_as_these_tests_write_them(reference) -> None:
    theirs = {
        name.removeprefix("state."): value.shape
        for name, value in reference.items()
        if name.startswith("state.")
    }
    model = shike_resnet32(100, len(reference["features_eval"]))
    ours = {name: x.shape for name, x in authors_state_dict(model, counters=False).items()}
    assert ours == theirs


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("counters", [True, False], ids=["counters", "no counters"])
@pytest.mark.parametrize(
    ("num_classes", "num_experts"), [(2, 1), (10, 2), (365, 3), (7, 4), (3, 5)]
)
def test_conversion_gives_back_any_network(num_classes, num_experts, counters, prefix) -> None:
    model = trained_for_a_step(num_classes, num_experts)
    theirs = {prefix + name: x for name, x in authors_state_dict(model, counters).items()}
    converted = convert_reference_state_dict(theirs)
    expected = model.state_dict()
    if not counters:
        for name, value in expected.items():
            if name.endswith("num_batches_tracked"):
                expected[name] = torch.zeros_like(value)
    assert_same_state(converted, expected)
    shike_resnet32(num_classes, num_experts, width=2).load_state_dict(converted)


def test_conversion_does_not_care_for_order_or_kind_and_shares_no_memory() -> None:
    model = trained_for_a_step(3, 2)
    theirs = authors_state_dict(model)
    reversed_order = dict(reversed([(name, x.numpy()) for name, x in theirs.items()]))
    converted = convert_reference_state_dict(reversed_order)
    assert_same_state(dict(sorted(converted.items())), dict(sorted(model.state_dict().items())))
    for tensor in converted.values():
        tensor.zero_()
    assert model.stem[0].weight.abs().min() > 0
    assert all(head.weight.abs().max() > 0 for head in model.stage1_heads)


@pytest.mark.parametrize(
    "name",
    [
        "fc.weight",
        "layer4.0.conv1.weight",
        "epoch",
        "",
        "shallow_exps.0.convs.StridedConv0.weight",
        "shallow_exps.0.convs.StridedConvX.conv.0.weight",
        "shallow_exps.0.other",
        "stem.0.weight",
    ],
)
def test_conversion_refuses_a_name_the_authors_do_not_have(name) -> None:
    with pytest.raises(CheckpointError, match="does not belong to the authors' ResNet-32"):
        convert_reference_state_dict({name: torch.zeros(1)})


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [True, False])
def test_import_reference_reads_the_authors_file(tmp_path, wrapped) -> None:
    model = trained_for_a_step(3, 4).eval()
    state = {f"module.{name}": x for name, x in authors_state_dict(model).items()}
    content = {"epoch": 200, "best_acc1": np.float64(56.3), "state_dict": state}
    torch.save(content if wrapped else state, tmp_path / "last.pth.tar")
    origin = {
        "class_names": [],
        "class_counts": [],
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "image_size": [32, 32],
    }
    imported = checkpoints.import_reference(tmp_path / "last.pth.tar", **origin, subset_digest="")
    checkpoints.save(imported, tmp_path / "checkpoint.pt")
    trained = checkpoints.load_trained(tmp_path / "checkpoint.pt")
    assert (trained.config.num_experts, trained.config.width) == (4, 2)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(trained.model(images), model(images))


@torch.no_grad()
@pytest.mark.parametrize("named", [True, False])
def test_an_imported_checkpoint_can_be_evaluated(tmp_path, named) -> None:
    """Whether or not somebody says what the authors' model was trained on."""
    rule = SubsetConfig(dataset="digits", imbalance_factor=20)
    info = stages.build_subset(rule, None, tmp_path / "subset", lambda metrics, step: None)
    model = trained_for_a_step(10, 2).eval()
    torch.save({"state_dict": authors_state_dict(model)}, tmp_path / "last.pth.tar")
    subset = tmp_path / "subset" if named else None
    sizes = stages.import_reference(tmp_path / "last.pth.tar", tmp_path / "imported", subset)
    assert sizes == {"num_experts": 2, "num_classes": 10}
    report = stages.evaluate(
        EvaluateConfig(),
        tmp_path / "subset",
        tmp_path / "imported",
        tmp_path / "evaluation",
        lambda metrics, step: None,
    )
    assert report["trained_on_this_subset"] is named
    counts = [row["train_images"] for row in report["per_class"]]
    assert counts == info["class_counts"]
    assert report["export"]["largest_difference"] < 1e-5


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("", "holds no state dict"),
        ("rt_classifiers", "has no stage-2 heads"),
        ("conv1", "has no first convolution"),
        ("layer1.3.conv2", "does not fit the authors' ResNet-32"),
    ],
)
def test_import_reference_refuses_half_a_network(tmp_path, drop, message) -> None:
    state = authors_state_dict(shike_resnet32(3, 2, width=2))
    kept = {name: x for name, x in state.items() if not name.startswith(drop)}
    torch.save(kept, tmp_path / "last.pth.tar")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.import_reference(
            tmp_path / "last.pth.tar",
            class_names=[],
            class_counts=[],
            mean=[0.5] * 3,
            std=[0.2] * 3,
            image_size=[32, 32],
            subset_digest="",
        )

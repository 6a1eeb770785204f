"""Both forms behind their interface."""

from dataclasses import replace

import pytest
import torch

from benchmarks import measure
from benchmarks.forms import Engine, Plain, engines
from benchmarks.settings import quick
from shike_core.data.manifest import read_subset
from shike_core.device import cpu_has_bfloat16

SETTINGS = quick("cpu", threads=1)
CONFIG = replace(measure.train_config(SETTINGS), stage1_epochs=1, stage2_epochs=1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("subset")
    measure.prepare(SETTINGS, None, path)
    return path


@pytest.fixture(params=[Plain(workers=0), *engines(CPU)], ids=lambda form: form.name)
def form(request):
    return request.param


def test_an_epoch_has_every_image_once_in_the_networks_format(form, directory) -> None:
    subset = read_subset(directory)
    batches = list(form.data(CONFIG, subset)(0))
    labels = torch.cat([targets for _, targets in batches])
    assert labels.bincount().tolist() == subset.class_counts.tolist()
    half = form.name == "engine-bfloat16"
    assert {x.dtype for x, _ in batches} == {torch.bfloat16 if half else torch.float32}


def test_updates_lower_the_loss_of_their_batch(form) -> None:
    torch.manual_seed(0)
    run = form.update(CONFIG, 10, 32)
    first, *_, last = [loss_of(run()) for _ in range(12)]
    assert last < first


@pytest.mark.slow
def test_an_update_is_compiled_if_the_engine_compiles() -> None:
    torch._dynamo.reset()  # what another test has compiled would not be compiled anew
    counters = torch._dynamo.utils.counters
    counters.clear()
    Engine("float32").update(replace(CONFIG, acceleration="compile"), 10, 32)
    assert counters["stats"]["unique_graphs"] >= 6  # stem, blocks of each stage, loss


def loss_of(result: object) -> float:
    """Plain form returns the loss, the engine a vector that begins with it."""
    return float(torch.as_tensor(result).flatten()[0])


def test_training_logs_every_epoch(form, directory) -> None:
    epochs = []
    form.train(CONFIG, directory, lambda metrics, epoch: epochs.append(epoch))
    assert epochs == [0, 1]
    assert form.epochs_between_logs(CPU) == 1


def test_the_engine_is_measured_in_float32_and_in_what_auto_means() -> None:
    names = [engine.precision for engine in engines(CPU)]
    assert names == ["float32", "bfloat16"] if cpu_has_bfloat16() else ["float32"]
    assert Engine("float32").name == "engine-float32"

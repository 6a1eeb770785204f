"""The training engine on real images: digits of 8 x 8, patches of photographs of 32 x 32."""

import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor

from shike_core import checkpoint as checkpoints
from shike_core import train as engine
from shike_core.acceleration import Preparation
from shike_core.config import TrainConfig
from shike_core.data.loader import ImageTable, steps_per_epoch
from shike_core.device import cpu_has_bfloat16, resolve_precision
from shike_core.errors import DivergedError, InterruptedTraining
from shike_core.losses import balanced_softmax, stage1_loss
from shike_core.recipes import PER_IMAGE
from shike_core.schedule import learning_rate
from shike_core.train import Average, Training, Update, accuracy_on

PLAIN = {"crop_padding": 0, "flip": False, "auto_augment": False, "cutout_size": 0}
DIGITS = TrainConfig(
    **PLAIN | {"crop_padding": 1},
    num_experts=2,
    width=4,
    batch_size=40,
    stage1_epochs=2,
    stage2_epochs=1,
    warmup_epochs=1,
    precision="float32",
    device="cpu",
)
PHOTOGRAPHS = replace(
    DIGITS, crop_padding=4, flip=True, auto_augment=True, cutout_size=16, num_experts=3
)
STEPS = 3
"""Steps of an epoch on either of the tables below."""
EPOCHS = 3

PRECISIONS = [
    "float32",
    pytest.param(
        "bfloat16",
        marks=pytest.mark.skipif(not cpu_has_bfloat16(), reason="this CPU has no bfloat16"),
    ),
]


@dataclass
class Data:
    """Images to train on."""

    table: ImageTable
    num_classes: int

    def take(self, rows: slice) -> "Data":
        return Data(ImageTable(self.table.images[rows], self.table.labels[rows]), self.num_classes)


@pytest.fixture(autouse=True)
def one_thread():
    """Steps as small as these only wait for each other on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digit_images(digits) -> Data:
    """The first 110 digits, a last batch of 30."""
    train = digits.train
    return Data(ImageTable.from_arrays(train.images[:110], train.labels[:110]), 10)


@pytest.fixture(scope="session")
def photographs() -> Data:
    """Patches of two real photographs, the class is the photograph."""
    patches = [
        torch.from_numpy(load_sample_image(name).copy())[-416:, :640:2]
        .unfold(0, 32, 32)
        .unfold(1, 32, 32)
        .flatten(0, 1)[:count]
        for name, count in (("china.jpg", 80), ("flower.jpg", 30))
    ]
    labels = torch.tensor([0] * 80 + [1] * 30)
    return Data(ImageTable(torch.cat(patches).contiguous(), labels), 2)


def never() -> None:
    """Nobody asks to stop."""


def after(calls: int, number: int = signal.SIGTERM) -> Callable[[], int | None]:
    """Somebody asks to stop just before this look at the signals; the engine looks each step."""
    looks = iter(range(1, 10**6))
    return lambda: number if next(looks) >= calls else None


def prepare(
    config: TrainConfig,
    data: Data,
    path: Path,
    *,
    stop: Callable[[], int | None] = never,
    validation: ImageTable | None = None,
    log: Callable[..., None] = lambda metrics, step: None,
) -> Training:
    """A training from the checkpoint if there is one, otherwise from the start."""
    counts = data.table.labels.bincount(minlength=data.num_classes)
    torch.manual_seed(config.seed)
    model = checkpoints.build_model(config, data.num_classes)
    if path.exists():
        state = checkpoints.load(path)
        model.load_state_dict(state.model)
    else:
        state = checkpoints.Checkpoint(
            config=asdict(config),
            training_digest="t",
            subset_digest="s",
            class_names=[str(label) for label in range(data.num_classes)],
            class_counts=counts.tolist(),
            mean=[0.3] * 3,
            std=[0.35] * 3,
            image_size=[8, 8],
            model={},
        )
    return Training(
        model=model.to(memory_format=torch.channels_last),
        config=config,
        table=data.table,
        validation=validation,
        mean=state.mean,
        std=state.std,
        class_counts=counts,
        dtype=resolve_precision(config.precision, data.table.images.device),
        state=state,
        path=path,
        log=log,
        stop_signal=stop,
    )


def fit(training: Training) -> Training:
    engine.fit([training])
    return training


def fit_stage1(training: Training) -> None:
    assert sum(1 for _ in engine.fit_stage1(training)) > 0


def fit_stage2(training: Training) -> None:
    assert sum(1 for _ in engine.fit_stage2(training)) > 0


def weights_of(training: Training) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in training.model.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names whose values differ in a single bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def measured(training: Training) -> list[dict[str, float]]:
    """The history without what depends on the clock."""
    return [
        {key: value for key, value in metrics.items() if key != "train/images_per_second"}
        for metrics in training.state.history
    ]


# ---- learning


@pytest.mark.parametrize("precision", PRECISIONS)
def test_32_images_are_learnt_by_heart_in_a_few_dozen_steps(precision, digit_images, tmp_path):
    data = digit_images.take(slice(64, 96))
    config = replace(
        DIGITS,
        **PLAIN,
        precision=precision,
        width=12,
        batch_size=16,
        stage1_epochs=36,
        stage1_learning_rate=0.01,
        stage1_warmup_start=0.01,
        stage2_epochs=20,
        stage2_learning_rate=0.5,
        stage2_batch_norm="eval",
        weight_decay=0.0,
        checkpoint_every=100,
    )
    training = prepare(config, data, tmp_path / "c.pt")
    assert accuracy_on(training, data.table, stage=1) < 0.5
    fit_stage1(training)
    assert accuracy_on(training, data.table, stage=1) == 1.0
    assert accuracy_on(training, data.table, stage=2) < 0.5
    fit_stage2(training)
    assert accuracy_on(training, data.table, stage=2) > 0.8


def test_one_step_is_stochastic_gradient_descent_with_momentum_and_weight_decay(
    digit_images, tmp_path
):
    config = replace(DIGITS, momentum=0.5, weight_decay=0.25)
    training = prepare(config, digit_images, tmp_path / "c.pt")
    weight = torch.nn.Parameter(torch.tensor([2.0, -4.0]))
    update = Update(training, [weight])
    update.set_learning_rate(0.5)
    update((weight * torch.tensor([1.0, 3.0])).sum())  # gradient (1, 3), with decay (1.5, 2)
    assert weight.tolist() == [2 - 0.75, -4 - 1.0]
    update((weight * 0).sum())  # decay (0.3125, -1.25), with momentum (1.0625, -0.25)
    assert weight.tolist() == [1.25 - 0.53125, -5 + 0.125]


def test_what_the_experts_share_learns_at_a_rate_of_its_own(digit_images, tmp_path):
    config = replace(DIGITS, momentum=0.0, weight_decay=0.0, trunk_learning_rate=0.25)
    training = prepare(config, digit_images, tmp_path / "c.pt")
    model = training.model
    parts = (model.stem[0], model.shared_stages[1][0].conv1, model.experts[1].last_stage[0].conv1)
    weights = [*(part.weight for part in parts), model.stage1_heads[0].weight]
    before = [weight.detach().clone() for weight in weights]
    update = Update(training, weights)
    update.set_learning_rate(0.5)
    update(sum(weight.sum() for weight in weights))  # gradient 1
    for weight, old, rate in zip(weights, before, (0.125, 0.125, 0.5, 0.5), strict=True):
        torch.testing.assert_close(weight.detach(), old - rate)
    assert update.rate == 0.5


FROZEN = TrainConfig(
    **PLAIN,
    network="resnet50",
    width=64,
    pretrained=True,  # without it nothing may be frozen; the weights here are random all the same
    trunk_learning_rate=0.0,
    num_experts=1,
    fusion=False,
    batch_size=8,
    stage1_epochs=1,
    stage2_epochs=1,
    warmup_epochs=0,
    averaging_epochs=1.0,
    precision="float32",
    device="cpu",
)


def test_a_frozen_trunk_does_not_change_in_a_single_bit(photographs, tmp_path):
    data = photographs.take(slice(72, 88))
    training = prepare(FROZEN, data, tmp_path / "c.pt", validation=data.table)
    before = weights_of(training)
    fit_stage1(training)
    between = weights_of(training)
    shared = {name for name in before if name.startswith(("stem", "shared_stages"))}
    heads = {"stage2_heads.0.weight"}
    assert changed(before, between) == before.keys() - shared - heads
    assert all(p.grad is None for p in training.model.trunk.parameters())
    fit_stage2(training)
    after = changed(between, weights_of(training))
    statistics = {n for n in before if "running_" in n or "num_batches_tracked" in n}
    assert after == heads | (statistics - shared)


def test_stage1_trains_everything_but_the_stage2_heads(digit_images, tmp_path):
    training = prepare(DIGITS, digit_images, tmp_path / "c.pt")
    before = weights_of(training)
    fit_stage1(training)
    names = changed(before, weights_of(training))
    assert names == {name for name in before if not name.startswith("stage2_heads")}


@pytest.mark.parametrize(("mode", "moving"), [("train", True), ("eval", False)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_stage2_changes_its_heads_and_running_statistics_only(
    mode, moving, precision, digit_images, tmp_path
):
    config = replace(DIGITS, stage2_batch_norm=mode, precision=precision, stage2_epochs=2)
    training = prepare(config, digit_images, tmp_path / "c.pt")
    fit_stage1(training)
    before = weights_of(training)
    fit_stage2(training)
    heads = {f"stage2_heads.{expert}.weight" for expert in (0, 1)}
    statistics = {n for n in before if "running_" in n or "num_batches_tracked" in n}
    assert len(statistics) > 100
    assert changed(before, weights_of(training)) == (heads | statistics if moving else heads)


def test_the_moving_average_by_hand():
    model = torch.nn.BatchNorm1d(1)
    average = Average(model, 0.75, None)
    model.weight.data.fill_(5.0)  # it started at 1
    model.running_mean.fill_(-4.0)  # at 0
    average.update()
    model.weight.data.fill_(2.0)
    average.update()
    kept = average.state_dict()
    assert kept["weight"].item() == (1 * 0.75 + 5 * 0.25) * 0.75 + 2 * 0.25
    assert kept["running_mean"].item() == -4 * 0.25 * 0.75 + -4 * 0.25
    assert "num_batches_tracked" not in kept
    going_on = Average(model, 0.75, {name: value.clone() for name, value in kept.items()})
    going_on.replace_model()
    assert model.weight.item() == kept["weight"].item()
    assert model.running_mean.item() == kept["running_mean"].item()


def test_stage1_ends_with_the_average_of_its_steps(digit_images, tmp_path):
    averaged = replace(DIGITS, averaging_epochs=2 / STEPS, stage1_epochs=1)
    training = prepare(averaged, digit_images, tmp_path / "c.pt")
    expected = training.model.state_dict()["stem.0.weight"].clone()
    plain = prepare(replace(averaged, averaging_epochs=0.0), digit_images, tmp_path / "plain.pt")
    for _ in engine.fit_stage1(plain):
        expected = 0.5 * expected + 0.5 * plain.model.state_dict()["stem.0.weight"]
    fit_stage1(training)
    torch.testing.assert_close(training.model.state_dict()["stem.0.weight"], expected)


def test_without_stage2_the_heads_of_stage1_are_deployed(digit_images, tmp_path):
    config = replace(DIGITS, stage2_epochs=0)
    training = fit(prepare(config, digit_images, tmp_path / "c.pt"))
    assert [metrics["stage"] for metrics in training.state.history] == [1, 1]
    written = checkpoints.load(tmp_path / "c.pt")
    assert written.finished
    for expert in (0, 1):
        one, two = (written.model[f"stage{s}_heads.{expert}.weight"] for s in (1, 2))
        assert torch.equal(one, two)


@pytest.mark.parametrize("changes", [{"fusion": False}, {"classifier": "linear"},
                                     {"stage1_objective": "balanced_softmax"},
                                     {"stage2_label_smoothing": 0.2},
                                     {"stage2_logit_adjustment": 1.5},
                                     {"stage2_scale": 20.0}], ids=str)  # fmt: skip
def test_options_of_model_and_losses_reach_the_training(changes, digit_images, tmp_path):
    usual = fit(prepare(DIGITS, digit_images, tmp_path / "usual.pt")).state.history
    other = fit(prepare(replace(DIGITS, **changes), digit_images, tmp_path / "c.pt")).state.history
    same_stage1 = next(iter(changes)).startswith("stage2")
    assert (usual[0]["train/loss"] == other[0]["train/loss"]) is same_stage1
    assert usual[-1]["train/loss"] != other[-1]["train/loss"]


def test_the_consistency_loss_is_logged_and_part_of_the_loss(photographs, tmp_path):
    config = replace(PHOTOGRAPHS, consistency_weight=0.5, stage1_epochs=1)
    (first, second) = fit(prepare(config, photographs, tmp_path / "c.pt")).state.history
    terms = [value for key, value in first.items() if key.startswith("train/loss_")]
    assert len(terms) == 4
    assert first["train/loss_consistency"] > 0
    assert first["train/loss"] == pytest.approx(sum(terms))
    assert "train/loss_consistency" not in second


def test_images_and_losses_are_mixed_in_pairs(photographs, tmp_path):
    config = replace(
        PHOTOGRAPHS, mixup_alpha=1.0, stage1_epochs=1, warmup_epochs=0, stage1_learning_rate=1e-30
    )
    training = prepare(config, photographs, tmp_path / "c.pt")
    mixup, loss, right = engine.Mixup(config, training.device), 0.0, 0.0
    training.model.train()
    batches = training.table.training_batches(config, training.mean, training.std, epoch=0)
    with torch.no_grad():
        for step, (images, targets) in enumerate(batches):
            mixup.draw(0, step)
            kept = mixup(torch.ones(()), torch.zeros(())).item()
            assert 0 < kept < 1
            logits = training.model(kept * images + (1 - kept) * images.flip(0), 1)
            for share, truth in ((kept, targets), (1 - kept, targets.flip(0))):
                loss += share * len(targets) * stage1_loss(logits, truth).total.item()
                right += share * int((logits.mean(dim=1).argmax(dim=1) == truth).sum())
    fit(training)
    first = training.state.history[0]
    assert first["train/loss"] == pytest.approx(loss / len(photographs.table), rel=1e-4)
    assert first["train/accuracy"] == pytest.approx(right / len(photographs.table), rel=1e-5)
    terms = [value for key, value in first.items() if key.startswith("train/loss_")]
    assert first["train/loss"] == pytest.approx(sum(terms))
    assert {key for key in first if key.startswith("train/loss")} == {*engine.STAGE1_TERMS}


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_how_much_an_image_keeps_of_itself(alpha):
    def kept(seed: int, epoch: int) -> Tensor:
        mixup = engine.Mixup(replace(DIGITS, mixup_alpha=alpha, seed=seed), torch.device("cpu"))
        shares = []
        for step in range(1000):
            mixup.draw(epoch, step)
            shares.append(mixup(torch.ones(()), torch.zeros(())))
        return torch.stack(shares)

    shares = kept(0, 0)
    assert shares.mean().item() == pytest.approx(0.5, abs=0.05)
    assert shares.var().item() == pytest.approx(0.25 / (2 * alpha + 1), rel=0.1)
    assert torch.equal(shares, kept(0, 0))
    assert (shares == kept(0, 1)).float().mean() < 0.1  # some are 1 to the last digit
    assert (shares == kept(1, 0)).float().mean() < 0.1


def test_several_trainings_end_as_each_would_alone(digit_images, tmp_path, never_stopped):
    configs = [DIGITS, replace(DIGITS, seed=1, stage1_epochs=1)]
    trainings = [
        prepare(config, digit_images, tmp_path / f"{config.seed}.pt") for config in configs
    ]
    engine.fit(trainings)
    for training in trainings:
        alone = never_stopped(training.config, digit_images)
        assert not changed(weights_of(alone), weights_of(training))
        assert measured(alone) == measured(training)


def test_a_training_that_diverges_does_not_stop_the_others(digit_images, tmp_path):
    broken = prepare(
        replace(DIGITS, stage1_warmup_start=1e20), digit_images, tmp_path / "broken.pt"
    )
    sound = prepare(DIGITS, digit_images, tmp_path / "sound.pt")
    with pytest.raises(DivergedError):
        engine.fit([broken, sound])
    assert checkpoints.load(tmp_path / "sound.pt").finished


def test_asked_to_stop_is_told_before_divergence(digit_images, tmp_path):
    broken = prepare(
        replace(DIGITS, stage1_warmup_start=1e20), digit_images, tmp_path / "broken.pt"
    )
    sound = prepare(DIGITS, digit_images, tmp_path / "sound.pt", stop=after(2))
    with pytest.raises(InterruptedTraining, match="epoch 0, step 2"):
        engine.fit([broken, sound])


def test_the_costs_of_each_epoch_are_kept(digit_images, tmp_path):
    path = tmp_path / "c.pt"
    with pytest.raises(InterruptedTraining):
        fit(prepare(DIGITS, digit_images, path, stop=after(3)))
    resumed = fit(prepare(DIGITS, digit_images, path))
    costs = checkpoints.load(path).costs
    assert len(costs) == len(resumed.state.history)
    for cost in costs:
        assert cost["trainings"] == 1
        assert cost["preparation_seconds"] == 0
        assert (cost["device"], cost["acceleration"], cost["fallbacks"]) == ("cpu", "none", [])
        assert 2**26 < cost["peak_memory_bytes"] < 2**36


def test_measuring_is_no_time_of_training(digit_images, tmp_path, monkeypatch):
    measured = engine.accuracy_on

    def slowly(*arguments):
        time.sleep(1.5)
        return measured(*arguments)

    monkeypatch.setattr(engine, "accuracy_on", slowly)
    config = replace(DIGITS, checkpoint_every=1)
    training = fit(prepare(config, digit_images, tmp_path / "c.pt", validation=digit_images.table))
    for metrics in training.state.history:
        assert "validation/accuracy" in metrics
        assert metrics["train/images_per_second"] > 110 / 1.5


def test_what_one_training_compiles_is_no_time_of_the_other(digit_images, tmp_path):
    preparation = Preparation()
    first, second = (prepare(DIGITS, digit_images, tmp_path / f"{i}.pt") for i in (0, 1))
    first.preparation = second.preparation = preparation
    began = second.now()
    preparation.seconds += 1e3
    assert began.seconds_until(second.now()) == 1e-6  # that is, less than nothing
    assert first.preparation_seconds == second.preparation_seconds == 0


def test_an_epoch_read_late_has_its_own_rate(digit_images, tmp_path, monkeypatch):
    """On a GPU an epoch is read while the next one runs, at another rate."""
    training, epochs = prepare(DIGITS, digit_images, tmp_path / "c.pt"), []
    monkeypatch.setattr(training, "read_later", epochs.append)
    fit(training)
    expected = [0.025, 0.15, 0.0375]
    assert [epoch.averages()["lr"] for epoch in epochs] == pytest.approx(expected)


def test_a_signal_stops_all_trainings_with_checkpoints(digit_images, tmp_path, never_stopped):
    configs = [DIGITS, replace(DIGITS, seed=1, stage1_epochs=1)]
    paths = [tmp_path / f"{config.seed}.pt" for config in configs]
    look = after(2)
    with pytest.raises(InterruptedTraining):
        engine.fit(
            [prepare(c, digit_images, p, stop=look) for c, p in zip(configs, paths, strict=True)]
        )
    assert [checkpoints.load(path).step for path in paths] == [2, 1]
    trainings = [prepare(c, digit_images, p) for c, p in zip(configs, paths, strict=True)]
    engine.fit(trainings)
    for training in trainings:
        alone = never_stopped(training.config, digit_images)
        assert not changed(weights_of(alone), weights_of(training))


@pytest.mark.slow
def test_a_compiled_training_is_the_plain_one_up_to_rounding(digit_images, tmp_path):
    # Small steps: with large ones rounding decides the loss after three of them already.
    config = replace(DIGITS, stage1_learning_rate=1e-5, stage1_warmup_start=1e-5)
    plain = fit(prepare(config, digit_images, tmp_path / "plain.pt"))
    training = prepare(config, digit_images, tmp_path / "compiled.pt")
    training.acceleration = "compile"
    fit(training)
    assert training.preparation_seconds > 0
    for ours, theirs in zip(training.state.history, plain.state.history, strict=True):
        for term in ("train/loss", "train/accuracy"):
            assert ours[term] == pytest.approx(theirs[term], rel=2e-3)
    first, last = plain.state.history[0], plain.state.history[config.stage1_epochs - 1]
    assert last["train/loss"] < 0.97 * first["train/loss"]  # and yet it learnt


def test_a_first_step_that_the_scaler_skips_leaves_a_momentum_of_zero(digit_images, tmp_path):
    training = prepare(DIGITS, digit_images, tmp_path / "c.pt")
    update = Update(training, training.model.parameters())
    buffers = [state["momentum_buffer"] for state in update.optimizer.state.values()]
    assert len(buffers) == len(list(training.model.parameters()))
    assert not any(buffer.any() for buffer in buffers)
    plain = Update(
        prepare(replace(DIGITS, momentum=0.0), digit_images, tmp_path / "d.pt"),
        training.model.parameters(),
    )
    assert not plain.optimizer.state


def test_each_part_of_the_network_is_compiled_once_for_all_its_likes(digit_images, tmp_path):
    model = prepare(replace(DIGITS, num_experts=3), digit_images, tmp_path / "c.pt").model
    parts = {id(part) for part in model.parts}
    covered = [p for part in model.parts for p in part.parameters()]
    heads = [p for h in (model.stage1_heads, model.stage2_heads) for p in h.parameters()]
    assert len(parts) == len(model.parts) == 1 + 2 * 5 + 3 * 5 + 3
    assert {id(p) for p in [*covered, *heads]} == {id(p) for p in model.parameters()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("acceleration", ["none", "cuda-graph", "compile"])
def test_a_gpu_trains_like_a_cpu_alone_and_side_by_side(
    acceleration, photographs, tmp_path, never_stopped, monkeypatch
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    # With the authors' weights of distillation, for two classes, a last bit changes losses by 4 %.
    config = replace(
        PHOTOGRAPHS, **PER_IMAGE, stage1_learning_rate=1e-5, stage1_warmup_start=1e-5,
        stage1_epochs=3, trunk_learning_rate=0.5, checkpoint_every=100,
    )  # fmt: skip
    table = ImageTable(photographs.table.images.cuda(), photographs.table.labels.cuda())
    trainings = []
    for seed in (0, 1):
        training = prepare(
            replace(config, seed=seed, mixup_alpha=float(seed)),
            Data(table, 2),
            tmp_path / f"{seed}.pt",
            validation=table,
        )
        training.model.cuda()
        training.acceleration = acceleration
        trainings.append(training)
    engine.fit(trainings)
    for training in trainings:
        alone = never_stopped(training.config, photographs)
        assert len(training.state.history) == 4
        for ours, theirs in zip(training.state.history, alone.state.history, strict=True):
            assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=3e-3)
            assert 0 < ours["train/images_per_second"] < 1e7
        assert checkpoints.load(training.path).finished


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("acceleration", ["none", "cuda-graph"])
def test_inside_an_epoch_nothing_waits_for_a_gpu(acceleration, photographs, tmp_path):
    table = ImageTable(photographs.table.images.cuda(), photographs.table.labels.cuda())
    config = replace(PHOTOGRAPHS, stage1_epochs=5, checkpoint_every=100, auto_augment=True)
    training = prepare(config, Data(table, 2), tmp_path / "c.pt")
    training.model.cuda()
    training.acceleration = acceleration
    steps, of_an_epoch = engine.fit_stage1(training), steps_per_epoch(110, config.batch_size)
    with training.on_stream():
        for _ in range(4 * of_an_epoch):  # until all sizes of batches are recorded
            next(steps)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(of_an_epoch):
                next(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- what is logged


def test_an_epoch_logs_these_metrics(digit_images, tmp_path):
    logged = []
    training = prepare(DIGITS, digit_images, tmp_path / "c.pt", log=lambda *x: logged.append(x))
    fit(training)
    of_both = {"epoch", "stage", "train/loss", "train/accuracy", "lr", "train/images_per_second"}
    terms = {"train/loss_cross_entropy", "train/loss_dkt", "train/loss_mutual"}
    assert [step for _, step in logged] == [0, 1, 2]
    assert [set(metrics) for metrics, _ in logged] == [of_both | terms] * 2 + [of_both]
    assert [(metrics["epoch"], metrics["stage"]) for metrics, _ in logged] == [
        (0, 1), (1, 1), (2, 2),
    ]  # fmt: skip
    assert [metrics for metrics, _ in logged] == training.state.history
    for metrics, _ in logged[:2]:
        assert metrics["train/loss"] == pytest.approx(sum(metrics[term] for term in terms))
    assert all(metrics["train/images_per_second"] > 0 for metrics, _ in logged)


def test_the_learning_rate_of_each_epoch_is_the_schedule_of_its_stage(digit_images, tmp_path):
    config = replace(DIGITS, stage1_epochs=4, stage2_epochs=3, warmup_epochs=2, batch_size=110)
    training = fit(prepare(config, digit_images, tmp_path / "c.pt"))
    first = {"epochs": 4, "peak": 0.15, "warmup_start": 0.025, "warmup_epochs": 2}
    second = {"epochs": 3, "peak": 0.1, "warmup_start": 0.0375, "warmup_epochs": 2}
    rates = [metrics["lr"] for metrics in training.state.history]
    assert rates == [learning_rate(e, **first) for e in range(4)] + [
        learning_rate(e, **second) for e in range(3)
    ]
    assert rates[:3] == pytest.approx([0.025, 0.0875, 0.15])


def test_either_stage_goes_down_in_steps_if_told(digit_images, tmp_path):
    config = replace(
        DIGITS, stage1_epochs=3, stage2_epochs=3, warmup_epochs=0, batch_size=110, schedule="step"
    )
    training = fit(prepare(config, digit_images, tmp_path / "c.pt"))
    rates = [metrics["lr"] for metrics in training.state.history]
    assert rates == pytest.approx([0.15, 0.015, 0.0015, 0.1, 0.01, 0.001])


def test_averages_are_over_images_not_batches(digit_images, tmp_path):
    still = 1e-30  # so that the weights stay what they are
    config = replace(
        DIGITS,
        stage1_epochs=1,
        warmup_epochs=0,
        stage1_learning_rate=still,
        stage2_learning_rate=still,
    )
    training = prepare(config, digit_images, tmp_path / "c.pt")
    one, two, correct = 0.0, 0.0, 0
    training.model.train()
    with torch.no_grad():
        for epoch, stage in ((0, 1), (1, 2)):
            for images, targets in training.table.training_batches(
                config, training.mean, training.std, epoch=epoch
            ):
                logits = training.model(images, stage)
                if stage == 1:
                    one += len(targets) * stage1_loss(logits, targets).total.item()
                    correct += int((logits.mean(dim=1).argmax(dim=1) == targets).sum())
                else:
                    loss = balanced_softmax(logits, targets, training.class_counts)
                    two += len(targets) * loss.item()
    fit(training)
    first, second = training.state.history
    assert first["train/loss"] == pytest.approx(one / 110, rel=1e-5)
    assert first["train/accuracy"] == correct / 110
    assert second["train/loss"] == pytest.approx(two / 110, rel=1e-5)


# ---- validation


def test_validation_is_looked_at_with_each_checkpoint_and_changes_nothing(digit_images, tmp_path):
    config = replace(DIGITS, stage1_epochs=3, stage2_epochs=3, checkpoint_every=2)
    held_out = digit_images.take(slice(80, 110)).table
    data = digit_images.take(slice(0, 80))
    without = fit(prepare(config, data, tmp_path / "without.pt"))
    looking = fit(prepare(config, data, tmp_path / "with.pt", validation=held_out))
    assert not changed(weights_of(without), weights_of(looking))
    looked_at = [m["epoch"] for m in looking.state.history if "validation/accuracy" in m]
    assert looked_at == [1, 2, 3, 5]  # every second epoch, and the last of each stage
    assert not any("validation/accuracy" in m for m in without.state.history)
    last = looking.state.history[-1]["validation/accuracy"]
    assert last == accuracy_on(looking, held_out, stage=2)
    assert 0 < last < 1


# ---- going on


@pytest.fixture(scope="session")
def never_stopped(digit_images, photographs, tmp_path_factory) -> Callable[..., Training]:
    """Trainings that nobody stopped, each made once."""
    done: dict[TrainConfig, Training] = {}

    def training_of(config: TrainConfig, data: Data) -> Training:
        if config not in done:
            path = tmp_path_factory.mktemp("never_stopped") / "c.pt"
            done[config] = fit(prepare(config, data, path))
        return done[config]

    return training_of


CASES = [
    ("digit_images", DIGITS),
    ("digit_images", replace(DIGITS, averaging_epochs=2.0)),
    ("photographs", replace(PHOTOGRAPHS, consistency_weight=1.0)),
    ("photographs", replace(PHOTOGRAPHS, mixup_alpha=1.0)),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("name", "config"), CASES, ids=["digits", "averaged", "consistent", "mixed"]
)
def test_stopped_after_every_single_step_it_ends_with_the_same_weights(
    name, config, precision, tmp_path, request, never_stopped
):
    data, config = request.getfixturevalue(name), replace(config, precision=precision)
    expected = never_stopped(config, data)
    places = []
    for _ in range(STEPS * EPOCHS - 1):
        training = prepare(config, data, tmp_path / "c.pt", stop=after(1))
        with pytest.raises(InterruptedTraining):
            fit(training)
        stopped = checkpoints.load(tmp_path / "c.pt")
        places.append((stopped.epoch, stopped.step))
    assert places == [
        (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2),
    ]  # fmt: skip
    training = fit(prepare(config, data, tmp_path / "c.pt", stop=after(1)))
    assert not changed(weights_of(expected), weights_of(training))
    assert measured(training) == measured(expected)
    written = checkpoints.load(tmp_path / "c.pt")
    assert written.finished
    assert not changed(weights_of(expected), written.model)


@pytest.mark.parametrize(
    ("looks", "place"),
    [
        pytest.param(2, "epoch 0, step 2", id="in stage 1"),
        pytest.param(3, "epoch 1, step 0", id="at the last step of an epoch"),
        pytest.param(4, "epoch 1, step 0", id="at an epoch's end"),
        pytest.param(8, "epoch 2, step 0", id="between the stages"),
        pytest.param(9, "epoch 2, step 1", id="in stage 2"),
    ],
)
def test_stopped_once_it_ends_with_the_same_weights(
    looks, place, digit_images, tmp_path, never_stopped
):
    path, expected = tmp_path / "c.pt", never_stopped(DIGITS, digit_images)
    with pytest.raises(InterruptedTraining, match=rf"signal 2 at {place}; wrote .*c\.pt") as caught:
        fit(prepare(DIGITS, digit_images, path, stop=after(looks, signal.SIGINT)))
    assert caught.value.signal_number == signal.SIGINT
    training = fit(prepare(DIGITS, digit_images, path))
    assert not changed(weights_of(expected), weights_of(training))
    assert measured(training) == measured(expected)


def test_stopped_in_one_number_format_it_goes_on_in_another(digit_images, tmp_path):
    with pytest.raises(InterruptedTraining):
        fit(prepare(DIGITS, digit_images, tmp_path / "c.pt", stop=after(2)))
    training = prepare(DIGITS, digit_images, tmp_path / "c.pt")
    training.dtype = torch.float16  # "auto" where there is no bfloat16; its scaler begins anew
    fit(training)
    assert checkpoints.load(tmp_path / "c.pt").scaler is None
    assert [math.isfinite(m["train/loss"]) for m in training.state.history] == [True] * EPOCHS


def test_stopped_with_two_rates_it_ends_with_the_same_weights(
    digit_images, tmp_path, never_stopped
):
    config = replace(DIGITS, trunk_learning_rate=0.5)
    expected = never_stopped(config, digit_images)
    with pytest.raises(InterruptedTraining, match="epoch 0, step 2"):
        fit(prepare(config, digit_images, tmp_path / "c.pt", stop=after(2)))
    rates = [group["lr"] for group in checkpoints.load(tmp_path / "c.pt").optimizer["param_groups"]]
    assert rates == pytest.approx([0.0125, 0.025])
    training = fit(prepare(config, digit_images, tmp_path / "c.pt"))
    assert not changed(weights_of(expected), weights_of(training))
    assert changed(weights_of(expected), weights_of(never_stopped(DIGITS, digit_images)))


def test_a_signal_at_the_very_end_comes_too_late_to_stop(digit_images, tmp_path, never_stopped):
    looks = (STEPS + 1) * EPOCHS - 1  # at the last step, one before the look at the epoch's end
    training = fit(prepare(DIGITS, digit_images, tmp_path / "c.pt", stop=after(looks)))
    assert checkpoints.load(tmp_path / "c.pt").finished
    assert not changed(weights_of(never_stopped(DIGITS, digit_images)), weights_of(training))


def test_a_finished_training_is_left_as_it_is(digit_images, tmp_path):
    path = tmp_path / "c.pt"
    finished = fit(prepare(DIGITS, digit_images, path))
    before = path.read_bytes()
    again = fit(prepare(DIGITS, digit_images, path))
    assert path.read_bytes() == before
    assert not changed(weights_of(finished), weights_of(again))
    assert again.state.history == finished.state.history


def test_other_seeds_give_other_weights(digit_images, tmp_path):
    one, two = (
        fit(prepare(replace(DIGITS, seed=seed), digit_images, tmp_path / f"{seed}.pt"))
        for seed in (1, 2)
    )
    names = changed(weights_of(one), weights_of(two))
    assert {name for name in names if name.endswith("weight")} == {
        name for name in weights_of(one) if name.endswith("weight")
    }


def test_checkpoints_are_written_when_due(digit_images, tmp_path):
    path, written = tmp_path / "c.pt", []

    def look(metrics, step) -> None:  # called before the epoch's own checkpoint is written
        written.append(checkpoints.load(path).epoch if path.exists() else None)

    config = replace(
        DIGITS, stage1_epochs=3, stage2_epochs=2, checkpoint_every=2, batch_size=110, width=1
    )
    fit(prepare(config, digit_images, path, log=look))
    assert written == [None, None, 2, 3, 4]
    assert checkpoints.load(path).epoch == 5


# ---- what can go wrong


def diverge(config: TrainConfig, data: Data, path: Path) -> tuple[DivergedError, bytes]:
    """Train until it diverges in the second epoch; the error and the first epoch's checkpoint."""
    with pytest.raises(InterruptedTraining):
        fit(prepare(config, data, path, stop=after(math.ceil(len(data.table) / config.batch_size))))
    good = path.read_bytes()
    with pytest.raises(DivergedError) as caught:
        fit(prepare(config, data, path))
    return caught.value, good


@pytest.mark.parametrize("precision", PRECISIONS)
def test_divergence_is_told_and_the_last_good_checkpoint_stays(precision, digit_images, tmp_path):
    config = replace(
        DIGITS, stage1_warmup_start=0.01, stage1_learning_rate=1e20, precision=precision,
        checkpoint_every=1,
    )  # fmt: skip
    error, good = diverge(config, digit_images, tmp_path / "c.pt")
    assert (error.epoch, error.step) == (1, 1)
    assert set(error.terms) == {
        "train/loss", "train/loss_cross_entropy", "train/loss_dkt", "train/loss_mutual",
    }  # fmt: skip
    assert not math.isfinite(error.terms["train/loss"])
    assert "not finite at epoch 1, step 1" in str(error)
    assert (tmp_path / "c.pt").read_bytes() == good
    kept = checkpoints.load(tmp_path / "c.pt")
    assert (kept.epoch, kept.step) == (1, 0)
    assert all(value.isfinite().all() for value in kept.model.values())


def test_weights_that_a_finite_loss_leaves_infinite_are_not_saved(digit_images, tmp_path):
    config = replace(
        DIGITS, stage1_warmup_start=0.01, stage1_learning_rate=3e38, batch_size=110,
        checkpoint_every=1,
    )  # fmt: skip
    error, good = diverge(config, digit_images, tmp_path / "c.pt")
    assert (error.epoch, error.step) == (1, 0)
    assert math.isfinite(error.terms["train/loss"])
    assert not math.isfinite(error.terms["weights"])
    assert (tmp_path / "c.pt").read_bytes() == good


def test_divergence_in_stage2_is_told(digit_images, tmp_path):
    config = replace(DIGITS, stage2_warmup_start=1e38, batch_size=20)
    with pytest.raises(DivergedError) as caught:
        fit(prepare(config, digit_images, tmp_path / "c.pt"))
    assert caught.value.epoch == 2
    assert checkpoints.load(tmp_path / "c.pt").epoch == 2


def test_a_stop_does_not_save_a_diverged_state(digit_images, tmp_path):
    config = replace(DIGITS, stage1_warmup_start=1e20)
    with pytest.raises(DivergedError):
        fit(prepare(config, digit_images, tmp_path / "c.pt", stop=after(2)))
    assert not (tmp_path / "c.pt").exists()

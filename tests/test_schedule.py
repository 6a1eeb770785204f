"""Learning rates against the authors' and by hand."""

from functools import partial

import pytest

from shike_core.config import TrainConfig
from shike_core.schedule import learning_rate


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_defaults_are_the_rates_of_the_authors(reference, stage) -> None:
    config = TrainConfig()
    epochs = getattr(config, f"{stage}_epochs")
    rate = partial(
        learning_rate,
        epochs=epochs,
        peak=getattr(config, f"{stage}_learning_rate"),
        warmup_start=getattr(config, f"{stage}_warmup_start"),
        warmup_epochs=config.warmup_epochs,
    )
    ours = [rate(epoch) for epoch in range(epochs)]
    assert ours == pytest.approx(reference[f"lr.{stage}"].tolist(), rel=1e-5)


def test_by_hand() -> None:
    rates = [
        learning_rate(epoch, epochs=6, peak=1.0, warmup_start=0.2, warmup_epochs=2)
        for epoch in range(6)
    ]
    cosine = 2**-0.5  # of a quarter of pi
    assert rates == pytest.approx([0.2, 0.6, 1.0, (1 + cosine) / 2, 0.5, (1 - cosine) / 2])


def test_without_warmup_the_first_epoch_has_the_peak() -> None:
    assert learning_rate(0, epochs=3, peak=0.7, warmup_start=0.1, warmup_epochs=0) == 0.7


@pytest.mark.parametrize("epochs", [1, 3, 5])
def test_a_stage_shorter_than_its_warmup_stays_below_the_peak(epochs) -> None:
    rates = [
        learning_rate(epoch, epochs=epochs, peak=0.15, warmup_start=0.025, warmup_epochs=5)
        for epoch in range(epochs)
    ]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.125][:epochs])


def test_steps_to_a_tenth_after_each_third() -> None:
    """Places-LT: 30 epochs, steps at 10 and 20."""
    rates = [
        learning_rate(
            epoch, epochs=30, peak=0.01, warmup_start=0.1, warmup_epochs=0, schedule="step"
        )
        for epoch in range(30)
    ]
    assert rates == [0.01] * 10 + [0.001] * 10 + [0.0001] * 10


def test_steps_of_a_length_that_is_no_multiple_of_three_and_a_warmup_before_them() -> None:
    rates = [
        learning_rate(
            epoch, epochs=10, peak=1.0, warmup_start=0.2, warmup_epochs=2, schedule="step"
        )
        for epoch in range(10)
    ]
    assert rates == pytest.approx([0.2, 0.6, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01])


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_a_warmup_as_long_as_the_stage_has_no_way_down(schedule) -> None:
    rates = [
        learning_rate(
            epoch, epochs=2, peak=1.0, warmup_start=0.5, warmup_epochs=2, schedule=schedule
        )
        for epoch in range(2)
    ]
    assert rates == [0.5, 0.75]

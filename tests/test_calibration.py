"""The temperature, against logits of which it is known."""

import math

import pytest
import torch

from shike_core.calibration import LARGEST, fit_temperature
from shike_core.metrics import expected_calibration_error


def drawn(images: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and targets drawn from exactly the probabilities that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, classes, generator=generator)
    targets = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)
    return logits, targets


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_the_temperature_of_overconfident_and_of_timid_logits_is_found(temperature):
    logits, targets = drawn(40_000, 8)
    found = fit_temperature(temperature * logits, targets)
    assert found == pytest.approx(temperature, rel=0.03)


def test_it_lowers_the_calibration_error_and_changes_no_answer():
    logits, targets = drawn(5000, 10)
    sure = 4 * logits
    scaled = sure / fit_temperature(sure, targets)
    before, after = (expected_calibration_error(z, targets, 15) for z in (sure, scaled))
    assert after < before / 4
    assert (scaled.argmax(dim=1) == sure.argmax(dim=1)).all()


def test_it_is_the_minimum_of_the_negative_log_likelihood():
    logits, targets = drawn(300, 5, seed=3)
    found = fit_temperature(logits.half().float(), targets)

    def cost(temperature: float) -> float:
        scaled = logits.half().double() / temperature
        return float(torch.nn.functional.cross_entropy(scaled, targets))

    assert cost(found) < min(cost(0.99 * found), cost(1.01 * found))


def test_a_model_that_is_always_right_or_always_wrong_gets_an_end():
    logits = 5 * torch.eye(3)
    assert fit_temperature(logits, torch.arange(3)) == pytest.approx(1 / LARGEST)
    assert fit_temperature(logits, torch.tensor([1, 2, 0])) == pytest.approx(LARGEST)
    assert math.isfinite(fit_temperature(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("logits", "targets"),
    [(torch.zeros(0, 3), torch.zeros(0).long()), (torch.zeros(2, 3), torch.zeros(3).long())],
)
def test_nothing_to_fit_is_refused(logits, targets):
    with pytest.raises(ValueError, match="give no temperature"):
        fit_temperature(logits, targets)

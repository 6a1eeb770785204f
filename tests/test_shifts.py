"""Weighted accuracies, against test sets that are really drawn so."""

import numpy as np
import pytest
import torch

from shike_core.shifts import FACTORS, accuracy_under_shifts, class_priors

COUNTS = np.array([40, 500, 5, 120])


def answers(images: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    targets = torch.arange(4).repeat_interleave(images)
    logits = torch.randn(len(targets), 4, generator=generator)
    logits[torch.arange(len(targets)), targets] += torch.tensor([0.2, 3.0, 0.5, 1.0])[targets]
    return logits, targets


def test_priors_follow_the_size_in_training():
    priors = class_priors(COUNTS, 8)
    assert priors.sum() == pytest.approx(1)
    assert priors[[1, 3, 0, 2]] / priors[2] == pytest.approx([8, 4, 2, 1])
    assert class_priors(COUNTS, 1 / 8)[[1, 3, 0, 2]] / priors[1] == pytest.approx(
        np.array([1, 2, 4, 8]) / 8
    )
    assert class_priors(COUNTS, 1) == pytest.approx([0.25] * 4)
    assert class_priors(np.array([7]), 50) == pytest.approx([1])


def test_the_rows_go_from_forward_to_backward():
    rows = accuracy_under_shifts(*answers(), COUNTS)
    names = [(row["name"], row["factor"]) for row in rows]
    forward = [("forward", f) for f in reversed(FACTORS)]
    assert names == [*forward, ("uniform", 1), *(("backward", f) for f in FACTORS)]
    by_class = [
        float((z.argmax(dim=1) == y).double().mean())
        for z, y in ((answers()[0][answers()[1] == k], k) for k in range(4))
    ]
    assert rows[5]["accuracy"] == pytest.approx(np.mean(by_class))
    assert rows[5]["corrected_accuracy"] == rows[5]["accuracy"]
    assert rows[0]["accuracy"] == pytest.approx(class_priors(COUNTS, 50) @ by_class)
    # The class that is largest in training is the easiest one here.
    assert rows[0]["accuracy"] > rows[5]["accuracy"] > rows[-1]["accuracy"]


def test_a_weighted_test_set_stands_for_one_that_is_drawn_so():
    logits, targets = answers(images=400)
    priors = class_priors(COUNTS, 25)
    (row,) = [
        row
        for row in accuracy_under_shifts(logits, targets, COUNTS)
        if (row["name"], row["factor"]) == ("forward", 25)
    ]
    generator = np.random.default_rng(0)
    labels = generator.choice(4, size=40_000, p=priors)
    drawn = torch.from_numpy(labels * 400 + generator.integers(400, size=len(labels)))
    for z, key in (
        (logits, "accuracy"),
        (logits + torch.tensor(priors).log(), "corrected_accuracy"),
    ):
        measured = (z[drawn].argmax(dim=1) == targets[drawn]).double().mean()
        assert row[key] == pytest.approx(float(measured), abs=0.01)


def test_to_know_the_priors_helps_a_model_whose_probabilities_are_right():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(40_000, 4, generator=generator)
    targets = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)
    for row in accuracy_under_shifts(logits, targets, COUNTS):
        if row["name"] != "uniform":
            assert row["corrected_accuracy"] > row["accuracy"]


def test_a_class_without_test_images_is_left_out_of_the_mix():
    logits, targets = answers()
    kept = targets != 3
    rows = accuracy_under_shifts(logits[kept], targets[kept], COUNTS)
    by_class = [float((logits[targets == k].argmax(dim=1) == k).double().mean()) for k in (0, 1, 2)]
    assert rows[5]["accuracy"] == pytest.approx(np.mean(by_class))
    assert rows[0]["accuracy"] == pytest.approx(class_priors(COUNTS[:3], 50) @ by_class)


@pytest.mark.parametrize("logit_adjustment", [0.0, 1.1, 1.25])
def test_what_training_left_in_the_logits_is_taken_out(logit_adjustment):
    logits, targets = answers()
    # Added in training, so that the logits are those without it.
    trained = logits.double() + (1 - logit_adjustment) * torch.tensor(COUNTS).log()
    balanced = accuracy_under_shifts(logits, targets, COUNTS)
    told = accuracy_under_shifts(trained, targets, COUNTS, logit_adjustment)
    for ours, theirs in zip(told, balanced, strict=True):
        assert ours["corrected_accuracy"] == theirs["corrected_accuracy"]
    assert [row["accuracy"] for row in told] != [row["accuracy"] for row in balanced]

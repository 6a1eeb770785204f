"""The model card: numbers by hand, names that are Markdown, what is not known."""

import numpy as np
import pytest
import torch

from shike_core.card import LICENCES, UNKNOWN_LICENCE, model_card, shortened
from shike_core.evaluate import measure
from shike_core.recipes import RECIPES, recipe_named


@pytest.fixture
def report() -> dict:
    labels = torch.arange(3).repeat_interleave(20)
    answers = torch.where(torch.arange(60) % 20 < 15, labels, (labels + 1) % 3)
    logits = 3.0 * torch.nn.functional.one_hot(answers, 3)[:, None]
    names = ["*bold* | <b>", "dog", "eel"]
    return measure(logits, labels, np.array([150, 50, 40]), names, 15)


def test_numbers_by_hand(report) -> None:
    card = model_card(report, "pets", "7", "abc")
    assert card.startswith("# pets, version 7\n")
    assert "| overall | 75.0 | 62.8 to 84.2 |" in card
    assert "| many-shot | 75.0 | 53.1 to 88.8 |" in card
    assert "few-shot |" not in card  # there are no such classes
    assert "\\*bold\\* \\| \\<b\\> (75 %, 150 training images)" in card
    assert UNKNOWN_LICENCE in card
    assert "None" not in card


def test_what_is_known_is_told(report) -> None:
    recipe = recipe_named("digits-lt")
    report["subset"] = {
        "rule": {"dataset": "digits", "imbalance_factor": 20.0, "selection": "first"}
    }
    report["train"] = {"seed": 3, "num_experts": 3, "width": recipe.train.width}
    report["export"] = {"weights_digest": "f" * 64}
    report["metrics"]["test/scaled/expected_calibration_error"] = 0.0123
    decision = {"alias": "challenger", "reasons": ["it is worse"]}
    card = model_card(report, "pets", "7", "abc", decision, commit="0123456789abcdef")
    for text in (
        "**Challenger**\n\n- it is worse", "digits, imbalance factor 20, images kept: first: 240",
        "from 150 down to 40 a class", LICENCES["digits"], "seed 3", "code `0123456789ab`",
        "Weights `ffffffffffffffff`", 'load_model("models:/pets/7")',
        "and 1.2 % with the temperature",
    ):  # fmt: skip
        assert text in card


def test_a_set_that_stays_as_it_is_has_no_selection(report) -> None:
    report["subset"] = {
        "rule": {"dataset": "imagenet_lt", "imbalance_factor": 0.0, "selection": "first"}
    }
    card = model_card(report, "pets", "7", "abc")
    assert "imbalance factor of the set itself: 240 training images" in card


def test_unequal_test_images_are_not_called_equal(report) -> None:
    equal = "as many test images of each class"
    assert equal in model_card(report, "pets", "7", "abc")
    report["per_class"][0]["test_images"] += 1
    assert equal not in model_card(report, "pets", "7", "abc")


def test_every_source_of_a_recipe_has_its_terms() -> None:
    sources = {recipe_named(name).subset.dataset for name in RECIPES}
    assert sources <= set(LICENCES)


def test_a_long_card_ends_with_a_whole_section_and_a_pointer(report) -> None:
    card = model_card(report, "pets", "7", "abc")
    short = shortened(card, 900, "over there")
    assert len(short) <= 900
    assert short.endswith("\n\nThe whole card: over there\n")
    kept = short.removesuffix("\n\nThe whole card: over there\n")
    assert card.startswith(kept + "\n\n## ")
    assert shortened(card, 5000, "over there") == card
    assert len(shortened("x" * 100, 50, "there")) == 50

"""Whether a model becomes champion: every rule, on numbers."""

from dataclasses import replace

import pytest

from shike_core.config import RegisterConfig
from shike_core.gate import decide, shot_groups_digest

STRICT = RegisterConfig(model_name="a model")
MARGINS = RegisterConfig(model_name="a model", max_accuracy_drop=0.01, max_few_shot_drop=0.1)


def a_model(
    accuracy: float, few_shot: float | None = None, weights: str = "w", test: str = "t" * 64
):
    metrics = {"test/accuracy": accuracy}
    if few_shot is not None:
        metrics["test/few_shot/accuracy"] = few_shot
    return {"weights_digest": weights, "test_digest": test, "metrics": metrics}


def a_champion(*args, **kwargs):
    return {"version": "7", **a_model(*args, **kwargs, weights="champion's")}


def test_the_first_model_is_champion() -> None:
    candidate = a_model(0.1)
    decision = decide(STRICT, candidate, None)
    assert decision.alias == "champion"
    assert decision.reasons == ["there is no champion yet"]
    assert (decision.candidate, decision.champion) == (candidate, None)


def test_a_better_model_opens_the_gate() -> None:
    candidate, champion = a_model(0.6, 0.4), a_champion(0.5, 0.3)
    decision = decide(STRICT, candidate, champion)
    assert decision.alias == "champion"
    assert decision.reasons == [
        "test/accuracy 0.6000 is not below the champion's 0.5000",
        "test/few_shot/accuracy 0.4000 is not below the champion's 0.3000",
    ]
    assert (decision.candidate, decision.champion) == (candidate, champion)


@pytest.mark.parametrize(
    ("accuracy", "few_shot", "rule"),
    [(0.49, 0.9, "test/accuracy"), (0.9, 0.29, "test/few_shot/accuracy")],
)
def test_falling_in_either_measure_shuts_it(accuracy, few_shot, rule) -> None:
    decision = decide(STRICT, a_model(accuracy, few_shot), a_champion(0.5, 0.3))
    assert decision.alias == "challenger"
    assert len(decision.reasons) == 2
    (refusal,) = [reason for reason in decision.reasons if "may not fall" in reason]
    assert refusal.startswith(rule)
    assert refusal.endswith("may not fall by 0.0100, margin 0")


def test_equal_models_pass_without_a_margin() -> None:
    assert decide(STRICT, a_model(0.5, 0.3), a_champion(0.5, 0.3)).alias == "champion"


@pytest.mark.parametrize("champion", [hundredth / 100 for hundredth in range(11, 101)])
def test_a_fall_by_just_the_margin_passes_and_by_an_image_more_does_not(champion) -> None:
    few_shot = round(champion - 0.1, 2)  # the difference is not 0.1 for every float
    accuracy = round(champion - 0.01, 2)
    best = a_champion(champion, champion)
    assert decide(MARGINS, a_model(accuracy, few_shot), best).alias == "champion"
    image = 1e-4
    assert decide(MARGINS, a_model(accuracy - image, few_shot), best).alias == "challenger"
    assert decide(MARGINS, a_model(accuracy, few_shot - image), best).alias == "challenger"


def test_the_same_weights_pass_whatever_else_is_said() -> None:
    champion = {"version": "7", **a_model(0.5, 0.3, weights="w", test="o" * 64)}
    decision = decide(STRICT, a_model(0.1, 0.1, weights="w"), champion)
    assert decision.alias == "champion"
    assert decision.reasons == ["these are the weights of the champion, version 7"]


def test_shot_groups_of_other_classes_cannot_be_compared() -> None:
    tail = [{"shot_group": group} for group in ("many_shot", "few_shot")]
    groups = [shot_groups_digest(rows) for rows in (tail, tail[::-1])]
    champion = a_champion(0.5, 0.3) | {"shot_groups": groups[0]}
    better = a_model(0.6, 0.4)
    assert decide(STRICT, better | {"shot_groups": groups[0]}, champion).alias == "champion"
    other = better | {"shot_groups": groups[1]}
    decision = decide(STRICT, other, champion)
    assert (decision.alias, decision.decided_by) == ("challenger", "max_few_shot_drop")
    assert "is of other classes than the champion's, version 7" in decision.reasons[-1]
    free = replace(STRICT, max_few_shot_drop=1.0)
    assert decide(free, other, champion).alias == "champion"
    assert decide(STRICT, other, a_champion(0.5, 0.3)).alias == "champion"  # an older version


def test_weights_that_were_taken_back_stay_back() -> None:
    champion = a_champion(0.5, 0.3) | {"rolled_back": {"w": "9"}}
    decision = decide(STRICT, a_model(0.9, 0.9, weights="w"), champion)
    assert (decision.alias, decision.decided_by) == ("challenger", "rolled back")
    assert "the weights of version 9" in decision.reasons[0]
    assert decide(STRICT, a_model(0.9, 0.9, weights="v"), champion).alias == "champion"


def test_other_test_images_cannot_be_compared() -> None:
    decision = decide(STRICT, a_model(0.9, 0.9), a_champion(0.1, 0.1, test="o" * 64))
    assert decision.alias == "challenger"
    assert decision.reasons == [
        "the champion, version 7, was measured on other test images "
        "(oooooooooooo, not tttttttttttt): the two cannot be compared"
    ]


@pytest.mark.parametrize(("new", "old"), [(None, 0.3), (0.3, None), (None, None)])
@pytest.mark.parametrize(("accuracy", "alias"), [(0.6, "champion"), (0.4, "challenger")])
def test_without_few_shot_classes_overall_accuracy_decides(new, old, accuracy, alias) -> None:
    decision = decide(STRICT, a_model(accuracy, new), a_champion(0.5, old))
    assert decision.alias == alias
    assert decision.reasons[1] == "test/few_shot/accuracy is not known of both: not compared"


def test_accuracy_of_the_tail_is_not_traded_for_that_of_the_head() -> None:
    champion = a_champion(0.5, 0.3)
    better = a_model(0.6, 0.29)
    better["metrics"]["test/many_shot/accuracy"] = 0.9
    decision = decide(STRICT, better, champion)
    assert (decision.alias, decision.decided_by) == ("challenger", "max_few_shot_drop")
    assert [(rule.name, rule.holds) for rule in decision.rules] == [
        ("max_accuracy_drop", True), ("max_few_shot_drop", False),
    ]  # fmt: skip


@pytest.mark.parametrize("group", ["medium_shot", "many_shot"])
def test_the_other_groups_are_free_unless_asked_for(group) -> None:
    candidate, champion = a_model(0.6, 0.4), a_champion(0.5, 0.3)
    candidate["metrics"][f"test/{group}/accuracy"] = 0.5
    champion["metrics"][f"test/{group}/accuracy"] = 0.7
    assert decide(STRICT, candidate, champion).alias == "champion"
    careful = RegisterConfig(model_name="a model", **{f"max_{group}_drop": 0.1})
    decision = decide(careful, candidate, champion)
    assert (decision.alias, decision.decided_by) == ("challenger", f"max_{group}_drop")
    assert (decision.rules[-1].candidate, decision.rules[-1].champion) == (0.5, 0.7)
    assert decision.rules[-1].limit == 0.1


@pytest.mark.parametrize("champion", [None, a_champion(0.1, 0.1)])
def test_a_minimum_holds_for_the_first_model_too(champion) -> None:
    policy = RegisterConfig(model_name="a model", min_accuracy=0.5, min_few_shot_accuracy=0.3)
    assert decide(policy, a_model(0.5, 0.3), champion).alias == "champion"
    decision = decide(policy, a_model(0.49, 0.4), champion)
    assert (decision.alias, decision.decided_by) == ("challenger", "min_accuracy")
    assert decision.reasons[:2] == [
        "test/accuracy 0.4900 is below the minimum 0.5",
        "test/few_shot/accuracy 0.4000 reaches the minimum 0.3",
    ]
    decision = decide(policy, a_model(0.9), champion)
    assert decision.decided_by == "min_few_shot_accuracy"
    assert decision.reasons[1].endswith("is not known, so it cannot be the 0.3 that is asked for")


def test_every_class_alike_if_asked_for() -> None:
    policy = RegisterConfig(model_name="a model", metric="mean_class_accuracy")
    candidate, champion = a_model(0.4, 0.3), a_champion(0.5, 0.3)
    candidate["metrics"]["test/mean_class_accuracy"] = 0.45
    champion["metrics"]["test/mean_class_accuracy"] = 0.44
    assert decide(policy, candidate, champion).alias == "champion"
    assert decide(STRICT, candidate, champion).alias == "challenger"


@pytest.mark.parametrize("lost", [{"test_digest": ""}, {"metrics": {}}])
def test_a_champion_of_whom_nothing_is_known_is_not_replaced(lost) -> None:
    decision = decide(STRICT, a_model(0.9, 0.9), a_champion(0.1, 0.1) | lost)
    assert (decision.alias, decision.decided_by) == ("challenger", "unknown champion")
    (reason,) = decision.reasons
    assert "does not say how good the champion, version 7, is" in reason
    assert reason.endswith("evaluate and register it again, or remove the alias champion")

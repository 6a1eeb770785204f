"""Whether a new model may replace the champion: a pure comparison of numbers."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shike_core.config import RegisterConfig

ROUNDING = 1e-6
"""By how much an accuracy may miss its margin: less than an image, more than rounding errors."""


@dataclass(frozen=True)
class Rule:
    """One rule of the policy, and what came of it."""

    name: str
    """The field of the policy, such as ``max_few_shot_drop``, or what else decided."""
    holds: bool
    reason: str
    """One sentence with the numbers."""
    metric: str = ""
    candidate: float | None = None
    champion: float | None = None
    limit: float | None = None
    """The margin or the minimum."""


@dataclass(frozen=True)
class Decision:
    """The alias a model gets, and why."""

    alias: str
    """``champion`` or ``challenger``."""
    decided_by: str
    """Name of the first rule that does not hold, or ``all rules hold``, or what made them idle."""
    reasons: list[str]
    """One sentence for each rule that was looked at."""
    candidate: dict[str, Any]
    champion: dict[str, Any] | None
    rules: list[Rule] = field(default_factory=list)


def shot_groups_digest(per_class: Iterable[Mapping[str, Any]]) -> str:
    """Tells apart which classes are many-, medium- and few-shot.

    Args:
        per_class: rows of a report, in the order of the labels.
    """
    groups = " ".join(str(row["shot_group"]) for row in per_class)
    return hashlib.sha256(groups.encode("ascii")).hexdigest()[:16]


def decide(
    config: RegisterConfig, candidate: Mapping[str, Any], champion: Mapping[str, Any] | None
) -> Decision:
    """Compare a candidate with the present champion on the same test images.

    Args:
        config: the policy.
        candidate: ``test_digest``, ``weights_digest``, ``metrics`` and, by `shot_groups_digest`,
            ``shot_groups`` of the new model.
        champion: the same of the champion, its ``version``, and ``rolled_back``: by their digests,
            weights that were champion and taken back, with their version; None if there is none.
    """
    rules = list(_rules(config, candidate, champion))
    broken = [rule.name for rule in rules if not rule.holds]
    alone = rules[0].name if len(rules) == 1 else "all rules hold"
    return Decision(
        alias="challenger" if broken else "champion",
        decided_by=broken[0] if broken else alone,
        reasons=[rule.reason for rule in rules],
        candidate=dict(candidate),
        champion=dict(champion) if champion else None,
        rules=rules,
    )


def _rules(
    config: RegisterConfig, candidate: Mapping[str, Any], champion: Mapping[str, Any] | None
) -> Iterator[Rule]:
    if champion and champion["weights_digest"] == candidate["weights_digest"]:
        same = f"these are the weights of the champion, version {champion['version']}"
        yield Rule("same weights", True, same)
        return
    if taken_back := (champion or {}).get("rolled_back", {}).get(candidate["weights_digest"]):
        yield Rule(
            "rolled back",
            False,
            f"these are the weights of version {taken_back}, which was champion and was taken "
            "back; to have it again, give it the alias champion by hand",
        )
        return
    overall = f"test/{config.metric}"
    for name, key in (
        ("min_accuracy", overall),
        ("min_few_shot_accuracy", "test/few_shot/accuracy"),
    ):
        if minimum := getattr(config, name):
            yield _minimum(name, key, minimum, candidate["metrics"].get(key))
    if champion is None:
        yield Rule("no champion", True, "there is no champion yet")
        return
    version = champion["version"]
    if not champion["test_digest"] or overall not in champion["metrics"]:
        yield Rule(
            "unknown champion",
            False,
            f"the registry does not say how good the champion, version {version}, is or on which "
            "test images (its tags test_digest and metrics), so nothing can be compared with it: "
            "evaluate and register it again, or remove the alias champion",
        )
        return
    if champion["test_digest"] != candidate["test_digest"]:
        yield Rule(
            "same test images",
            False,
            f"the champion, version {version}, was measured on other test images "
            f"({champion['test_digest'][:12]}, not {candidate['test_digest'][:12]}): "
            "the two cannot be compared",
        )
        return
    for name, key in (
        ("max_accuracy_drop", overall),
        ("max_few_shot_drop", "test/few_shot/accuracy"),
        ("max_medium_shot_drop", "test/medium_shot/accuracy"),
        ("max_many_shot_drop", "test/many_shot/accuracy"),
    ):
        margin = getattr(config, name)
        if margin < 1 and key != overall and _other_groups(candidate, champion):
            yield Rule(
                name,
                False,
                f"{key} is of other classes than the champion's, version {version}, which was "
                "trained on other numbers of images, so the two cannot be compared: register under "
                f"another name, or set {name} to 1",
                key,
                limit=margin,
            )
        elif margin < 1:
            yield _margin(
                name, key, margin, candidate["metrics"].get(key), champion["metrics"].get(key)
            )


def _other_groups(candidate: Mapping[str, Any], champion: Mapping[str, Any]) -> bool:
    """Whether both are known and differ; older versions do not tell theirs."""
    of_both = [side.get("shot_groups", "") for side in (candidate, champion)]
    return all(of_both) and of_both[0] != of_both[1]


def _minimum(name: str, key: str, minimum: float, new: float | None) -> Rule:
    if new is None:
        reason = f"{key} is not known, so it cannot be the {minimum:g} that is asked for"
        return Rule(name, False, reason, key, limit=minimum)
    holds = new >= minimum - ROUNDING
    reason = f"{key} {new:.4f} {'reaches' if holds else 'is below'} the minimum {minimum:g}"
    return Rule(name, holds, reason, key, new, limit=minimum)


def _margin(name: str, key: str, margin: float, new: float | None, old: float | None) -> Rule:
    if new is None or old is None:
        # A set without few-shot classes has no such number; the overall one is there.
        holds = name != "max_accuracy_drop"
        reason = f"{key} is not known of both: not compared"
        return Rule(name, holds, reason, key, new, old, margin)
    holds = old - new <= margin + ROUNDING
    reason = (
        f"{key} {new:.4f} against the champion's {old:.4f}: "
        f"{'may' if holds else 'may not'} fall by {old - new:.4f}, margin {margin:g}"
        if new < old
        else f"{key} {new:.4f} is not below the champion's {old:.4f}"
    )
    return Rule(name, holds, reason, key, new, old, margin)

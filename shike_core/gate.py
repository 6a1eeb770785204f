"""Whether a new model may replace the champion: a pure comparison of numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shike_core.config import RegisterConfig

ROUNDING = 1e-6
"""By how much an accuracy may miss its margin: less than an image, more than rounding errors."""


@dataclass(frozen=True)
class Decision:
    """The alias a model gets, and why."""

    alias: str
    """``champion`` or ``challenger``."""
    reasons: list[str]
    """One sentence for each rule that was looked at."""
    candidate: dict[str, Any]
    champion: dict[str, Any] | None


def decide(
    config: RegisterConfig, candidate: Mapping[str, Any], champion: Mapping[str, Any] | None
) -> Decision:
    """Compare a candidate with the present champion on the same test images.

    Args:
        config: by how much overall and few-shot accuracy may fall.
        candidate: ``test_digest``, ``weights_digest`` and ``metrics`` of the new model.
        champion: the same of the champion, or None if there is none.
    """
    allowed, reasons = _compare(config, candidate, champion)
    return Decision(
        alias="champion" if allowed else "challenger",
        reasons=reasons,
        candidate=dict(candidate),
        champion=dict(champion) if champion else None,
    )


def _compare(
    config: RegisterConfig, candidate: Mapping[str, Any], champion: Mapping[str, Any] | None
) -> tuple[bool, list[str]]:
    if champion is None:
        return True, ["there is no champion yet"]
    if champion["weights_digest"] == candidate["weights_digest"]:
        return True, [f"these are the weights of the champion, version {champion['version']}"]
    if champion["test_digest"] != candidate["test_digest"]:
        return False, [
            f"the champion, version {champion['version']}, was measured on other test images "
            f"({champion['test_digest'][:12]}, not {candidate['test_digest'][:12]}): "
            "the two cannot be compared"
        ]
    allowed, reasons = True, []
    for key, margin in (
        ("test/accuracy", config.max_accuracy_drop),
        ("test/few_shot/accuracy", config.max_few_shot_drop),
    ):
        if key not in candidate["metrics"] or key not in champion["metrics"]:
            reasons.append(f"{key} is not known of both: not compared")
            continue
        new, old = candidate["metrics"][key], champion["metrics"][key]
        holds = old - new <= margin + ROUNDING
        allowed = allowed and holds
        reasons.append(
            f"{key} {new:.4f} against the champion's {old:.4f}: "
            f"{'may' if holds else 'may not'} fall by {old - new:.4f}, margin {margin:g}"
            if new < old
            else f"{key} {new:.4f} is not below the champion's {old:.4f}"
        )
    return allowed, reasons

"""Figures of repeated measurements."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

PLAIN = "plain"
"""The form that ratios are to."""
Report = dict[str, Any]


def summary(runs: Sequence[float]) -> Report:
    """Median and spread."""
    return {
        "median": statistics.median(runs),
        "lowest": min(runs),
        "highest": max(runs),
        "runs": list(runs),
    }


def ratios(runs: Mapping[str, Mapping[str, Sequence[float]]]) -> Report:
    """Every form's figure over the plain form's in the same round, by part and form."""
    return {
        part: {
            form: summary([ours / plain for ours, plain in zip(x, forms[PLAIN], strict=True)])
            for form, x in forms.items()
            if form != PLAIN
        }
        for part, forms in runs.items()
    }

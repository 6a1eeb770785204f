"""Make an earlier champion of a registered model the champion again."""

import json
from pathlib import Path

import tyro

from components import tracking
from pipelines.run_local import HOME, exit_on_error, local_or_named_server
from shike_core.recipes import digits_lt

DEFAULT_MODEL = digits_lt().register.model_name
SHOWN = ("test/accuracy", "test/few_shot/accuracy")


def history(model_name: str, home: Path) -> str:
    """The champions of a model, the present one last, a line for each."""
    entries = tracking.champions(local_or_named_server(home), model_name)
    lines = [f"champions of {model_name}, the present one last"]
    for entry in entries:
        metrics = json.loads(entry["tags"].get("metrics", "{}"))
        figures = [f"{key} {metrics[key]:.4f}" for key in SHOWN if key in metrics]
        lines.append(f"  version {entry['version']:<4}" + "  ".join(figures))
    return "\n".join(lines if entries else [f"{model_name} has no champion"])


def main(
    model: tyro.conf.Positional[str] = DEFAULT_MODEL,
    to: str = "",
    show: bool = False,
    home: Path = HOME,
) -> None:
    """Make an earlier champion of a registered model the champion again.

    Args:
        model: name of the registered model.
        to: version to go back to; by default the champion before the present one.
        show: only list the champions there were.
        home: where local runs are kept; used if MLFLOW_TRACKING_URI names no server.
    """
    with exit_on_error("roll-back"):
        if not show:
            before, now = tracking.rollback(local_or_named_server(home), model, to)
            print(f"the champion of {model} was version {before} and is version {now}")
        print(history(model, home))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m pipelines.rollback")

"""Let a registered model, or that of any evaluated run, answer for images."""

import re
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from components import tracking
from pipelines.rollback import DEFAULT_MODEL
from pipelines.run_local import HOME, exit_on_error, local_or_named_server
from shike_core import stages
from shike_core.cli import print_answers
from shike_core.config import PredictConfig

Flat: Any = tyro.conf.OmitArgPrefixes


def main(
    images: tyro.conf.Positional[tuple[str, ...]],
    config: Annotated[PredictConfig, Flat],
    model: str = DEFAULT_MODEL,
    output: Literal["text", "json", "csv"] = "text",
    home: Path = HOME,
) -> None:
    """Let a registered model say what images show, and each of its experts as well.

    Args:
        images: files, folders, or - for one image on standard input.
        config: how.
        model: a registered model, whose champion is taken, or NAME@ALIAS, NAME/VERSION, or the id
            of a run.
        output: text for a person; json, one object a line; or csv, one row a class told.
        home: where local runs are kept; used if MLFLOW_TRACKING_URI names no server.
    """
    with exit_on_error("prediction"), tempfile.TemporaryDirectory() as directory:
        client = local_or_named_server(home)
        registered = not re.search(r"[@/]|^[0-9a-f]{32}$", model)
        run = tracking.find_run(client, f"{model}@champion" if registered else model)
        checkpoint = tracking.fetch_checkpoint(client, run, Path(directory))
        if failed := print_answers(stages.predict(config, checkpoint, images), output):
            sys.exit(f"error: {failed} of the images cannot be used, see above")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m pipelines.predict")

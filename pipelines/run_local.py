"""Run the whole pipeline on this machine and print what came out."""

import argparse
import os
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import psutil
import tyro

from components import boundary, tracking
from pipelines.compile import git_commit
from pipelines.console import StepConsole
from pipelines.parameters import RECIPE_HELP, arguments
from shike_core.config import Recipe
from shike_core.environment import CPU_SETTINGS
from shike_core.errors import ShikeError
from shike_core.recipes import recipe_named

HOME = Path(".shike")


class Stopped(Exception):
    """A signal ended the run; the step had the time to write what it needs to go on.

    Attributes:
        signal_number: the signal received.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.signal_number = signal_number


@contextmanager
def forwarded_signals() -> Iterator[list[int]]:
    """Let the running step end by itself when this process is asked to stop.

    A terminal sends Ctrl-C to the step as well; a service manager sends SIGTERM to this process
    alone, so that one is passed on. A second signal ends everything at once.

    Yields:
        The signals received so far.
    """
    received: list[int] = []

    def handle(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        if number == signal.SIGTERM:
            for child in psutil.Process().children(recursive=True):
                child.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def run(recipe: Recipe, home: Path, data_dir: str = "") -> str:
    """Run the pipeline in sub-processes, one for each step.

    Args:
        recipe: every value.
        home: where runs, checkpoints and, by default, MLflow's database are kept.
        data_dir: folder with the source's official files, or empty.

    Returns:
        The id of the MLflow run.

    Raises:
        TrackingError: the tracking server does not answer; nothing was run.
        RuntimeError: a step failed; its message stands above.
        Stopped: a signal came.
    """
    from kfp import local

    from pipelines.training import training_pipeline

    home.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{home.resolve()}/mlflow.db")
    client = tracking.connect()
    run_id = f"local-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    os.environ[tracking.KFP_RUN_ID] = run_id
    os.environ.setdefault(tracking.GIT_COMMIT, git_commit())
    for name, value in CPU_SETTINGS.items():
        os.environ.setdefault(name, value)
    if sys.stderr.isatty():
        os.environ[boundary.PROGRESS_TERMINAL] = os.ttyname(sys.stderr.fileno())
    warnings.filterwarnings("ignore", module=r"kfp\.local")  # settings meant for a cluster
    root = home.resolve() / "runs" / run_id
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root), raise_on_error=True)
    root.mkdir(parents=True)
    values = arguments(recipe, data_dir, checkpoint_dir=str(home.resolve() / "checkpoints"))
    with forwarded_signals() as received:
        try:
            with (
                (root / "log.txt").open("w") as record,
                redirect_stdout(StepConsole(sys.stdout, record)),
            ):
                training_pipeline(recipe)(**values)
        except BaseException as error:
            if (tracked := tracking.find_run(client, run_id)) is not None:
                tracking.attach(tracked).finish("KILLED" if received else "FAILED")
            if received:
                raise Stopped(received[0]) from error
            raise
    tracked = tracking.find_run(client, run_id)
    if tracked is None:
        raise RuntimeError("the pipeline ended without an MLflow run; see the messages above")
    return tracked


def main() -> None:
    """Command line of ``python -m pipelines.run_local``."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Every value of the recipe can be given as well; --values lists them.",
    )
    parser.add_argument("--recipe", default="digits-lt", help=RECIPE_HELP)
    parser.add_argument("--data-dir", default="", help="folder with the official files")
    parser.add_argument("--home", type=Path, default=HOME, help="where runs are kept")
    parser.add_argument("--values", action="store_true", help="list the recipe's values")
    options, rest = parser.parse_known_args()
    data_dir = str(Path(options.data_dir).resolve()) if options.data_dir else ""
    try:
        recipe = tyro.cli(
            Recipe,
            prog="make run ARGS=",
            default=recipe_named(options.recipe),
            args=["--help"] if options.values else rest,
        )
        run_id = run(recipe, options.home, data_dir)
        print(tracking.summary(run_id, options.home))
    except (ShikeError, ValueError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: cannot use {error.filename} ({error.strerror}); give another --home")
    except RuntimeError as error:
        sys.exit(f"error: the run stopped: {error}. The message of the step stands above.")
    except Stopped as stop:
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

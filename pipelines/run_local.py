"""Run the whole pipeline on this machine and print what came out."""

import argparse
import os
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import tyro
from google.protobuf import json_format
from kfp import local
from kfp.dsl.base_component import BaseComponent

from components import boundary, tracking
from pipelines.compile import git_commit
from pipelines.console import ANSI, StepConsole
from pipelines.parameters import RECIPE_HELP, arguments
from pipelines.runners import (
    Runner,
    RunnerError,
    RunnerName,
    docker_runner,
    require_images,
    subprocess_runner,
    tracking_server,
)
from shike_core import stages
from shike_core.config import Recipe
from shike_core.data.listed import absolute
from shike_core.environment import CPU_SETTINGS
from shike_core.errors import ShikeError, exit_without_reader
from shike_core.processes import heard_signals
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
def forwarded_signals() -> Iterator["Signals"]:
    """Let the running step end by itself when this process is asked to stop.

    A terminal sends Ctrl-C to processes as well, but not to containers; a service manager sends
    SIGTERM to this process alone, and so may a terminal that is closed, which cannot show anything
    from then on. A second signal ends everything at once, but that of a terminal, which comes from
    the shell and from the system. Steps that begin later, as those of a loop do when one of them
    fails, are stopped as well.

    Yields:
        The signals received so far.

    Raises:
        Stopped: a signal came before there was a way to run steps.
    """
    signals, ended = Signals(), threading.Event()
    watch = threading.Thread(target=_stop_what_begins, args=(signals, ended), daemon=True)

    def handle(number: int, _: object) -> None:
        signals.received.append(number)
        os.environ[tracking.STOPPED] = str(number)
        if number == signal.SIGHUP:
            for descriptor in terminals:
                os.dup2(nowhere.fileno(), descriptor)
        elif len(signals.received) > 1:
            raise KeyboardInterrupt
        if signals.steps is None:
            raise Stopped(number)
        signals.steps.stop(number)
        if not watch.ident:
            watch.start()

    terminals = [stream.fileno() for stream in (sys.stdout, sys.stderr) if stream.isatty()]
    numbers = heard_signals()
    with Path(os.devnull).open("w") as nowhere:
        before = [signal.signal(number, handle) for number in numbers]
        try:
            yield signals
        finally:
            ended.set()
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
            os.environ.pop(tracking.STOPPED, None)


@dataclass
class Signals:
    """What has been received, and what passes it on."""

    received: list[int] = field(default_factory=list)
    steps: Runner | None = None


def _stop_what_begins(signals: Signals, ended: threading.Event) -> None:
    assert signals.steps is not None
    while not ended.wait(1.0):
        signals.steps.stop(signal.SIGTERM)


def run(
    pipeline: BaseComponent,
    values: Mapping[str, Any],
    home: Path,
    runner: RunnerName = "subprocess",
    kind: str = "run",
) -> str:
    """Run a pipeline on this machine.

    Args:
        pipeline: compiled for no cluster.
        values: its arguments.
        home: where runs, checkpoints and, by default, MLflow's database are kept.
        runner: how a step runs.
        kind: of the MLflow run that tells how it ended, see `tracking.open_run`.

    Returns:
        The id of the MLflow run.

    Raises:
        TrackingError: the tracking server does not answer; nothing was run.
        RunnerError: there is no container engine, or it lacks an image; nothing was run.
        RuntimeError: a step failed; its message stands above.
        Stopped: a signal came.
    """
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    if runner == "docker":
        require_images(images_of(pipeline))
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
    with (
        forwarded_signals() as signals,
        tracking_server(home) if runner == "docker" else nullcontext(),
    ):
        return _run(pipeline, values, home, runner, kind, signals)


def _run(
    pipeline: BaseComponent,
    values: Mapping[str, Any],
    home: Path,
    runner: RunnerName,
    kind: str,
    signals: Signals,
) -> str:
    client = tracking.connect()
    run_id = f"local-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    os.environ[tracking.KFP_RUN_ID] = run_id
    if runner == "subprocess":  # an image knows what it was built from
        os.environ.setdefault(tracking.GIT_COMMIT, git_commit())
    for name, value in CPU_SETTINGS.items():
        os.environ.setdefault(name, value)
    if sys.stderr.isatty() and runner == "subprocess":
        os.environ[boundary.PROGRESS_TERMINAL] = os.ttyname(sys.stderr.fileno())
    warnings.filterwarnings("ignore", module=r"kfp\.local")  # settings meant for a cluster
    root = home / "runs" / run_id
    root.mkdir(parents=True)
    steps = (
        docker_runner(run_id, home, str(values.get("step1_data_dir", "")))
        if runner == "docker"
        else subprocess_runner()
    )
    local.init(steps.for_kfp, pipeline_root=str(root), raise_on_error=True)
    signals.steps = steps
    try:
        with (
            (root / "log.txt").open("w") as record,
            redirect_stdout(StepConsole(sys.stdout, record)),
        ):
            pipeline(**values)
        # A container that failed can be reported as a success; MLflow knows which steps ended.
        ended = tracking.runs_of(client, run_id, kind)
        if not ended or ended[0].info.status != "FINISHED":
            raise RuntimeError("not all steps did their work; see the messages above")
    except BaseException as error:
        for line in tracking.close_runs("CANCELED" if signals.received else "FAILED"):
            print(line)  # the last step never ran, or in a container knows of no signal
        if signals.received:
            raise Stopped(signals.received[0]) from error
        raise
    for trained in tracking.runs_of(client, run_id, "run"):
        stages.discard_checkpoint(
            trained.data.tags["training_digest"],
            boundary.optional_path(values.get("step2_checkpoint_dir", "")),
        )
    return str(ended[0].info.run_id)


def local_or_named_server(home: Path) -> Any:
    """A client of the server that MLFLOW_TRACKING_URI names, or of the runs made here.

    Args:
        home: where local runs are kept.

    Raises:
        TrackingError: no runs were made here, or the server does not answer.
    """
    database = home.resolve() / "mlflow.db"
    if "MLFLOW_TRACKING_URI" not in os.environ:
        if not database.exists():
            raise tracking.TrackingError(
                f"there are no runs in {home}; make some with make run, or name the server with "
                "MLFLOW_TRACKING_URI"
            )
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{database}"
    return tracking.connect()


def images_of(pipeline: BaseComponent) -> set[str]:
    """The names of the images that a pipeline's steps run in."""
    specification = json_format.MessageToDict(pipeline.pipeline_spec)
    executors = specification["deploymentSpec"]["executors"].values()
    return {executor["container"]["image"] for executor in executors}


def run_recipe(
    recipe: Recipe,
    home: Path,
    data_dir: str = "",
    runner: RunnerName = "subprocess",
    num_nodes: int = 1,
    stage1_from: str = "",
) -> str:
    """Run the training pipeline with a recipe's values; see `run`.

    Several nodes are containers, while the steps are processes.
    """
    from pipelines.training import training_pipeline  # after the images' tag is known

    checkpoints = str(home.resolve() / "checkpoints")
    values = arguments(recipe, data_dir, checkpoints, stage1_from)
    if num_nodes != 1:
        values |= {"step2_num_nodes": num_nodes, "step2_nodes": _containers(runner)}
    return run(training_pipeline(recipe), values, home, runner)


def _containers(runner: RunnerName) -> dict[str, Any]:
    from components import images

    if runner == "docker":
        raise RunnerError(
            "a step in a container cannot start others; leave RUNNER=docker out, with --num-nodes "
            "the nodes are containers of the train image anyway"
        )
    require_images({images.TRAIN})
    return {"backend": "container", "image": images.TRAIN}


@contextmanager
def exit_on_error(what: str) -> Iterator[None]:
    """End the process with one line and a status of its own when something goes wrong.

    Args:
        what: is run, in one word.
    """
    try:
        yield
    except (ShikeError, ValueError) as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        exit_without_reader()
    except OSError as error:
        if not error.filename:  # not of a file: a connection, or a container engine
            sys.exit(f"error: {error}")
        sys.exit(f"error: cannot use {error.filename} ({error.strerror}); give another --home")
    except RuntimeError as error:
        reason = ANSI.sub("", str(error)).rstrip(".")
        sys.exit(f"error: the {what} stopped: {reason}. The message of the step stands above.")
    except Stopped as stop:
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:
        sys.exit(130)


def main() -> None:
    """Command line of ``python -m pipelines.run_local``."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Every value of the recipe can be given as well; --values lists them.",
    )
    parser.add_argument("--recipe", default="digits-lt", help=RECIPE_HELP)
    parser.add_argument("--data-dir", default="", help="folder with the source's files, or its URL")
    parser.add_argument(
        "--runner", choices=get_args(RunnerName), default="subprocess", help="how a step runs"
    )
    parser.add_argument("--tag", default=git_commit(), help="of the images, if containers are used")
    parser.add_argument(
        "--num-nodes", type=int, default=1, help="containers that train together (docs/nodes.md)"
    )
    parser.add_argument(
        "--stage1-from",
        default="",
        help="MLflow run, or model as in NAME@champion, trained with the same settings but for "
        "those of stage 2: only stage 2 is trained",
    )
    parser.add_argument("--home", type=Path, default=HOME, help="where runs are kept")
    parser.add_argument("--values", action="store_true", help="list the recipe's values")
    options, rest = parser.parse_known_args()
    os.environ["SHIKE_TAG"] = options.tag or "local"
    data_dir = absolute(options.data_dir) if options.data_dir else ""
    with exit_on_error("run"):
        recipe = tyro.cli(
            Recipe,
            prog="python -m pipelines.run_local",
            default=recipe_named(options.recipe),
            args=["--help"] if options.values else rest,
        )
        run_id = run_recipe(
            recipe,
            options.home,
            data_dir,
            options.runner,
            options.num_nodes,
            options.stage1_from,
        )
        print(tracking.summary(run_id, options.home))


if __name__ == "__main__":
    main()

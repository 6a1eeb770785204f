"""A client whose server answers, and errors that say what is wrong with it."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar
from urllib.parse import unquote

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# One call may wait 10 s and is tried twice; waiting longer is this module's own decision.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

import mlflow
from mlflow.exceptions import MlflowException, RestException
from requests import RequestException

from shike_core.errors import ShikeError

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = "SHIKE_TRACKING_PATIENCE_S"
"""Environment variable: seconds a step waits at its end for a server that went away."""
DEFAULT_PATIENCE_S = 600.0
REQUEST_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
FILES_S = 600
"""How long a call may wait that sends or fetches a file of hundreds of megabytes."""


class TrackingError(ShikeError):
    """The tracking server is not configured, not reachable, or lost what it had."""


def connect(patience_s: float = 0.0) -> mlflow.MlflowClient:
    """A client whose server answers.

    Args:
        patience_s: how long to wait for a server that is away; 0 asks once.

    Raises:
        TrackingError: MLFLOW_TRACKING_URI is not set, or the server does not answer.
    """
    uri = _tracking_uri()
    if not uri:
        raise TrackingError(
            "MLFLOW_TRACKING_URI is not set, so every metric would be lost with this container; "
            "set it to the address of the MLflow server (or to sqlite:////path/mlflow.db)"
        )
    mlflow.set_tracking_uri(uri)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            client = mlflow.MlflowClient(uri)
            client.search_experiments(max_results=1)
            return client
        except Exception as error:  # a database, an HTTP client: each store raises its own
            if getattr(error, "error_code", "") == "UNAUTHENTICATED":
                raise TrackingError(
                    f"the MLflow tracking server {uri} does not know this user or password; set "
                    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to those it knows"
                ) from error
            if time.monotonic() >= deadline:
                raise TrackingError(
                    f"the MLflow tracking server {without_password(uri)} does not answer "
                    f"({reason(error)}); check MLFLOW_TRACKING_URI, that the server runs, and "
                    "that this machine may reach it"
                ) from error
            time.sleep(2.0)


def all_experiments(client: mlflow.MlflowClient) -> list[str]:
    """The ids of all experiments; a server tells them by the thousand."""
    found: list[str] = []
    token: str | None = ""
    while token is not None:
        answer = client.search_experiments(page_token=token or None)
        found += [experiment.experiment_id for experiment in answer]
        token = answer.token or None
    return found


def _tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, after user and password in it went where no message shows them."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    address = without_password(uri)
    if uri.startswith("http") and address != uri:
        user, _, password = uri.partition("://")[2].rpartition("@")[0].partition(":")
        os.environ["MLFLOW_TRACKING_URI"] = address
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(user)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(password)
        return address
    return uri


@contextmanager
def time_for_files() -> Iterator[None]:
    """Let MLflow's calls wait as long as large files need.

    A server that keeps files in a store of its own answers when they have arrived there.
    """
    before = os.environ[REQUEST_TIMEOUT]
    os.environ[REQUEST_TIMEOUT] = str(max(FILES_S, int(before)))
    try:
        yield
    finally:
        os.environ[REQUEST_TIMEOUT] = before


@contextmanager
def permission_to_write(experiment: str) -> Iterator[None]:
    """Say in words that the server's rules for this user are in the way."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != "PERMISSION_DENIED":
            raise
        user = os.environ.get("MLFLOW_TRACKING_USERNAME", "without a name")
        raise TrackingError(
            f"user {user} may not write to the experiment {experiment} on "
            f"{without_password(mlflow.get_tracking_uri())}; have its owner or the server's "
            "admin grant EDIT, or be another user"
        ) from error


def patient(write: Callable[P, T]) -> Callable[P, T]:
    """A function that writes to the server, and waits for one that is away, as restarts take.

    Raises:
        TrackingError: by the function, if the server refuses, or stays away too long.
    """

    @wraps(write)
    def patiently(*args: P.args, **kwargs: P.kwargs) -> T:
        deadline = time.monotonic() + patience_s()
        while True:
            try:
                return write(*args, **kwargs)
            except (MlflowException, RequestException) as error:
                if not _passes(error) or time.monotonic() >= deadline:
                    raise TrackingError(
                        f"the MLflow tracking server {without_password(mlflow.get_tracking_uri())} "
                        f"did not take what this step has to say ({reason(error)}); check the "
                        "server, its store of files, and this user's rights"
                    ) from error
                time.sleep(2.0)

    return patiently


def _passes(error: MlflowException | RequestException) -> bool:
    """Whether it may be otherwise in a moment: the server is away, or has trouble of its own."""
    if isinstance(error, RequestException):
        return error.response is None or error.response.status_code >= 500
    # What MLflow finds wrong on this side has the status 500 as well.
    of_server = isinstance(error, RestException) or str(error).startswith("API request to")
    unavailable = error.error_code == "TEMPORARILY_UNAVAILABLE"
    return unavailable or (of_server and error.get_http_status_code() >= 500)


def patience_s() -> float:
    """Seconds to wait at the end of a step for a server that went away."""
    return float(os.environ.get(PATIENCE, DEFAULT_PATIENCE_S))


def page(experiment_id: str, run_id: str) -> str:
    """The address of a run's page; empty if the store has no pages."""
    uri = mlflow.get_tracking_uri()
    if not uri.startswith("http"):
        return ""
    pages = without_password(uri).rstrip("/")
    # Without the type of workflow the pages open in their view for language models.
    place = f"experiments/{experiment_id}/runs/{run_id}"
    return f"{pages}/?workflowType=machine_learning#/{place}"


def runs_page(experiment_id: str, view: str) -> str:
    """Where MLflow's list of runs is, with the columns of a shared view, below its address.

    Args:
        experiment_id: of the list.
        view: key of the view.
    """
    return (
        f"?workflowType=machine_learning#/experiments/{experiment_id}/runs?viewStateShareKey={view}"
    )


def reason(error: BaseException) -> str:
    """The first line of what went wrong at the root, without passwords."""
    root = error
    while (inner := root.__cause__ or root.__context__) is not None:
        root = inner
    lines = str(root).splitlines()
    shown = without_password(lines[0])[:200] if lines else ""
    return shown or type(root).__name__


def without_password(uri: str) -> str:
    """A text with URIs as it may be shown; a database's password may hold / and @ as they are."""
    return re.sub(r"//[^:/\s]*(:\S*)?@", "//", uri)

"""MLflow: the only package that imports it.

One canonical MLflow run belongs to a pipeline run, or to each training of a sweep. A step finds it
by the id that an earlier step handed on, then by ``MLFLOW_RUN_ID``, then by the KFP run's id, and
creates it last of all. A training that KFP served from its cache hands on the run of an older
pipeline run; then what was logged there is logged once more in a run of this one.
"""

from components.tracking.connection import PATIENCE, TrackingError, connect, page
from components.tracking.live import live_log
from components.tracking.lookup import (
    fetch_answers,
    fetch_checkpoint,
    find_run,
    latest_runs,
    take_stage1,
)
from components.tracking.models import ModelExporter, model_of
from components.tracking.registry import (
    address_to_serve,
    champion_of,
    champions,
    register,
    rollback,
    store_decision,
)
from components.tracking.runs import (
    GIT_COMMIT,
    KFP_RUN_ID,
    KFP_UI,
    STOPPED,
    TrackedRun,
    attach,
    close_runs,
    fetch_evaluation,
    hand_on,
    log_evaluation,
    log_training,
    open_evaluation,
    open_run,
    open_training,
    runs_of,
    where_to_look,
)
from components.tracking.summaries import summary
from components.tracking.sweeps import log_sweep, sweep_summary, trainings

__all__ = [
    "GIT_COMMIT",
    "KFP_RUN_ID",
    "KFP_UI",
    "PATIENCE",
    "STOPPED",
    "ModelExporter",
    "TrackedRun",
    "TrackingError",
    "address_to_serve",
    "attach",
    "champion_of",
    "champions",
    "close_runs",
    "connect",
    "fetch_answers",
    "fetch_checkpoint",
    "fetch_evaluation",
    "find_run",
    "hand_on",
    "latest_runs",
    "live_log",
    "log_evaluation",
    "log_sweep",
    "log_training",
    "model_of",
    "open_evaluation",
    "open_run",
    "open_training",
    "page",
    "register",
    "rollback",
    "runs_of",
    "store_decision",
    "summary",
    "sweep_summary",
    "take_stage1",
    "trainings",
    "where_to_look",
]

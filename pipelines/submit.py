"""Upload a compiled pipeline to Kubeflow Pipelines, run it once or on a schedule, and follow it."""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from pipelines.connection import (
    COOKIES_VARIABLE,
    TOKEN_VARIABLE,
    Cluster,
    ClusterError,
    Credentials,
    connect,
)
from pipelines.package import Package, read_package
from pipelines.schedule import Schedule, moment, timestamp
from shike_core.errors import ShikeError

FINAL_STATES = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
CHANGE_SECONDS = 120
"""Limit for requests that make something; the server compiles the pipeline meanwhile."""
PATIENCE_SECONDS = 600
"""For how long a server that does not answer is asked again while a run is followed."""


def upload(cluster: Cluster, package: Package, page: str) -> dict[str, str]:
    """Put the package onto the cluster as a version of its pipeline, unless it is there.

    Args:
        cluster: where.
        package: what.
        page: address of the KFP UI.

    Returns:
        The reference of the version, as a run takes it.
    """
    from kfp_server_api import V2beta1Pipeline

    pipelines, owner = cluster.client.pipelines, cluster.namespace or None
    find = pipelines.pipeline_service_list_pipelines
    pipeline = _named(cluster, find, "pipelines", package.name, namespace=owner)
    if pipeline is None:
        # Uploading would make the pipeline too, but with a first version of the pipeline's name.
        pipeline = cluster.call(
            pipelines.pipeline_service_create_pipeline,
            seconds=CHANGE_SECONDS,
            pipeline=V2beta1Pipeline(
                display_name=package.name,
                name=package.name,
                description=package.description,
                namespace=owner,
            ),
        )
    pipeline_id = _made(cluster, pipeline.pipeline_id)

    def find_version() -> Any:
        find = pipelines.pipeline_service_list_pipeline_versions
        return _named(cluster, find, "pipeline_versions", package.version, pipeline_id=pipeline_id)

    word = ""
    if (version := find_version()) is not None:
        word = " (was there already)"
    else:
        try:
            version = _upload_version(cluster, package, pipeline_id)
        except ClusterError as error:
            # Somebody else was faster: the name holds a digest, so theirs is the same.
            if error.status != 409 or (version := find_version()) is None:
                raise
    version_id = _made(cluster, version.pipeline_version_id)
    _show("pipeline", package.name)
    _show("version", f"{package.version}{word}")
    _show("", f"{page}/#/pipelines/details/{pipeline_id}/version/{version_id}")
    return {"pipeline_id": pipeline_id, "pipeline_version_id": version_id}


def _upload_version(cluster: Cluster, package: Package, pipeline_id: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.yaml"  # what was checked, whatever became of the original
        file.write_text(package.text)
        return cluster.call(
            cluster.client.pipeline_uploads.upload_pipeline_version,
            seconds=CHANGE_SECONDS,
            uploadfile=str(file),
            name=package.version,
            pipelineid=pipeline_id,
            description=f"{package.description} Images tagged {package.tag}.",
        )


def find_experiment(cluster: Cluster, name: str, page: str) -> str:
    """The id of the experiment of a name, which is made if there is none."""
    from kfp_server_api import V2beta1Experiment

    api, owner = cluster.client.experiments, cluster.namespace or None
    find = api.experiment_service_list_experiments
    experiment = _named(cluster, find, "experiments", name, namespace=owner)
    if experiment is None:
        experiment = cluster.call(
            api.experiment_service_create_experiment,
            seconds=CHANGE_SECONDS,
            experiment=V2beta1Experiment(display_name=name, namespace=owner),
        )
    elif experiment.storage_state == "ARCHIVED":
        raise ClusterError(
            f"the experiment {name!r} is archived; restore it in the KFP UI or give another "
            "--experiment"
        )
    experiment_id = _made(cluster, experiment.experiment_id)
    _show("experiment", name)
    _show("", f"{page}/#/experiments/details/{experiment_id}")
    return experiment_id


def start_run(cluster: Cluster, page: str, **body: Any) -> tuple[str, str]:
    """Start one run.

    Args:
        cluster: where.
        page: address of the KFP UI.
        **body: fields of the API's run.

    Returns:
        Its id and its page in the UI.
    """
    from kfp_server_api import V2beta1Run

    create = cluster.client.runs.run_service_create_run
    run = cluster.call(create, seconds=CHANGE_SECONDS, run=V2beta1Run(**body))
    run_id = _made(cluster, run.run_id)
    link = f"{page}/#/runs/details/{run_id}"
    _show("run", body["display_name"])
    _show("", link)
    return run_id, link


def start_recurring_run(cluster: Cluster, page: str, schedule: Schedule, **body: Any) -> None:
    """Start runs on a schedule, never two at once, and no more than one for times that were missed.

    Raises:
        ClusterError: among others if the experiment has one of this name, which would go on beside
            the new one.
    """
    from kfp_server_api import (
        RecurringRunMode,
        V2beta1CronSchedule,
        V2beta1PeriodicSchedule,
        V2beta1RecurringRun,
        V2beta1Trigger,
    )

    api, name = cluster.client.recurring_runs, body["display_name"]
    find = api.recurring_run_service_list_recurring_runs
    there = _named(cluster, find, "recurring_runs", name, experiment_id=body["experiment_id"])
    if there is not None:
        raise ClusterError(
            f"there is a recurring run {name!r} already, which would go on: delete it first "
            f"({page}/#/recurringrun/details/{there.recurring_run_id}), or give another --run-name"
        )
    times = {"start_time": timestamp(schedule.start), "end_time": timestamp(schedule.end)}
    if schedule.cron:
        trigger = V2beta1Trigger(cron_schedule=V2beta1CronSchedule(cron=schedule.cron, **times))
    else:
        seconds = str(schedule.interval_seconds)
        periodic = V2beta1PeriodicSchedule(interval_second=seconds, **times)
        trigger = V2beta1Trigger(periodic_schedule=periodic)
    recurring = cluster.call(
        api.recurring_run_service_create_recurring_run,
        seconds=CHANGE_SECONDS,
        recurring_run=V2beta1RecurringRun(
            mode=RecurringRunMode.ENABLE,
            trigger=trigger,
            max_concurrency="1",
            no_catchup=True,
            **body,
        ),
    )
    recurring_id = _made(cluster, recurring.recurring_run_id)
    _show("recurring", name)
    _show("", f"{page}/#/recurringrun/details/{recurring_id}")


def follow(cluster: Cluster, run_id: str, limit: float | None, pause: float) -> str:
    """Print how a run's state changes until it has its last one.

    Args:
        cluster: where it runs.
        run_id: which.
        limit: seconds to wait; None is without end.
        pause: seconds from question to question.

    Returns:
        The last state.

    Raises:
        ClusterError: the run failed, the limit is over, or the server did not answer for long.
    """
    start = heard = time.monotonic()
    state = ""
    silent = False
    while True:
        now = time.monotonic()
        try:
            run = cluster.call(cluster.client.runs.run_service_get_run, run_id=run_id)
        except ClusterError as error:
            if not error.temporary or now - heard > PATIENCE_SECONDS:
                raise
            if not silent:
                _show("waiting", f"{error}; asking again")
            silent = True
        else:
            heard, silent = now, False
            if run.state and run.state != state:
                state = run.state
                _show("state", f"{state} after {timedelta(seconds=round(now - start))}")
            if state in FINAL_STATES:
                if state != "SUCCEEDED":
                    raise ClusterError(f"the run ended as {state}{_reason(cluster, run)}")
                return state
        if limit is not None and time.monotonic() - start + pause > limit:
            raise ClusterError(f"the run is {state or 'unknown'} after {limit:g} s; it goes on")
        time.sleep(pause)


def _reason(cluster: Cluster, run: Any) -> str:
    """Which steps failed, and why; empty if the server does not tell."""
    tasks = getattr(run.run_details, "task_details", None) or []
    failed = [task for task in tasks if task.state == "FAILED"]
    names = dict.fromkeys(task.display_name for task in failed if task.display_name != "root")
    errors = [task.error for task in failed] + [run.error]
    said = next((error.message for error in errors if error and error.message), "")
    steps = f" in {', '.join(names)}" if names else ""
    return cluster.credentials.hide(f"{steps}: {' '.join(said.split())}" if said else steps)


def _named(
    cluster: Cluster, find: Callable[..., Any], kind: str, name: str, **arguments: Any
) -> Any:
    """The one thing of a name that a list function of the client finds, or None."""
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    answer = cluster.call(find, filter=json.dumps({"predicates": [predicate]}), **arguments)
    found = [thing for thing in getattr(answer, kind) or [] if thing.display_name == name]
    if len(found) > 1:
        raise ClusterError(
            f"{cluster.host} has {len(found)} {kind.replace('_', ' ')} of the name {name!r}; "
            "delete or rename all but one"
        )
    return found[0] if found else None


def _made(cluster: Cluster, identity: str | None) -> str:
    if not identity:  # a page where one logs in answers to everything
        raise ClusterError(f"{cluster.host} gave an answer that is not one of KFP 2")
    return identity


def _show(label: str, text: str) -> None:
    print(f"{label:<11} {text}", flush=True)


def submit(options: argparse.Namespace) -> None:
    """Do what the command line says; nothing is sent before all of it is checked."""
    credentials = Credentials.of(options.token_file, os.environ)
    if options.stop:
        cluster = connect(options.host, credentials, options.ca_cert, options.namespace)
        cluster.call(cluster.client.runs.run_service_terminate_run, run_id=options.stop)
        _show("stopping", options.stop)
        return
    package = read_package(options.package)
    if options.no_cache:
        package = package.without_cache()
    schedule = _schedule(options)
    values = {} if options.upload_only else package.values(options.set, options.parameters)
    cluster = connect(options.host, credentials, options.ca_cert, options.namespace)
    page = (options.ui or cluster.host).partition("#")[0].rstrip("/")
    version = upload(cluster, package, page)
    if options.upload_only:
        return
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    body = {
        "display_name": options.run_name or f"{package.name} {schedule or now}",
        "experiment_id": find_experiment(cluster, options.experiment or package.name, page),
        "pipeline_version_reference": version,
        "runtime_config": {"parameters": values},
        "service_account": options.service_account or None,
    }
    if schedule:
        start_recurring_run(cluster, page, schedule, **body)
        return
    run_id, link = start_run(cluster, page, **body)
    if options.wait:
        try:
            follow(cluster, run_id, options.timeout_seconds, options.poll_seconds)
        except KeyboardInterrupt:
            print(
                f"\nno longer waiting; the run goes on: {link}\nTo stop it, press Terminate there, "
                f"or: python -m pipelines.submit --host {cluster.host} --stop {run_id}",
                file=sys.stderr,
            )
            raise


def _schedule(options: argparse.Namespace) -> Schedule | None:
    if options.cron is None and options.interval_seconds is None:
        return None
    return Schedule(
        cron=options.cron,
        interval_seconds=options.interval_seconds or 0,
        start=moment(options.start) if options.start else None,
        end=moment(options.end) if options.end else None,
    )


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Credentials come from --token-file or the environment: {TOKEN_VARIABLE}, a bearer "
        f"token, or {COOKIES_VARIABLE}, name=value; name=value.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--host", required=True, help="address of the API, https://... or http://...")
    add("--package", type=Path, help="YAML file that make pipeline-compile wrote")
    add("--namespace", default="", help="yours, where KFP serves several users")
    add("--token", help=argparse.SUPPRESS)
    add("--token-file", type=Path, help="file with a bearer token; read again for each request")
    add("--ca-cert", type=Path, help="certificates of the authorities to trust, PEM")
    add("--ui", default="", help="address of the UI for the links, if it is not that of the API")

    run = parser.add_argument_group("the run").add_argument
    run("--experiment", default="", help="its name (default: the pipeline's)")
    run("--run-name", default="", help="default: the pipeline's with the time or the schedule")
    run("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter; repeatable")
    run("--parameters", type=Path, metavar="FILE", help="JSON object of parameters; --set wins")
    run("--no-cache", action="store_true", help="run every step anew")
    run("--service-account", default="", help="Kubernetes account of the steps")

    what = parser.add_argument_group("one of").add_mutually_exclusive_group().add_argument
    what("--wait", action="store_true", help="follow the run; exit code 0 only if it succeeded")
    what("--upload-only", action="store_true", help="start nothing")
    what("--cron", help='start by "second minute hour day month weekday", UTC by KFP\'s default')
    what("--interval-seconds", type=int, metavar="N", help="start every N seconds")
    what("--stop", metavar="RUN_ID", help="stop a run")

    times = parser.add_argument_group("times").add_argument
    times("--start", metavar="TIME", help="schedule: none before, such as 2027-01-31T02:00:00Z")
    times("--end", metavar="TIME", help="schedule: none after")
    times("--timeout-seconds", type=float, metavar="N", help="wait: how long at most")
    times("--poll-seconds", type=float, default=10, metavar="N", help="wait: pause (default 10)")
    return parser


def main() -> None:
    """Command line of ``python -m pipelines.submit``."""
    parser = _arguments()
    options = parser.parse_args()
    if options.token is not None:
        parser.error(f"a token does not belong where `ps` shows it: {TOKEN_VARIABLE}, --token-file")
    if not options.package and not options.stop:
        parser.error("--package is missing")
    once = options.cron is None and options.interval_seconds is None
    if once and (options.start or options.end):
        parser.error("--start and --end belong to --cron or --interval-seconds")
    if options.timeout_seconds is not None and not options.wait:
        parser.error("--timeout-seconds belongs to --wait")
    if options.upload_only or options.stop:
        of_a_run = ("set", "parameters", "run_name", "experiment", "service_account")
        for name in of_a_run + ("no_cache", "package") * bool(options.stop):
            if getattr(options, name):
                what = "--stop" if options.stop else "--upload-only"
                parser.error(f"--{name.replace('_', '-')} means nothing with {what}")
    try:
        submit(options)
    except ShikeError as error:
        sys.exit("\n".join(f"error: {line}" for line in str(error).splitlines()))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

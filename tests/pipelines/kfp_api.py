"""A server on this machine that speaks the part of the KFP v2beta1 REST API that submitting uses.

Paths, verbs, fields and values are those of the published client ``kfp_server_api``; names are
checked, packages parsed and parameters refused as the backend does it. State is kept in memory. Any
call that is not foreseen here is answered with 404 or 501 and noted in ``unforeseen``.
"""

import json
import re
import ssl
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email import message_from_bytes
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import kfp_server_api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

CODES = {400: 3, 401: 16, 403: 7, 404: 5, 409: 6, 500: 13, 501: 12, 503: 14}
TYPES: dict[str, Callable[[Any], bool]] = {
    "NUMBER_DOUBLE": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "NUMBER_INTEGER": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "STRING": lambda value: isinstance(value, str),
    "BOOLEAN": lambda value: isinstance(value, bool),
    "LIST": lambda value: isinstance(value, list),
    "STRUCT": lambda value: isinstance(value, dict),
}


class Refusal(Exception):
    """An answer that is not 2xx."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Request:
    """What came in."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes = field(repr=False)


@dataclass
class Fault:
    """What some of the next requests meet instead of their answer."""

    pattern: str
    times: int
    status: int = 0  # 0: the connection is closed
    body: bytes = b""
    content_type: str = "application/json"
    delay: float = 0.0  # instead of an answer of another kind


@dataclass
class KfpApi:
    """The server; used by ``with``, which starts and stops it."""

    token: str = ""
    cookie: str = ""
    multi_user: bool = False
    release: str = "2.17.0"
    states: tuple[str, ...] = ("PENDING", "RUNNING", "SUCCEEDED")
    tls: ssl.SSLContext | None = None
    pipelines: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    experiments: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    recurring_runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    unforeseen: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def __enter__(self) -> Self:
        api = self
        handler = type("Handler", (_Handler,), {"api": api})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.server.handle_error = self._broken
        if self.tls:
            self.server.socket = self.tls.wrap_socket(self.server.socket, server_side=True)
        self.lock = threading.Lock()
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}
        )
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def address(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.server.server_port}"

    def fault(self, pattern: str, times: int = 1, **answer: Any) -> None:
        """Let the next requests whose "METHOD /path" holds the pattern meet a fault."""
        self.faults.append(Fault(pattern, times, **answer))

    def called(self, pattern: str) -> list[Request]:
        """The requests whose "METHOD /path" holds the pattern."""
        return [r for r in self.requests if re.search(pattern, f"{r.method} {r.path}")]

    def answer(self, request: Request) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        if (self.token and request.headers.get("authorization") != f"Bearer {self.token}") or (
            self.cookie and request.headers.get("cookie") != self.cookie
        ):
            return 401, _error(401, "Unauthenticated: the request holds no valid identity")
        for method, pattern, action in self.routes():
            if found := re.fullmatch(f"/apis/{pattern}", request.path):
                if method != request.method:
                    continue
                try:
                    with self.lock:
                        return 200, action(request, *found.groups())
                except Refusal as refusal:
                    as_upload = "/upload" in request.path
                    error = _upload_error if as_upload else _error
                    return refusal.status, error(refusal.status, str(refusal))
        known = [
            m for m, pattern, _ in self.routes() if re.fullmatch(f"/apis/{pattern}", request.path)
        ]
        self.unforeseen.append(f"{request.method} {request.path}")
        status = 501 if known else 404
        return status, _error(status, "Method Not Allowed" if known else "Not Found")

    def routes(self) -> list[tuple[str, str, Callable[..., Any]]]:
        if self.release.startswith("1."):
            return [("GET", "v1beta1/healthz", self.health), ("GET", "v2beta1/healthz", _missing)]
        return [
            ("GET", "v2beta1/healthz", self.health),
            ("GET", "v2beta1/pipelines", self.list_pipelines),
            ("POST", "v2beta1/pipelines", self.create_pipeline),
            ("GET", "v2beta1/pipelines/([^/]+)/versions", self.list_versions),
            ("POST", "v2beta1/pipelines/upload_version", self.upload_version),
            ("GET", "v2beta1/experiments", self.list_experiments),
            ("POST", "v2beta1/experiments", self.create_experiment),
            ("POST", "v2beta1/runs", self.create_run),
            ("GET", "v2beta1/runs/([^/:]+)", self.get_run),
            ("POST", "v2beta1/runs/([^/:]+):terminate", self.terminate_run),
            ("GET", "v2beta1/recurringruns", self.list_recurring_runs),
            ("POST", "v2beta1/recurringruns", self.create_recurring_run),
        ]

    def health(self, _: Request) -> dict[str, Any]:
        common = {"commit_sha": "0" * 40, "tag_name": self.release, "multi_user": self.multi_user}
        return common if self.release.startswith("1.") else common | {"pipeline_store": "database"}

    def list_pipelines(self, request: Request) -> dict[str, Any]:
        self._owner(request.query.get("namespace"))
        return _page("pipelines", _filtered(self.pipelines, request))

    def create_pipeline(self, request: Request) -> dict[str, Any]:
        body = _body(request, kfp_server_api.V2beta1Pipeline)
        self._owner(body.get("namespace"))
        _unique(self.pipelines, body["display_name"])
        return _keep(self.pipelines, "pipeline_id", body)

    def list_versions(self, request: Request, pipeline_id: str) -> dict[str, Any]:
        _known(self.pipelines, pipeline_id, "Pipeline")
        return _page("pipeline_versions", _filtered(self._versions(pipeline_id), request))

    def upload_version(self, request: Request) -> dict[str, Any]:
        if unknown := set(request.query) - {"name", "display_name", "description", "pipelineid"}:
            raise Refusal(400, f"unexpected {sorted(unknown)}")
        pipeline_id, name = request.query["pipelineid"], request.query["name"]
        _known(self.pipelines, pipeline_id, "Pipeline")
        if not re.fullmatch("[a-z0-9]([-a-z0-9.]{0,125}[a-z0-9])?", name):
            raise Refusal(400, f"PipelineVersion.Name {name!r} is not valid")
        if any(v["name"] == name for v in self._versions(pipeline_id).values()):
            raise Refusal(409, "Failed to create a pipeline version")
        version = {
            "pipeline_id": pipeline_id,
            "display_name": name,
            "name": name,
            "description": request.query.get("description", ""),
            "pipeline_spec": self._parsed(_uploaded(request)),
        }
        return _keep(self.versions, "pipeline_version_id", version)

    def list_experiments(self, request: Request) -> dict[str, Any]:
        self._owner(request.query.get("namespace"))
        return _page("experiments", _filtered(self.experiments, request))

    def create_experiment(self, request: Request) -> dict[str, Any]:
        body = _body(request, kfp_server_api.V2beta1Experiment)
        self._owner(body.get("namespace"))
        _unique(self.experiments, body["display_name"])
        return _keep(self.experiments, "experiment_id", body | {"storage_state": "AVAILABLE"})

    def create_run(self, request: Request) -> dict[str, Any]:
        body = _body(request, kfp_server_api.V2beta1Run)
        self._check_job(body)
        return _keep(self.runs, "run_id", body | {"state": "PENDING", "polls": 0})

    def get_run(self, _: Request, run_id: str) -> dict[str, Any]:
        run = _known(self.runs, run_id, "Run")
        if run["state"] not in ("CANCELING", "CANCELED"):
            run["state"] = self.states[min(run["polls"], len(self.states) - 1)]
        run["polls"] += 1
        answer = {key: value for key, value in run.items() if key != "polls"}
        if run["state"] == "FAILED":
            error = {"code": 2, "message": "exit code 1: the loss\nis not finite"}
            names = {"root": "FAILED", "build-subset": "SUCCEEDED", "train": "FAILED"}
            answer["run_details"] = {
                "task_details": [
                    {"run_id": run_id, "display_name": name, "state": state}
                    | ({"error": error} if name == "train" else {})
                    for name, state in names.items()
                ]
            }
        return answer

    def terminate_run(self, _: Request, run_id: str) -> dict[str, Any]:
        _known(self.runs, run_id, "Run")["state"] = "CANCELED"
        return {}

    def list_recurring_runs(self, request: Request) -> dict[str, Any]:
        wanted = request.query.pop("experiment_id")
        found = {k: r for k, r in self.recurring_runs.items() if r["experiment_id"] == wanted}
        return _page("recurringRuns", _filtered(found, request))

    def create_recurring_run(self, request: Request) -> dict[str, Any]:
        body = _body(request, kfp_server_api.V2beta1RecurringRun)
        self._check_job(body)
        trigger = body["trigger"]
        if set(trigger) not in ({"cron_schedule"}, {"periodic_schedule"}):
            raise Refusal(400, "a trigger has one schedule")
        schedule = next(iter(trigger.values()))
        for key in {"start_time", "end_time"} & set(schedule):
            datetime.strptime(schedule[key], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        if body["mode"] not in ("ENABLE", "DISABLE") or not 0 < int(body["max_concurrency"]) <= 10:
            raise Refusal(400, "mode or max_concurrency is not valid")
        return _keep(self.recurring_runs, "recurring_run_id", body | {"status": "ENABLED"})

    def _broken(self, *_: object) -> None:
        if not isinstance(error := sys.exception(), OSError):  # those are clients that went away
            self.unforeseen.append(repr(error))

    def _owner(self, namespace: str | None) -> None:
        if bool(namespace) != self.multi_user:
            raise Refusal(400, f"Invalid input error: namespace {namespace!r} in this mode")

    def _versions(self, pipeline_id: str) -> dict[str, dict[str, Any]]:
        return {k: v for k, v in self.versions.items() if v["pipeline_id"] == pipeline_id}

    def _parsed(self, package: bytes) -> dict[str, Any]:
        specification: dict[str, Any] = {}
        for document in yaml.load_all(package, yaml.CSafeLoader):
            platform = "platforms" in document
            kind = pipeline_spec_pb2.PlatformSpec if platform else pipeline_spec_pb2.PipelineSpec
            if int(self.release.split(".")[1]) < 16 and "literals" in json.dumps(document):
                raise Refusal(400, 'invalid v2 pipeline spec: unknown field "literals"')
            try:
                json_format.ParseDict(document, kind())
            except json_format.ParseError as error:
                raise Refusal(400, f"invalid v2 pipeline spec: {error}") from error
            specification["platform_spec" if platform else "pipeline_spec"] = document
        if specification["pipeline_spec"]["schemaVersion"] != "2.1.0":
            raise Refusal(400, "KFP only supports schema version 2.1.0")
        return specification

    def _check_job(self, body: dict[str, Any]) -> None:
        """What a run and a recurring run have in common."""
        _known(self.experiments, body["experiment_id"], "Experiment")
        reference = body["pipeline_version_reference"]
        version = _known(self.versions, reference["pipeline_version_id"], "PipelineVersion")
        if version["pipeline_id"] != reference["pipeline_id"] or not body["display_name"]:
            raise Refusal(400, "Invalid input error: the version is of another pipeline")
        specification = version["pipeline_spec"]["pipeline_spec"]
        definitions = specification["root"].get("inputDefinitions", {}).get("parameters", {})
        given = body["runtime_config"].get("parameters", {})
        if unknown := sorted(set(given) - set(definitions)):
            raise Refusal(400, f"parameter(s) provided are not required by pipeline: {unknown}")
        for name, definition in definitions.items():
            kind = definition["parameterType"]
            if name in given and not TYPES[kind](given[name]):
                raise Refusal(400, f"input parameter {name} requires type {kind}")
            if name not in given and not definition.get("isOptional"):
                raise Refusal(400, f"parameter {name} is not optional")


class _Handler(BaseHTTPRequestHandler):
    api: KfpApi
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 40 ms for each answer
    timeout = 10  # or a connection left open keeps its thread

    def do_GET(self) -> None:
        self.handle_request()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def handle_request(self) -> None:
        address = urlsplit(self.path)
        request = Request(
            self.command,
            address.path,
            {key: values[-1] for key, values in parse_qs(address.query).items()},
            {key.lower(): value for key, value in self.headers.items()},
            self.rfile.read(int(self.headers.get("Content-Length", 0))),
        )
        self.api.requests.append(request)
        if (fault := self.fault(request)) is not None:
            time.sleep(fault.delay)
            if not fault.status:
                self.close_connection = True
                return
            self.reply(fault.status, fault.body, fault.content_type)
            return
        status, answer = self.api.answer(request)
        self.reply(status, json.dumps(answer).encode(), "application/json")

    def fault(self, request: Request) -> Fault | None:
        for fault in self.api.faults:
            if fault.times and re.search(fault.pattern, f"{request.method} {request.path}"):
                fault.times -= 1
                return fault
        return None

    def reply(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: a test prints what it needs."""


def _error(status: int, message: str) -> dict[str, Any]:
    detail = {"@type": "type.googleapis.com/google.rpc.Status", "message": message}
    return {"error": message, "code": CODES[status], "message": message, "details": [detail]}


def _upload_error(status: int, message: str) -> dict[str, Any]:
    assert status in CODES
    return {"error_message": message, "error_details": f"{message}\ngithub.com/kubeflow/..."}


def _missing(_: Request) -> dict[str, Any]:
    raise Refusal(404, "Not Found")


def _body(request: Request, model: Any) -> dict[str, Any]:
    """The JSON of a request, which may hold the model's fields and no others."""
    assert request.headers["content-type"] == "application/json", request.headers
    body: dict[str, Any] = json.loads(request.body, parse_constant=lambda word: 1 / 0)
    if unknown := sorted(set(body) - set(model.attribute_map.values())):
        raise Refusal(400, f"unknown field {unknown}")
    return body


def _uploaded(request: Request) -> bytes:
    """The file of a multipart form."""
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    form = message_from_bytes(head + request.body, policy=HTTP)
    for part in form.iter_parts():
        if part.get_param("name", header="content-disposition") == "uploadfile":
            if not str(part.get_filename()).endswith((".yaml", ".yml")):
                raise Refusal(400, "Failed to read a pipeline spec file")
            return part.get_payload(decode=True)
    raise Refusal(400, "Failed to read pipeline from file")


def _filtered(things: dict[str, dict[str, Any]], request: Request) -> list[dict[str, Any]]:
    """The things that the one kind of filter in use lets through."""
    if unknown := set(request.query) - {"filter", "namespace"}:
        raise Refusal(400, f"unexpected {sorted(unknown)}")
    (predicate,) = json.loads(request.query["filter"])["predicates"]
    assert (predicate["operation"], predicate["key"]) == ("EQUALS", "display_name"), predicate
    return [t for t in things.values() if t["display_name"] == predicate["stringValue"]]


def _page(kind: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    return {kind: found, "total_size": len(found)} if found else {}


def _unique(things: dict[str, dict[str, Any]], name: str) -> None:
    if not name or any(thing["display_name"] == name for thing in things.values()):
        raise Refusal(409, f"Already exist error: the name {name!r} is empty or taken")


def _known(things: dict[str, dict[str, Any]], identity: str, kind: str) -> dict[str, Any]:
    if identity not in things:
        raise Refusal(404, f"ResourceNotFoundError: {kind} {identity} not found.")
    return things[identity]


def _keep(things: dict[str, dict[str, Any]], key: str, thing: dict[str, Any]) -> dict[str, Any]:
    thing |= {key: str(uuid.uuid4()), "created_at": datetime.now(UTC).isoformat()}
    things[thing[key]] = thing
    return {name: value for name, value in thing.items() if name != "polls"}

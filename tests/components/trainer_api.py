"""A server on this machine that speaks the part of the Kubernetes API that a TrainJob needs.

It is the control plane of Kubeflow Trainer 2 as well: of each TrainJob it makes pods, which are
processes of this machine with the command, the name and the environment that the Trainer would
give them. Any call that is not foreseen here is answered with 501 and noted in ``unforeseen``.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

GROUP = "/apis/trainer.kubeflow.org/v1alpha1"
NAMESPACE = "team-a"
JOBS = f"{GROUP}/namespaces/{NAMESPACE}/trainjobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
LABELS = {"trainer.kubeflow.org/framework": "torch"}
RUNTIME = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "ClusterTrainingRuntime",
    "metadata": {"name": "torch-distributed", "labels": LABELS},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {}},
        "template": {
            "spec": {
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "metadata": {
                                "labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
                            },
                            "spec": {
                                "template": {
                                    "spec": {"containers": [{"name": "node", "image": "torch"}]}
                                }
                            },
                        },
                    }
                ]
            }
        },
    },
}


@dataclass
class Pod:
    """A process that stands for a pod."""

    job: str
    index: int
    process: subprocess.Popen
    log: Path

    @property
    def name(self) -> str:
        return f"{self.job}-node-0-{self.index}-abcde"

    @property
    def phase(self) -> str:
        code = self.process.poll()
        return "Running" if code is None else "Failed" if code else "Succeeded"

    @property
    def manifest(self) -> dict[str, Any]:
        labels = {
            "jobset.sigs.k8s.io/jobset-name": self.job,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(self.index),
        }
        return {
            "metadata": {"name": self.name, "namespace": NAMESPACE, "labels": labels},
            "spec": {"containers": [{"name": "node"}]},
            "status": {"phase": self.phase},
        }

    def end(self) -> None:
        """As the deletion of a pod does."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)


@dataclass
class TrainerApi:
    """The server; a block of its own starts and ends it.

    Attributes:
        folder: receives a kubeconfig and the pods' working directories.
        program: a command for all pods in place of the job's.
        refused: answers with 403 to these verbs on trainjobs.
        installed: whether the cluster has Kubeflow Trainer.
        away: so many calls are answered with 503.
        requests: verb and path of all calls.
        created: the TrainJobs that came.
    """

    folder: Path
    program: list[str] | None = None
    refused: tuple[str, ...] = ()
    installed: bool = True
    away: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    unforeseen: list[str] = field(default_factory=list)
    _jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    _pods: list[Pod] = field(default_factory=list)

    def __enter__(self) -> Self:
        api = self

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                code, answer = api._answer(self.command, self.path, body)
                text = answer if isinstance(answer, str) else json.dumps(answer)
                self.send_response(code)
                kind = "text/plain" if isinstance(answer, str) else "application/json"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_POST = do_DELETE = _serve  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.kubeconfig.write_text(json.dumps(self._access()))
        return self

    def __exit__(self, *_: object) -> None:
        for pod in self._pods:
            pod.end()
            pod.process.wait(60)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def kubeconfig(self) -> Path:
        """How clients get here."""
        return self.folder / "kubeconfig"

    @property
    def jobs(self) -> list[str]:
        """The names of the TrainJobs that are there."""
        return list(self._jobs)

    @property
    def running(self) -> list[str]:
        """The names of the pods that run."""
        return [pod.name for pod in self._pods if pod.phase == "Running"]

    def delete(self, name: str) -> None:
        """Remove a TrainJob, as anybody may."""
        del self._jobs[name]
        for pod in self._pods:
            if pod.job == name:
                pod.end()

    def evict(self, index: int) -> None:
        """Tell a pod to end: the signal comes to its first process alone."""
        os.kill(self._pods[index].process.pid, signal.SIGTERM)

    def _access(self) -> dict[str, Any]:
        address = f"http://127.0.0.1:{self._server.server_port}"
        context = {"cluster": "here", "user": "step", "namespace": NAMESPACE}
        return {
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": address}}],
            "contexts": [{"name": "here", "context": context}],
            "users": [{"name": "step", "user": {"token": "secret"}}],
        }

    def _answer(self, verb: str, path: str, body: Any) -> tuple[int, Any]:
        address = urlsplit(path)
        self.requests.append((verb, address.path))
        if "configmaps" in path:
            return _status(404, "no such map")
        if address.path.startswith(GROUP) and not self.installed:
            return 404, "404 page not found\n"
        if self.away and verb == "GET" and address.path.startswith(JOBS):
            self.away -= 1
            return _status(503, "the server is currently unable to handle the request")
        if address.path.startswith(JOBS) and verb in self.refused:
            return _status(
                403,
                f"trainjobs.trainer.kubeflow.org is forbidden: User "
                f'"system:serviceaccount:{NAMESPACE}:pipeline-runner" cannot {verb}',
            )
        if verb == "GET" and address.path.startswith(f"{GROUP}/clustertrainingruntimes/"):
            return 200, RUNTIME
        if verb == "GET" and "/trainingruntimes/" in path:
            return _status(404, "not found")
        if verb == "POST" and address.path == JOBS:
            return self._create(body)
        if address.path.startswith(f"{JOBS}/"):
            name = address.path.rpartition("/")[2]
            if name not in self._jobs:
                return _status(404, f'trainjobs.trainer.kubeflow.org "{name}" not found')
            if verb == "DELETE":
                self.delete(name)
                return _status(200, "")
            return 200, self._job(name)
        if verb == "GET" and address.path == PODS:
            name = re.search("jobset-name=([^,]+)", parse_qs(address.query)["labelSelector"][0])[1]
            there = name in self._jobs
            pods = [p for p in self._pods if p.job == name and (there or p.phase == "Running")]
            return 200, {"kind": "PodList", "items": [pod.manifest for pod in pods]}
        if verb == "GET" and address.path.endswith("/log"):
            (pod,) = (p for p in self._pods if address.path == f"{PODS}/{p.name}/log")
            return 200, pod.log.read_text()
        self.unforeseen.append(f"{verb} {path}")
        return _status(501, "not foreseen")

    def _create(self, job: dict[str, Any]) -> tuple[int, Any]:
        name = job["metadata"]["name"]
        if name in self._jobs:
            return _status(409, f'trainjobs.trainer.kubeflow.org "{name}" already exists')
        self.created.append(job)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        job["metadata"] |= {"namespace": NAMESPACE, "creationTimestamp": now}
        self._jobs[name] = job
        self._pods = [pod for pod in self._pods if pod.job != name]
        trainer = job["spec"]["trainer"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        for index in range(trainer["numNodes"]):
            folder = self.folder / f"pod-{len(self.created)}-{index}"
            folder.mkdir()
            log = folder / "log.txt"
            environment = os.environ | {
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "PET_NNODES": str(trainer["numNodes"]),
                "PET_NODE_RANK": str(index),
                "PET_NPROC_PER_NODE": "1",
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": port,
            }
            with log.open("w") as output:
                process = subprocess.Popen(
                    self.program or trainer["command"],
                    cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
            self._pods.append(Pod(name, index, process, log))
        return 201, job

    def _job(self, name: str) -> dict[str, Any]:
        phases = {pod.phase for pod in self._pods if pod.job == name}
        state = "Failed" if "Failed" in phases else "Complete" if phases == {"Succeeded"} else ""
        job = dict(self._jobs[name])
        if state:
            now = job["metadata"]["creationTimestamp"]
            condition = {"type": state, "status": "True", "reason": "x", "message": "x"}
            job["status"] = {"conditions": [condition | {"lastTransitionTime": now}]}
        return job


def _status(code: int, message: str) -> tuple[int, dict[str, Any]]:
    state = "Success" if code < 300 else "Failure"
    return code, {"kind": "Status", "status": state, "message": message, "code": code}

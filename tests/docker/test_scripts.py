"""What `make images`, `make sbom` and `make audit` refuse; most of it without an engine."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Call = Callable[..., subprocess.CompletedProcess[str]]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.invalid"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A clean checkout with the scripts and nothing to build."""
    folder = tmp_path / "checkout"
    (folder / "docker").mkdir(parents=True)
    for name in ("build.py", "images.py", "sbom.py"):
        shutil.copy(ROOT / "docker" / name, folder / "docker")
    (folder / ".gitignore").write_text("__pycache__/\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "All there is")
    return folder


@pytest.fixture
def call(checkout, process_environment, free_port) -> Call:
    """Runs a script of the checkout; no engine answers it."""

    def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        nobody = {"DOCKER_HOST": f"tcp://127.0.0.1:{free_port()}"}
        return subprocess.run(
            [sys.executable, str(checkout / "docker" / script), *arguments],
            env=process_environment(**(nobody | environment)),
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on standard error of a script that failed."""
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


def test_files_that_are_not_committed_are_refused(call, checkout):
    (checkout / "forgotten.py").write_text("")
    line = only_line(call("build.py"))
    assert line.startswith(
        f"error: the tree differs from commit {git(checkout, 'rev-parse', '--short=12', 'HEAD')}"
    )
    assert "(forgotten.py)" in line
    assert "ALLOW_DIRTY=1" in line


def test_an_own_tag_does_not_make_a_tree_clean(call, checkout):
    (checkout / "docker" / "sbom.py").write_text("# changed\n")
    assert "the tree differs" in only_line(call("build.py", "--tag", "v1"))


@pytest.mark.skipif(shutil.which("docker") is None, reason="there is no docker client")
@pytest.mark.parametrize("script", ["build.py", "sbom.py"])
def test_an_engine_that_does_not_answer_is_told(call, script):
    line = only_line(call(script))
    assert line.startswith("error: no container engine answers (")
    assert "DOCKER_HOST" in line


def test_a_missing_client_is_told(call, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "git").symlink_to(shutil.which("git"))
    assert only_line(call("build.py", PATH=str(folder))).startswith("error: docker is missing;")
    (folder / "git").unlink()
    assert only_line(call("build.py", PATH=str(folder))).startswith("error: git is missing,")


def test_a_folder_that_is_no_checkout_is_told(call, checkout):
    shutil.rmtree(checkout / ".git")
    assert "is no git checkout" in only_line(
        call("build.py", GIT_CEILING_DIRECTORIES=str(checkout.parent))
    )


def test_an_unknown_image_is_told(call):
    line = only_line(call("build.py", "train", "trian"))
    assert "there is no image trian; choose some of data, register, mlflow, train" in line


def test_nothing_is_pushed_to_nowhere(call):
    assert "add REGISTRY=HOST/PROJECT" in only_line(call("build.py", "--push"))


@pytest.mark.docker
def test_names_are_made_of_registry_image_and_commit(call, checkout, engine):
    here = {"DOCKER_HOST": os.environ.get("DOCKER_HOST", "")}
    commit = git(checkout, "rev-parse", "--short=12", "HEAD")
    push = ["build.py", "--push", "--registry", "registry.invalid/team/", "train"]
    name = "registry.invalid/team/shike-python-train"
    assert f"there is no image {name}:{commit};" in only_line(call(*push, **here))
    assert f"there is no image {name}:v1;" in only_line(call(*push, "--tag", "v1", **here))
    (checkout / "forgotten.py").write_text("")
    dirty = call(*push, "--allow-dirty", **here)
    assert f"there is no image {name}:{commit}-dirty;" in only_line(dirty)
    assert "(forgotten.py), the images are marked as dirty" in dirty.stdout


# --- vulnerabilities --------------------------------------------------------------------------

FLAW = {
    "id": "PYSEC-0000-1",
    "aliases": ["CVE-0000-1"],
    "summary": "made up",
    "affected": [
        {
            "package": {"name": "torch", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "9999.1"}]}],
        }
    ],
}


class Database(BaseHTTPRequestHandler):
    """Answers as the database of open source vulnerabilities does; `flawed` has a flaw."""

    flawed = ""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        found = {"vulns": [FLAW]} if body["package"]["name"] == self.flawed else {}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=["", "torch"])
def database(request) -> Iterator[tuple[str, str]]:
    """Address of a database, and the package that it knows a flaw of."""
    handler = type("Handler", (Database,), {"flawed": request.param})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query", request.param
        server.shutdown()


def audit(address: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "docker" / "audit.py")]
    return subprocess.run(
        [*command, "--vulnerability-service", "osv", "--osv-url", address],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_audit_tells_what_is_known_of_any_package(database, process_environment):
    address, flawed = database
    done = audit(address, process_environment())
    assert done.stderr == ""
    *flaws, summary = done.stdout.splitlines()
    if flawed:
        assert done.returncode == 1
        (flaw,) = flaws
        assert flaw.startswith("torch 2.")
        assert flaw.endswith(": PYSEC-0000-1 (CVE-0000-1), fixed in 9999.1")
        assert summary.endswith(" packages, 1 known vulnerabilities")
    else:
        assert done.returncode == 0
        assert not flaws
        assert summary.endswith(" packages, 0 known vulnerabilities")


def test_an_audit_that_asked_nobody_does_not_pass(free_port, process_environment):
    done = audit(f"http://127.0.0.1:{free_port()}/v1/query", process_environment())
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: nothing was audited: ")
    assert done.stdout == ""


def test_an_audit_that_left_something_out_does_not_pass(capsys):
    judge = runpy.run_path(str(ROOT / "docker" / "audit.py"))["judge"]
    known = {"name": "numpy", "version": "2.4.6", "vulns": []}
    assert judge([known]) == 0
    capsys.readouterr()
    assert judge([known, {"name": "torch", "skip_reason": "Dependency not found"}]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: 1 of 2 packages were not audited")
    assert "(torch)" in told.err
    assert told.out == ""

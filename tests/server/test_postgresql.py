"""The tracking server of a team: PostgreSQL, users, several writers, and machines that fail."""

import base64
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import Run

from components import tracking

ROOT = Path(__file__).parents[2]
DATABASE_PASSWORD = "database@pass:word/%41"  # all that has a meaning in a URI
ADMIN_PASSWORD = "admin@pass:word/%41"
PASSWORDS = {name: f"{name}@pass:word/%41" for name in ("anna", "ben", "cleo", "guest")}
WRONG_PASSWORD = "wrong@pass:word/%41"
TINY = [
    *("--train.num-experts", "2", "--train.width", "4", "--train.warmup-epochs", "1"),
    *("--train.device", "cpu", "--train.stage2-epochs", "1"),
]
STAGE1_EPOCHS = 60
"""Of the training whose server fails: long enough for that to happen in its middle."""


def forms(user: str, password: str) -> list[bytes]:
    """How a password could come to light: as it is, in a URI, in a header of HTTP."""
    header = base64.b64encode(f"{user}:{password}".encode())
    return [password.encode(), quote(password, safe="").encode(), header]


SECRETS = [
    *forms("mlflow", DATABASE_PASSWORD),
    *forms("admin", ADMIN_PASSWORD),
    *forms("anna", WRONG_PASSWORD),
    *(form for name, password in PASSWORDS.items() for form in forms(name, password)),
]


def secrets_in(*places: bytes | str | Path) -> list[str]:
    """Which secrets stand in these texts, files and folders."""
    found = []
    for place in places:
        if isinstance(place, Path):
            files = [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
            assert files, f"nothing to look at in {place}"
            texts = {str(path): path.read_bytes() for path in files}
        else:
            texts = {repr(place[:40]): place.encode() if isinstance(place, str) else place}
        found += [f"{s!r} in {name}" for name, text in texts.items() for s in SECRETS if s in text]
    return found


# --- PostgreSQL, and the server that `make mlflow-server` starts -----------------------------


@dataclass
class Postgres:
    """A database server of the test's own, which can be killed and started again."""

    programs: Path
    directory: Path
    port: int
    owner: str | None
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def settings(self) -> dict[str, str]:
        """What PostgreSQL's own programs need to know."""
        return {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": "mlflow",
            "PGPASSWORD": DATABASE_PASSWORD,
            "PGDATABASE": "mlflow",
        }

    @property
    def uri(self) -> str:
        password = quote(DATABASE_PASSWORD, safe="")
        return f"postgresql://mlflow:{password}@127.0.0.1:{self.port}/mlflow"

    def run(self, program: str, *arguments: str) -> bytes:
        environment = os.environ | self.settings
        command = [str(self.programs / program), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, check=True).stdout

    def create(self) -> None:
        """Make an empty cluster that asks for the password."""
        password = self.directory / "password"
        password.write_text(DATABASE_PASSWORD)
        if self.owner:
            for path in (self.directory, password):
                shutil.chown(path, self.owner)
        command = ["initdb", "--pgdata", "data", "--username", "mlflow", "--pwfile", "password"]
        command += ["--auth", "scram-sha-256", "--no-sync", "--no-locale", "--encoding", "UTF8"]
        command[0] = str(self.programs / command[0])
        with (self.directory / "initdb.txt").open("w") as log:
            subprocess.run(
                command, cwd=self.directory, user=self.owner, stdout=log, stderr=log, check=True
            )

    def start(self) -> None:
        # Commits wait for the operating system, which outlives the server, but not for the disk.
        settings = {"fsync": "off", "full_page_writes": "off", "unix_socket_directories": ""}
        settings |= {"listen_addresses": "127.0.0.1", "port": str(self.port)}
        command = [str(self.programs / "postgres"), "-D", "data"]
        command += [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        with (self.directory / "log.txt").open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=self.directory, user=self.owner, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 60
        while not self.answers():
            assert time.monotonic() < deadline, (self.directory / "log.txt").read_text()
            time.sleep(0.05)

    def answers(self) -> bool:
        try:
            self.run("psql", "--dbname", "postgres", "--command", "SELECT 1")
        except subprocess.CalledProcessError:
            return False
        return True

    def kill(self) -> None:
        """End it at once with all its processes, as a node that fails would."""
        if self.process is None:
            return
        main = psutil.Process(self.process.pid)
        processes = [main, *main.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # some end by themselves when the first one does
                process.kill()
        psutil.wait_procs(processes[1:], timeout=30)
        self.process.wait()
        self.process = None


@pytest.fixture(scope="module")
def postgres(free_port) -> Iterator[Postgres]:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("needs PostgreSQL's programs (Debian: apt-get install postgresql)")
    owner = None
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        users = {user.pw_name for user in pwd.getpwall()}
        owner = "postgres" if "postgres" in users else "nobody"
    directory = Path(tempfile.mkdtemp(prefix="shike-postgresql-"))  # pytest's belong to root
    server = Postgres(found[-1].parent, directory, free_port(), owner)
    try:
        server.create()
        server.start()
        server.run("createdb", "mlflow")
        yield server
    finally:
        server.kill()
        shutil.rmtree(directory)


def ask(server, what: str, **values: str) -> None:
    """Have the server's admin change something."""
    answer = requests.post(
        f"{server.uri}/api/{what}",
        json=values,
        auth=("admin", ADMIN_PASSWORD),
        timeout=30,
    )
    assert answer.ok, answer.text


@pytest.fixture(scope="module")
def server(mlflow_server, postgres, tmp_path_factory) -> Iterator:
    """`make mlflow-server` with some users; the process of this test is its admin."""
    if not shutil.which("make"):
        pytest.skip("needs make")
    artifacts = tmp_path_factory.mktemp("artifacts")
    made = mlflow_server(postgres.uri, artifacts)
    python = Path(sys.executable)
    made.command = ["make", "-C", str(ROOT), "-o", ".venv/.synced", f"BIN={python.parent}"]
    made.command += ["mlflow-server"]
    made.settings |= {
        "PORT": str(made.port),
        "MLFLOW_STORE": postgres.uri,
        "MLFLOW_WORKERS": "2",
        "MLFLOW_ARTIFACTS_DESTINATION": str(artifacts),
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN_PASSWORD,
    }
    made.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", ADMIN_PASSWORD)
        for name, password in PASSWORDS.items():
            ask(made, "2.0/mlflow/users/create", username=name, password=password)
        yield made
        made.kill()


@pytest.fixture(scope="module")
def client(server) -> MlflowClient:
    """Sees everything."""
    return MlflowClient(server.uri)


def of_user(server, name: str, password: str = "") -> dict[str, str]:
    """The variables of someone who uses the server."""
    return {
        "MLFLOW_TRACKING_URI": server.uri,
        "MLFLOW_TRACKING_USERNAME": name,
        "MLFLOW_TRACKING_PASSWORD": password or PASSWORDS[name],
    }


def with_password(server, name: str, password: str) -> str:
    """The server's address with a user's password inside."""
    return server.uri.replace("//", f"//{name}:{quote(password, safe='')}@")


def test_the_server_listens_on_this_machine_only(server):
    listening = {
        connection.laddr
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == server.port
    }
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_no_argument_of_the_server_holds_a_password(server):
    main = psutil.Process(server.process.pid)
    commands = [" ".join(p.cmdline()) for p in [main, *main.children(recursive=True)]]
    assert any("uvicorn" in command for command in commands)
    assert secrets_in(*commands) == []


@pytest.mark.parametrize(
    ("store", "message"),
    [
        (f"mysql://u:{DATABASE_PASSWORD}@h/d", "has to look like postgresql://user@host/database"),
        (f"postgresql://u:{DATABASE_PASSWORD}@h/d", "cannot be read; write it as"),
        ("postgresql://u:pass/word@h/d", "cannot be read; write it as"),
        ("postgresql://u:{quoted}@127.0.0.1:{port}/d", "Connection refused"),
    ],
)
def test_a_wrong_database_is_told_in_one_line(process_environment, free_port, store, message):
    store = store.replace("{quoted}", quote(DATABASE_PASSWORD, safe=""))
    done = subprocess.run(
        [sys.executable, str(ROOT / "docker/mlflow_server.py")],
        env=process_environment(MLFLOW_STORE=store.replace("{port}", str(free_port()))),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert secrets_in(line) == []


def test_a_new_server_without_a_password_for_its_admin_does_not_start(
    postgres, process_environment
):
    postgres.run("createdb", "without_users")
    settings = postgres.settings | {"PGDATABASE": "without_users"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "docker/mlflow_server.py")],
        env=process_environment(**settings),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "MLFLOW_AUTH_ADMIN_PASSWORD is not set" in line


# --- the whole pipeline, while database and server fail --------------------------------------


@dataclass
class Outage:
    """A pipeline run in whose training the database and then the server were killed."""

    home: Path
    code: int
    out: str
    err: str
    run: Run
    epochs: dict[str, int]


@pytest.fixture(scope="module")
def outage(server, postgres, client, process_environment, tmp_path_factory) -> Outage:
    home = tmp_path_factory.mktemp("home")
    out, err = home.parent / f"{home.name}-out.txt", home.parent / f"{home.name}-err.txt"
    epochs: dict[str, int] = {}

    def epochs_done() -> int:
        files = home.glob("runs/*/*/train/checkpoint/metrics.jsonl")
        return sum(len(path.read_text().splitlines()) for path in files)

    def wait_for(what: str, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not reached():
            output = out.read_text() + err.read_text()
            assert process.poll() is None, f"the run ended before: {what}\n{output}"
            assert time.monotonic() < deadline, f"{what} did not come\n{output}"
            time.sleep(0.02)
        epochs[what] = epochs_done()

    def warned() -> bool:
        logs = home.glob("runs/*/log.txt")
        text = out.read_text() + err.read_text() + "".join(path.read_text() for path in logs)
        return "the tracking server does not take metrics" in text

    arguments = [*TINY, "--train.stage1-epochs", str(STAGE1_EPOCHS)]
    with out.open("w") as out_file, err.open("w") as err_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.run_local", "--home", str(home), *arguments],
            cwd=ROOT,
            env=process_environment(**of_user(server, "anna")),
            stdout=out_file,
            stderr=err_file,
        )
    try:
        wait_for("database killed", lambda: epochs_done() >= 2)
        postgres.kill()
        wait_for("database missed", warned)
        wait_for("server killed", lambda: epochs_done() >= epochs["database missed"] + 2)
        server.kill()
        wait_for("both started", lambda: epochs_done() >= epochs["server killed"] + 2)
        postgres.start()
        server.start()
        code = process.wait(timeout=300)
    finally:
        process.kill()
        process.wait()
    experiment = client.get_experiment_by_name("digits-lt")
    (run,) = client.search_runs([experiment.experiment_id])
    return Outage(home, code, out.read_text(), err.read_text(), run, epochs)


@pytest.mark.slow
def test_a_run_outlives_its_database_and_its_server(outage):
    assert outage.code == 0, outage.out + outage.err
    assert outage.run.info.status == "FINISHED"
    assert outage.epochs["database killed"] < outage.epochs["both started"] <= STAGE1_EPOCHS


@pytest.mark.slow
def test_every_epoch_is_there_after_an_outage(outage, client):
    everywhere = ("train/loss", "train/accuracy", "lr")
    for key in everywhere:
        history = client.get_metric_history(outage.run.info.run_id, key)
        assert sorted(metric.step for metric in history) == list(range(STAGE1_EPOCHS + 1)), key


@pytest.mark.slow
def test_a_run_leaves_metrics_artifacts_and_a_registered_model(outage, client, server):
    run_id, data = outage.run.info.run_id, outage.run.data
    assert 0 < data.metrics["test/accuracy"] <= 1
    assert data.params["train.stage1_epochs"] == str(STAGE1_EPOCHS)
    folders = {artifact.path for artifact in client.list_artifacts(run_id)}
    assert {"subset", "train", "evaluation", "register"} <= folders
    version = client.get_model_version_by_alias("shike-digits-lt", "champion")
    assert version.run_id == run_id
    assert version.tags["weights_digest"] == data.tags["weights_digest"]
    artifacts = Path(server.settings["MLFLOW_ARTIFACTS_DESTINATION"])
    assert list(artifacts.rglob("checkpoint.pt"))
    assert list(artifacts.rglob("MLmodel"))


@pytest.mark.slow
def test_no_password_is_written_anywhere(outage, server, postgres):
    artifacts = Path(server.settings["MLFLOW_ARTIFACTS_DESTINATION"])
    assert list(outage.home.glob("runs/*/log.txt"))
    database = postgres.run("pg_dump")  # parameters, tags, and the users
    assert b"weights_digest" in database
    assert b"scrypt:" in database or b"pbkdf2:" in database
    places = [outage.out, outage.err, outage.home, artifacts, database, server.log]
    assert secrets_in(*places, postgres.directory / "log.txt") == []


# --- several at once -------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from components import tracking
from shike_core.config import RegisterConfig
from shike_core.gate import decide

number, epochs, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
run = tracking.open_run("shared-lt")
with tracking.live_log(run, lambda metrics, step: None, out) as log:
    for epoch in range(epochs):
        log({"train/loss": float(number), "lr": epoch / epochs}, epoch)
run.tag(weights_digest=f"weights of {number}")
config = RegisterConfig(model_name="shared")
candidate = {"test_digest": "t", "weights_digest": "w", "metrics": {"test/accuracy": 0.5}}
tracking.store_decision(run, config, decide(config, candidate, None))
model = run.client.create_logged_model(run.experiment_id, source_run_id=run.run_id)
run.client.finalize_logged_model(model.model_id, "READY")
version = tracking.register(run, f"models:/{model.model_id}", config, "challenger")
run.finish()
print(run.run_id, version, flush=True)
"""
WRITERS = ("anna", "ben", "cleo")
WRITTEN_EPOCHS = 400


@pytest.fixture(scope="module")
def written(server, process_environment, tmp_path_factory) -> dict[str, tuple[int, str, str]]:
    """Exit code, output and errors of processes that begin to write in the same moment."""
    directory = tmp_path_factory.mktemp("writers")
    processes = {}
    for number, name in enumerate(WRITERS):
        uri = with_password(server, name, PASSWORDS[name])
        arguments = [str(number), str(WRITTEN_EPOCHS), str(directory / name)]
        processes[name] = subprocess.Popen(
            [sys.executable, "-c", WRITER, *arguments],
            cwd=ROOT,
            env=process_environment(MLFLOW_TRACKING_URI=uri),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    for process in processes.values():
        assert process.stdout.readline() == "ready\n", process.communicate()
    for process in processes.values():
        process.stdin.write("\n")
        process.stdin.flush()
    done = {}
    for name, process in processes.items():
        out, err = process.communicate(timeout=300)
        done[name] = process.returncode, out, err
    return done


def test_nothing_is_lost_when_several_write_at_once(written, client):
    assert {name: code for name, (code, _, _) in written.items()} == dict.fromkeys(WRITERS, 0), (
        written
    )
    (experiment,) = client.search_experiments(filter_string="name = 'shared-lt'")
    runs = client.search_runs([experiment.experiment_id])
    ids = [out.splitlines()[-1].split()[0] for _, out, _ in written.values()]
    assert {run.info.run_id for run in runs} == set(ids)
    for number, run_id in enumerate(ids):
        losses = client.get_metric_history(run_id, "train/loss")
        assert sorted(metric.step for metric in losses) == list(range(WRITTEN_EPOCHS))
        assert {metric.value for metric in losses} == {float(number)}
        rates = {m.step: m.value for m in client.get_metric_history(run_id, "lr")}
        assert rates == {epoch: epoch / WRITTEN_EPOCHS for epoch in range(WRITTEN_EPOCHS)}


def test_several_models_registered_at_once_get_a_version_each(written, client):
    versions = client.search_model_versions("name = 'shared'")
    assert sorted(int(version.version) for version in versions) == [1, 2, 3]
    told = {tuple(out.splitlines()[-1].split()) for _, out, _ in written.values()}
    assert {(version.run_id, str(version.version)) for version in versions} == told


def test_a_password_in_the_address_is_shown_nowhere(written, postgres, server):
    assert len(written) == len(WRITERS)
    texts = [text for _, out, err in written.values() for text in (out, err)]
    assert secrets_in(*texts, postgres.run("pg_dump"), server.log) == []


# --- who may not -----------------------------------------------------------------------------

RUN = ["-m", "pipelines.run_local", *TINY, "--train.stage1-epochs", "1", "--home"]


@pytest.mark.parametrize(
    "how",
    [
        "wrong password",
        # One of the address also has to stay out of an exception, which is tried below.
        pytest.param("wrong password in the address", marks=pytest.mark.slow),
        pytest.param("no password", marks=pytest.mark.slow),
    ],
)
def test_who_does_not_know_the_password_is_told_in_one_line(
    server, process_environment, tmp_path, how
):
    settings = {
        "wrong password": of_user(server, "anna", WRONG_PASSWORD),
        "no password": {"MLFLOW_TRACKING_URI": server.uri},
        "wrong password in the address": {
            "MLFLOW_TRACKING_URI": with_password(server, "anna", WRONG_PASSWORD)
        },
    }[how]
    done = subprocess.run(
        [sys.executable, *RUN, str(tmp_path / "home")],
        cwd=ROOT,
        env=process_environment(**settings),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode not in (0, None)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "MLFLOW_TRACKING_USERNAME" in line
    assert "MLFLOW_TRACKING_PASSWORD" in line
    assert server.uri in line
    assert secrets_in(done.stdout, done.stderr) == []
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not left or secrets_in(*left) == []


@pytest.mark.parametrize("reachable", [True, False])
def test_no_password_in_an_exception(server, free_port, monkeypatch, reachable):
    uri = with_password(server, "anna", WRONG_PASSWORD)
    if not reachable:
        uri = uri.replace(str(server.port), str(free_port()))
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(tracking.TrackingError) as raised:
        tracking.connect()
    assert secrets_in("".join(traceback.format_exception(raised.value))) == []


def test_who_may_not_write_to_an_experiment_is_told_before_anything_runs(
    server, client, process_environment, tmp_path
):
    found = client.get_experiment_by_name("digits-lt")  # of the run that outlived its server
    experiment_id = found.experiment_id if found else client.create_experiment("digits-lt")
    ask(
        server,
        "3.0/mlflow/users/permissions/grant",
        username="guest",
        resource_type="experiment",
        resource_id=experiment_id,
        permission="DENY",
    )
    before = client.search_runs([experiment_id])
    done = subprocess.run(
        [sys.executable, *RUN, str(tmp_path / "home")],
        cwd=ROOT,
        env=process_environment(**of_user(server, "guest")),
        capture_output=True,
        text=True,
        check=False,
    )
    told = done.stdout + done.stderr
    assert done.returncode not in (0, None)
    assert "guest" in told
    assert "digits-lt" in told
    assert "may not write" in told
    assert "Traceback" not in told
    assert "epoch 1/" not in told
    assert secrets_in(told, tmp_path / "home") == []
    assert len(client.search_runs([experiment_id])) == len(before)

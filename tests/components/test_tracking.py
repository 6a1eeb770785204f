import json
import os
import socket
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pytest
from kfp import dsl
from mlflow import MlflowClient

from components import tracking
from components.tracking import runs
from components.train import train
from shike_core.config import RegisterConfig
from shike_core.gate import decide
from shike_core.recipes import digits_lt, recipe_named


def show_nothing(metrics, step) -> None:
    """A console that nobody looks at."""


def loss_history(run: tracking.TrackedRun) -> list[tuple[int, float]]:
    found = run.client.get_metric_history(run.run_id, "train/loss")
    return [(metric.step, metric.value) for metric in sorted(found, key=lambda m: m.step)]


@pytest.fixture
def slow_files() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Address of a server for files that takes its time to store them, and what it was sent."""
    received = {}

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(2.5)
            received[self.path.rpartition("/")[2]] = content
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/files", received
        server.shutdown()


def test_a_large_file_may_take_longer_than_another_call(store, slow_files, tmp_path, monkeypatch):
    address, received = slow_files
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    MlflowClient(store).create_experiment("digits-lt", artifact_location=address)
    (tmp_path / "checkpoint.pt").write_bytes(b"weights")
    tracking.open_run("digits-lt").log_directory(tmp_path, "train", "checkpoint.pt")
    assert received == {"checkpoint.pt": b"weights"}
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://me:secret@host/runs", "postgresql://host/runs"),
        ("postgresql://me:se/cr@t@host:5432/runs", "postgresql://host:5432/runs"),
        ("mysql+pymysql://me@host/runs", "mysql+pymysql://host/runs"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("http://host:5000/mlflow", "http://host:5000/mlflow"),
    ],
)
def test_where_to_look_shows_no_password(uri, shown, store, monkeypatch):
    run = tracking.open_run("digits-lt")
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: uri)
    found = tracking.where_to_look(run)
    assert found.endswith(f"STORE={shown}") or found.startswith(shown)


# --- the run ---------------------------------------------------------------------------------


def test_a_run_is_created_in_the_experiment_of_the_data_set(store, subset, monkeypatch):
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-1")
    monkeypatch.setenv(tracking.GIT_COMMIT, "0123abc")
    run = tracking.open_run("digits-lt")
    found = MlflowClient(store).get_run(run.run_id)
    assert found.data.tags["kind"] == "run"
    assert MlflowClient(store).get_experiment(found.info.experiment_id).name == "digits-lt"
    assert found.data.tags["kfp_run_id"] == "kfp-1"
    assert found.data.tags["mlflow.source.git.commit"] == "0123abc"
    assert "kfp-1" in found.data.tags["mlflow.note.content"]


def test_which_run_a_step_writes_to(store, subset, monkeypatch):
    config = digits_lt().train
    of_the_backend = tracking.open_run("digits-lt").run_id
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-1")
    of_the_pipeline = tracking.open_run("digits-lt").run_id
    assert of_the_pipeline != of_the_backend
    assert tracking.open_run("digits-lt").run_id == of_the_pipeline
    assert tracking.open_training(subset, config).run_id == of_the_pipeline
    monkeypatch.setenv("MLFLOW_RUN_ID", of_the_backend)
    assert tracking.open_run("digits-lt").run_id == of_the_backend
    assert tracking.open_training(subset, config).run_id == of_the_backend
    monkeypatch.delenv("MLFLOW_RUN_ID")
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-2")
    assert tracking.open_training(subset, config).run_id not in {of_the_backend, of_the_pipeline}


def test_the_trainings_of_a_sweep_are_children_of_one_run(store, subset, monkeypatch):
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-1")
    parent = tracking.open_run("digits-lt", "sweep")
    configs = [replace(digits_lt().train, seed=seed) for seed in (0, 1)]
    children = [tracking.open_training(subset, config) for config in configs]
    assert len({parent.run_id, *(child.run_id for child in children)}) == 3
    assert tracking.open_training(subset, configs[1]).run_id == children[1].run_id
    for child in children:
        tags = child.client.get_run(child.run_id).data.tags
        assert tags["mlflow.parentRunId"] == parent.run_id
        assert child.of_sweep()
    assert not parent.of_sweep()


def test_trainings_that_begin_at_the_same_time_do_not_take_each_others_run(
    store, subset, monkeypatch
):
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-1")
    tracking.open_run("digits-lt", "sweep")
    config = digits_lt().train
    others = []

    def first_the_other(client, experiment, digest):
        run = find_run(client, experiment, digest)
        if not others:  # before the first has got further than a run of its own
            others.append(None)
            others[0] = tracking.open_training(subset, replace(config, seed=1))
        return run

    find_run = runs._run_for_training
    monkeypatch.setattr(runs, "_run_for_training", first_the_other)
    run, (other,) = tracking.open_training(subset, config), others
    assert run.run_id != other.run_id
    seeds = [x.client.get_run(x.run_id).data.params["train.seed"] for x in (run, other)]
    assert seeds == ["0", "1"]


def left_by_training(run: tracking.TrackedRun, config, out: Path) -> None:
    """The files of a finished training, as far as the tracking reads them."""
    out.mkdir()
    history = [{"epoch": epoch, "train/loss": 9.0 - epoch} for epoch in range(3)]
    report = {
        "config": vars(config), "device": "cpu", "precision": "float32", "parameters_deployed": 7,
    }  # fmt: skip
    (out / "history.json").write_text(json.dumps(history))
    (out / "train.json").write_text(json.dumps(report))
    tracking.hand_on(run, out)


def test_an_evaluation_goes_on_in_the_run_of_its_training(store, subset, tmp_path, monkeypatch):
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-1")
    run = tracking.open_training(subset, digits_lt().train)
    left_by_training(run, digits_lt().train, tmp_path / "out")
    assert tracking.open_evaluation(subset, tmp_path / "out").run_id == run.run_id
    assert loss_history(run) == []


def test_a_training_from_the_cache_is_logged_in_the_run_of_this_pipeline_run(
    store, subset, tmp_path, monkeypatch
):
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-1")
    config = replace(digits_lt().train, seed=4)
    old = tracking.open_training(subset, config)
    left_by_training(old, config, tmp_path / "out")
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-2")
    opened_by_preflight = tracking.open_run("digits-lt")
    for _ in range(2):  # the second time as a retried step
        run = tracking.open_evaluation(subset, tmp_path / "out")
        assert run.run_id == opened_by_preflight.run_id != old.run_id
        assert loss_history(run) == [(0, 9.0), (1, 8.0), (2, 7.0)]
    data = run.client.get_run(run.run_id).data
    assert data.tags["cached_training"] == old.run_id
    assert data.params["train.seed"] == "4"
    assert run.client.list_artifacts(run.run_id, "train")


def test_a_directory_that_no_training_left_is_refused(store, subset, tmp_path):
    with pytest.raises(tracking.TrackingError, match=r"not what the train step leaves .*run\.json"):
        tracking.open_evaluation(subset, tmp_path)


@pytest.mark.parametrize(
    ("state", "status"), [("FAILED", "FAILED"), ("CANCELED", "KILLED"), ("SUCCEEDED", "FAILED")]
)
def test_no_run_stays_open(store, monkeypatch, state, status):
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-1")
    parent = tracking.open_run("digits-lt", "sweep")
    done = tracking.open_run("digits-lt")
    done.finish()
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-2")
    of_another = tracking.open_run("digits-lt")
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-1")
    assert tracking.close_runs(state) == [f"closed run {parent.run_id} as {status}"]
    found = {
        run: parent.client.get_run(run.run_id).info.status for run in (parent, done, of_another)
    }
    assert list(found.values()) == [status, "FINISHED", "RUNNING"]


def test_parameters_of_the_backend_do_not_stand_in_the_way(store, subset, monkeypatch):
    of_the_backend = tracking.open_run("digits-lt")
    for key in ("seed", "width", "dataset"):  # a backend that tracks runs logs a step's inputs
        of_the_backend.client.log_param(of_the_backend.run_id, key, "of the backend")
    monkeypatch.setenv("MLFLOW_RUN_ID", of_the_backend.run_id)
    run = tracking.open_training(subset, replace(digits_lt().train, seed=9))
    params = run.client.get_run(of_the_backend.run_id).data.params
    assert (params["seed"], params["train.seed"]) == ("of the backend", "9")
    assert os.environ["MLFLOW_RUN_ID"] == of_the_backend.run_id  # nothing consumed it


def test_steps_outside_of_a_pipeline_share_no_run(store, subset):
    first, second = (tracking.open_run("digits-lt") for _ in range(2))
    assert first.run_id != second.run_id


def test_a_run_that_is_not_there(store):
    with pytest.raises(tracking.TrackingError, match=f"no MLflow run 0f0f on {store}.*of this"):
        tracking.attach("0f0f")


def test_a_retried_training_goes_on_in_its_run(store, subset, monkeypatch):
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-1")
    config = digits_lt().train
    first = tracking.open_training(subset, config)
    with tracking.live_log(first, show_nothing, subset.parent) as log:
        for epoch in range(3):
            log({"train/loss": 10.0 - epoch}, epoch)
    first.finish("FAILED")
    again = tracking.open_training(subset, config)
    assert again.run_id == first.run_id
    assert again.client.get_run(again.run_id).info.status == "RUNNING"
    with tracking.live_log(again, show_nothing, subset.parent) as log:
        for epoch in range(5):  # a resumed training tells the epochs already done once more
            log({"train/loss": 10.0 - epoch}, epoch)
    assert loss_history(again) == [(0, 10.0), (1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0)]


def test_a_variant_is_told_by_the_name_of_its_run(store, subset):
    for recipe, start, tag in (("digits-lt", "IF", "shike"), ("digits-lt/crt", "crt IF", "crt")):
        run = tracking.open_training(subset, recipe_named(recipe).train)
        stored = run.client.get_run(run.run_id)
        assert stored.info.run_name.startswith(start)
        assert stored.data.tags["variant"] == tag


def test_what_was_measured_before_an_error_arrives(store, subset, tmp_path):
    run = tracking.open_run("digits-lt")

    def fail_after_one_epoch() -> None:
        with tracking.live_log(run, show_nothing, tmp_path) as log:
            log({"train/loss": 3.0}, 0)
            raise RuntimeError("of the training")

    with pytest.raises(RuntimeError, match="of the training"):
        fail_after_one_epoch()
    assert loss_history(run) == [(0, 3.0)]


def test_the_console_sees_every_epoch(store, subset, tmp_path):
    seen = []
    run = tracking.open_run("digits-lt")
    with tracking.live_log(run, lambda *line: seen.append(line), tmp_path) as log:
        log({"train/loss": 3.0}, 0)
    assert seen == [({"train/loss": 3.0}, 0)]


def test_runs_are_found_among_more_experiments_than_a_server_tells_at_once(
    store, subset, monkeypatch
):
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-1")
    run = tracking.open_run("digits-lt")
    columns = "artifact_location, lifecycle_stage, creation_time, workspace"
    with sqlite3.connect(store.removeprefix("sqlite:///")) as database:
        database.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1001) "
            f"INSERT INTO experiments (name, {columns}) SELECT i, "
            f"{columns.replace('creation_time', 'creation_time + i')} FROM experiments, n "
            "WHERE name = 'digits-lt'"
        )
    assert len(MlflowClient(store).search_experiments()) == 1000
    (found,) = tracking.runs_of(MlflowClient(store), "kfp-1")
    assert found.info.run_id == run.run_id
    MlflowClient(store).update_run(run.run_id, name="Anna's run")
    assert tracking.find_run(MlflowClient(store), "Anna's run").info.run_id == run.run_id


def test_a_deleted_experiment_is_told(store, subset):
    client = MlflowClient(store)
    experiment = client.create_experiment("digits-lt")
    client.delete_experiment(experiment)
    message = rf"digits-lt was deleted; bring it back: .* restore --experiment-id {experiment}, or"
    with pytest.raises(tracking.TrackingError, match=message):
        tracking.open_run("digits-lt")


# --- servers that go away --------------------------------------------------------------------


@pytest.fixture(scope="module")
def fragile_server(mlflow_server, empty_mlflow_database, tmp_path_factory):
    """A server to be killed; ``start()`` brings it back with its store."""
    directory = tmp_path_factory.mktemp("fragile")
    database = directory / "mlflow.db"
    database.write_bytes(empty_mlflow_database.read_bytes())
    return mlflow_server(f"sqlite:///{database}", directory / "artifacts")


def test_nothing_is_lost_when_the_server_goes_away_and_returns(
    fragile_server, subset, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", fragile_server.uri)
    fragile_server.start()
    run = tracking.open_run("digits-lt")
    slowest, epochs = 0.0, 30
    with tracking.live_log(run, show_nothing, tmp_path) as log:
        for epoch in range(epochs):
            if epoch == 10:
                fragile_server.kill()
            if epoch == 20:
                time.sleep(2.5)  # so that sending fails at least once
                fragile_server.start()
            before = time.monotonic()
            log({"train/loss": float(epochs - epoch), "lr": 0.1}, epoch)
            slowest = max(slowest, time.monotonic() - before)
            time.sleep(0.05)
    assert slowest < 1.0
    assert loss_history(run) == [(epoch, float(epochs - epoch)) for epoch in range(epochs)]
    found = run.client.get_metric_history(run.run_id, "train/loss")
    sent = [metric.step for metric in sorted(found, key=lambda m: (m.timestamp, m.step))]
    assert sent == list(range(epochs))
    assert capsys.readouterr().err.count("warning: the tracking server does not take metrics") == 1


def test_the_step_fails_at_its_end_if_the_server_never_returns(
    fragile_server, subset, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", fragile_server.uri)
    monkeypatch.setenv(tracking.PATIENCE, "1")
    fragile_server.start()
    run = tracking.open_run("digits-lt")
    spool = tmp_path / "out" / "metrics.jsonl"

    def lose_the_server() -> None:
        with tracking.live_log(run, show_nothing, spool.parent) as log:
            fragile_server.kill()
            for epoch in range(5):
                log({"train/loss": float(epoch), "lr": 0.1}, epoch)

    with pytest.raises(tracking.TrackingError, match=f"within 1 s .*They are in {spool}"):
        lose_the_server()
    kept = [json.loads(line) for line in spool.read_text().splitlines()]
    assert kept == [{"step": epoch, "train/loss": float(epoch), "lr": 0.1} for epoch in range(5)]


def test_what_a_step_says_at_its_end_waits_for_a_server_that_restarts(
    fragile_server, subset, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", fragile_server.uri)
    fragile_server.start()
    run = tracking.open_run("digits-lt")
    (tmp_path / "checkpoint.pt").write_bytes(b"weights")
    fragile_server.kill()
    back = threading.Timer(3.0, fragile_server.start)
    back.start()
    try:
        tracking.log_training(
            run, {"device": "cpu", "precision": "float32", "parameters_deployed": 1}, tmp_path
        )
    finally:
        back.join()
    assert run.client.get_run(run.run_id).data.tags["device"] == "cpu"
    kept = run.client.download_artifacts(run.run_id, "train/checkpoint.pt", str(tmp_path / "new"))
    assert Path(kept).read_bytes() == b"weights"


def test_a_server_that_stays_away_or_refuses_is_told_in_one_line(fragile_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", fragile_server.uri)
    fragile_server.start()
    run = tracking.open_run("digits-lt")
    start = time.monotonic()
    with pytest.raises(tracking.TrackingError, match=r"did not take .*INVALID_PARAMETER_VALUE"):
        run.tag(**{"a:tag//of no name/..": 1})
    assert time.monotonic() - start < 60  # it would not be otherwise later
    fragile_server.kill()
    monkeypatch.setenv(tracking.PATIENCE, "1")
    with pytest.raises(tracking.TrackingError, match=r"did not take .*check the server"):
        run.tag(a=1)


def test_a_lost_server_is_no_missing_champion(fragile_server, subset, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", fragile_server.uri)
    fragile_server.start()
    client = tracking.connect()
    assert tracking.champion_of(client, "never-registered") is None
    client.create_registered_model("without-alias")
    assert tracking.champion_of(client, "without-alias") is None
    fragile_server.kill()
    with pytest.raises(tracking.TrackingError, match="champion of without-alias"):
        tracking.champion_of(client, "without-alias")


def test_training_does_not_start_without_its_server(
    subset, tmp_path, free_port, monkeypatch, capsys
):
    uri = f"http://user:s3cret@127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    checkpoint = dsl.Model(uri=str(tmp_path / "checkpoint"))
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        train.python_func(
            **vars(digits_lt().train),
            subset=dsl.Dataset(uri=str(subset)),
            checkpoint_dir="",
            num_nodes=1,
            nodes={},
            stage1_from="",
            checkpoint=checkpoint,
        )
    assert time.monotonic() - start < 30
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert "epoch" not in printed.out
    assert not Path(checkpoint.path).exists()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert "does not answer" in line
    assert "127.0.0.1" in line
    assert "s3cret" not in printed.err


def test_a_server_that_never_answers_is_given_up_in_time(monkeypatch):
    with socket.socket() as silent:  # takes connections, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(tracking.TrackingError, match="does not answer"):
            tracking.connect()
        assert time.monotonic() - start < 30


def test_a_step_without_an_address_fails_at_once():
    with pytest.raises(tracking.TrackingError, match=r"MLFLOW_TRACKING_URI is not set.*set it to"):
        tracking.connect()


# --- the registry ----------------------------------------------------------------------------


def test_a_run_keeps_the_reasons_of_the_gate(store, subset, tmp_path):
    run = tracking.open_run("digits-lt")
    config = RegisterConfig(model_name="m", max_accuracy_drop=0.5)
    candidate = {"test_digest": "t", "weights_digest": "w", "metrics": {"test/accuracy": 0.5}}
    tracking.store_decision(run, config, decide(config, candidate, None))
    found = run.client.get_run(run.run_id).data
    assert found.params["register.max_accuracy_drop"] == "0.5"
    assert found.tags["decision"] == "champion"
    path = run.client.download_artifacts(run.run_id, "register/decision.json", str(tmp_path))
    assert json.loads(Path(path).read_text())["reasons"] == ["there is no champion yet"]


# --- parameters ------------------------------------------------------------------------------


def test_parameters_and_data_sets_are_written_down_once(store, subset, monkeypatch):
    monkeypatch.setenv(tracking.KFP_RUN_ID, "kfp-1")
    config = replace(digits_lt().train, seed=3)
    for _ in range(2):  # the second time as a retried step
        run = tracking.open_training(subset, config)
    found = run.client.get_run(run.run_id)
    prefixes = Counter(key.partition(".")[0] for key in found.data.params)
    assert set(prefixes) == {"subset", "train"}
    assert prefixes["train"] == len(vars(config))
    assert found.data.tags["seed"] == "3"
    info = json.loads((subset / "subset.json").read_text())
    data = {
        entry.tags[0].value: (entry.dataset.name, entry.dataset.digest)
        for entry in found.inputs.dataset_inputs
    }
    assert data == {
        "train": ("digits-lt-train", info["digest"][:36]),
        "test": ("digits-lt-test", info["test_digest"][:36]),
    }
    assert len(found.inputs.dataset_inputs) == 2


def test_the_settings_of_the_tracker_are_those_of_the_module():
    assert float(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) <= 10
    assert int(os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]) <= 1

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pipelines import run_local as script
from pipelines.run_local import Stopped, forwarded_signals

ROOT = Path(__file__).parents[2]
TINY = [
    *("--train.num-experts", "2", "--train.width", "4", "--train.warmup-epochs", "1"),
    *("--train.stage1-epochs", "2", "--train.stage2-epochs", "1"),
]


@dataclass
class Local:
    """What a call of ``python -m pipelines.run_local`` printed, and its MLflow runs."""

    home: Path
    code: int
    out: str
    err: str

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.home}/mlflow.db")

    @property
    def runs(self) -> list[Run]:
        """Newest first."""
        experiment = self.client.get_experiment_by_name("digits-lt")
        return self.client.search_runs([experiment.experiment_id])


@pytest.fixture(scope="module")
def run_local(process_environment) -> Callable[..., Local]:
    def call(home: Path, *arguments: str, **environment: str) -> Local:
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.run_local", "--home", str(home), *arguments],
            cwd=ROOT,
            env=process_environment(**environment),
            capture_output=True,
            text=True,
            check=False,
        )
        return Local(home, done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="module")
def home(empty_mlflow_database, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("home")
    shutil.copyfile(empty_mlflow_database, directory / "mlflow.db")
    return directory


@pytest.fixture(scope="module")
def finished(run_local, home) -> Local:
    done = run_local(home, *TINY)
    assert done.code == 0, done.out + done.err
    return done


@pytest.fixture(scope="module")
def repeated(run_local, finished) -> Local:
    done = run_local(finished.home, *TINY)
    assert done.code == 0, done.out + done.err
    return done


@pytest.fixture(scope="module")
def failed(run_local, finished) -> Local:
    """A training that diverges, in a store where another run has succeeded."""
    rates = ["--train.stage1-learning-rate", "1e9", "--train.stage1-warmup-start", "1e9"]
    return run_local(finished.home, *TINY, *rates)


def test_a_finished_run_prints_its_accuracies(finished):
    (run,) = finished.client.search_runs(["1"], "attributes.status = 'FINISHED'")[-1:]
    rows = {
        line.split("  ")[0]: [float(cell) for cell in re.findall(r"\d+\.\d", line)]
        for line in finished.out.splitlines()
        if line.startswith(("ensemble", "expert "))
    }
    assert set(rows) == {"ensemble", "expert 0", "expert 1"}
    metrics = run.data.metrics
    for row, prefix in (("ensemble", "test/"), ("expert 1", "test/expert_1/")):
        groups = ("", "many_shot/", "medium_shot/", "few_shot/")
        expected = [100 * metrics[f"{prefix}{group}accuracy"] for group in groups]
        assert rows[row] == pytest.approx(expected, abs=0.051)


def test_a_finished_run_names_model_and_report(finished):
    assert re.search(r"shike-digits-lt version 1\b.*\bchampion\b", finished.out)
    (report,) = re.findall(r"\S+report\.html", finished.out)
    path = Path(report) if Path(report).is_absolute() else ROOT / report
    page = path.read_text()
    assert "<html" in page
    assert "Not judged by the gate yet" not in page
    assert "there is no champion" in page
    assert finished.runs[-1].info.run_id in finished.out
    assert finished.runs[-1].info.status == "FINISHED"
    assert finished.runs[-1].data.tags["mlflow.source.git.commit"]


def test_a_finished_run_shows_each_step_and_epoch(finished):
    for step in ("build subset", "train", "evaluate", "register"):
        assert step in finished.out
    assert len(re.findall(r"epoch [123]/3 .*loss", finished.out)) == 3


@pytest.mark.slow
def test_the_same_weights_are_registered_once(repeated):
    assert re.search(r"shike-digits-lt version 1\b.*\bchampion\b", repeated.out)
    assert len(repeated.client.search_model_versions("name = 'shike-digits-lt'")) == 1
    finished = [run for run in repeated.runs if run.info.status == "FINISHED"]
    assert len(finished) == 2
    assert len({run.data.tags["weights_digest"] for run in finished}) == 1
    assert len({run.data.tags["kfp_run_id"] for run in finished}) == 2


def test_a_failing_step_fails_the_run(failed):
    assert failed.code not in (0, None)
    assert "the loss is not finite at epoch 0" in failed.out + failed.err
    (run,) = [run for run in failed.runs if run.info.status == "FAILED"]
    assert run.data.params["train.stage1_learning_rate"] == "1000000000.0"
    assert "registered_version" not in run.data.tags
    assert "Traceback" not in failed.err


def test_what_was_trained_is_kept_for_a_run_that_failed_later(
    run_local, empty_mlflow_database, tmp_path
):
    shutil.copyfile(empty_mlflow_database, tmp_path / "mlflow.db")
    failed = run_local(tmp_path, *TINY, "--evaluate.device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert failed.code != 0
    assert "device=cuda" in failed.out
    assert len(list(tmp_path.glob("checkpoints/*/checkpoint.pt"))) == 1
    again = run_local(tmp_path, *TINY)
    assert again.code == 0, again.out + again.err
    (report,) = tmp_path.glob(f"runs/{again.runs[0].data.tags['kfp_run_id']}/**/train.json")
    assert json.loads(report.read_text())["epochs_in_this_call"] == 0
    losses = [
        [m.value for m in again.client.get_metric_history(run.info.run_id, "train/loss")]
        for run in again.runs
    ]
    assert losses[0] == losses[1] != []
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_run_stopped_by_ctrl_c_keeps_its_checkpoint_and_is_killed(
    empty_mlflow_database, process_environment, tmp_path
):
    shutil.copyfile(empty_mlflow_database, tmp_path / "mlflow.db")
    long = [*TINY, "--train.stage1-epochs", "5000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.run_local", "--home", str(tmp_path), *long],
        cwd=ROOT,
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            if re.match(r"epoch +3/", line):
                break
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        rest, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    stopped = Local(tmp_path, 130, rest, "")
    (run,) = stopped.runs
    assert run.info.status == "KILLED"
    assert rest.count(f"closed run {run.info.run_id} as KILLED") == 1
    assert "FAILED" not in rest
    assert len(list(tmp_path.glob("checkpoints/*/checkpoint.pt"))) == 1


def test_a_run_whose_terminal_is_closed_keeps_its_checkpoint_and_is_killed(
    empty_mlflow_database, process_environment, tmp_path
):
    shutil.copyfile(empty_mlflow_database, tmp_path / "mlflow.db")
    long = [*TINY, "--train.stage1-epochs", "5000"]

    def on_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started by nohup
        os.login_tty(terminal)

    ours, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.run_local", "--home", str(tmp_path), *long],
        cwd=ROOT,
        env=process_environment(),
        preexec_fn=on_terminal,
    )
    os.close(terminal)
    try:
        seen = b""
        while not re.search(rb"[1-9]/5001 .*loss", seen):  # the bar
            seen += os.read(ours, 4096)
        os.close(ours)
        assert process.wait(timeout=120) == 128 + signal.SIGHUP
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    (run,) = Local(tmp_path, 0, "", "").runs
    assert run.info.status == "KILLED"
    assert len(list(tmp_path.glob("checkpoints/*/checkpoint.pt"))) == 1


def test_a_signal_before_there_are_steps_ends_at_once():
    def wait_for_a_server() -> None:
        with forwarded_signals():
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)

    with pytest.raises(Stopped) as stop:
        wait_for_a_server()
    assert stop.value.signal_number == signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subset.imbalance-factor", "0.01"], "0.01 is probably meant as 100"),
        (["--train.no-such-option", "1"], "no-such-option"),
        (["--train.num-experts", "0"], "num_experts must be at least 1"),
        (["--recipe", "digits-lt/no-dk"], "unknown variant 'no-dk' of digits-lt; choose one of"),
    ],
)
def test_wrong_values_are_refused_before_anything_runs(
    tmp_path, monkeypatch, capfd, arguments, message
):
    home = tmp_path / "home"
    monkeypatch.setattr(sys, "argv", ["run_local", "--home", str(home), *arguments])
    monkeypatch.setenv("SHIKE_TAG", "")  # it sets it
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code not in (0, None)
    told = [*capfd.readouterr(), str(stop.value)]
    words = " ".join(re.findall(r"[^\s│]+", " ".join(told)))  # out of the box it stands in
    assert message in words
    assert "Traceback" not in words
    assert not home.exists()


def test_nodes_are_containers_and_no_container_starts_others(run_local, tmp_path):
    done = run_local(tmp_path, "--runner", "docker", "--num-nodes", "2")
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert line.startswith("error: a step in a container cannot start others; leave RUNNER=docker")
    assert not (tmp_path / "runs").exists()


def test_a_server_that_is_not_there_is_told_at_once(run_local, tmp_path, free_port):
    done = run_local(tmp_path, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{free_port()}")
    assert done.code not in (0, None)
    (line,) = done.err.splitlines()
    assert "does not answer" in line
    assert "Executing" not in done.out


# --- in a browser ----------------------------------------------------------------------------


def shown(browser, *texts: str, patience_s: float = 90) -> str:
    """The page's text once it has all these in it."""
    deadline = time.monotonic() + patience_s
    while True:
        page = browser.find_element("tag name", "body").text
        missing = [text for text in texts if text not in page]
        if not missing:
            return page
        assert time.monotonic() < deadline, f"{missing} not in:\n{page}"
        time.sleep(0.5)


@pytest.mark.browser
def test_the_report_opens_in_a_browser(finished, browser):
    (path,) = re.findall(r"\S+report\.html", finished.out)
    path = (ROOT / path).resolve()
    (numbers,) = (finished.home / "runs").glob(
        f"{finished.runs[-1].data.tags['kfp_run_id']}/**/evaluation/report.json"
    )
    accuracy = json.loads(numbers.read_text())["metrics"]["test/accuracy"]
    browser.get(path.as_uri())
    shown(browser, f"{100 * accuracy:.1f}")
    pictures = browser.find_elements("tag name", "img")
    assert pictures
    widths = "return Array.from(document.images).map(image => image.naturalWidth)"
    assert all(browser.execute_script(widths))


def report_of(finished) -> dict[str, Any]:
    (path,) = (finished.home / "runs").glob(
        f"{finished.runs[-1].data.tags['kfp_run_id']}/**/evaluation/report.json"
    )
    return json.loads(path.read_text())


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_is_clicked_through(finished, browser, width):
    """Each link of the contents leads to its section, and the numbers are report.json's."""
    report = report_of(finished)
    (path,) = re.findall(r"\S+report\.html", finished.out)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.get((ROOT / path).resolve().as_uri())
        links = browser.find_elements("css selector", "nav a")
        assert len(links) >= 8
        for link in links:
            link.click()
            assert browser.execute_script(
                "const box = document.querySelector(location.hash).getBoundingClientRect();"
                "return box.top < innerHeight && box.bottom > 0"
            ), link.text
        page = browser.find_element("tag name", "body").text
        wide = "return document.documentElement.scrollWidth - innerWidth"
        assert browser.execute_script(wide) <= 0  # a table may scroll, the page does not
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    figures = [value for key, value in report["metrics"].items() if key.endswith("/accuracy")]
    figures += [row["accuracy"] for row in report["per_class"]]
    figures += [end for interval in report["intervals"].values() for end in interval]
    figures += [row[key] for row in report["shifts"] for key in ("accuracy", "corrected_accuracy")]
    figures += [
        value for row in report["calibration"]["groups"].values()
        for key, value in row.items() if key != "images"
    ]  # fmt: skip
    missing = [value for value in figures if f"{100 * value:.1f}" not in page]
    assert missing == []


@pytest.mark.browser
def test_the_tracking_pages_are_clicked_through(finished, browser, mlflow_server):
    """From the experiment to the run to its model, with the numbers of report.json."""
    server = mlflow_server(f"sqlite:///{finished.home}/mlflow.db", finished.home / "artifacts")
    server.start()
    run, report = finished.runs[-1], report_of(finished)
    (address,) = re.findall(r"all runs  there(/\S+)", finished.out)
    browser.get(server.uri + address)  # with the columns that tell which run is better
    cell = f"{report['metrics']['test/accuracy']:.3f}".rstrip("0")
    shown(browser, run.info.run_name, "test/few_shot/accuracy", cell)
    # Runs that failed may have the same name.
    browser.find_element("css selector", f"a[href*='{run.info.run_id}']").click()
    page = shown(browser, run.info.run_name, "test/accuracy", "shike-digits-lt")
    accuracy = report["metrics"]["test/accuracy"]
    assert f"{accuracy:.4g}"[:5] in page
    browser.get(f"{server.uri}/#/models/shike-digits-lt/versions/1")
    interval = " to ".join(f"{100 * end:.1f}" for end in report["intervals"]["all"])
    shown(browser, "champion", interval, "How to load it")


@pytest.mark.slow
@pytest.mark.browser
def test_the_screenshots_of_the_documents_can_be_taken(
    finished, browser, tmp_path, process_environment
):
    done = subprocess.run(
        [sys.executable, "docs/screenshots.py", "--home", finished.home, "--out", tmp_path],
        cwd=ROOT, env=process_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    taken = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert taken.keys() == {"experiment.png", "report.png", "model.png"}  # one run, no comparison
    assert "no comparison" in done.stdout
    assert all(10_000 < size < 200_000 for size in taken.values())

import os
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import requests
from kfp import dsl

from components import boundary
from shike_core.config import SubsetConfig
from shike_core.errors import DivergedError, InterruptedTraining


def test_nothing_happens_without_an_error(capsys):
    with boundary.readable_errors():
        pass
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error",
    [
        DivergedError(3, 14, {"train/loss": float("inf")}),
        ValueError("batch_size must be at least 1, got 0"),
    ],
)
def test_errors_for_people_become_one_line(error, capsys):
    with pytest.raises(SystemExit) as stop, boundary.readable_errors():
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", f"error: {error}\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "/x"),
         "error: No space left on device: /x; free some space or choose another place\n"),
        (requests.HTTPError("413 Client Error"), "error: 413 Client Error\n"),
    ],
)  # fmt: skip
def test_only_errors_of_files_are_told_to_choose_another_place(error, line, capsys):
    with pytest.raises(SystemExit) as stop, boundary.readable_errors():
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr().err == line


def test_a_configuration_that_cannot_work_becomes_one_line(capsys):
    with pytest.raises(SystemExit) as stop, boundary.readable_errors():
        SubsetConfig(dataset="digits", imbalance_factor=0.01)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "probably meant as 100" in printed


@pytest.mark.parametrize(("signal_number", "code"), [(15, 143), (2, 130)])
def test_an_interruption_exits_as_a_shell_reports_it(signal_number, code, capsys):
    with pytest.raises(SystemExit) as stop, boundary.readable_errors():
        raise InterruptedTraining(signal_number, 4, 7, "/kept/checkpoint.pt")
    assert stop.value.code == code
    printed = capsys.readouterr().err
    assert printed.startswith(f"stopped: stopped by signal {signal_number} at epoch 4, step 7")
    assert "/kept/checkpoint.pt" in printed
    assert printed.count("\n") == 1


def test_errors_of_our_own_making_keep_their_traceback():
    with pytest.raises(KeyError), boundary.readable_errors():
        raise KeyError("a bug")


def test_print_metrics_writes_one_line(capsys):
    boundary.print_metrics({"subset/train_images": 417.0, "subset/gini": 0.5}, 0)
    assert capsys.readouterr().out == "subset/train_images 417  subset/gini 0.5\n"


def test_console_prints_lines_where_no_terminal_is_named(monkeypatch, capsys):
    monkeypatch.delenv(boundary.PROGRESS_TERMINAL, raising=False)
    boundary.console(2)({"train/loss": 1.5}, 0)
    assert capsys.readouterr().out.startswith("epoch 1/2  train/loss 1.5")


def test_console_draws_a_bar_on_the_terminal_named(process_environment):
    controller, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    steps = "import sys; from components import boundary; log = boundary.console(2); "
    steps += "[log({'train/loss': 1.5}, epoch) for epoch in range(2)]"
    done = subprocess.run(
        [sys.executable, "-c", steps],
        cwd=Path(__file__).parents[2],
        env=process_environment(SHIKE_PROGRESS_TERMINAL=os.ttyname(terminal)),
        capture_output=True,
        text=True,
        check=True,
    )
    shown = os.read(controller, 10_000).decode()
    os.close(controller)
    os.close(terminal)
    assert "2/2" in shown
    assert "1.5" in shown
    assert done.stdout == done.stderr == ""


def test_show_in_kfp_fills_both_metric_artifacts():
    report = {
        "metrics": {"test/accuracy": 0.75, "test/few_shot/accuracy": 0.5},
        "confusion_display": {"labels": ["cat", "dog"], "matrix": [[3, 1], [0, 4]]},
    }
    metrics, confusion = dsl.Metrics(), dsl.ClassificationMetrics()
    boundary.show_in_kfp(report, metrics, confusion)
    assert metrics.metadata == report["metrics"]
    matrix = confusion.metadata["confusionMatrix"]
    assert [name["displayName"] for name in matrix["annotationSpecs"]] == ["cat", "dog"]
    assert [row["row"] for row in matrix["rows"]] == [[3, 1], [0, 4]]


def test_optional_path():
    assert boundary.optional_path("") is None
    assert str(boundary.optional_path("/data")) == "/data"


def test_downloaded_weights_are_kept_with_the_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", "")  # so that it is as before afterwards
    monkeypatch.delenv("TORCH_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    boundary.keep_weights(None)
    assert "TORCH_HOME" not in os.environ
    (tmp_path / "cache" / "torch").mkdir(parents=True)
    boundary.keep_weights(tmp_path / "kept")
    assert "TORCH_HOME" not in os.environ
    (tmp_path / "cache" / "torch").rmdir()
    boundary.keep_weights(tmp_path / "kept")
    assert os.environ["TORCH_HOME"] == str(tmp_path / "kept" / "torch")
    monkeypatch.setenv("TORCH_HOME", "/elsewhere")
    boundary.keep_weights(tmp_path / "kept")
    assert os.environ["TORCH_HOME"] == "/elsewhere"

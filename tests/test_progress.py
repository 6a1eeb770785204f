"""What a person sees, on a real terminal and without one."""

import contextlib
import io
import os
import pty
import re
import termios
import time

from shike_core.progress import console_log, format_metrics


def an_epoch(step: int) -> dict[str, float]:
    return {"lr": 0.1, "train/loss": 3.25 - step, "other": 9.0, "train/accuracy": 0.5}


def test_metrics_have_one_order_and_only_those_worth_a_line() -> None:
    assert format_metrics(an_epoch(0)) == "train/loss 3.25  train/accuracy 0.5  lr 0.1"
    assert format_metrics({}) == ""


def test_plain_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    log = console_log(100, stream)
    time.sleep(0.05)
    for step in (0, 1, 99):
        log(an_epoch(step), step)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    start = r"epoch   1/100  train/loss 3\.25  train/accuracy 0\.5  lr 0\.1  left (\d+) s"
    assert (left := re.fullmatch(start, lines[0]))
    assert int(left[1]) >= 5  # 99 epochs of at least a twentieth of a second
    assert lines[1].startswith("epoch   2/100  train/loss 2.25")
    assert lines[2] == "epoch 100/100  train/loss -95.75  train/accuracy 0.5  lr 0.1"


def test_the_time_left_does_not_count_the_epochs_of_an_earlier_call() -> None:
    stream = io.StringIO()
    log = console_log(100, stream)
    for step in range(50):  # what a resumed training tells at once
        log(an_epoch(step), step)
    time.sleep(0.1)
    log(an_epoch(50), 50)
    (left,) = re.findall(r"left (\d+) s", stream.getvalue().splitlines()[-1])
    assert int(left) >= 4  # 49 epochs of a tenth of a second


def read_all(terminal: int) -> str:
    """What was written to the other, closed end."""
    shown = b""
    with contextlib.suppress(OSError):  # Linux's end of a terminal
        while more := os.read(terminal, 4096):
            shown += more
    os.close(terminal)
    return shown.decode()


def test_a_bar_with_loss_and_time_left_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with os.fdopen(theirs, "w") as terminal:
        log = console_log(4, terminal)
        for step in range(4):
            time.sleep(0.15)  # the bar is drawn ten times a second at most
            log(an_epoch(step), step)
    shown = read_all(ours)
    assert shown.count("\r") >= 5  # drawn over itself
    assert shown.count("\n") == 1
    assert re.search(r"training: +25%.* 1/4 \[00:00<00:0\d, .*loss 3\.250\]", shown)
    assert re.search(r"training: 100%.* 4/4 \[00:0\d<00:00, .*loss 0\.250\]\s*$", shown)

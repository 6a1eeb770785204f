"""What a local run shows: the steps and what they say, without the platform's bookkeeping."""

import io
import re
from typing import TextIO

ANSI = re.compile(r"\x1b\[\d+m")
_TASK = re.compile(r"Executing task '(.+)'")
_RUNNER_LOG = re.compile(r"\d\d:\d\d:\d\d\.\d+ - (\w+) - ")
_STEP_INDENT = "    "


class StepConsole(io.TextIOBase):
    """Takes the local runner's standard output; keeps all of it, shows what matters to a person.

    The runner prints its own log, a dump of every step's inputs and outputs, and the step's
    output indented by four spaces.

    Args:
        screen: where to show.
        record: file that receives every line.
    """

    def __init__(self, screen: TextIO, record: TextIO) -> None:
        self._screen, self._record = screen, record
        self._line = ""
        self._hidden_until: str | None = None
        self._in_step = False

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str) -> int:
        """Take text; complete lines are shown or not."""
        self._record.write(text)
        self._record.flush()
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            shown = self._shown(ANSI.sub("", line))
            if shown is not None:
                self._screen.write(shown + "\n")
                self._screen.flush()
        return len(text)

    def _shown(self, line: str) -> str | None:
        if log := _RUNNER_LOG.match(line):
            self._in_step, self._hidden_until = "Streamed logs" in line, None
            if task := _TASK.search(line):
                return f"--- {task[1].replace('-', ' ')}"
            return None if log[1] == "INFO" else line[log.end() :]
        if not self._in_step or not line.startswith(_STEP_INDENT):
            return None  # the runner's outputs and rulers
        line = line.removeprefix(_STEP_INDENT)
        if line.startswith("Found image "):
            return None
        if self._hidden_until is not None:
            if line == self._hidden_until:
                self._hidden_until = None
            return None
        if line.startswith("[KFP Executor") and " INFO]: " in line:
            self._hidden_until = "}" if "Got executor_input:" in line else None
            return None
        return line.rstrip() or None

"""Processes that a program starts, and the signals that ask it to stop.

They do not run the program a second time, they end with it, and its signals are not for them.
"""

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C; a service manager or a cluster; a terminal that is closed, or whose network is gone."""


def heard_signals() -> tuple[signal.Signals, ...]:
    """Those of `STOP_SIGNALS` that this process listens to: started by nohup it stays."""
    stays = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return STOP_SIGNALS[:-1] if stays else STOP_SIGNALS


@contextmanager
def without_main() -> Iterator[None]:
    """Processes started here do not import the program that started them, as they otherwise would.

    They need nothing of it, it may take seconds, and a script that does not expect it would run
    a second time.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def end_with_program() -> None:
    """In a process that was started: end at once when the one that started it has ended."""
    threading.Thread(target=_wait_for_program, daemon=True).start()


def _wait_for_program() -> None:
    program = multiprocessing.parent_process()
    assert program is not None
    program.join()
    os._exit(1)

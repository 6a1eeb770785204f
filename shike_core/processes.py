"""Processes that a program starts: they do not run it a second time, and they end with it."""

import multiprocessing
import os
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager


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

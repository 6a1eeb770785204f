"""Metrics while a training runs, sent from a thread of their own."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow.entities import Metric

from components.tracking.connection import TrackingError, patience_s, reason
from components.tracking.runs import MAX_BATCH, TrackedRun, last_step

SYSTEM_METRICS_EVERY_S = 5.0

Log = Callable[[Mapping[str, float], int], None]


class LiveLog:
    """Sends metrics from a thread; what a server that is away cannot take is kept and sent later.

    Training never waits for it. Every metric is on disk as well, in ``metrics.jsonl``.
    """

    def __init__(self, run: TrackedRun, console: Log, spool: Path) -> None:
        self._run, self._console, self._spool = run, console, spool
        self._pending: list[Metric] = []
        self._lock = threading.Lock()
        self._sending = threading.Lock()  # two senders would drop a batch that neither sent
        self._closing = threading.Event()
        self._last_error = ""
        self._already = last_step(run)
        self._system = _SystemMetrics()
        self._thread = threading.Thread(target=self._work, daemon=True)
        spool.parent.mkdir(parents=True, exist_ok=True)
        spool.write_text("")
        self._thread.start()

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        """Show and keep the metrics of one epoch; return at once."""
        self._console(metrics, step)
        if step <= self._already:  # a resumed run repeats the epochs that it had logged
            return
        with self._spool.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._add(metrics, step)

    def close(self, patience_s: float) -> None:
        """Send what is left.

        Args:
            patience_s: how long to wait for a server that is away.

        Raises:
            TrackingError: the server did not return; the metrics are on disk.
        """
        self._closing.set()
        self._thread.join(timeout=60.0)
        deadline = time.monotonic() + patience_s
        while not self._send():
            if time.monotonic() >= deadline:
                raise TrackingError(
                    f"the tracking server went away during the step and did not return within "
                    f"{patience_s:g} s ({self._last_error}); {len(self._pending)} values were not "
                    f"sent. They are in {self._spool}, and all results are on disk: run the same "
                    "command again when the server is back, nothing is computed twice"
                )
            time.sleep(min(2.0, max(0.1, deadline - time.monotonic())))

    def _add(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        with self._lock:
            self._pending += [Metric(k, float(v), now, step) for k, v in metrics.items()]

    def _work(self) -> None:
        while not self._closing.wait(1.0):
            sampled = self._system.sample()
            if sampled is not None:
                self._add(*sampled)
            self._send()
        self._system.collect()  # a training of less than a second has no sample yet
        self._add(*self._system.rest())

    def _send(self) -> bool:
        with self._sending:
            return self._send_batches()

    def _send_batches(self) -> bool:
        while self._pending:
            with self._lock:
                batch = self._pending[:MAX_BATCH]
            try:
                self._run.client.log_batch(self._run.run_id, metrics=batch)
            except Exception as error:  # whatever it is, training goes on
                if not self._last_error:
                    print(
                        f"warning: the tracking server does not take metrics ({reason(error)}); "
                        "they are kept and sent when it returns",
                        file=sys.stderr,
                        flush=True,
                    )
                self._last_error = reason(error)
                return False
            self._last_error = ""
            with self._lock:
                del self._pending[: len(batch)]
        return True


class _SystemMetrics:
    """Processor, memory, disk, network and GPU, averaged over some seconds."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        try:
            from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

            self._monitors.append(GPUMonitor())
        except (ImportError, RuntimeError):
            pass  # no NVIDIA library, no GPU metrics
        self._step = 0
        self._due = time.monotonic() + SYSTEM_METRICS_EVERY_S

    def sample(self) -> tuple[dict[str, float], int] | None:
        """Take one sample; the averages and their step when they are due."""
        self.collect()
        if time.monotonic() < self._due:
            return None
        self._due += SYSTEM_METRICS_EVERY_S
        return self.rest()

    def collect(self) -> None:
        """Take one sample."""
        for monitor in self._monitors:
            monitor.collect_metrics()

    def rest(self) -> tuple[dict[str, float], int]:
        """Averages of the samples since the last call, and their step."""
        averages: dict[str, float] = {}
        for monitor in self._monitors:
            averages |= {f"system/{k}": v for k, v in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        self._step += 1
        return averages, self._step - 1


@contextmanager
def live_log(run: TrackedRun, console: Log, out: Path) -> Iterator[LiveLog]:
    """A `LiveLog` that has sent everything when the block ends without an error."""
    log = LiveLog(run, console, out / "metrics.jsonl")
    try:
        yield log
    except BaseException:
        log._closing.set()  # the step's own error counts; give the metrics one more chance
        log._thread.join(timeout=15.0)
        log._send()
        raise
    log.close(patience_s())

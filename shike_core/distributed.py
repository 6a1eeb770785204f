"""Several processes that train one model, each on its share of every batch.

They are started by torchrun, on one machine or several, or by `start`, on this one. What they
have to tell each other goes through a `Group`; a group of one has nothing to say and costs nothing.
"""

import multiprocessing
import multiprocessing.resource_tracker
import os
import pickle
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from shike_core.errors import DeviceError, DivergedError, InterruptedTraining, PeerError, ShikeError
from shike_core.processes import STOP_SIGNALS, end_with_program, without_main

TIMEOUT = timedelta(minutes=60)
"""How long one process waits for the others: they may be validating, or fetching weights."""
GRACE_S = 5.0
"""How long after one failure others may report another, which may be its cause."""

Log = Callable[[Mapping[str, float], int], None]
Work = Callable[["Group", Log, Callable[[], int | None]], Any]
"""What each process does: with its group, a log and a look at the signals to a result."""


@dataclass(frozen=True)
class Group:
    """The processes that train together, seen from one of them."""

    rank: int = 0
    """This one's number, from 0."""
    size: int = 1
    """How many they are."""
    local_size: int = 1
    """How many of them are on this machine."""
    control: dist.ProcessGroup | None = None
    """Connects their processors, whatever connects their devices."""

    @property
    def first(self) -> bool:
        """Whether this is the one that logs and writes."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """As `shike_core.data.loader.shares` takes it."""
        return self.rank, self.size

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on its device."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors everywhere the values they have in the first process."""
        if self.size > 1:
            for values in tensors:
                dist.broadcast(values, 0)

    def agree(self, signal_number: int | None) -> int | None:
        """The signal that any of them got, the same answer for all."""
        if self.size == 1:
            return signal_number
        largest = torch.tensor(signal_number or 0)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest) or None

    def gather(self, value: Any) -> list[Any]:
        """What each of them has, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        """Wait until all are here."""
        if self.size > 1:
            dist.barrier(group=self.control)


def by_torchrun() -> bool:
    """Whether torchrun started this process, so that it does not start others."""
    return dist.is_torchelastic_launched()


def launched() -> bool:
    """Whether torchrun started this process, and others with it."""
    return by_torchrun() and int(os.environ["WORLD_SIZE"]) > 1


def processes_for(asked: int, batch_size: int, device: torch.device) -> int:
    """How many processes train on this machine.

    Args:
        asked: see `shike_core.config.TrainConfig.processes`.
        batch_size: so many at most are of use.
        device: where they train.

    Raises:
        DeviceError: there are fewer GPUs than that.
    """
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if gpus and asked > gpus:
        raise DeviceError(
            f"processes={asked} need as many GPUs, and here {'is' if gpus == 1 else 'are'} {gpus}; "
            "set processes to fewer or to 0"
        )
    return asked or max(1, min(gpus, batch_size))


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """The group that the environment tells of, as torchrun sets it; each process gets its GPU.

    Raises:
        DeviceError: this machine has fewer GPUs than processes.
        PeerError: another process has ended, or did not answer.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    with warnings.catch_warnings(), _peers_named(size):
        if rank:  # what the first one says is enough
            warnings.simplefilter("ignore")
        if device.type == "cuda":
            if local_rank >= (gpus := torch.cuda.device_count()):
                raise DeviceError(
                    f"{local_size} processes were started on a machine with {gpus} GPUs; start "
                    "one for each GPU"
                )
            torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        assert isinstance(control, dist.ProcessGroup), "all ranks are in it"
        try:
            group = Group(rank, size, local_size, control)
            yield group
            group.barrier()
        except (InterruptedTraining, DivergedError):  # all of them stop at the same step
            dist.destroy_process_group()
            raise
        # After any other error the others may be waiting; to say goodbye would wait for them.
        dist.destroy_process_group()


@contextmanager
def _peers_named(size: int) -> Iterator[None]:
    """Say it when a connection breaks: neither gloo nor NCCL has an error of its own for that."""
    try:
        yield
    except RuntimeError as error:
        told = str(error)
        if not (isinstance(error, dist.DistError) or "gloo" in told or "peer" in told):
            raise
        raise PeerError(
            f"another of the {size} processes that train together has ended or does not answer "
            f"({told.splitlines()[0]}); look for its own message, then run the same command again "
            "to go on from the last checkpoint"
        ) from error


# ---- in the program that starts the others


def start(
    work: Work,
    processes: int,
    device: torch.device,
    log: Log,
    stop_signal: Callable[[], int | None],
) -> Any:
    """Have some processes of this machine train together.

    They end with this program. Signals are for the program, which tells them; what the first of
    them logs is logged here.

    Args:
        work: what each of them does; is pickled.
        processes: how many, at least 2.
        device: where they train; each gets a GPU of its own.
        log: called here with what the first one logs.
        stop_signal: the number of the signal that asks to stop, or None.

    Returns:
        What `work` returned in the first of them.

    Raises:
        ShikeError: raised by `work` in one of them; the others are ended.
        DeviceError: one was killed.
    """
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    threads = max(1, torch.get_num_threads() // processes)
    running: list[SpawnProcess] = []
    lines: list[Connection] = []
    try:
        for rank in range(processes):
            ours, theirs = context.Pipe()
            place = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes,
                "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": store.port, "GLOO_SOCKET_IFNAME": "lo",
                # This program holds the store of addresses, as torchrun's agent does.
                "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0,
            }  # fmt: skip
            child = context.Process(
                target=_take_part, args=(work, place, device, threads, theirs), name=f"rank {rank}"
            )
            with without_main(), _signals_wait():
                child.start()
            theirs.close()
            running.append(child)
            lines.append(ours)
        return _attend(running, lines, log, stop_signal)
    finally:
        for child in running:
            child.kill()  # does nothing to one that has ended
        for child in running:
            child.join()


def _attend(
    running: Sequence[SpawnProcess],
    lines: Sequence[Connection],
    log: Log,
    stop_signal: Callable[[], int | None],
) -> Any:
    """Listen to the processes until all are done or one has failed."""
    results: dict[int, Any] = {}
    failures: list[Exception] = []
    open_lines = {line: rank for rank, line in enumerate(lines)}
    told_to_stop = False
    deadline = float("inf")
    while open_lines and time.monotonic() < deadline:
        if not told_to_stop and (number := stop_signal()) is not None:
            told_to_stop = True
            for line in open_lines:
                with suppress(OSError):  # it is just ending, and will be heard of
                    line.send(number)
        for line in cast(list[Any], wait(list(open_lines), timeout=0.1)):
            rank = open_lines[line]
            try:
                kind, content = line.recv()
            except (EOFError, OSError):
                del open_lines[line]
                if rank not in results:
                    failures.append(_killed(running[rank], rank, len(running)))
                continue
            if kind == "log":
                log(*content)
                continue
            if kind == "failed":
                failures.append(content)
                del open_lines[line]
            else:
                results[rank] = content
        if failures and deadline == float("inf"):
            # Only who lost another process leaves open why.
            deadline = time.monotonic() + GRACE_S
        if any(not isinstance(error, PeerError) for error in failures):
            break
    if failures:
        raise next((e for e in failures if not isinstance(e, PeerError)), failures[0])
    return results[0]


def _killed(child: SpawnProcess, rank: int, processes: int) -> DeviceError:
    child.join(GRACE_S)
    code = child.exitcode
    how = f"exit code {code}"
    if code is not None and code < 0:
        with suppress(ValueError):
            how = signal.Signals(-code).name
    return DeviceError(
        f"one of {processes} processes that train together, rank {rank}, was killed ({how}), most "
        "often for lack of memory; give the container more memory, or set processes or workers to "
        "fewer, and run the same command again to go on from the last checkpoint"
    )


@contextmanager
def _signals_wait() -> Iterator[None]:
    """A process started here gets signals only when it lets them in."""
    multiprocessing.resource_tracker.ensure_running()  # it would let them in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- in a process that was started


def _take_part(
    work: Work,
    place: Mapping[str, object],
    device: torch.device,
    threads: int,
    line: Connection,
) -> None:
    for number in STOP_SIGNALS:  # a terminal sends them to all, but they are for the program
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    end_with_program()
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(threads)
    told: list[int] = []

    def stop_signal() -> int | None:
        if not told and line.poll():
            told.append(line.recv())
        return told[0] if told else None

    def log(metrics: Mapping[str, float], step: int) -> None:
        line.send(("log", (metrics, step)))

    try:
        with joined(device) as group:
            result = work(group, log, stop_signal)
        line.send(("done", result))
    except Exception as error:
        line.send(("failed", _portable(error)))
        os._exit(1)  # what connects it to the others may wait for them


def _portable(error: Exception) -> Exception:
    """The error in a form that can be sent, with its traceback as a note."""
    if not isinstance(error, ShikeError | ValueError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error

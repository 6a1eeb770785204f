"""Ways of running a training step: as it is written, compiled, or recorded and replayed.

A step of a small network is hundreds of kernels of a few microseconds each. Compiling fuses them;
a CUDA graph launches all of them at once. Either gives the results of the plain form up to
rounding.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.parallel import DistributedDataParallel

from shike_core.config import Acceleration

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Images and targets to the loss, a scalar, and a vector of what is to be remembered of a step:
means over the images, and last a number of images."""
T = TypeVar("T")
Step = Callable[[Tensor, Tensor, float], Tensor]
"""Images, targets and their share of the batch to that vector, after an update of the weights."""


VARIANTS = 1000
"""Of the same code that one process may compile: for each shape and, of networks trained one after
the other or side by side, each kind."""


def compile_parts(parts: Iterable[nn.Module]) -> None:
    """Have modules compiled when they are called, each by itself.

    Blocks of one shape share what is compiled, so a network takes seconds, not minutes, and a
    second one nothing.
    """
    for part in parts:
        part.compile(dynamic=False)


def as_written() -> AbstractContextManager[object]:
    """A context in which nothing is compiled, nor what has been compiled is used."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """The same function, compiled when it is called; its tensors always have the same shapes."""
    made: Callable[..., T] = torch.compile(function, dynamic=False)
    return made


class Branches:
    """Runs some modules at the same time on a GPU, each on a stream of its own.

    A single kernel of a small network leaves most of a large GPU idle. In a recorded step the
    streams become branches of the graph, forward and backward.

    Args:
        count: of the modules.
        device: a GPU.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._others = [torch.cuda.Stream(device) for _ in range(count - 1)]

    def __call__(self, modules: Iterable[nn.Module], shared: Sequence[Tensor]) -> list[Tensor]:
        """What each module makes of the same tensors."""
        if not shared[0].is_cuda:
            return [module(shared) for module in modules]
        first, *others = modules
        here = torch.cuda.current_stream(shared[0].device)
        results = []
        for module, stream in zip(others, self._others, strict=True):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                results.append(module(shared))
            for tensor in shared:  # made here, read there, later in the backward pass too
                tensor.record_stream(stream)
        results.insert(0, first(shared))
        for result, stream in zip(results[1:], self._others, strict=True):
            here.wait_stream(stream)
            result.record_stream(here)
        return results


class Shared(nn.Module):
    """A model whose gradients are the mean over several processes, each with its own images.

    What is called is the forward pass of the stage, as it is or compiled, so that one object sees
    all gradients of a stage. Parameters that learn must say so before it is made. Buffers stay
    each process's own.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, forward: Forward, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See `Forward`."""
        return forward(images, targets)


@dataclass
class Preparation:
    """Time that compiling and recording has taken in all trainings that run side by side."""

    seconds: float = 0.0


class TrainingStep:
    """One step of training, which becomes faster after its first calls.

    Every call is a real step, also those that compile. Batches of another size than the usual
    one, such as the last of an epoch, are not compiled.

    Steps of several processes are not recorded: a recording would have to hold what they send each
    other, and each of them would have to replay it at the same moment.

    Args:
        forward: computes the loss; must not look at a value on the host.
        update: one step down the gradient of a loss, added to what was accumulated.
        acceleration: as `shike_core.device.resolve_acceleration` gives it. With ``compile`` what
            `forward` calls has been given to torch.compile, part by part.
        batch_size: images of the usual batch, of this process.
        accumulate: adds the gradient of a loss and takes no step; for `micro_batch_size`.
        discard: forgets the gradients of a step that was begun and not ended.
        micro_batch_size: most images of a forward pass; 0 means all.
        shared: the model, if several processes train it.
        preparation: is told of the time that this step's preparation takes, as others are.
    """

    CALLS_BEFORE_RECORDING = 3
    """In the first calls libraries choose their algorithms."""

    def __init__(
        self,
        forward: Forward,
        update: Callable[[Tensor], None],
        acceleration: Acceleration,
        batch_size: int,
        *,
        accumulate: Callable[[Tensor], None] | None = None,
        discard: Callable[[], None] | None = None,
        micro_batch_size: int = 0,
        shared: DistributedDataParallel | None = None,
        preparation: Preparation | None = None,
    ) -> None:
        self._discard = discard
        self._preparation = preparation
        self._step = _step(forward, update, accumulate or update, micro_batch_size, shared)
        self._compiled = acceleration == "compile"
        self._accelerated = acceleration != "none"
        self._recordable = shared is None
        self._batch_size = batch_size
        self._calls: Counter[int] = Counter()  # of each size of batches
        self._recorded: dict[int, Recording] = {}
        self.seconds_of_preparation = 0.0
        """Time that the calls took which compiled or recorded."""
        self.fallbacks: list[str] = []
        """Why steps run slower than was asked for."""

    def __call__(self, images: Tensor, targets: Tensor, share: float = 1.0) -> Tensor:
        """One step.

        Args:
            images: ``(batch, 3, h, w)``, or a multiple of that, one view after the other.
            targets: ``(batch,)``.
            share: how often the images count in the mean over processes: as many times as the
                mean number of images of a process.

        Returns:
            What `forward` remembers, of this process's images.
        """
        size = len(targets)
        if (recorded := self._recorded.get(size)) is not None:
            return recorded(images, targets)
        usual = size == self._batch_size
        if not self._accelerated or self._calls[size] == self.CALLS_BEFORE_RECORDING:
            return self._as_it_runs(usual)(images, targets, share)
        started = time.perf_counter()
        self._calls[size] += 1
        remembered = self._first_call(usual, images, targets, share)
        last = self._calls[size] == self.CALLS_BEFORE_RECORDING
        records = last and self._recordable and images.device.type == "cuda"
        first_ended = time.perf_counter()
        if records:
            torch.cuda.synchronize()  # what was queued before is training, up to an epoch of it
            waited = time.perf_counter() - first_ended
            started, first_ended = started + waited, first_ended + waited
            self._record(usual, images, targets)
        seconds = time.perf_counter() - (started if usual else first_ended)
        self.seconds_of_preparation += seconds
        if self._preparation is not None:
            self._preparation.seconds += seconds
        return remembered

    def _as_it_runs(self, usual: bool) -> Step:
        if not self._compiled or usual:
            return self._step

        def not_compiled(images: Tensor, targets: Tensor, share: float) -> Tensor:
            with as_written():
                return self._step(images, targets, share)

        return not_compiled

    def _first_call(self, usual: bool, images: Tensor, targets: Tensor, share: float) -> Tensor:
        limits = torch._dynamo.config.patch(
            recompile_limit=VARIANTS, accumulated_recompile_limit=VARIANTS
        )
        try:
            with limits, warnings.catch_warnings():
                # Raised by the compiler's own look at the input of a part.
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that")
                return self._as_it_runs(usual)(images, targets, share)
        except TorchDynamoException as error:
            if self._discard is not None:
                self._discard()  # parts of a batch, or later layers, may have been computed
            reason = str(error).strip().splitlines()[0]
            self._fall_back(f"a step cannot be compiled ({reason}); it runs as it is")
            self._batch_size = 0  # no size is the usual one any more
            return self._as_it_runs(False)(images, targets, share)

    def _record(self, usual: bool, images: Tensor, targets: Tensor) -> None:
        try:
            recording = Recording(self._as_it_runs(usual), images, targets)
        except RuntimeError as error:
            if self._discard is not None:
                self._discard()  # gradients that were recorded have never been computed
            reason = str(error).strip().splitlines()[0]
            self._fall_back(f"a step cannot be recorded ({reason}); it is not")
        else:
            self._recorded[len(targets)] = recording

    def _fall_back(self, message: str) -> None:
        self.fallbacks.append(message)
        warnings.warn(message, stacklevel=5)


class Recording:
    """A step as a CUDA graph: its kernels with the addresses they work on."""

    def __init__(self, step: Step, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = torch.empty_like(images), torch.empty_like(targets)
        self.graph = torch.cuda.CUDAGraph()
        # Threads that bring images to the device go on meanwhile and may ask for memory.
        with torch.cuda.graph(
            self.graph,
            stream=torch.cuda.current_stream(images.device),
            capture_error_mode="thread_local",
        ):
            self.remembered = step(self.images, self.targets, 1.0)

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Run the step on other values."""
        self.images.copy_(images)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.remembered.clone()  # the next replay overwrites it


def _step(
    forward: Forward,
    update: Callable[[Tensor], None],
    accumulate: Callable[[Tensor], None],
    micro_batch_size: int,
    shared: DistributedDataParallel | None,
) -> Step:
    def backward(images: Tensor, targets: Tensor, weight: float, last: bool) -> Tensor:
        if shared is None:
            loss, remembered = forward(images, targets)
        else:
            loss, remembered = shared(forward, images, targets)
        (update if last else accumulate)(loss if weight == 1.0 else loss * weight)
        return remembered

    def step(images: Tensor, targets: Tensor, share: float) -> Tensor:
        parts = _parts(images, targets, micro_batch_size)
        *before, (images, last_targets) = parts
        if not before:
            return backward(images, last_targets, share, True)
        remembered = []
        with nullcontext() if shared is None else shared.no_sync():
            for some, some_targets in before:
                weight = share * len(some_targets) / len(targets)
                remembered.append(backward(some, some_targets, weight, False))
        weight = share * len(last_targets) / len(targets)
        remembered.append(backward(images, last_targets, weight, True))
        total = torch.zeros_like(remembered[0])
        for (_, some_targets), row in zip(parts, remembered, strict=True):
            total[:-1] += row[:-1] * (len(some_targets) / len(targets))
            total[-1] += row[-1]
        return total

    return step


def _parts(images: Tensor, targets: Tensor, micro_batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """A batch in as few parts of about the same size as may be, all views of an image together."""
    count = -(-len(targets) // micro_batch_size) if micro_batch_size else 1
    if count == 1:
        return [(images, targets)]
    views = [view.tensor_split(count) for view in images.split(len(targets))]
    made = [
        torch.cat(of_part) if len(of_part) > 1 else of_part[0]
        for of_part in zip(*views, strict=True)
    ]
    return list(zip(made, targets.tensor_split(count), strict=True))

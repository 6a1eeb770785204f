"""Ways of running a training step: as it is written, compiled, or recorded and replayed.

A step of a small network is hundreds of kernels of a few microseconds each. Compiling fuses them;
a CUDA graph launches all of them at once. Either gives the results of the plain form up to
rounding.
"""

import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from shike_core.config import Acceleration

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Images and targets to the loss, a scalar, and a vector of what is to be remembered of a step."""
Step = Callable[[Tensor, Tensor], Tensor]
"""Images and targets to that vector, after an update of the weights."""


RECOMPILE_LIMIT = 1000
"""Models that one process may train one after the other or side by side."""


class TrainingStep:
    """One step of training, which becomes faster after its first calls.

    Every call is a real step, also those that compile. Batches of another size than the usual
    one, such as the last of an epoch, run as they are written.

    Args:
        forward: computes the loss; must not look at a value on the host.
        update: one step down the gradient of a loss.
        acceleration: as `shike_core.device.resolve_acceleration` gives it.
        batch_size: images of the usual batch.
    """

    CALLS_BEFORE_RECORDING = 3
    """Libraries choose their algorithms and the optimiser makes its buffers in the first calls."""

    def __init__(
        self,
        forward: Forward,
        update: Callable[[Tensor], None],
        acceleration: Acceleration,
        batch_size: int,
    ) -> None:
        self._plain = _step(forward, update)
        self._fast = self._plain
        if acceleration == "compile":
            self._fast = _step(torch.compile(forward, dynamic=False), update)
        self._calls_left = 0 if acceleration == "none" else self.CALLS_BEFORE_RECORDING
        self._batch_size = batch_size
        self._recorded: Step | None = None
        self.seconds_of_preparation = 0.0
        """Time that the calls took which compiled or recorded."""

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Images ``(batch, 3, h, w)`` and targets ``(batch,)`` to what `forward` remembers."""
        if len(targets) != self._batch_size:
            return self._plain(images, targets)
        if self._recorded is not None:
            return self._recorded(images, targets)
        if not self._calls_left:
            return self._fast(images, targets)
        started = time.perf_counter()
        remembered = self._first_call(images, targets)
        self._calls_left -= 1
        if not self._calls_left and images.device.type == "cuda":
            self._record(images, targets)
        self.seconds_of_preparation += time.perf_counter() - started
        return remembered

    def _first_call(self, images: Tensor, targets: Tensor) -> Tensor:
        try:
            # Steps of several models share their code, and each of them is compiled.
            with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                return self._fast(images, targets)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"a step cannot be compiled ({reason}); it runs as it is", stacklevel=3)
            self._fast = self._plain
            return self._fast(images, targets)

    def _record(self, images: Tensor, targets: Tensor) -> None:
        try:
            self._recorded = Recording(self._fast, images, targets)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"a step cannot be recorded ({reason}); it is not", stacklevel=4)


class Recording:
    """A step as a CUDA graph: its kernels with the addresses they work on."""

    def __init__(self, step: Step, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = torch.empty_like(images), torch.empty_like(targets)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream(images.device)):
            self.remembered = step(self.images, self.targets)

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Run the step on other values."""
        self.images.copy_(images)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.remembered.clone()  # the next replay overwrites it


def _step(forward: Forward, update: Callable[[Tensor], None]) -> Step:
    def step(images: Tensor, targets: Tensor) -> Tensor:
        loss, remembered = forward(images, targets)
        update(loss)
        return remembered

    return step

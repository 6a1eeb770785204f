"""A step that is compiled or recorded, against the same step as it is written."""

import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache

from shike_core import acceleration
from shike_core.acceleration import Preparation, TrainingStep, compile_parts
from shike_core.model.backbone import Steps

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
BATCH = 8


class Problem:
    """A small network with BatchNorm, trained by gradient descent with momentum."""

    def __init__(self, acceleration: str, device: str = "cpu") -> None:
        torch.manual_seed(0)
        features = Steps(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.model = nn.Sequential(features, nn.Flatten(), nn.Linear(64, 5)).to(device)
        rate = torch.tensor(0.1, device=device) if device == "cuda" else 0.1
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=rate, momentum=0.9, fused=True)
        if acceleration == "compile":
            compile_parts([self.model[0]])
        self.step = TrainingStep(
            self.forward, self.update, acceleration, BATCH, discard=self.discard
        )

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(images)
        loss = nn.functional.cross_entropy(logits, targets)
        right = (logits.argmax(dim=1) == targets).sum()
        return loss, torch.stack([loss, right.float()]).detach()

    def update(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def train(self, sizes: list[int]) -> Tensor:
        """What is remembered of each step, (steps, 2)."""
        generator = torch.Generator().manual_seed(1)
        device = next(self.model.parameters()).device
        remembered = []
        for size in sizes:
            images = torch.randn(size, 3, 6, 6, generator=generator).to(device)
            targets = torch.randint(5, (size,), generator=generator).to(device)
            remembered.append(self.step(images, targets))
        return torch.stack(remembered).cpu()


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


SIZES = [BATCH] * 5 + [3] + [BATCH] * 3 + [3]


@pytest.mark.parametrize(
    ("acceleration", "device"),
    [
        ("compile", "cpu"),
        pytest.param("none", "cuda", marks=[GPU, pytest.mark.gpu]),
        pytest.param("cuda-graph", "cuda", marks=[GPU, pytest.mark.gpu]),
        pytest.param("compile", "cuda", marks=[GPU, pytest.mark.gpu]),
    ],
)
def test_an_accelerated_training_is_the_plain_one_up_to_rounding(acceleration, device) -> None:
    plain, fast = Problem("none"), Problem(acceleration, device)
    stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()
    with stream:
        theirs = fast.train(SIZES)
    ours = plain.train(SIZES)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5)
    assert len({tuple(row) for row in theirs.tolist()}) == len(SIZES)  # every step is another one
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(fast.model.state_dict()[name].cpu(), value, rtol=1e-3, atol=1e-4)
    assert fast.step.seconds_of_preparation > 0 or acceleration == "none"
    assert plain.step.seconds_of_preparation == 0


class RecordingThatFails:
    """A recorded step sets gradients, which nobody computes before it is replayed."""

    def __init__(self, step, images: Tensor, targets: Tensor) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan)
        raise RuntimeError("CUDA out of memory\nmore about it")


def test_a_recording_that_fails_leaves_no_gradients(monkeypatch) -> None:
    problem = Problem("cuda-graph")
    monkeypatch.setattr(acceleration, "Recording", RecordingThatFails)
    monkeypatch.setattr(RecordingThatFails, "model", problem.model, raising=False)
    with pytest.warns(UserWarning, match=r"cannot be recorded \(CUDA out of memory\); it is not"):
        problem.step._record(True, torch.zeros(BATCH, 3, 6, 6), torch.zeros(BATCH))
    assert problem.step.fallbacks == ["a step cannot be recorded (CUDA out of memory); it is not"]
    assert all(parameter.grad is None for parameter in problem.model.parameters())


@pytest.mark.gpu
@GPU
def test_a_gpu_goes_on_after_a_recording_that_fails() -> None:
    fails, plain = Problem("cuda-graph", "cuda"), Problem("none", "cuda")

    def update_that_cannot_be_recorded(loss: Tensor) -> None:
        loss.backward()
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("out of memory")
        fails.optimizer.step()
        fails.discard()

    fails.step = TrainingStep(
        fails.forward, update_that_cannot_be_recorded, "cuda-graph", BATCH, discard=fails.discard
    )
    with torch.cuda.stream(torch.cuda.Stream()), pytest.warns(UserWarning, match="be recorded"):
        theirs = fails.train(SIZES)
    torch.testing.assert_close(theirs, plain.train(SIZES), rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@GPU
def test_a_gpu_records_while_a_thread_asks_for_pinned_memory() -> None:
    """As the thread does that brings images from worker processes to the device."""
    problem, ended, failures = Problem("cuda-graph", "cuda"), threading.Event(), []

    def pin() -> None:
        kept = []
        try:
            while not ended.is_set():
                kept.append(torch.empty(2**20, pin_memory=True))
                del kept[:-4]
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        with torch.cuda.stream(torch.cuda.Stream()), warnings.catch_warnings():
            warnings.simplefilter("error")
            problem.train(SIZES)
    finally:
        ended.set()
        thread.join()
    assert not failures


def test_time_of_preparation_is_counted_for_all_and_for_each() -> None:
    shared, problems = Preparation(), [Problem("cuda-graph"), Problem("cuda-graph")]
    for problem in problems:
        problem.step = TrainingStep(
            problem.forward, problem.update, "cuda-graph", BATCH, preparation=shared
        )
        problem.train(SIZES)
    each = [problem.step.seconds_of_preparation for problem in problems]
    assert min(each) > 0
    assert shared.seconds == pytest.approx(sum(each))


def test_a_compilation_that_fails_halfway_leaves_no_gradients() -> None:
    """Of a backward pass or a batch in parts, some may be computed before the compiler fails."""
    problem, plain = Problem("none"), Problem("none")
    failed = []

    def backward_that_fails_once(loss: Tensor) -> None:
        loss.backward()
        if not failed:
            failed.append(True)
            raise TorchDynamoException("no such kernel")
        problem.optimizer.step()
        problem.discard()

    problem.step = TrainingStep(
        problem.forward, backward_that_fails_once, "compile", BATCH, discard=problem.discard
    )
    with pytest.warns(UserWarning, match=r"cannot be compiled \(no such kernel\)"):
        problem.train([BATCH])
    plain.train([BATCH])
    assert failed
    # BatchNorm's running statistics have seen the batch twice, the weights once.
    for ours, theirs in zip(problem.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_cannot_be_compiled_runs_as_it_is_with_one_warning() -> None:
    problem, plain = Problem("compile"), Problem("none")
    with (
        fresh_cache(),
        inductor.patch({"cpp.cxx": ("/nowhere/c++",)}),
        pytest.warns(UserWarning, match=r"cannot be compiled .*; it runs as it is") as caught,
    ):
        rows = problem.train(SIZES)
    assert problem.step.fallbacks == [str(warning.message) for warning in caught]
    assert len(caught) == 1
    assert torch.equal(rows, plain.train(SIZES))

"""Streams: batches do not depend on the workers, and workers end with the program."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor

from shike_core.config import TrainConfig
from shike_core.data import stream as streams
from shike_core.data.loader import ImageTable
from shike_core.data.pack import available_workers
from shike_core.data.split import Split
from shike_core.data.storage import ReferencedImages
from shike_core.data.stream import PIECE, ImageStream, open_tables
from shike_core.errors import DatasetError, DeviceError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
COUNT = 150
PLAIN = TrainConfig(
    crop="resized", crop_size=16, auto_augment=False, cutout_size=0, flip=False, batch_size=70
)
AUGMENTED = replace(PLAIN, flip=True, rand_augment=2, color_jitter=0.4)


def stored(folder: Path) -> ReferencedImages:
    names = sorted(path.name for path in folder.iterdir())
    sizes = np.array([(folder / name).stat().st_size for name in names])
    return ReferencedImages(str(folder), pa.array(names), sizes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Image i has the colour (i, 255 - i, 7) at its edges, and noise in its middle."""
    path = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        values = np.empty((24 + i % 5, 30, 3), dtype=np.uint8)
        values[:] = (i, 255 - i, 7)
        values[10:14, 10:20] = rng.integers(256, size=(4, 10, 3))
        Image.fromarray(values).save(path / f"{i:03}.png")
    return path


def a_stream(folder: Path, workers: int = 2, size: int = 16) -> ImageStream:
    images = stored(folder)
    return ImageStream(images, 2 * torch.arange(len(images)), size, workers)


@pytest.fixture(scope="module")
def stream(folder) -> Iterator[ImageStream]:
    """Two workers, which the tests share; the label of an image is twice its row."""
    made = a_stream(folder)
    yield made
    made.close()


Batches = list[tuple[Tensor, Tensor]]


def an_epoch(stream: ImageStream, config: TrainConfig, epoch: int = 0, **more) -> Batches:
    return list(stream.training_batches(config, MEAN, STD, epoch=epoch, **more))


def assert_same(batches: Batches, others: Batches) -> None:
    for (images, labels), (other_images, other_labels) in zip(batches, others, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


# ---- batches


def test_every_image_comes_once_with_its_label_normalised(stream) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    batches = list(stream.training_batches(PLAIN, mean, std, epoch=0))
    assert [len(labels) for _, labels in batches] == [70, 70, 10]
    labels = torch.cat([labels for _, labels in batches])
    assert sorted(labels.tolist()) == list(range(0, 2 * COUNT, 2))
    images = torch.cat([images for images, _ in batches])
    assert (images.dtype, images.shape) == (torch.float32, (COUNT, 3, 16, 16))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in batches)
    # Most pixels have the image's colour: red is its row, by which its label is known.
    rows = labels / 2
    colour = torch.stack([rows, 255 - rows, torch.full_like(rows, 7)], dim=1) / 255
    expected = (colour - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(images.flatten(2).median(dim=2).values, expected)


def test_order_and_augmentation_follow_from_seed_and_epoch(stream) -> None:
    def labels(batches: Batches) -> list[int]:
        return torch.cat([labels for _, labels in batches]).tolist()

    first = an_epoch(stream, AUGMENTED, 3)
    assert_same(an_epoch(stream, AUGMENTED, 3), first)
    assert labels(an_epoch(stream, AUGMENTED, 4)) != labels(first)
    assert labels(an_epoch(stream, replace(AUGMENTED, seed=1), 3)) != labels(first)
    plain = an_epoch(stream, PLAIN, 3)
    assert labels(plain) == labels(first)
    assert not torch.equal(plain[0][0], first[0][0])


@pytest.mark.parametrize("first_step", [1, 2, 3])
def test_an_epoch_goes_on_anywhere_with_another_number_of_workers(
    folder, stream, first_step
) -> None:
    whole = an_epoch(stream, AUGMENTED, 2)
    alone = a_stream(folder, workers=1)
    assert_same(an_epoch(alone, AUGMENTED, 2, first_step=first_step), whole[first_step:])
    alone.close()


def test_the_size_of_what_a_worker_makes_at_a_time_does_not_matter(stream, monkeypatch) -> None:
    whole = an_epoch(stream, AUGMENTED, 2)
    monkeypatch.setattr(streams, "PIECE", 9)
    assert_same(an_epoch(stream, AUGMENTED, 2), whole)


def test_an_epoch_that_was_left_does_not_disturb_the_next(stream) -> None:
    whole = an_epoch(stream, AUGMENTED, 1)
    left = stream.training_batches(AUGMENTED, MEAN, STD, epoch=5)
    next(left)
    left.close()
    assert_same(an_epoch(stream, AUGMENTED, 1), whole)


@pytest.mark.parametrize("processes", [2, 11])
def test_the_shares_of_several_processes_together_are_the_batch(folder, stream, processes) -> None:
    whole = an_epoch(stream, AUGMENTED, 1, first_step=1)
    parts = [
        an_epoch(stream, AUGMENTED, 1, first_step=1, part=(rank, processes))
        for rank in range(processes)
    ]
    for (images, labels), *of_each in zip(whole, *parts, strict=True):
        if len(labels) < processes:
            of_each = of_each[:1]  # each has them all
        assert torch.equal(torch.cat([x for x, _ in of_each]), images)
        assert torch.equal(torch.cat([y for _, y in of_each]), labels)


def test_images_in_half_precision_are_the_rounded_ones(stream) -> None:
    halves = an_epoch(stream, AUGMENTED, dtype=torch.bfloat16)
    for (images, _), (half, _) in zip(an_epoch(stream, AUGMENTED), halves, strict=True):
        assert torch.equal(images.bfloat16(), half)


def test_images_for_evaluation_come_in_their_order(folder, stream) -> None:
    batches = list(stream.batches(64))
    assert [len(images) for images in batches] == [64, 64, 22]
    assert {images.dtype for images in batches} == {torch.uint8}
    images = torch.cat(batches)
    assert images.shape == (COUNT, 3, 16, 16)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images[:, 0].flatten(1).median(dim=1).values.tolist() == list(range(COUNT))
    assert torch.equal(next(stream.batches(4)), images[:4])
    alone = ImageStream(stored(folder), stream.labels, crop_size=16, workers=1)
    assert torch.equal(torch.cat(list(alone.batches(1000))), images)


def test_generators_of_the_program_do_not_move(stream) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    an_epoch(stream, AUGMENTED)
    list(stream.batches(100))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def test_time_spent_waiting_is_measured(stream) -> None:
    before, started = stream.seconds_waited(), time.perf_counter()
    for _ in stream.training_batches(AUGMENTED, MEAN, STD, epoch=0):
        time.sleep(0.2)  # meanwhile nobody waits
    taken = time.perf_counter() - started
    waited = stream.seconds_waited() - before
    assert 0 < waited < taken - 0.6
    an_epoch(stream, AUGMENTED, 8)
    of_this, of_all = stream.seconds_waited(8), stream.seconds_waited()
    assert 0 < of_this == pytest.approx(of_all - before - waited)
    assert stream.seconds_waited(9) == 0


# ---- workers


def workers_now() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid]


def test_workers_stay_for_the_next_epoch_and_end_when_closed(folder) -> None:
    before = set(workers_now())
    made = a_stream(folder)
    an_epoch(made, PLAIN, 0)
    first = set(workers_now()) - before
    assert len(first) == 2
    an_epoch(made, PLAIN, 1)
    assert set(workers_now()) - before == first
    made.close()
    assert set(workers_now()) <= before


def test_workers_of_an_evaluation_end_with_it(stream) -> None:
    an_epoch(stream, PLAIN)
    before = set(workers_now())
    list(stream.batches(100))
    assert set(workers_now()) == before
    next(stream.batches(4))
    assert set(workers_now()) == before


def test_a_small_split_does_not_start_many_workers(tmp_path) -> None:
    for i in range(PIECE + 1):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    before = set(workers_now())
    made = a_stream(tmp_path, workers=64)
    assert len(an_epoch(made, PLAIN)[0][1]) == PIECE + 1
    assert len(set(workers_now()) - before) == 2
    made.close()


def test_workers_of_several_trainings_share_the_cores(folder, monkeypatch) -> None:
    monkeypatch.setattr(streams, "available_workers", lambda: 13)
    seen = []
    monkeypatch.setattr(streams, "ImageStream", lambda *args: seen.append(args[2:]))
    split = Split(stored(folder), np.arange(COUNT), np.arange(COUNT))
    open_tables(split, [PLAIN, replace(PLAIN, workers=6, crop_size=24), PLAIN], CPU)
    assert seen == [(16, 4), (24, 6), (16, 4)]
    open_tables(split, [PLAIN] * 20, CPU)
    assert seen[-1] == (16, 1)
    assert available_workers() >= 1


def test_images_in_memory_are_held_once_for_several_trainings() -> None:
    split = Split(np.zeros((3, 8, 8, 3), dtype=np.uint8), np.arange(3), np.arange(3))
    first, second = open_tables(split, [TrainConfig(), TrainConfig(seed=1)], CPU)
    assert first is second
    assert isinstance(first, ImageTable)


def test_a_crop_that_is_not_for_such_images_is_refused(folder) -> None:
    arrays = Split(np.zeros((3, 8, 8, 3), dtype=np.uint8), np.arange(3), np.arange(3))
    files = Split(stored(folder), np.arange(COUNT), np.arange(COUNT))
    with pytest.raises(DatasetError, match=r"crop=resized is not .* one size.*set crop=padded"):
        open_tables(arrays, [TrainConfig(), PLAIN], CPU)
    with pytest.raises(DatasetError, match=r"crop=padded is not .* different sizes: set crop=resi"):
        open_tables(files, [TrainConfig()], CPU)


# ---- what goes wrong


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """The images, to be damaged."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[60:] = bytes(len(content) - 60)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage, r"/100\.png cannot be decoded \(.+\), though it could .*build_subset again$"),
        (Path.unlink, r"/100\.png cannot be read \(.*No such file.*build_subset again$"),
    ],
)
def test_an_image_that_cannot_be_used_is_named_in_one_line(copy, spoil, message) -> None:
    made = a_stream(copy)
    spoil(copy / "100.png")
    for batches in (lambda: an_epoch(made, PLAIN), lambda: list(made.batches(50))):
        with pytest.raises(DatasetError, match=message) as caught:
            batches()
        assert "\n" not in str(caught.value)
    made.close()


def test_a_worker_that_was_killed_is_reported(folder) -> None:
    before = set(workers_now())
    made = a_stream(folder)
    batches = made.training_batches(replace(PLAIN, batch_size=4), MEAN, STD, epoch=0)
    next(batches)
    killed, _ = set(workers_now()) - before
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(DeviceError, match=r"one of 2 processes .* was killed.*workers to fewer"):
        list(batches)
    made.close()
    assert set(workers_now()) <= before


def test_too_few_processes_allowed(folder, monkeypatch) -> None:
    def refuse(*args: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    made = a_stream(folder)
    monkeypatch.setattr(streams.DataLoader, "__iter__", refuse)
    with pytest.raises(DeviceError, match=r"2 processes .* cannot be started .*temporarily"):
        next(made.training_batches(PLAIN, MEAN, STD, epoch=0))


SCRIPT = """
import multiprocessing, sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from test_stream import MEAN, PLAIN, STD, a_stream, replace

# No `if __name__ == "__main__"`: a worker that imported this would start workers of its own.
made = a_stream(Path({folder!r}))
for epoch in (0, 1):
    for images, labels in made.training_batches(PLAIN, MEAN, STD, epoch=epoch):
        pass
print(*[process.pid for process in multiprocessing.active_children()], flush=True)
time.sleep(600)
"""


def test_a_script_without_a_guard_in_a_container_with_little_shared_memory_that_is_killed(
    folder, tmp_path, process_environment
) -> None:
    small = 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"'
    isolated = ["unshare", "--mount", "sh", "-c", small, "sh"]
    if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        isolated = []  # without the right to mount, at least the script
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(here=str(Path(__file__).parent), folder=str(folder)))
    with subprocess.Popen(
        [*isolated, sys.executable, str(path)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        env=process_environment(PYTHONPATH=str(ROOT)), start_new_session=True,
    ) as process:  # fmt: skip
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        assert all(map(running, workers))
        process.kill()
    deadline = time.monotonic() + 60
    while any(map(running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # gone, before or while it was read
        return False
    return state != "Z"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_gets_the_same_batches(folder, stream) -> None:
    on_gpu = ImageStream(stored(folder), stream.labels.cuda(), crop_size=16, workers=2)
    for size in (64, 150):
        for ours, theirs in zip(on_gpu.batches(size), stream.batches(size), strict=True):
            assert ours.device.type == "cuda"
            assert torch.equal(ours.cpu(), theirs)
    for epoch in (0, 1):
        config = replace(AUGMENTED, batch_size=10)  # more batches than may be ahead
        batches = an_epoch(on_gpu, config, epoch)
        for (images, labels), (other_images, other_labels) in zip(
            batches, an_epoch(stream, config, epoch), strict=True
        ):
            torch.testing.assert_close(images.cpu(), other_images, rtol=1e-6, atol=1e-6)
            assert torch.equal(labels.cpu(), other_labels)
    torch.cuda.synchronize()
    of_epochs = [on_gpu.seconds_waited(epoch) for epoch in (0, 1)]
    assert min(of_epochs) > 0
    assert sum(of_epochs) == pytest.approx(on_gpu.seconds_waited())
    on_gpu.close()

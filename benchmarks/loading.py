"""Photographs from disk to batches: ours against a plain ImageFolder with DataLoader.

    python -m benchmarks.loading --out build/loading.json

Also a part of ``make bench``. All forms read the same files, take their turns in each round, have
the same number of worker processes, and end with normalised float32 batches; ratios are taken
within a round. The first epoch of each, which starts its workers, does not count. Without
``--photographs`` the files are generated: noise with the spectrum of photographs, 500 x 375 pixels
and about 110 kB each, as ImageNet's have on average. What is measured, in images per second:

- ``one_core``: in this process, nothing but ``decode`` (Pillow, whole image to RGB),
  ``decode_torchvision`` (`torchvision.io.decode_jpeg`), ``plain`` (torchvision's usual transforms,
  decoding included) and ``ours`` (`shike_core.data.views`, decoding included);
- ``loader``: ``plain``, and the stream by storage: ``referenced``, ``packed``, ``packed_256``
  (packed with images shrunk to a short side of 256);

both for ``training`` (random resized crop, mirrored) and ``evaluation`` (centre crop).
"""

import argparse
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks import runs
from benchmarks.figures import ratios, summary
from benchmarks.tables import table
from shike_core import stages
from shike_core.config import SubsetConfig, TrainConfig
from shike_core.data.augment import normalise
from shike_core.data.listed import IMAGENET_MEAN, IMAGENET_STD
from shike_core.data.manifest import read_subset
from shike_core.data.stream import ImageStream
from shike_core.data.views import EvaluationView, TrainingView
from shike_core.errors import DatasetError, ShikeError
from shike_core.stages import write_json

CROP = 224
BATCH = 64
CLASSES = 4
DISTINCT = 64
"""Generated images that differ; files repeat them."""
QUALITY = 92
STORAGES: Mapping[str, Mapping[str, Any]] = {
    "referenced": {"storage": "referenced"},
    "packed": {"storage": "packed"},
    "packed_256": {"storage": "packed", "short_side": 256},
}
PARTS = ("training", "evaluation")
Result = dict[str, Any]
Epoch = Callable[[], int]
"""Goes through some images; their number."""


def measure(
    photographs: Path | None, work: Path, *, images: int, workers: int, rounds: int
) -> Result:
    """Measure all forms.

    Args:
        photographs: a folder with JPEG files, at any depth; None generates some.
        work: an empty folder.
        images: of an epoch; files are repeated up to that.
        workers: processes of each loader.
        rounds: in each of which all forms take their turns.

    Raises:
        DatasetError: the folder has no JPEG file, or one cannot be read.
    """
    folder = work / "images"
    contents = (
        [file.read_bytes() for file in find_photographs(photographs)]
        if photographs
        else generated(min(DISTINCT, images))
    )
    lay_out(contents, folder, images)
    encoded = list(islice(cycle(contents), min(images, 4 * len(contents))))
    with ExitStack() as opened:
        forms = {
            "one_core": {part: one_core(encoded, part) for part in PARTS},
            "loader": {
                part: {
                    "plain": plain_loader(folder, part, workers),
                    **{
                        name: opened.enter_context(stream(work / name, folder, rule, part, workers))
                        for name, rule in STORAGES.items()
                    },
                }
                for part in PARTS
            },
        }
        rates = {
            where: {part: take_turns(of_part, rounds) for part, of_part in parts.items()}
            for where, parts in forms.items()
        }
    return {
        "photographs": str(photographs) if photographs else "generated",
        "file_bytes": sum(map(len, contents)) / len(contents),
        "images": images,
        "workers": workers,
        "rounds": rounds,
        "images_per_second": {
            where: {
                part: {form: summary(of_form) for form, of_form in of_part.items()}
                for part, of_part in parts.items()
            }
            for where, parts in rates.items()
        },
        "ratios": {where: ratios(parts) for where, parts in rates.items()},
    }


# ---- files


def find_photographs(folder: Path) -> list[Path]:
    """A folder's JPEG files, at any depth.

    Raises:
        DatasetError: there is none.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise DatasetError(f"{folder} has no .jpg or .jpeg files; name a folder of photographs")
    return files


def generated(count: int = DISTINCT) -> list[bytes]:
    """JPEG files that cost as much to decode as ImageNet's, no two alike."""
    generator = np.random.default_rng(0)
    height, width = 375, 500
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    contents = []
    for _ in range(count):
        # Grey, and less of each colour; amplitudes fall with the frequency as in photographs.
        noise = generator.normal(size=(4, *frequency.shape, 2)).view(np.complex128)[..., 0]
        planes = np.fft.irfft2(noise / frequency**1.2, (height, width))
        planes /= planes.std(axis=(1, 2), keepdims=True)
        pixels = 128 + 50 * (planes[0] + 0.3 * planes[1:])
        buffer = io.BytesIO()
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        picture.save(buffer, "JPEG", quality=QUALITY)
        contents.append(buffer.getvalue())
    return contents


def lay_out(contents: list[bytes], folder: Path, images: int) -> None:
    """Write a folder for each class, with as many images to train on as to test on."""
    for part in ("train", "test"):
        for label in range(CLASSES):
            (folder / part / f"class{label}").mkdir(parents=True)
        for i, content in enumerate(islice(cycle(contents), images)):
            (folder / part / f"class{i % CLASSES}" / f"{i:06d}.jpg").write_bytes(content)


# ---- forms


def one_core(contents: list[bytes], part: str) -> dict[str, Epoch]:
    """What is done to each image, without any loader."""
    plain = plain_transform(part)
    view = make_view(part)
    jpegs = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]

    def ours() -> int:
        for start in range(0, len(contents), BATCH):
            rows = range(start, min(start + BATCH, len(contents)))
            images = np.stack([np.asarray(view(contents[i], i)) for i in rows])
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
            normalise(pixels, IMAGENET_MEAN, IMAGENET_STD)
        return len(contents)

    def epoch(work: Callable[[int], object]) -> Epoch:
        def run() -> int:
            for i in range(len(contents)):
                work(i)
            return len(contents)

        return run

    def opened(i: int) -> Image.Image:
        return Image.open(io.BytesIO(contents[i])).convert("RGB")

    return {
        "plain": epoch(lambda i: plain(opened(i))),
        "ours": ours,
        "decode": epoch(opened),
        "decode_torchvision": epoch(lambda i: decode_jpeg(jpegs[i], ImageReadMode.RGB)),
    }


def make_view(part: str) -> TrainingView | EvaluationView:
    """Ours, of one image."""
    return TrainingView(train_config(), epoch=0) if part == "training" else EvaluationView(CROP)


def plain_transform(part: str) -> Callable[[Image.Image], torch.Tensor]:
    """What is usually done to photographs, one at a time."""
    first: list[nn.Module] = (
        [transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip()]
        if part == "training"
        else [transforms.Resize(256), transforms.CenterCrop(CROP)]
    )
    whole: Callable[[Image.Image], torch.Tensor] = transforms.Compose(
        [*first, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    return whole


def plain_loader(folder: Path, part: str, workers: int) -> Epoch:
    """Torchvision's ImageFolder in torch's DataLoader; workers stay alive between epochs."""
    training = part == "training"
    loader: DataLoader[Any] = DataLoader(
        ImageFolder(folder / ("train" if training else "test"), plain_transform(part)),
        batch_size=BATCH,
        shuffle=training,
        num_workers=workers,
        persistent_workers=True,
    )
    return lambda: sum(len(labels) for _, labels in loader)


@contextmanager
def stream(
    out: Path, folder: Path, rule: Mapping[str, Any], part: str, workers: int
) -> Iterator[Epoch]:
    """Ours, of images that are stored by a rule."""
    if not out.exists():
        config = SubsetConfig(dataset="image_folder", imbalance_factor=0, leakage="keep", **rule)
        stages.build_subset(config, folder, out, lambda metrics, step: None, workers=workers)
    training = part == "training"
    split = read_subset(out).splits["train" if training else "test"]
    labels = torch.from_numpy(split.labels)
    with closing(ImageStream(split.images, labels, CROP, workers)) as opened:  # type: ignore[arg-type]
        config_of_training = train_config()

        def trained() -> Iterable[int]:
            batches = opened.training_batches(
                config_of_training, IMAGENET_MEAN, IMAGENET_STD, epoch=0
            )
            return (len(targets) for _, targets in batches)

        def evaluated() -> Iterable[int]:
            return (
                len(normalise(batch, IMAGENET_MEAN, IMAGENET_STD))
                for batch in opened.batches(BATCH)
            )

        yield lambda: sum(trained() if training else evaluated())


def train_config() -> TrainConfig:
    """A training that crops and mirrors and does nothing else to images."""
    return TrainConfig(
        network="resnet50",
        width=64,
        crop="resized",
        crop_size=CROP,
        auto_augment=False,
        cutout_size=0,
        batch_size=BATCH,
    )


def take_turns(forms: Mapping[str, Epoch], rounds: int) -> dict[str, list[float]]:
    """Images per second of each form in each round."""
    for epoch in forms.values():
        epoch()
    rates: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, epoch in forms.items():
            started = time.perf_counter()
            count = epoch()
            rates[name].append(count / (time.perf_counter() - started))
    return rates


# ---- report


def render(report: Result) -> str:
    """Tables for a terminal."""
    title = (
        f"{report['images']} photographs ({report['photographs']}, "
        f"{report['file_bytes'] / 1e3:.0f} kB each), {report['workers']} workers, "
        f"{report['rounds']} rounds; images per second, and times plain form"
    )
    tables = []
    for where, name in (("one_core", "in one process"), ("loader", "by the loader")):
        rates, ratios = report["images_per_second"][where], report["ratios"][where]
        rows = [[name, *PARTS, *(f"{part}, each worker" for part in PARTS if where == "loader")]]
        for form in rates["training"]:
            cells = []
            for part in PARTS:
                ratio = ratios[part].get(form)
                times = f" ({ratio['median']:.2f}x)" if ratio else ""
                cells.append(f"{rates[part][form]['median']:,.0f}{times}")
            if where == "loader":
                cells += [f"{rates[p][form]['median'] / report['workers']:,.0f}" for p in PARTS]
            rows.append([form.replace("_", " "), *cells])
        tables.append(table(rows))
    return "\n\n".join([title, *tables])


def main() -> None:
    """Command line of ``python -m benchmarks.loading``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--photographs", type=Path, help="folder of JPEG files; else generated")
    parser.add_argument("--images", type=int, default=800, help="of an epoch (default: 800)")
    parser.add_argument("--workers", type=int, default=cores, help=f"default: all {cores} cores")
    parser.add_argument("--rounds", type=int, default=4, help="repetitions (default: 4)")
    parser.add_argument("--out", type=Path, help="file to write as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as work:
            found = measure(
                options.photographs,
                Path(work),
                images=options.images,
                workers=options.workers,
                rounds=options.rounds,
            )
    except ShikeError as error:
        sys.exit(f"error: {error}")
    machine = runs.machine("cpu")
    report = {"date": time.strftime("%Y-%m-%d %H:%M:%S%z"), **machine, **found}
    print(render(report))
    if options.out:
        write_json(report, options.out)
        print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()

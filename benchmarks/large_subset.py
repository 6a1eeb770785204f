"""Build and read back a subset with as many images as the largest data set: time and memory.

    python -m benchmarks.large_subset --work build/large_subset --out build/large_subset.json

By default the sizes are those of iNaturalist 2018. The images are generated, each of 8 x 8 pixels
in a file of its own, no two alike, in a folder for each class, and listed in a table, so what is
measured is what grows with the number of images, not decoding. Folders of an earlier call with the
same sizes are used again. Building is the command ``python -m shike_core build-subset`` in a
process of its own, watched from outside; reading back is one epoch of the training images in the
order that suits the storage, in another process.

The file written holds ``date``, ``device``, ``cores``, ``versions``, ``commit``, ``images``,
``classes``, ``file_bytes`` (mean) and, by storage:

- ``build``: ``seconds``, ``images_per_second``, ``parent_bytes`` and ``worker_bytes`` (peak of
  resident memory of the main process, and of the largest worker), ``workers``, ``subset_bytes``;
- ``read``: ``open_seconds`` until the subset was read and checked, ``order_seconds`` for the order
  of an epoch, ``images_per_second``, ``process_bytes``.
"""

import argparse
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from PIL import Image

from shike_core.data.manifest import read_subset
from shike_core.data.storage import StoredImages
from shike_core.stages import write_json

TEST_PER_CLASS = 3
LARGEST_OVER_SMALLEST = 500.0
BATCH = 256
SECONDS_BETWEEN_LOOKS = 0.2
Result = dict[str, Any]


def make_images(folder: Path, images: int, classes: int) -> Path:
    """Write the files, unless they are there already.

    Args:
        folder: receives them.
        images: to train on, over classes of exponentially falling sizes.
        classes: with three test images each.

    Returns:
        The table that lists them, which is written last.
    """
    table = folder / "images.parquet"
    if table.exists():
        return table
    shutil.rmtree(folder, ignore_errors=True)
    pixels = np.random.default_rng(0).integers(256, size=(64, 8, 8, 3), dtype=np.uint8)
    contents = [encoded(image) for image in pixels]
    sizes = LARGEST_OVER_SMALLEST ** (-np.arange(classes) / (classes - 1))
    counts = np.maximum(2, images * sizes / sizes.sum()).astype(int)
    counts[0] += images - counts.sum()
    rows: list[tuple[str, int, str]] = []
    for label, count in enumerate(counts + TEST_PER_CLASS):
        (folder / f"{label:05d}").mkdir(parents=True)
        for number in range(count):
            path = f"{label:05d}/{number:06d}.jpg"
            # A decoder stops at the image's end, so what follows makes a file like no other.
            (folder / path).write_bytes(contents[len(rows) % len(contents)] + path.encode())
            rows.append((path, label, "test" if number < TEST_PER_CLASS else "train"))
    frame = pd.DataFrame(rows, columns=["path", "label", "split"])
    frame.to_parquet(table)
    return table


def encoded(image: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """The image as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG")
    return buffer.getvalue()


def build(table: Path, out: Path, storage: str, workers: int) -> Result:
    """Build a subset of all images by the command line, and watch its processes.

    Raises:
        SystemExit: the command failed; its message stands above.
    """
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "shike_core", "build-subset", "--dataset", "table"]
    command += ["--imbalance-factor", "0", "--data-dir", str(table), "--out", str(out)]
    command += ["--storage", storage, "--workers", str(workers)]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks: dict[int, int] = {}
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children()]:
                peaks[each.pid] = max(peaks.get(each.pid, 0), peak_bytes(each.pid))
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if process.returncode:
        sys.exit(process.returncode)
    seconds = time.monotonic() - started
    parent = peaks.pop(process.pid)
    # The tracker of multiprocessing is a process too, but it loads none of our libraries.
    worker_peaks = [peak for peak in peaks.values() if peak > 2**25]
    sizes = read_subset(out, splits=()).info["sizes"]
    return {
        "seconds": seconds,
        "images_per_second": sum(sizes.values()) / seconds,
        "parent_bytes": parent,
        "worker_bytes": max(worker_peaks, default=0),
        "workers": len(worker_peaks),
        "subset_bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }


def peak_bytes(pid: int) -> int:
    """Peak of resident memory of a process since its program was loaded; 0 if it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


def read_back(out: Path) -> Result:
    """Read an epoch of the training images."""
    started = time.monotonic()
    images = read_subset(out).splits["train"].images
    assert isinstance(images, StoredImages)
    opened = time.monotonic()
    order = images.order(np.random.default_rng(0))
    ordered = time.monotonic()
    for first in range(0, len(order), BATCH):
        images.read(order[first : first + BATCH].tolist())
    return {
        "open_seconds": opened - started,
        "order_seconds": ordered - opened,
        "images_per_second": len(order) / (time.monotonic() - ordered),
        "process_bytes": peak_bytes(os.getpid()),
    }


def measure(options: argparse.Namespace) -> Result:
    """Everything the file written holds."""
    from benchmarks.runs import machine

    folder = options.work / f"images-{options.images}-{options.classes}"
    table = make_images(folder, options.images, options.classes)
    known = machine("cpu")
    first = [path.stat().st_size for path in sorted((folder / "00000").iterdir())]
    report: Result = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "cores": len(os.sched_getaffinity(0)),
        **{name: known[name] for name in ("device", "versions", "commit")},
        "images": options.images,
        "classes": options.classes,
        "file_bytes": sum(first) / len(first),
    }
    for storage in options.storages:
        out = options.work / f"subset-{storage}"
        result = {"build": build(table, out, storage, options.workers)}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as pool:
            result["read"] = pool.submit(read_back, out).result()
        report[storage] = result
        shutil.rmtree(out)
        print(render(storage, result), flush=True)
    return report


def render(storage: str, result: Result) -> str:
    """A line for people."""
    build, read = result["build"], result["read"]
    return (
        f"{storage:<10}  built in {build['seconds']:.0f} s ({build['images_per_second']:.0f} "
        f"images/s, {build['workers']} workers), memory {build['parent_bytes'] / 2**20:.0f} + "
        f"{build['worker_bytes'] / 2**20:.0f} MiB a worker, on disk "
        f"{build['subset_bytes'] / 2**20:.0f} MiB; opened in {read['open_seconds']:.1f} s, read "
        f"{read['images_per_second']:.0f} images/s in {read['process_bytes'] / 2**20:.0f} MiB"
    )


def main() -> None:
    """Command line of ``python -m benchmarks.large_subset``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for images and subsets")
    parser.add_argument("--images", type=int, default=437_513, help="to train on")
    parser.add_argument("--classes", type=int, default=8142, help="each has 3 test images besides")
    parser.add_argument("--storages", nargs="+", choices=("packed", "referenced"),
                        default=("packed", "referenced"))  # fmt: skip
    parser.add_argument("--workers", type=int, default=0, help="default: all cores")
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    report = measure(options)
    if options.out:
        write_json(report, options.out)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

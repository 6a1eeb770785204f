"""The engine against the plain form of the same recipe on this machine: ``make bench``.

In each round all forms take their turns, and ratios are taken within a round, so that a machine
that grows slower meanwhile does not favour one of them. Both forms have the same threads, the same
settings of the processor's libraries, the same images, network, losses and batch; the plain
form has as many loader processes as serve it best. The data are a small subset in the project's
own format, by default generated; their content does not matter to the speed.

The file written holds, with every figure that a table shows:

- ``date``, ``commit``, ``settings``, ``environment``, ``hardware``, ``versions``, ``seconds``,
  ``subset``: images and classes trained on;
- ``images_per_second``: by part (``data``, ``update``, ``training``, and its ``stage1`` and
  ``stage2``) and form (``plain``, ``engine-float32`` ...): ``median``, ``lowest``, ``highest``,
  ``runs``; and ``ratios`` to the plain form in the same way;
- ``plain_workers``: whole training of the plain form by number of loader processes, tried once;
- ``peak_memory_bytes``: by form: ``start``, ``peak``, ``worker``, ``device``;
- ``growth``: ``batch_size``, ``num_experts``, ``num_classes``, ``images``;
- ``ceilings``: ``convolutions``, ``network``, ``copy_bytes_per_second``;
- ``share_of_ceiling``: by form and part, the time at the machine's ceiling over that measured;
- ``loading``: photographs from disk, see `benchmarks.loading`.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import loading
from benchmarks.figures import PLAIN, Report, ratios, summary
from benchmarks.settings import SHARE_OF_STAGE1, Settings, quick
from benchmarks.tables import render
from shike_core.data.manifest import read_info
from shike_core.environment import CPU_SETTINGS
from shike_core.errors import DatasetError
from shike_core.stages import write_json

ROOT = Path(__file__).parents[1]


def measure(settings: Settings, subset: Path | None, photographs: Path | None) -> Report:
    """Measure everything, one process after the other.

    Args:
        settings: how much.
        subset: the images; None generates some.
        photographs: a folder of JPEG files; None generates some.

    Raises:
        SystemExit: a process failed; its message stands above.
    """
    started = time.monotonic()
    with TemporaryDirectory() as directory:
        job = {
            "settings": asdict(settings),
            "directory": directory,
            "subset": str(subset.resolve()) if subset else None,
            "photographs": str(photographs.resolve()) if photographs else None,
        }
        # The tables first: a peak of memory is that of all that came before.
        found = run_job(job, ["machine", "tables", "prepare", "speed", "growth", "ceilings"])
        tried = found["speed"]["plain_workers"]
        workers = int(max(tried, key=tried.__getitem__))
        memory = {
            form: run_job(job | {"form": form, "workers": workers}, ["memory"])["memory"]
            for form in found["speed"]["forms"]
        }
        photographs_read = run_job(job, ["loading"])["loading"]
    runs = found["speed"]["runs"]
    speed = {part: {form: summary(x) for form, x in forms.items()} for part, forms in runs.items()}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "settings": asdict(settings),
        "environment": {name: os.environ[name] for name in CPU_SETTINGS},
        **found["machine"],
        "seconds": time.monotonic() - started,
        "subset": found["prepare"] | {"directory": str(subset) if subset else "generated"},
        "images_per_second": speed,
        "ratios": ratios(runs),
        "plain_workers": tried,
        "peak_memory_bytes": memory,
        "growth": found["growth"] | found["tables"],
        "ceilings": found["ceilings"],
        "share_of_ceiling": shares_of_ceiling(
            speed, found["ceilings"], settings.batch_size, found["prepare"]["image_size"]
        ),
        "loading": photographs_read,
    }


def run_job(job: Mapping[str, Any], parts: Sequence[str]) -> Report:
    """Measure some parts in a process of their own."""
    command = [sys.executable, "-m", "benchmarks.measure", json.dumps({**job, "parts": parts})]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(f"error: measuring {', '.join(parts)} failed; see the message above")
    result: Report = json.loads(done.stdout.splitlines()[-1])
    return result


def shares_of_ceiling(
    speed: Report, ceilings: Report, batch_size: int, image_size: Sequence[int]
) -> Report:
    """How near each form comes to the machine's measured best, 1 being there.

    An update's ceiling is the time of the network's convolutions alone, each as fast as it runs by
    itself in the form's number format; whole training's is that of both stages, where stage 2 has
    the forward pass only. That of the data is to read each pixel once and to write it once as a
    number of that format, as fast as the machine copies.
    """
    shares: Report = {}
    for form in speed["update"]:
        network = ceilings["network"][precision_of(form)]
        forward, *backward = (network[name]["seconds"] / batch_size for name in network)
        update = forward + sum(backward)
        both = SHARE_OF_STAGE1 * update + (1 - SHARE_OF_STAGE1) * forward
        pixel_bytes = 1 + (4 if precision_of(form) == "float32" else 2)
        data = 3 * math.prod(image_size) * pixel_bytes / ceilings["copy_bytes_per_second"]
        shares[form] = {
            part: at_ceiling * speed[part][form]["median"]
            for part, at_ceiling in (("data", data), ("update", update), ("training", both))
        }
    return shares


def precision_of(form: str) -> str:
    """The number format of a form's convolutions."""
    return "float32" if form == PLAIN else form.removeprefix("engine-")


def dated(directory: Path, date: str) -> Path:
    """A report's file, named to the minute: one day may see measurements on several machines.

    Args:
        directory: to hold it.
        date: the report's ``date``.
    """
    day, clock = date[:10], date[11:16].replace(":", "")
    return directory / f"bench-{day}-{clock}.json"


def main() -> None:
    """Command line of ``python -m benchmarks.bench``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--subset", type=Path, help="directory of build_subset; else generated")
    parser.add_argument("--photographs", type=Path, help="folder of JPEG files; else generated")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=cores, help=f"default: all {cores} cores")
    parser.add_argument("--rounds", type=int, help="repetitions of each form")
    parser.add_argument("--out", type=Path, help="file; default: a dated one in benchmarks/results")
    options = parser.parse_args()
    make = quick if options.quick else Settings
    settings = make(device=options.device, threads=options.threads)
    if options.rounds:
        settings = replace(settings, rounds=options.rounds)
    try:
        if options.subset:
            read_info(options.subset)
        if options.photographs:
            loading.find_photographs(options.photographs)
    except DatasetError as error:
        sys.exit(f"error: {error}")
    report = measure(settings, options.subset, options.photographs)
    out = options.out
    if out is None and not options.quick:
        out = dated(ROOT / "benchmarks" / "results", report["date"])
    if out is not None:
        write_json(report, out)
    print(render(report), loading.render(report["loading"]), sep="\n\n")
    if out is not None:
        print(f"\nwrote {out}")


if __name__ == "__main__":
    main()

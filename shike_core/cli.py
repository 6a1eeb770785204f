"""The command line: one command for each stage, derived from signatures and dataclasses."""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from shike_core import stages
from shike_core.config import EvaluateConfig, PredictConfig, SubsetConfig, TrainConfig
from shike_core.environment import CPU_SETTINGS
from shike_core.errors import DatasetError, Interrupted, ShikeError, exit_without_reader
from shike_core.progress import console_log, format_metrics

Flat: Any = tyro.conf.OmitArgPrefixes
"""Options of a configuration go by their own names: ``--seed``, not ``--config.seed``."""


def build_subset(
    config: Annotated[SubsetConfig, Flat],
    out: Path,
    data_dir: str = "",
    shards_dir: str = "",
    workers: int = 0,
) -> None:
    """Cut a long-tailed subset out of a source of images.

    Args:
        config: the rule.
        out: directory to write.
        data_dir: where the source's files are, a folder or a URL; without it the official files of
            CIFAR are downloaded.
        shards_dir: folder or URL for the packed images in place of `out`.
        workers: processes that read images in files; 0 means as many as there are cores and memory
            for.
    """
    report = stages.build_subset(config, data_dir or None, out, _quiet, shards_dir, workers)
    print(f"{report['sizes']} images in {out}, digest {report['digest']}")
    if left_out := sum(report.get("unreadable", {}).values()):
        print(f"{left_out} images cannot be read and are left out, see unreadable.csv there")


def train(
    config: Annotated[TrainConfig, Flat],
    subset: Path,
    out: Path,
    checkpoint_dir: Path | None = None,
    stage1_from: Path | None = None,
) -> None:
    """Train both stages of SHIKE, or go on where an earlier call was stopped.

    Args:
        config: everything that decides the weights.
        subset: directory written by build-subset.
        out: directory to write.
        checkpoint_dir: keeps checkpoints in another place than `out`.
        stage1_from: checkpoint of a training with the same settings but for those of stage 2, whose
            stage 1 is taken, so that only stage 2 is trained.
    """
    if stage1_from is not None:
        stages.take_stage1(stage1_from, config, subset, out, checkpoint_dir)
    report = stages.train(
        config, subset, out, console_log(config.epochs, sys.stdout), checkpoint_dir
    )
    if os.environ.get("RANK", "0") != "0":  # of torchrun: each process is here
        return
    print(
        f"{out / stages.CHECKPOINT}: {report['epochs']} epochs, {format_metrics(report['final'])}"
    )


def evaluate(
    config: Annotated[EvaluateConfig, Flat], subset: Path, checkpoint: Path, out: Path
) -> None:
    """Measure a trained model on the balanced test split, and export it.

    Args:
        config: how to measure.
        subset: directory written by build-subset.
        checkpoint: directory written by train.
        out: directory to write.
    """
    report = stages.evaluate(config, subset, checkpoint, out, _quiet)
    for key, value in report["metrics"].items():
        if "expert" not in key:
            print(f"{key:<32} {value:.4f}")
    print(f"report: {out / 'report.html'}")


def compare(
    evaluations: tyro.conf.Positional[list[Path]], out: Path, across_test_sets: bool = False
) -> None:
    """Put evaluated models side by side, and say how sure their differences are.

    Args:
        evaluations: directories written by evaluate; the first is what the others are compared
            with.
        out: directory to write.
        across_test_sets: also if they were measured on different images; then nothing is tested.
    """
    from shike_core.compare import as_text

    report = stages.compare(evaluations, out, across_test_sets=across_test_sets)
    print(as_text(report))
    print(f"page: {out / 'compare.html'}")


def predict(
    images: tyro.conf.Positional[list[str]],
    model: Path,
    config: Annotated[PredictConfig, Flat],
    output: Literal["text", "json", "csv"] = "text",
) -> None:
    """Let a trained model say what images show, and each of its experts as well.

    Args:
        images: files, folders, or - for one image on standard input.
        model: directory written by train, or the checkpoint in it.
        config: how.
        output: text for a person; json, one object a line; or csv, one row a class told.
    """
    if failed := print_answers(stages.predict(config, model, images), output):
        raise DatasetError(f"{failed} of the images cannot be used, see above")


def print_answers(answers: Iterable[dict[str, Any]], output: str) -> int:
    """Print what `shike_core.stages.predict` yields, as it comes; how many images had an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files are bytes, in no coding at all
        sys.stdout.reconfigure(errors="surrogateescape")
    failed, shown = 0, ANSWER_FORMATS[output]()
    for row in answers:
        if "error" in row:
            failed += 1
            print(f"error: {row['image']}: {row['error']}", file=sys.stderr)
        else:
            shown(row)
            sys.stdout.flush()
    return failed


def _as_text() -> Callable[[dict[str, Any]], None]:
    warned = False

    def show(row: dict[str, Any]) -> None:
        nonlocal warned
        if not (row["calibrated"] or warned):
            warned = True
            print(
                "these probabilities are not calibrated: the checkpoint has no temperature, which "
                "a training fits where its subset has a validation part",
                file=sys.stderr,
            )
        print(row["image"])
        width = max(len(best["class"]) for best in row["top"])
        for best in row["top"]:
            print(f"  {best['class']:<{width}}  {100 * best['probability']:5.1f} %")
        told = (f"{e['class']} ({100 * e['probability']:.0f} %)" for e in row["experts"])
        print("  " + ", ".join(f"expert {i}: {answer}" for i, answer in enumerate(told)))

    return show


def _as_json() -> Callable[[dict[str, Any]], None]:
    return lambda row: print(json.dumps(row))


def _as_csv() -> Callable[[dict[str, Any]], None]:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "label", "probability", "calibrated", "experts"])

    def show(row: dict[str, Any]) -> None:
        experts = "; ".join(f"{e['class']} {e['probability']:.4f}" for e in row["experts"])
        for rank, best in enumerate(row["top"], start=1):
            probability = f"{best['probability']:.6f}"
            line = [row["image"], rank, best["class"], best["label"], probability]
            writer.writerow([*line, row["calibrated"], experts])

    return show


ANSWER_FORMATS: dict[str, Callable[[], Callable[[dict[str, Any]], None]]] = {
    "text": _as_text,
    "json": _as_json,
    "csv": _as_csv,
}


def import_reference(
    file: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    subset: Path | None = None,
) -> None:
    """Turn a checkpoint of the authors' code into one of ours, ready for evaluate.

    Args:
        file: the authors' FILE.pth.tar.
        out: directory to write.
        subset: directory written by build-subset that the model was trained on; without it the
            classes are those of the subset it is evaluated on.
    """
    report = stages.import_reference(file, out, subset)
    sizes = f"{report['num_experts']} experts, {report['num_classes']} classes"
    print(f"{out / stages.CHECKPOINT}: {sizes}")


COMMANDS: dict[str, Any] = {
    "build-subset": build_subset,
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "predict": predict,
    "import-reference": import_reference,
}


def main() -> None:
    """Command line of ``python -m shike_core``."""
    run(COMMANDS, sys.argv[1:], "python -m shike_core")


def run(commands: dict[str, Any], arguments: list[str], prog: str) -> None:
    """Run one command; an error a person should read becomes one line and exit code 2.

    Args:
        commands: by name.
        arguments: of the command line, the command's name first.
        prog: what the help calls the program.
    """
    for name, value in CPU_SETTINGS.items():
        os.environ.setdefault(name, value)  # the stages load torch
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog=prog, args=arguments)
    except Interrupted as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signal_number)
    except ModuleNotFoundError as error:  # an image, or an installation, without that part
        print(
            f"error: {error.name} is not installed here, and this command needs it; use the image "
            "or the requirements file of its step",
            file=sys.stderr,
        )
        sys.exit(2)
    except (ShikeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        exit_without_reader()
    except KeyboardInterrupt:
        sys.exit(130)


def _quiet(metrics: object, step: int) -> None:
    """The commands print their own summary."""

"""The commands of the images: a container's step by hand, without a pipeline."""

import sys
from typing import Annotated, Any

import tyro

from shike_core import cli as core
from shike_core.config import RegisterConfig

Flat: Any = tyro.conf.OmitArgPrefixes


def preflight(
    dataset: str,
    data_dir: str = "",
    checkpoint_dir: str = "",
    device: str = "auto",
    shared_memory: str = "",
    free_disk_gib: float = 1.0,
) -> None:
    """Check tracking server, data, disk, memory and GPU in seconds.

    Args:
        dataset: where the images come from.
        data_dir: folder with the source's files, for a table the file itself, or a URL; empty means
            downloading CIFAR.
        checkpoint_dir: folder where a stopped training will go on from.
        device: cuda demands a GPU.
        shared_memory: size that /dev/shm has to have, as in 2Gi.
        free_disk_gib: free space that is needed.
    """
    from components import checks

    needs = checks.Needs(
        dataset=dataset,
        data_dir=data_dir,
        checkpoint_dir=checkpoint_dir,
        device=device,
        shared_memory=shared_memory,
        free_disk_gib=free_disk_gib,
    )
    print("\n".join(checks.check(needs, checks.BY_HAND)))


def register(config: Annotated[RegisterConfig, Flat], run_id: str) -> None:
    """Let the model of a finished evaluation pass the gate, and register it.

    Args:
        config: name of the model, and what may get worse.
        run_id: the MLflow run that the evaluation was logged in.
    """
    from components import registration

    version, decision = registration.register(config, run_id)
    print(f"{config.model_name} version {version}, alias {decision.alias}")
    print("\n".join(decision.reasons))


COMMANDS: dict[str, Any] = core.COMMANDS | {"preflight": preflight, "register": register}


def main(arguments: list[str] | None = None) -> None:
    """Run one step; an error a person should read becomes one line and exit code 2.

    Args:
        arguments: of the command line, the step's name first; None takes those of this process.
    """
    core.run(COMMANDS, sys.argv[1:] if arguments is None else arguments, "python -m components")

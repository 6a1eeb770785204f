"""Which images there are, what they are called, and whether an engine can be used."""

import argparse
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = {
    "data": "data",
    "register": "data",
    "mlflow": "server",
    "train": "train",
    "evaluate": "train",
}
"""The lock that an image is made from; in the order of the stages in docker/Dockerfile."""


class ImageError(Exception):
    """Something that a person can put right."""


@dataclass(frozen=True)
class Options:
    """Which images, and under which names."""

    images: tuple[str, ...]
    """Some of `LOCKS`."""
    registry: str
    """HOST/PROJECT, or empty for this machine alone."""
    tag: str
    """The same for all."""

    def name(self, image: str) -> str:
        """What the engine calls an image."""
        name = f"shike-python-{image}:{self.tag}"
        return f"{self.registry}/{name}" if self.registry else name


@cache
def revision(allow_dirty: bool) -> str:
    """The commit of this checkout, with a suffix if files differ from it.

    Raises:
        ImageError: it is no checkout, or files differ and that was not allowed.
    """
    if shutil.which("git") is None:
        raise ImageError("git is missing, and images are named after the commit; install git")
    commit = _git("rev-parse", "--short=12", "HEAD").strip()
    changed = _git("status", "--porcelain").splitlines()
    if not changed:
        return commit
    some = ", ".join(line[3:] for line in changed[:3]) + (", ..." if len(changed) > 3 else "")
    if not allow_dirty:
        raise ImageError(
            f"the tree differs from commit {commit} ({some}), so no commit would tell what is in "
            "the images; commit first, or try things out with ALLOW_DIRTY=1"
        )
    print(f"the tree differs from commit {commit} ({some}), the images are marked as dirty")
    return f"{commit}-dirty"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ImageError(f"{ROOT} is no git checkout with a commit ({last_line(done.stderr)})")
    return done.stdout


def check_engine() -> None:
    """Find out in a second whether images can be built.

    Raises:
        ImageError: there is no client, or no engine answers it.
    """
    if shutil.which("docker") is None:
        raise ImageError("docker is missing; install Docker, or put its client into PATH")
    done = subprocess.run(["docker", "version"], capture_output=True, text=True)
    if done.returncode:
        raise ImageError(
            f"no container engine answers ({last_line(done.stderr)}); start Docker, or let "
            "DOCKER_HOST name an engine that you may use"
        )


def inspect(name: str, what: str) -> str:
    """What the engine knows of an image, by a Go template.

    Raises:
        ImageError: there is no such image.
    """
    command = ["docker", "image", "inspect", "--format", what, name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ImageError(f"there is no image {name}; build it with make images, same REGISTRY, TAG")
    return done.stdout.strip()


def last_line(text: str) -> str:
    """Where a command says what went wrong."""
    return next(reversed(text.strip().splitlines()), "no message")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that name images."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=f"{', '.join(LOCKS)}; else all")
    parser.add_argument("--registry", default="", help="HOST/PROJECT in front of the names")
    parser.add_argument("--tag", default="", help="of the images; the git commit if not given")
    parser.add_argument("--allow-dirty", action="store_true", help="take files not committed")
    return parser


def options(arguments: argparse.Namespace) -> Options:
    """Which images the arguments mean.

    Raises:
        ImageError: an image is unknown, or no tag is given and no commit can be one.
    """
    if unknown := [image for image in arguments.images if image not in LOCKS]:
        raise ImageError(f"there is no image {unknown[0]}; choose some of {', '.join(LOCKS)}")
    return Options(
        images=tuple(image for image in LOCKS if not arguments.images or image in arguments.images),
        registry=arguments.registry.rstrip("/"),
        tag=arguments.tag or revision(arguments.allow_dirty),
    )

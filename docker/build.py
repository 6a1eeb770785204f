"""Build or push the images of the steps and of the tracking server.

`make images` and `make images-push` call it. It needs git, a docker client and an engine, but
nothing of the project's own environment.
"""

import hashlib
import re
import subprocess
import sys
import time

from images import (
    LOCKS,
    ROOT,
    ImageError,
    Options,
    check_engine,
    inspect,
    options,
    parser,
    revision,
)


def build(options: Options, commit: str, base_image: str) -> None:
    """Build images one after the other.

    Args:
        options: which ones.
        commit: what they are made from.
        base_image: with Python, in place of the official one; or empty.

    Raises:
        ImageError: there is no engine, or a build failed.
    """
    check_engine()
    for image in options.images:
        lock = (ROOT / "requirements" / f"{LOCKS[image]}.lock").read_bytes()
        arguments = {
            "VERSION": _version(),
            "REVISION": commit,
            "LOCK_SHA256": hashlib.sha256(lock).hexdigest(),
        }
        if base_image:
            arguments["BASE_IMAGE"] = base_image
        command = ["docker", "build", "--file", str(ROOT / "docker" / "Dockerfile")]
        command += ["--target", image, "--tag", options.name(image)]
        for key, value in arguments.items():
            command += ["--build-arg", f"{key}={value}"]
        started = time.monotonic()
        if subprocess.run([*command, str(ROOT)]).returncode:
            raise ImageError(f"{options.name(image)} was not built; docker's message stands above")
        print(f"{options.name(image)}: {time.monotonic() - started:.0f} s", flush=True)
    for image in options.images:
        size = inspect(options.name(image), "{{.Size}}")
        print(f"{options.name(image)}  {int(size) / 1e6:.0f} MB")


def push(options: Options) -> None:
    """Push images that were built.

    Raises:
        ImageError: no registry is named, there is no engine, an image is not there, or the
            registry refuses it.
    """
    if not options.registry:
        raise ImageError("there is nowhere to push to; add REGISTRY=HOST/PROJECT")
    check_engine()
    for image in options.images:
        inspect(options.name(image), "{{.Id}}")
    for image in options.images:
        if subprocess.run(["docker", "push", options.name(image)]).returncode:
            raise ImageError(
                f"{options.name(image)} was not pushed; docker's message stands above (docker "
                "login gives access)"
            )


def _version() -> str:
    text = (ROOT / "shike_core" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE)
    assert found, "shike_core/__init__.py names no version"
    return found[1]


def main() -> None:
    """Command line of ``python docker/build.py``."""
    given = parser(__doc__)
    given.add_argument("--base-image", default="", help="in place of the official Python image")
    given.add_argument("--push", action="store_true", help="push what was built before")
    arguments = given.parse_args()
    try:
        chosen = options(arguments)
        if arguments.push:
            push(chosen)
        else:
            build(chosen, revision(arguments.allow_dirty), arguments.base_image)
    except ImageError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

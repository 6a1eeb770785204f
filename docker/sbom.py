"""Write down what is in the images, as CycloneDX documents; `make sbom`.

Python's packages are described by the metadata that is installed in the image, those of the base
image by Debian's database of packages.
"""

import io
import json
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path
from typing import Any

from images import ImageError, check_engine, inspect, last_line, options, parser
from packageurl import PackageURL

METADATA = "cd /opt/shike/venv/lib/python3*/site-packages && tar --create *.dist-info"
PYTHON = ["python", "-c", "import platform; print(end=platform.python_version())"]
DEBIAN = ["dpkg-query", "--show", "--showformat", "${Package} ${Version} ${Architecture}\n"]


def describe(image: str, name: str) -> dict[str, Any]:
    """The document of one image.

    Args:
        image: which of the images.
        name: what the engine calls it.

    Raises:
        ImageError: the image is not there or cannot be looked into.
    """
    image_id = inspect(name, "{{.Id}}")
    document = _python_packages(_run(name, ["sh", "-c", METADATA]))
    document["metadata"]["component"] = {
        "type": "container",
        "bom-ref": "image",
        "name": f"shike-python-{image}",
        "version": inspect(name, '{{index .Config.Labels "org.opencontainers.image.revision"}}'),
        "licenses": [{"license": {"id": "Apache-2.0"}}],
        "properties": [{"name": "shike:image-id", "value": image_id}],
    }
    document["components"].append(_package("generic", "python", _run(name, PYTHON).decode()))
    for line in _run(name, DEBIAN).decode().splitlines():
        package, version, architecture = line.split()
        component = _package("deb", package, version, namespace="debian", arch=architecture)
        document["components"].append(component)
    holds = [component["bom-ref"] for component in document["components"]]
    document["dependencies"].append({"ref": "image", "dependsOn": holds})
    return document


def _run(name: str, command: list[str]) -> bytes:
    done = subprocess.run(
        ["docker", "run", "--rm", "--network", "none", name, *command], capture_output=True
    )
    if done.returncode:
        raise ImageError(f"cannot look into {name}: {last_line(done.stderr.decode())}")
    return done.stdout


def _python_packages(metadata: bytes) -> dict[str, Any]:
    """The document of an environment that has the metadata of packages, and nothing else."""
    with tempfile.TemporaryDirectory() as directory:
        venv.create(directory)
        (packages,) = Path(directory).glob("lib/python3*/site-packages")
        with tarfile.open(fileobj=io.BytesIO(metadata)) as tar:
            tar.extractall(packages, filter="data")
        command = [sys.executable, "-m", "cyclonedx_py", "environment", "--spec-version", "1.6"]
        command += ["--no-validate", "--output-file", "-", directory]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ImageError(f"cyclonedx-py failed: {last_line(done.stderr)}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def _package(
    kind: str, name: str, version: str, namespace: str = "", **qualifiers: str
) -> dict[str, Any]:
    purl = PackageURL(kind, namespace, name, version, qualifiers).to_string()
    component = {"type": "library", "name": name, "version": version}
    return {"bom-ref": purl, "purl": purl, **component}


def main() -> None:
    """Command line of ``python docker/sbom.py``."""
    given = parser(__doc__)
    given.add_argument("--output", type=Path, default=Path("build/sbom"), help="folder to write")
    arguments = given.parse_args()
    try:
        chosen = options(arguments)
        check_engine()
        arguments.output.mkdir(parents=True, exist_ok=True)
        for image in chosen.images:
            document = describe(image, chosen.name(image))
            path = arguments.output / f"{image}.cdx.json"
            path.write_text(json.dumps(document, indent=1) + "\n")
            print(f"{path}: {len(document['components'])} packages", flush=True)
    except ImageError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

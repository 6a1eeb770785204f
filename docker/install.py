"""Bring /opt/shike/venv to its lock, while an image is built.

The arguments are patterns of what to leave out of site-packages. The environment has no pip; that
of the base image fills it, whose settings (pip.conf) also say where packages come from.
"""

import compileall
import shutil
import subprocess
import sys
from pathlib import Path

VENV = Path("/opt/shike/venv")
FROM_SOURCE = "kfp-server-api"
"""The one package that is published as source only; there is nothing in it to compile."""
UNUSED = (
    *("matplotlib/tests", "pandas/tests", "pyarrow/tests", "scipy/**/tests", "sklearn/**/tests"),
    "pyarrow/*flight*",  # a protocol that nothing here speaks; no other part of pyarrow loads it
    "**/*.a",  # libraries for a linker
    # Of the services that botocore can call, all but S3 and who is asked for its credentials.
    *("botocore/data/[a-rt-z]*/*", "botocore/data/s[a-ru-z]*/*", "botocore/data/ssm*/*"),
    *sys.argv[1:],
)
"""What is large and never loaded. (Some of numpy's tests are, by numpy.testing.)"""

base = Path(sys.base_prefix) / "bin/python3"
pip = [str(base), "-m", "pip", "--python", str(VENV / "bin/python")]
pip += ["--no-cache-dir", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
pip += ["--root-user-action=ignore", "--require-hashes", "--no-deps", "--only-binary=:all:"]
pip += [f"--no-binary={FROM_SOURCE}", "-r", str(VENV / "requirements.lock")]
if code := subprocess.run(pip, check=False).returncode:
    sys.exit(code)  # pip said why

(packages,) = VENV.glob("lib/python3*/site-packages")
for pattern in UNUSED:
    for path in list(packages.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()

# On all cores. Files that are no Python of this version, such as templates, stay as they are.
compileall.compile_dir(packages, quiet=2, workers=0)

"""Ask a database of vulnerabilities about what the images are made from; `make audit`.

The exit code is 0 if nothing is known of any package, 1 if something is, and 2 if not every package
could be asked about: pip-audit itself calls that a success.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOCKS = ("train", "server")
"""The lock of the images without torch is part of that of those with it."""


def findings(dependencies: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each vulnerability known."""
    return [
        f"{found['name']} {found['version']}: {flaw['id']}"
        f" ({', '.join(flaw['aliases']) or 'no other name'}),"
        f" fixed in {', '.join(flaw['fix_versions']) or 'no version yet'}"
        for found in dependencies
        for flaw in found.get("vulns", [])
    ]


def not_asked(dependencies: Iterable[dict[str, Any]]) -> list[str]:
    """Packages that the database was not asked about, or does not know."""
    return [found["name"] for found in dependencies if "skip_reason" in found]


def judge(dependencies: list[dict[str, Any]]) -> int:
    """Say what pip-audit found of each package; returns the exit code."""
    known, left_out = findings(dependencies), not_asked(dependencies)
    for line in known:
        print(line)
    if left_out:
        some = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        print(
            f"error: {len(left_out)} of {len(dependencies)} packages were not audited, the service "
            f"knows nothing of them ({some}); run it where the service can be reached, or try "
            "ARGS='--vulnerability-service osv'",
            file=sys.stderr,
        )
        return 2
    print(f"{len(dependencies)} packages, {len(known)} known vulnerabilities")
    return 1 if known else 0


def audit(arguments: list[str]) -> int:
    """Run pip-audit on the locks; returns the exit code.

    Args:
        arguments: further ones of pip-audit, such as ``--vulnerability-service osv``.
    """
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--progress-spinner", "off"]
    command += ["--format", "json", *arguments]
    for lock in LOCKS:
        command += ["--requirement", str(ROOT / "requirements" / f"{lock}.lock")]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except ValueError:
        reason = next(reversed(done.stderr.strip().splitlines()), "no message")
        print(f"error: nothing was audited: {reason[:300]}", file=sys.stderr)
        return 2
    return judge(dependencies)


if __name__ == "__main__":
    sys.exit(audit(sys.argv[1:]))

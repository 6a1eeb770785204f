"""Make a release of what is committed; `make release VERSION=0.2.0`.

Writes the version where it stands, commits and tags. Nothing is pushed.
"""

import argparse
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNRELEASED = "## Unreleased\n"


class ReleaseError(Exception):
    """This version cannot be released as things are."""


def release(version: str, today: date, root: Path = ROOT) -> str:
    """Write, commit and tag a version.

    Args:
        version: as in 0.2.0, above the present one.
        today: the date it bears.
        root: of the checkout.

    Returns:
        The tag.

    Raises:
        ReleaseError: the version is not one or not a new one, something is not committed, or the
            change log has nothing to say of it. Nothing was changed.
    """
    tag = f"v{version}"
    package, changes, citation = (
        root / name for name in ("shike_core/__init__.py", "CHANGELOG.md", "CITATION.cff")
    )
    present = package.read_text(encoding="utf-8").partition('__version__ = "')[2].partition('"')[0]
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ReleaseError(f"VERSION={version} is not three numbers; give one such as 0.2.0")
    if _numbers(version) < _numbers(present):
        raise ReleaseError(f"VERSION={version} is below {present}; give a higher one")
    if _git(root, "tag", "--list", tag):
        raise ReleaseError(f"the tag {tag} is there already; give a version above {present}")
    if dirty := _git(root, "status", "--porcelain"):
        raise ReleaseError(f"these files are not committed; commit or remove them:\n{dirty}")
    before, _, rest = changes.read_text(encoding="utf-8").partition(UNRELEASED)
    notes, heading, older = rest.partition("\n## ")
    if not notes.strip():
        raise ReleaseError(
            "CHANGELOG.md says nothing under Unreleased; write there what a user will notice"
        )
    section = f"{UNRELEASED}\n## {version} ({today})\n{notes}"
    try:
        changes.write_text(before + section + heading + older, encoding="utf-8")
        _put(package, r'^__version__ = ".+"$', f'__version__ = "{version}"')
        _put(citation, r"^version: .+$", f"version: {version}")
        _put(citation, r"^date-released: .+$", f"date-released: {today}")
        _git(root, "commit", "--quiet", "--all", "--message", f"Version {version}")
    except BaseException:  # a hook refused, a full disk, Ctrl-C
        _git(root, "checkout", "--quiet", "HEAD", "--", *map(str, (package, changes, citation)))
        raise
    _git(root, "tag", "--annotate", tag, "--message", f"Version {version}\n\n{notes.strip()}")
    return tag


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def _put(path: Path, pattern: str, line: str) -> None:
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(pattern, line, text, count=1, flags=re.MULTILINE), encoding="utf-8")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ReleaseError(f"git {arguments[0]} refused: {done.stderr.strip()}")
    return done.stdout.strip()


def main() -> None:
    """Command line of ``python docker/release.py``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", help="as in 0.2.0")
    try:
        tag = release(parser.parse_args().version, date.today())
    except ReleaseError as error:
        sys.exit(f"error: {error}")
    print(f"{tag} is committed and tagged here. To publish it:")
    print("  git push --follow-tags")
    print(f"  make images images-push REGISTRY=HOST/PROJECT TAG={tag}")


if __name__ == "__main__":
    main()

"""`make release`: a version is written everywhere, or nowhere."""

import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("shike_core/__init__.py", "CHANGELOG.md", "CITATION.cff")
LOG = "# Changes\n\n## Unreleased\n\n- Faster.\n\n## 0.0.9 (2026-01-01)\n\n- First.\n"


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A checkout of what a release touches."""
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "Test")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "test@example.invalid")
    for part in PARTS:
        (tmp_path / part).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / part, tmp_path / part)
    (tmp_path / "CHANGELOG.md").write_text(LOG)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "All there is")
    return tmp_path


@pytest.fixture
def release(checkout) -> Callable[[str], str]:
    script = runpy.run_path(str(ROOT / "docker" / "release.py"))
    return lambda version: script["release"](version, date(2031, 2, 3), checkout)


def test_a_version_is_written_committed_and_tagged(checkout, release):
    assert release("7.8.9") == "v7.8.9"
    assert '__version__ = "7.8.9"' in (checkout / PARTS[0]).read_text()
    citation = (checkout / "CITATION.cff").read_text()
    assert "\nversion: 7.8.9\ndate-released: 2031-02-03\n" in citation
    assert citation.startswith("cff-version: 1.2.0\n")
    log = (checkout / "CHANGELOG.md").read_text()
    assert log == LOG.replace("ased\n", "ased\n\n## 7.8.9 (2031-02-03)\n")
    assert git(checkout, "status", "--porcelain") == ""
    assert git(checkout, "tag", "--points-at", "HEAD") == "v7.8.9"
    assert "- Faster." in git(checkout, "tag", "--list", "-n9", "v7.8.9")


@pytest.mark.parametrize("version", ["1", "v7.8.9", "7.8", "7.8.9rc1", "0.0.1"])
def test_what_is_no_higher_version_is_refused(checkout, release, version):
    with pytest.raises(Exception, match=r"give (one such as 0\.2\.0|a higher one)"):
        release(version)
    assert git(checkout, "tag") == git(checkout, "status", "--porcelain") == ""


def test_a_version_is_released_once(release):
    release("7.8.9")
    with pytest.raises(Exception, match=r"v7\.8\.9 is there already"):
        release("7.8.9")


def test_the_change_log_has_to_say_something(checkout, release):
    release("7.8.8")
    with pytest.raises(Exception, match="says nothing under Unreleased"):
        release("7.8.9")


def test_what_is_not_committed_is_not_released(checkout, release):
    (checkout / "forgotten.py").touch()
    with pytest.raises(Exception, match=r"not committed[^?]+\?\? forgotten\.py"):
        release("7.8.9")


def test_a_hook_that_refuses_leaves_everything_as_it_was(checkout, release):
    hook = checkout / ".git" / "hooks" / "pre-commit"
    hook.write_text("#!/bin/sh\necho not today >&2\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(Exception, match="not today"):
        release("7.8.9")
    assert git(checkout, "status", "--porcelain") == ""


def test_the_command_says_what_is_wrong_in_one_line():
    script = [sys.executable, str(ROOT / "docker" / "release.py"), "seven"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: VERSION=seven is not three numbers; give one such as 0.2.0\n"

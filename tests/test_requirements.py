"""The locks are complete, say the same, and name nothing but packages, versions and hashes."""

import re
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
LOCKS = ("uv", "data", "train", "server", "dev")
PIN = re.compile(r"([a-z0-9-]+)==([^\s;]+)((?: --hash=sha256:[0-9a-f]{64})+)")


def read_lock(name: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Version and hashes by package; a line that is not a pin with hashes is an error."""
    text = (REQUIREMENTS / f"{name}.lock").read_text()
    pins = {}
    for line in re.sub(r" \\\n +", " ", text).splitlines():
        match = PIN.fullmatch(line)
        assert match, f"{name}.lock: not a pin with hashes: {line[:80]!r}"
        package, version, hashes = match.groups()
        assert package not in pins, f"{name}.lock: {package} is there twice"
        pins[package] = version, frozenset(hashes.split())
    return pins


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_is_a_pin_with_hashes(name: str) -> None:
    assert read_lock(name)


def test_every_input_that_is_not_a_part_has_a_lock() -> None:
    inputs = {path.stem for path in REQUIREMENTS.glob("*.in")}
    assert inputs - {"core"} == set(LOCKS) == {path.stem for path in REQUIREMENTS.glob("*.lock")}


@pytest.mark.parametrize("name", ["data", "train", "server"])
def test_smaller_locks_agree_with_dev(name: str) -> None:
    dev = read_lock("dev")
    assert {package: dev.get(package) for package in read_lock(name)} == read_lock(name)


def test_images_without_torch_stay_without_torch() -> None:
    data, train = read_lock("data"), read_lock("train")
    assert data.keys() < train.keys()
    assert "torch" in train
    assert not {package for package in data if package.startswith(("torch", "nvidia", "triton"))}


@pytest.mark.parametrize("path", sorted(REQUIREMENTS.iterdir()), ids=lambda path: path.name)
def test_no_index_and_no_host_is_named(path: Path) -> None:
    text = path.read_text()
    named = re.findall(r"\S*://\S*|(?m:^-(?!r )\S+)|\S+ @ \S+|\S+\.(?:org|com|net|io)\b", text)
    assert named == []

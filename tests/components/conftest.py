"""What the tests of the steps and of the tracking share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shike_core import stages
from shike_core.recipes import digits_lt


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other make such small models slower, not faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch) -> None:
    """No test depends on what the machine has set."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "SHIKE_KFP_RUN_ID", "SHIKE_GIT_COMMIT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="package")
def subset(tmp_path_factory) -> Path:
    """The long-tailed digits on disk."""
    directory = tmp_path_factory.mktemp("subset")
    stages.build_subset(digits_lt().subset, None, directory, lambda metrics, step: None)
    return directory

"""Shared fixtures. Golden and real data live outside the repository and their absence skips, never fails."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


def _outside(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, REPO.parent / "shared" / default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set {variable} to the folder to run this test")
    return folder.resolve()


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of numeric parity data (environment variable TTMRAY_GOLDEN)."""
    return _outside("TTMRAY_GOLDEN", "golden")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real audio and metadata (environment variable TTMRAY_DATA)."""
    return _outside("TTMRAY_DATA", "data")

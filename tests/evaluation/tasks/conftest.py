"""Benchmarks are run on the models and the server that backends are tested with, with a cache of each test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backends.conftest import server, tiny_vlm

__all__ = ["server", "tiny_vlm"]


@pytest.fixture(autouse=True)
def own_cache(private_cache: Path) -> None:
    """Images of TSV files are unpacked there, and answers kept."""

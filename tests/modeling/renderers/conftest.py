from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a tiny pipeline; do not write into it."""
    pytest.importorskip("diffusers")
    from tests.modeling.renderers.pipelines import PIPELINES

    made: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("pipeline") / kind
            PIPELINES[kind](made[kind])
        return made[kind]

    return folder_of

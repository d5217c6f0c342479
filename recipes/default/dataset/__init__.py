"""The generated data set that the default model learns from, and the pictures that it is later judged on."""

from __future__ import annotations

from recipes.default.dataset.build import BuildReport, build_default

__all__ = ["BuildReport", "build_default"]

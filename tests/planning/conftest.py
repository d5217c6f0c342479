"""Plans are made of the recipes that training is tested with."""

from tests.training.conftest import plain, tiny

__all__ = ["plain", "tiny"]

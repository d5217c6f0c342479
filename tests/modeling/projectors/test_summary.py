"""The summary projector: it begins as its MLP, knows places, and gives fewer tokens where fewer are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polymodal.config import ProjectorConfig
from polymodal.errors import ConfigError
from polymodal.media_plan import Size
from polymodal.modeling.projectors import build_projector
from polymodal.modeling.projectors.summary import SummaryProjector

SETTINGS = {"num_query_tokens": 3, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}


def build(**settings: Any) -> SummaryProjector:
    torch.manual_seed(0)
    config = ProjectorConfig(mm_projector_type="summary", summary=SETTINGS | settings)
    projector = build_projector(config, 8, Size(2, 3), 12)
    assert isinstance(projector, SummaryProjector)
    return projector


def features() -> Tensor:
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_it_begins_as_the_mlp_of_each_patch_and_of_their_mean() -> None:
    projector = build()
    tokens = projector(features())
    assert projector.output_grid == Size(1, 9) and tokens.shape == (2, 9, 12)
    torch.testing.assert_close(tokens[:, 3:], projector.mlp(features()))
    whole = projector.mlp(features().mean(dim=1, keepdim=True))
    torch.testing.assert_close(tokens[:, :3], whole.expand(-1, 3, -1))


@torch.no_grad()
def test_the_same_patches_elsewhere_are_another_image() -> None:
    projector = build()
    torch.nn.init.normal_(projector.output.weight)
    tokens, turned = projector(features()), projector(features().flip(1))
    assert (tokens[:, :3] - turned[:, :3]).abs().max() > 1e-3
    assert (tokens[:, 0] - tokens[:, 1]).abs().max() > 1e-3  # the queries differ
    torch.testing.assert_close(projector(features(), Size(1, 2)), tokens[:, :2])


def test_a_width_that_does_not_go_into_the_heads_is_refused() -> None:
    with pytest.raises(ConfigError, match="hidden_size 10 is not divisible by 4 heads"):
        build(hidden_size=10, num_attention_heads=4)

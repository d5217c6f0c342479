"""Hidden states of signal tokens in the place of a prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from polymodal.errors import ConfigError
from polymodal.modeling.renderers import RenderRequest
from polymodal.modeling.renderers.diffusion import DiffusersRenderer
from polymodal.modeling.renderers.feature_relay import FeatureRelay


@pytest.fixture(scope="module")
def draws(tiny_pipeline: Callable[[str], Path]) -> DiffusersRenderer:
    return DiffusersRenderer(tiny_pipeline("stable_diffusion"), device="cpu")


def test_an_encoded_prompt_draws_what_the_prompt_draws(draws: DiffusersRenderer) -> None:
    request = RenderRequest(prompt="a red circle", width=32, height=32, steps=2, seed=3)
    encoded = draws.encode("a red circle")
    assert encoded.shape == (1, 77, 32)
    other = request.model_copy(update={"prompt": "nothing of this is read"})
    image = draws.render(request)
    assert np.array_equal(image, draws.render(other, prompt_embeds=encoded))
    assert not np.array_equal(image, draws.render(other))
    with pytest.raises(ConfigError, match="cannot draw this"):
        draws.render(request, prompt_embeds=torch.zeros(1, 77, 16))
    with pytest.warns(UserWarning, match="left out"):
        draws.encode("word " * 200)


def test_a_relay_learns_the_encoders_output(draws: DiffusersRenderer) -> None:
    torch.manual_seed(0)
    captions = ["a red circle", "a blue square"]
    target = torch.cat([draws.encode(caption) for caption in captions])
    hidden = torch.randn(2, 4, 48)  # four signal tokens of a language model
    relay = FeatureRelay(48, 32, dim=32, num_layers=1, num_heads=2)
    assert relay(hidden).shape == target.shape
    optimizer = torch.optim.Adam(relay.parameters(), lr=0.01)
    first = relay.loss(hidden, target)
    assert torch.allclose(first, (relay(hidden) - target).pow(2).mean())
    for _ in range(150):
        optimizer.zero_grad()
        loss = relay.loss(hidden, target)
        loss.backward()
        optimizer.step()
    assert all(value.grad is not None for value in relay.parameters())
    assert loss < first / 10
    # and tells the captions apart
    apart = torch.cdist(relay(hidden).flatten(1), target.flatten(1))
    assert apart.argmin(dim=1).tolist() == [0, 1]
    image = draws.render(RenderRequest(prompt="-", width=32, height=32, steps=1), prompt_embeds=relay(hidden[:1]))
    assert image.shape == (32, 32, 3)

"""The model that tests of generation share."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from polymodal.modeling.vlm import MultimodalLM

VOCAB, IMAGE = 40, 7


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    """A model that soon goes in circles, as random ones do."""
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128)
    )  # fmt: skip
    # A head sharp enough that ties do not decide.
    llm.lm_head.weight.data.mul_(30)
    return MultimodalLM(llm=llm, image_token_id=IMAGE).eval()

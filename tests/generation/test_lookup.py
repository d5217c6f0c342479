"""Prompt lookup: the same ids from the same logits in fewer forward passes, and hardly ever a pass in vain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from polymodal.generation import generate
from polymodal.generation.lookup import FEW, LOSS, MOST, PRICE, SHARE, Lookup
from polymodal.generation.params import GenerationParams
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Sample, collate
from tests.generation.conftest import IMAGE, VOCAB


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.05}, {"temperature": 0.3, "seed": 3}])
@pytest.mark.parametrize("most", [1, 2, 3, 60, 1000])
def test_the_same_ids_and_logits_in_fewer_passes(
    model: MultimodalLM, monkeypatch: pytest.MonkeyPatch, most: int, settings: dict[str, Any]
) -> None:
    ids = [1, 5, 9, 2, 30]
    params = GenerationParams(max_new_tokens=most, **settings)
    passes: list[int] = []
    real = model.llm.forward
    monkeypatch.setattr(model.llm, "forward", lambda **kwargs: passes.append(1) or real(**kwargs))
    seen: list[torch.Tensor] = []
    choose = generate.sample_next
    monkeypatch.setattr(generate, "sample_next", lambda logits, *rest: seen.append(logits) or choose(logits, *rest))

    def run(prompt: torch.Tensor | None) -> tuple[list[Any], torch.Tensor, int]:
        passes.clear()
        seen.clear()
        batch = collate([Sample(torch.tensor(ids), torch.zeros(len(ids), dtype=torch.bool))], 0, "left")
        made = [row[0] for row, _ in generate.stream_ids(model, batch, params, [], VOCAB, prompt=prompt)]
        return made, torch.cat(seen), len(passes)

    plain, logits, count = run(None)
    made, same, fewer = run(torch.tensor(ids))
    assert made == plain and len(made) == min(most, 128 - len(ids))
    torch.testing.assert_close(same, logits, rtol=0, atol=1e-4)
    assert fewer <= count and (most < 60 or fewer < 0.8 * count)


def test_a_cache_that_forgets_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    llm = MistralForCausalLM(MistralConfig(**small, num_key_value_heads=2, vocab_size=VOCAB, sliding_window=4))
    model = MultimodalLM(llm=llm, image_token_id=IMAGE).eval()
    monkeypatch.setattr(generate, "Lookup", lambda *_: pytest.fail("a draft was to be looked up"))
    batch = collate([Sample(torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.bool))], 0, "left")
    made = generate.stream_ids(model, batch, GenerationParams(max_new_tokens=30), [], VOCAB, prompt=torch.arange(30))
    assert len(list(made)) == 30


class Script:
    """A model that says what is written, whatever it reads."""

    def __init__(self, prompt: list[int], answer: list[int], most: int = 10**6) -> None:
        self.answer, self.at, self.read = answer, 0, []
        self.lookup = Lookup(self.pass_over, self, prompt, most)
        self.lookup(None)
        for token in answer:
            self.lookup(torch.tensor([token]))

    def pass_over(self, ids: torch.Tensor | None) -> torch.Tensor:
        self.read.append([] if ids is None else ids.tolist())
        return torch.zeros(max(1, len(self.read[-1])), 3)

    def crop(self, _positions: int) -> None:
        """As a cache does."""

    @property
    def drafts(self) -> list[list[int]]:
        return [ids[1:] for ids in self.read if len(ids) > 1]


def test_drafts_grow_while_they_are_right() -> None:
    text = list(range(100, 160))
    copied = Script(text, text)
    assert [len(draft) for draft in copied.drafts][:3] == [FEW, 2 * FEW, MOST]
    assert len(copied.read) < len(text) / 4


def test_no_draft_holds_media_or_goes_past_the_end() -> None:
    copied = Script([1, 2, 3, -1, 4, 5, 6, 7, 8, 9], [1, 2, 3, 0, 4, 5, 6, 7, 8, 9], most=8)
    assert copied.drafts == [[3], [6]]


def test_drafts_that_are_wrong_cost_little() -> None:
    pairs = [token for n in range(400) for token in (1, 2, 1000 + n)]  # 1, 2 goes on otherwise each time
    script = Script(pairs[:300], pairs[300:])
    wasted = PRICE * sum(map(len, script.drafts))
    assert 0 < wasted <= LOSS + SHARE * len(script.read)

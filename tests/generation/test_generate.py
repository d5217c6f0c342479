"""Generation: cached equals uncached, padded equals single, and media ids are never made."""

from __future__ import annotations

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from polymodal.generation.generate import generate_ids
from polymodal.generation.params import GenerationParams
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Sample, collate
from tests.generation.conftest import VOCAB


def prompt(ids: list[int]) -> Sample:
    return Sample(torch.tensor(ids), torch.zeros(len(ids), dtype=torch.bool))


def greedy_without_cache(model: MultimodalLM, ids: list[int], count: int) -> list[int]:
    made = list(ids)
    for _ in range(count):
        logits = model(torch.tensor([made])).logits[0, -1].clone()
        logits[model.image_token_id] = -torch.inf
        made.append(int(logits.argmax()))
    return made[len(ids) :]


def test_cached_equals_uncached(model: MultimodalLM) -> None:
    ids = [1, 5, 9, 2, 30]
    made = generate_ids(model, collate([prompt(ids)], 0, "left"), GenerationParams(max_new_tokens=12), [])
    assert made == [greedy_without_cache(model, ids, 12)]


def test_unequal_prompts_in_one_batch_equal_single_runs(model: MultimodalLM) -> None:
    prompts = [[1, 5, 9, 2, 30], [3], [8, 8, 8, 1, 2, 3, 4, 5, 6]]
    params = GenerationParams(max_new_tokens=10)
    together = generate_ids(model, collate([prompt(p) for p in prompts], 0, "left"), params, [])
    assert together == [greedy_without_cache(model, p, 10) for p in prompts]


def test_a_row_ends_at_its_stop_id_and_the_others_go_on(model: MultimodalLM) -> None:
    prompts = [[1, 5, 9, 2, 30], [3]]
    params = GenerationParams(max_new_tokens=10)
    free = generate_ids(model, collate([prompt(p) for p in prompts], 0, "left"), params, [])
    stop = next(i for i in free[0] if i not in free[1])
    stopped = generate_ids(model, collate([prompt(p) for p in prompts], 0, "left"), params, [stop])
    assert stopped[0] == free[0][: free[0].index(stop) + 1]
    assert stopped[1] == free[1]


@pytest.fixture(scope="module")
def learned() -> MultimodalLM:
    """A model with a table of 24 positions, past which there is nothing."""
    torch.manual_seed(0)
    llm = OPTForCausalLM(
        OPTConfig(vocab_size=VOCAB, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2,
                  num_attention_heads=2, max_position_embeddings=24)
    )  # fmt: skip
    llm.lm_head.weight.data.mul_(30)
    return MultimodalLM(llm=llm, image_token_id=7).eval()


def test_an_answer_ends_at_the_last_position(model: MultimodalLM, learned: MultimodalLM) -> None:
    params = GenerationParams(max_new_tokens=500)
    for made_for, most in ((model, 128), (learned, 24)):
        prompts = [[1, 5, 9, 2, 30], [3], [8, 8, 8, 1, 2, 3, 4, 5, 6]]
        together = generate_ids(made_for, collate([prompt(p) for p in prompts], 0, "left"), params, [])
        assert [len(made) for made in together] == [most - len(p) for p in prompts]
        for ids, made in zip(prompts, together, strict=True):
            assert generate_ids(made_for, collate([prompt(ids)], 0, "left"), params, []) == [made]
            assert made[:10] == greedy_without_cache(made_for, ids, 10)


def test_a_row_that_has_ended_takes_no_positions(learned: MultimodalLM) -> None:
    long, short = [8, 8, 8, 1, 2, 3, 4, 5, 6, 1, 1, 1], [3]
    params = GenerationParams(max_new_tokens=22)
    alone = [generate_ids(learned, collate([prompt(p)], 0, "left"), params, [])[0] for p in (long, short)]
    stop = next(i for i in alone[0] if i not in alone[1])
    together = generate_ids(learned, collate([prompt(long), prompt(short)], 0, "left"), params, [stop])
    assert together == [alone[0][: alone[0].index(stop) + 1], alone[1]]


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-300, 1e-6])
def test_a_temperature_near_0_takes_the_likeliest(model: MultimodalLM, temperature: float) -> None:
    batch = collate([prompt([1, 5, 9])], 0, "left")
    greedy = generate_ids(model, batch, GenerationParams(max_new_tokens=12), [])
    cold = GenerationParams(max_new_tokens=12, temperature=temperature, top_p=1e-45, top_k=10**30, seed=2**64 - 1)
    assert generate_ids(model, batch, cold, []) == greedy


def test_placeholder_and_ids_past_the_tokenizer_are_never_made(model: MultimodalLM) -> None:
    params = GenerationParams(max_new_tokens=60, temperature=50.0, seed=3)
    made = generate_ids(model, collate([prompt([1, 2])] * 4, 0, "left"), params, [], vocab_size=30)
    seen = {i for row in made for i in row}
    assert len(seen) > 20  # hot enough that everything allowed turns up
    assert 7 not in seen and max(seen) < 30


def test_same_seed_same_text_other_seed_other_text(model: MultimodalLM) -> None:
    def run(seed: int) -> list[list[int]]:
        params = GenerationParams(max_new_tokens=20, temperature=5.0, seed=seed)
        return generate_ids(model, collate([prompt([1, 2])], 0, "left"), params, [])

    assert run(1) == run(1) != run(2)

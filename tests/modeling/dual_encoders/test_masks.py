"""Who can see whom, on transformers' own Q-Former: whatever is masked has an influence of exactly 0.0."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polymodal.modeling.dual_encoders.blip2_stage1 import bidirectional_mask, unilm_mask, unimodal_mask

QUERIES, LENGTHS = 3, [6, 4, 1]
COUNT, TEXT = len(LENGTHS), max(LENGTHS)
REAL = torch.arange(TEXT)[None] < torch.tensor(LENGTHS)[:, None]


@pytest.fixture(scope="module")
def qformer() -> Any:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    torch.manual_seed(0)
    config = Blip2QFormerConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        encoder_hidden_size=12,
        cross_attention_frequency=2,
        use_qformer_text_input=True,
        initializer_range=0.3,
    )
    config._attn_implementation = "sdpa"
    return Blip2QFormerModel(config).eval()


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embedded queries and text, and the image."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((QUERIES, 16), (TEXT, 16), (5, 12))
    queries, text, image = (torch.randn(COUNT, *size, generator=generator) for size in sizes)
    return queries, text, image


def run(qformer: Any, embeds: torch.Tensor, queries: int, mask: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    found = qformer(embeds, query_length=queries, attention_mask=mask, encoder_hidden_states=image)
    return found.last_hidden_state


def influence(qformer: Any, mask: torch.Tensor, inputs: Any) -> torch.Tensor:
    """[b, row, column]: the largest gradient of a row's output for a column's input."""
    queries, text, image = inputs
    embeds = torch.cat([queries, text], dim=1).requires_grad_()
    # Not a plain sum: a LayerNorm's outputs sum to a constant.
    weights = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(2))
    outputs = run(qformer, embeds, QUERIES, mask, image) * weights
    rows = []
    for row in range(outputs.shape[1]):
        (gradient,) = torch.autograd.grad(outputs[:, row].sum(), embeds, retain_graph=True)
        rows.append(gradient.abs().amax(dim=-1))
    return torch.stack(rows, dim=1)


def allowed(kind: str, row: int, column: int, length: int) -> bool:
    """What the paper's figure 2 draws, for rows of queries and real text."""
    row_is_query, column_is_query = row < QUERIES, column < QUERIES
    if not column_is_query and column - QUERIES >= length:
        return False
    return {
        "bidirectional": True,
        "unimodal": row_is_query == column_is_query,
        "unilm": column_is_query or (not row_is_query and column <= row),
    }[kind]


MASKS = {"bidirectional": bidirectional_mask, "unimodal": unimodal_mask, "unilm": unilm_mask}


@pytest.mark.parametrize("kind", MASKS)
def test_what_is_masked_has_no_influence(qformer: Any, inputs: Any, kind: str) -> None:
    mask = MASKS[kind](REAL, QUERIES)
    assert mask.shape == (COUNT, 1, QUERIES + TEXT, QUERIES + TEXT) and mask.dtype is torch.bool
    assert torch.equal(mask, MASKS[kind](REAL.long(), QUERIES))
    found = influence(qformer, mask, inputs)
    seen = {True: 0, False: 0}
    for pair, length in enumerate(LENGTHS):
        for row in range(QUERIES + length):
            for column in range(QUERIES + TEXT):
                # Every row sees itself beside the mask, through the residual stream; the masks allow that anyway.
                may = allowed(kind, row, column, length)
                value = found[pair, row, column].item()
                assert (value > 0.0) if may else (value == 0.0), (kind, pair, row, column, value)
                seen[may] += 1
    assert min(seen.values()) > 20


@pytest.mark.parametrize("kind", ["unilm", "unimodal"])
def test_queries_are_what_they_are_alone(qformer: Any, inputs: Any, kind: str) -> None:
    """So one UniLM pass gives the contrastive image features too; and another text changes nothing at all."""
    queries, text, image = inputs
    mask = MASKS[kind](REAL, QUERIES)
    with torch.no_grad():
        both = run(qformer, torch.cat([queries, text], dim=1), QUERIES, mask, image)[:, :QUERIES]
        other = run(qformer, torch.cat([queries, -text], dim=1), QUERIES, mask, image)[:, :QUERIES]
        alone = run(qformer, queries, QUERIES, torch.ones(COUNT, QUERIES), image)
    assert (both - other).abs().max().item() == 0.0
    assert torch.allclose(both, alone, rtol=0, atol=5e-6)


def test_text_is_what_it_is_alone(qformer: Any, inputs: Any) -> None:
    queries, text, image = inputs
    with torch.no_grad():
        both = run(qformer, torch.cat([queries, text], 1), QUERIES, unimodal_mask(REAL, QUERIES), image)[:, QUERIES:]
        other = run(qformer, torch.cat([-queries, text], 1), QUERIES, unimodal_mask(REAL, QUERIES), image)
        alone = qformer(text, query_length=0, attention_mask=REAL.long()).last_hidden_state
        ours = qformer(text, query_length=0, attention_mask=unimodal_mask(REAL, 0)).last_hidden_state
    assert (both - other[:, QUERIES:])[REAL].abs().max().item() == 0.0
    assert torch.allclose(both[REAL], alone[REAL], rtol=0, atol=5e-6)
    assert torch.allclose(ours[REAL], alone[REAL], rtol=0, atol=5e-6)


def test_text_sees_no_later_token(qformer: Any, inputs: Any) -> None:
    queries, text, image = inputs
    mask = unilm_mask(torch.ones_like(REAL), QUERIES)
    with torch.no_grad():
        before = run(qformer, torch.cat([queries, text], dim=1), QUERIES, mask, image)
        for place in range(1, TEXT):
            changed = text.clone()
            changed[:, place:] = 7.0
            after = run(qformer, torch.cat([queries, changed], dim=1), QUERIES, mask, image)
            assert (after - before)[:, : QUERIES + place].abs().max().item() == 0.0
            assert (after - before)[:, QUERIES + place].abs().max().item() > 0.0


def test_the_joint_pass_is_transformers_own(qformer: Any, inputs: Any) -> None:
    """With the 2-D mask of `Blip2ForImageTextRetrieval`: ones for the queries, then the text's."""
    queries, text, image = inputs
    embeds, flat = torch.cat([queries, text], dim=1), torch.cat([torch.ones(COUNT, QUERIES), REAL], dim=1)
    with torch.no_grad():
        expected = run(qformer, embeds, QUERIES, flat, image)
        ours = run(qformer, embeds, QUERIES, bidirectional_mask(REAL, QUERIES), image)
    assert torch.equal(ours, expected)


def test_an_empty_text_is_a_number(qformer: Any, inputs: Any) -> None:
    _, text, _ = inputs
    nothing = torch.zeros_like(REAL)
    with torch.no_grad():
        found = qformer(text, query_length=0, attention_mask=unimodal_mask(nothing, 0)).last_hidden_state
    assert found.isfinite().all()

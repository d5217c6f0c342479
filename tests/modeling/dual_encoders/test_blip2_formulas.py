"""Stage 1 of BLIP-2 against its losses from the paper, as LAVIS computes them, in float64 and sharing no code.

Four passes: the queries alone, the text alone, matching, and captioning on the keys and values that the pass over the
queries left. Weights are looked up by our names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

Make = Callable[..., Any]
Weights = dict[str, Tensor]
Past = list[tuple[Tensor, Tensor]]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, allowed: Tensor | None) -> Tensor:
    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

    scores = split(q) @ split(k).transpose(-1, -2) / math.sqrt(q.shape[-1] // heads)
    if allowed is not None:
        scores = scores + (1 - allowed.double())[:, None] * -1e9
    return (scores.softmax(-1) @ split(v)).transpose(1, 2).flatten(2)


def bert(
    w: Weights, c: Any, x: Tensor, queries: int, vision: Tensor | None, allowed: Tensor, past: Past | None = None
) -> tuple[Tensor, Past]:
    """Run [queries; text]; `allowed` is [B, L, past + L]. Returns hidden states, and keys and values of each layer."""
    x = norm(w, "transformer.layernorm", x, c.layer_norm_eps)
    kept: Past = []
    for number in range(c.num_hidden_layers):
        layer, eps = f"transformer.encoder.layer.{number}", c.layer_norm_eps

        def residual(part: str, inside: Tensor, before: Tensor, layer: str = layer, eps: float = eps) -> Tensor:
            return norm(w, f"{layer}.{part}.LayerNorm", linear(w, f"{layer}.{part}.dense", inside) + before, eps)

        k, v = linear(w, f"{layer}.attention.attention.key", x), linear(w, f"{layer}.attention.attention.value", x)
        if past is not None:
            k, v = torch.cat([past[number][0], k], 1), torch.cat([past[number][1], v], 1)
        kept.append((k, v))
        q = linear(w, f"{layer}.attention.attention.query", x)
        x = residual("attention.output", attend(q, k, v, c.num_attention_heads, allowed), x)
        seeing, text = x[:, :queries], x[:, queries:]
        if queries:
            if number % c.cross_attention_frequency == 0:
                assert vision is not None
                across = f"{layer}.crossattention.attention"
                q, k, v = (
                    linear(w, f"{across}.query", seeing),
                    linear(w, f"{across}.key", vision),
                    linear(w, f"{across}.value", vision),
                )
                seeing = residual("crossattention.output", attend(q, k, v, c.num_attention_heads, None), seeing)
            inside = F.gelu(linear(w, f"{layer}.intermediate_query.dense", seeing))
            seeing = residual("output_query", inside, seeing)
        if text.shape[1]:
            text = residual("output", F.gelu(linear(w, f"{layer}.intermediate.dense", text)), text)
        x = torch.cat([seeing, text], 1)
    return x, kept


def stage1(
    w: Weights,
    c: Any,
    features: Tensor,
    ids: Tensor,
    mask: Tensor,
    image_ids: Tensor,
    dec: int,
    images: Tensor,
    texts: Tensor,
) -> dict[str, Tensor]:
    """The three losses.

    Args:
        w: All weights in float64, those of the Q-Former without "qformer.".
        c: The Q-Former's settings.
        features: [B, P, E].
        ids: [B, T].
        mask: [B, T] bool.
        image_ids: [B].
        dec: The id of [DEC].
        images: [B] negative image of each text.
        texts: [B] negative text of each image.
    """
    size, length = ids.shape
    vision = norm(w, "ln_vision", features, c.vision_norm_eps)
    queries = w["query_tokens"].expand(size, -1, -1)
    count = queries.shape[1]

    def words(tokens: Tensor) -> Tensor:
        places = w["embeddings.position_embeddings.weight"][:length]
        return w["embeddings.word_embeddings.weight"][tokens] + places

    # Contrast: queries alone, text alone.
    seen, past = bert(w, c, queries, count, vision, torch.ones(size, count, count))
    read, _ = bert(w, c, words(ids), 0, None, mask[:, None].expand(-1, length, -1))
    image = F.normalize(linear(w, "vision_projection", seen), dim=-1)
    text = F.normalize(linear(w, "text_projection", read[:, 0]), dim=-1)
    by_query = torch.stack([image[:, q] @ text.T for q in range(count)])  # [Q, images, texts]
    close = by_query.amax(0) / w["temperature"]
    same = (image_ids[:, None] == image_ids[None]).double()
    wanted = 0.9 * same / same.sum(1, keepdim=True) + 0.1 / size
    itc = -((close.log_softmax(1) * wanted).sum(1).mean() + (close.T.log_softmax(1) * wanted).sum(1).mean()) / 2

    # Matching: the pairs, negative images, negative texts.
    def matches(which_image: Tensor, which_text: Tensor) -> Tensor:
        x = torch.cat([queries, words(ids[which_text])], 1)
        seen_by_all = torch.cat([torch.ones(size, count), mask[which_text].double()], 1)
        allowed = seen_by_all[:, None].expand(-1, count + length, -1)
        hidden, _ = bert(w, c, x, count, vision[which_image], allowed)
        return linear(w, "itm_head", hidden[:, :count]).mean(1)

    own = torch.arange(size)
    logits = torch.cat([matches(own, own), matches(images, own), matches(own, texts)]).log_softmax(1)
    itm = -(logits[:size, 1].sum() + logits[size:, 0].sum()) / (3 * size)

    # Captioning, on the keys and values of the queries' own pass.
    decoder = ids.clone()
    decoder[:, 0] = dec
    allowed = torch.cat([torch.ones(size, length, count), torch.ones(length, length).tril() * mask[:, None]], 2)
    said, _ = bert(w, c, words(decoder), 0, None, allowed, past)
    said = norm(w, "lm_head.norm", F.gelu(linear(w, "lm_head.dense", said)), c.layer_norm_eps)
    chances = (said @ w["embeddings.word_embeddings.weight"].T + w["lm_head.bias"]).log_softmax(-1)
    losses = []
    for row in range(size):
        for place in range(length - 1):
            if mask[row, place + 1]:
                line = chances[row, place]
                losses.append(-0.9 * line[decoder[row, place + 1]] - 0.1 * line.mean())
    return {"itc": itc, "itm": itm, "itg": torch.stack(losses).mean()}


@pytest.mark.parametrize("ids", [None, [0, 1, 2, 0, 4, 1]], ids=["own images", "shared images"])
def test_it_is_the_four_passes_of_the_reference_in_float64(
    ids: list[int] | None, blip2_model: Make, blip2_batch: Make, blip2_step: Make
) -> None:
    model = blip2_model()
    batch = blip2_batch(model, ids=ids)
    terms, everyone = blip2_step(model, batch)
    images, texts = model.negatives(everyone, 6)
    assert images[:6].tolist() == texts[:6].tolist() == texts[6:12].tolist() == images[12:].tolist() == [*range(6)]
    weights = {
        name.removeprefix("qformer."): p.detach().double().requires_grad_(p.requires_grad)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert everyone.features is not None
    wanted = stage1(
        weights,
        model.qformer.config,
        everyone.features.double(),
        batch.input_ids,
        batch.attention_mask,
        batch.image_ids,
        model.tokenizer.bos_token_id,
        images[6:12],
        texts[12:],
    )
    for name, value in wanted.items():
        assert abs(float(terms[name]) - float(value.detach())) <= 1e-5, name
    sum(wanted.values(), torch.zeros((), dtype=torch.float64)).backward()
    reference = {name: w.grad for name, w in weights.items() if w.grad is not None}
    own = {name.removeprefix("qformer."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(reference) == set(weights)  # every weight is reached by some loss
    scale = max(float(gradient.abs().max()) for gradient in reference.values())
    for name, gradient in reference.items():
        assert (own[name].double() - gradient).abs().max() <= 1e-5 * max(scale, 1.0), name

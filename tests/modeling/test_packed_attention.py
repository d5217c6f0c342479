"""Packed = unpacked, on tiny random models of several architectures: values, gradients, and nothing leaks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from polymodal.errors import ConfigError
from polymodal.modeling import packed_attention as attention
from polymodal.modeling.packed_attention import MASK, POSITIONS, SEGMENTS, Segments, segment_attention, segment_mask
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Sample, collate, collate_packed

VOCAB = 61
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
GQA = {**COMMON, "num_key_value_heads": 2}

MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", GQA, SEGMENTS),
    "llama-eager": ("Llama", {**GQA, "attn_implementation": "eager"}, SEGMENTS),
    "smollm2": ("Llama", {**COMMON, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24,
                          "tie_word_embeddings": True}, SEGMENTS),
    "smollm3": ("SmolLM3", {**GQA, "no_rope_layers": [1, 0]}, SEGMENTS),
    "qwen2": ("Qwen2", GQA, SEGMENTS),
    "mistral-window": ("Mistral", {**GQA, "sliding_window": 6, "head_dim": 8}, SEGMENTS),
    "gemma2": ("Gemma2", {**GQA, "head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 2.0,
                          "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}, SEGMENTS),
    "qwen3": ("Qwen3", {**GQA, "head_dim": 8}, SEGMENTS),
    "granite": ("Granite", GQA, SEGMENTS),
    "gpt-neox": ("GPTNeoX", COMMON, SEGMENTS),
    "opt": ("OPT", {**{k: v for k, v in COMMON.items() if k not in ("intermediate_size", "initializer_range")},
                    "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3, "dropout": 0.0}, SEGMENTS),
    "gpt2": ("GPT2", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
                      "initializer_range": 0.3, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, SEGMENTS),
    "gpt-neo": ("GPTNeo", {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 6,
                           "max_position_embeddings": 128, "attention_types": [[["global", "local"], 1]],
                           "initializer_range": 0.3, "resid_dropout": 0.0, "embed_dropout": 0.0,
                           "attention_dropout": 0.0}, POSITIONS),
}  # fmt: skip
"""Name -> (class prefix, configuration, the way that it should go)."""


def test_ten_architectures_are_tried() -> None:
    assert len({prefix for prefix, *_ in MODELS.values()}) >= 10


def make(name: str) -> MultimodalLM:
    """A tiny random model by name."""
    prefix, values, _ = MODELS[name]
    values = dict(values)
    attention = values.pop("attn_implementation", None)
    config = getattr(transformers, f"{prefix}Config")(**values)
    if attention is not None:
        config._attn_implementation = attention
    torch.manual_seed(0)
    return MultimodalLM(llm=transformers.AutoModelForCausalLM.from_config(config), image_token_id=VOCAB)


def samples(seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in (9, 2, 17, 5):
        mask = torch.rand(length, generator=generator) < 0.5
        mask[-1] = True
        found.append(Sample(torch.randint(1, VOCAB, (length,), generator=generator), mask))
    return found


def gradients(model: MultimodalLM) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def run(model: MultimodalLM, members: list[Sample], packed: bool) -> Any:
    batch = collate_packed(members) if packed else collate(members, pad_id=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(**batch.inputs())
    out.loss_sum.backward()
    return out


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_unpacked(name: str) -> None:
    model = make(name).double().train()  # what two ways round differently is then far below the tolerance
    apart = run(model, samples(), packed=False)
    expected = gradients(model)
    together = run(model, samples(), packed=True)
    assert model.prepare_packing() == MODELS[name][2]
    assert together.num_targets == apart.num_targets == len(together.losses)
    assert together.loss_sum.item() == pytest.approx(apart.loss_sum.item(), rel=1e-5)
    assert torch.allclose(together.losses, apart.losses, rtol=1e-5, atol=1e-5)
    assert together.losses.sum().item() == pytest.approx(together.loss_sum.item(), rel=1e-6)
    found = gradients(model)
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        assert torch.allclose(found[key], gradient, rtol=1e-5, atol=1e-6 * largest), key


@pytest.mark.parametrize("name", MODELS)
def test_nothing_leaks_from_sample_to_sample(name: str) -> None:
    model = make(name).eval()
    before = samples()
    after = [*before]
    after[0] = Sample(before[0].input_ids.flip(0) % (VOCAB - 1) + 1, before[0].loss_mask)
    after[2] = Sample(before[2].input_ids.flip(0) % (VOCAB - 1) + 1, before[2].loss_mask)
    counts = [int(sample.loss_mask[1:].sum()) for sample in before]
    one, two = (run(model, members, packed=True).losses.split(counts) for members in (before, after))
    assert not torch.equal(one[0], two[0]) and not torch.equal(one[2], two[2])
    assert (one[1] - two[1]).abs().max() == 0.0 and (one[3] - two[3]).abs().max() == 0.0


@pytest.mark.parametrize("name", ["llama", "llama-eager", "gemma2", "opt"])
def test_what_is_not_packed_goes_as_before(name: str) -> None:
    model, fresh = make(name).eval(), make(name).eval()
    run(model, samples(), packed=True)
    for side in ("right", "left"):
        batch = collate(samples(), pad_id=0, side=side)
        with torch.no_grad():
            ours, theirs = (m(batch.input_ids, batch.attention_mask).logits for m in (model, fresh))
        assert torch.equal(ours, theirs)
    prompt = samples()[2].input_ids[None]
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.llm.generate(prompt, **settings), fresh.llm.generate(prompt, **settings))
    assert model.llm.config.to_json_string() == fresh.llm.config.to_json_string()


def test_a_block_mask_is_the_last_resort_and_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama").eval()
    expected = run(model, samples(), packed=False).loss_sum.item()
    forward = model.llm.forward

    def stubborn(
        inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None, use_cache: bool = False, **rest: Any
    ) -> Any:
        if "segments" in rest or ("position_ids" in rest and attention_mask is None):
            raise TypeError("unexpected keyword argument")
        return forward(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=use_cache, **rest)

    monkeypatch.setattr(model.llm, "forward", stubborn)
    with pytest.warns(UserWarning, match="LlamaForCausalLM does not take another attention") as said:
        for _ in range(2):
            out = model(**collate_packed(samples()).inputs())
    assert model.prepare_packing() == MASK and len(said) == 1
    assert out.loss_sum.item() == pytest.approx(expected, rel=1e-5)


def test_a_model_with_a_running_state_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = MultimodalLM(llm=transformers.MambaForCausalLM(config), image_token_id=VOCAB).eval()
    with pytest.raises(ConfigError, match=r"batch.packing: MambaForCausalLM cannot keep packed samples apart"):
        model(**collate_packed(samples()).inputs())


def test_segments_that_do_not_fit_the_row_are_refused() -> None:
    batch = collate_packed(samples())
    with pytest.raises(ConfigError, match="segments of 12 tokens in all do not fit a batch"):
        make("llama")(batch.input_ids, segments=(5, 7))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_attention_itself_equals_masked_attention(window: int | None, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (1, 6, 2, 8)
    query = torch.randn(1, 4, 17, 8, generator=generator)
    key, value = (torch.randn(1, 2, 17, 8, generator=generator) for _ in range(2))
    got = segment_attention(query, key, value, Segments(lengths), 0.4, sliding_window=window, softcap=softcap)
    keys, values = (part.repeat_interleave(2, dim=1) for part in (key, value))
    scores = query @ keys.transpose(2, 3) * 0.4
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    allowed = segment_mask(lengths, "cpu")
    if window is not None:
        place = torch.arange(17)
        allowed = allowed & (place[:, None] - place[None, :] < window)
    expected = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ values
    assert torch.allclose(got, expected.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("scaling", [None, 0.4])
def test_in_training_a_cpu_attends_by_products(scaling: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of the fused kernel, which a long segment still goes to; in autocast its dtype."""
    monkeypatch.setattr(attention, "BLOCK", 4)
    monkeypatch.setattr(attention, "SHORT", 9)
    fused, asked = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *a, **k: asked.append(q.shape[2]) or fused(q, *a, **k)
    )
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(1, heads, 28, 8, generator=generator, requires_grad=True) for heads in (6, 2, 2)]
    segments = Segments((9, 1, 12, 6))
    got = segment_attention(*sides, segments, scaling)
    assert asked == [12] and got.shape == (1, 28, 6, 8)
    gradients = torch.autograd.grad(got.square().sum(), sides)
    monkeypatch.setattr(attention, "SHORT", 0)
    expected = segment_attention(*sides, segments, scaling)
    wanted = torch.autograd.grad(expected.square().sum(), sides)
    assert asked[1:] == [9, 1, 12, 6] and torch.allclose(got, expected, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, wanted, strict=True))
    monkeypatch.setattr(attention, "SHORT", 12)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = segment_attention(*sides, segments, scaling)
    assert rounded.dtype is torch.bfloat16 and torch.allclose(rounded.float(), expected, atol=0.05)
    with torch.no_grad():
        segment_attention(*sides, segments, scaling)
    assert asked[5:] == [9, 1, 12, 6]


@pytest.mark.parametrize("name", ["llama", "llama-eager", "gemma2", "opt"])
def test_rows_with_padding_attend_by_products_in_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses and gradients as by the usual attention, where causal attention is all that is asked for."""
    asked = []
    by_products = attention._by_products
    monkeypatch.setattr(attention, "_by_products", lambda q, *a: asked.append(len(q)) or by_products(q, *a))
    model, fresh = make(name).train(), make(name).train()
    run(model, samples(), packed=True)
    model.zero_grad(set_to_none=True)
    asked.clear()
    ours, theirs = (run(each, samples(), packed=False) for each in (model, fresh))
    # Gemma 2 caps its scores; its own eager attention is given a mask.
    assert set(asked) == ({len(samples())} if name in ("llama", "opt") else set())
    assert torch.allclose(ours.losses, theirs.losses, atol=1e-5)
    wanted = gradients(fresh)
    assert all(torch.allclose(mine, wanted[name], atol=1e-4) for name, mine in gradients(model).items())


@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_gets_what_its_documentation_asks_for(window: int | None) -> None:
    """A stand-in with the documented meaning of `torch.nn.attention.varlen.varlen_attn`, which runs on CUDA only."""

    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
        max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
    ) -> torch.Tensor:  # fmt: skip
        assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32 and enable_gqa
        assert max_q == max_k == int(cu_seq_q.diff().max())
        pieces = []
        for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
            q, k, v = query[start:end], key[start:end], value[start:end]
            k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
            back = torch.arange(end - start)[:, None] - torch.arange(end - start)[None, :]
            seen = (back >= -window_size[1]) & ((back <= window_size[0]) if window_size[0] >= 0 else back >= -1000)
            scores = torch.einsum("qhd,khd->hqk", q, k) * scale
            pieces.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
        return torch.cat(pieces)

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 17, 8, generator=generator)
    key, value = (torch.randn(1, 2, 17, 8, generator=generator) for _ in range(2))
    segments = Segments((1, 6, 2, 8))
    got = attention._by_kernel(kernel, query, key, value, segments, 0.4, window)
    expected = segment_attention(query, key, value, segments, 0.4, sliding_window=window)
    assert got.shape == expected.shape and torch.allclose(got, expected, atol=1e-6)
    assert segments.offsets(torch.device("cpu")) is segments.offsets(torch.device("cpu"))


def test_this_torch_has_the_kernel_with_the_options_that_are_used() -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    assert attention._varlen_kernel() is not None

"""The loss in chunks equals the plain one, in value and gradient, whatever a model does around its head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from polymodal.errors import ConfigError
from polymodal.modeling.token_loss import chunk_rows, chunked_losses, fits, knows_head, token_losses
from polymodal.modeling.vlm import MultimodalLM

VOCAB = 53
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "untied": LlamaConfig(**SHAPE),
    "soft cap": Gemma2Config(**SHAPE, final_logit_softcapping=3.0),
    "scale": CohereConfig(**{k: v for k, v in SHAPE.items() if k != "head_dim"}, logit_scale=0.25),
    "divisor": GraniteConfig(**{k: v for k, v in SHAPE.items() if k != "head_dim"}, logits_scaling=3.0),
}


def make(name: str) -> MultimodalLM:
    torch.manual_seed(0)
    return MultimodalLM(llm=AutoModelForCausalLM.from_config(CONFIGS[name]), image_token_id=VOCAB).eval()


def run(model: MultimodalLM) -> tuple[Any, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, 20), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.6, ids, -100)
    out = model(ids, labels=labels)
    (out.loss_sum * 0.37).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out, found


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("frozen_head", [False, True])
def test_chunks_give_the_same_loss_and_gradient(name: str, frozen_head: bool) -> None:
    model = make(name)
    model.llm.get_output_embeddings().weight.requires_grad_(not frozen_head)
    plain, expected = run(model)
    model.logits_budget = 8 * VOCAB * 7  # seven positions at a time
    for _ in range(2):  # the first time also looks at what the model does after its head
        chunked, found = run(model)
        assert chunked.logits is None and plain.logits is not None
        assert chunked.num_targets == plain.num_targets and torch.equal(chunked.targets, plain.targets)
        assert chunked.loss_sum.item() == pytest.approx(plain.loss_sum.item(), rel=1e-6)
        assert torch.allclose(chunked.losses, plain.losses, atol=1e-6)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            assert torch.allclose(found[key], gradient, rtol=1e-5, atol=1e-6), key


def test_without_gradients_there_is_still_a_loss() -> None:
    model = make("untied")
    plain, _ = run(model)
    model.logits_budget = 8 * VOCAB
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, 20), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.6, ids, -100)
    with torch.no_grad():
        out = model(ids, labels=labels)
    assert out.logits is None and not out.loss_sum.requires_grad
    assert torch.allclose(out.losses, plain.losses, atol=1e-6)


def test_a_model_that_changes_its_logits_in_its_own_way_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("untied")
    forward = model.llm.forward

    def bent(**kwargs: Any) -> Any:
        out = forward(**kwargs)
        out.logits = out.logits.sin()
        return out

    monkeypatch.setattr(model.llm, "forward", bent)
    plain, expected = run(model)
    model.logits_budget = 8 * VOCAB
    kept, found = run(model)
    assert kept.logits is not None and torch.equal(kept.losses, plain.losses)
    assert all(torch.equal(found[key], gradient) for key, gradient in expected.items())


@pytest.mark.parametrize("chunk", [1, 4, 10, 99])
def test_a_head_of_any_kind_in_double_precision(chunk: int) -> None:
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 11)).double()
    hidden, targets = torch.randn(10, 6, dtype=torch.float64, requires_grad=True), torch.randint(0, 11, (10,))
    loss_sum, losses = chunked_losses(hidden, targets, head, list(head.parameters()), chunk)
    wanted = [hidden, *head.parameters()]
    found = torch.autograd.grad(loss_sum, wanted)
    plain = F.cross_entropy(head(hidden), targets, reduction="none")
    assert torch.allclose(losses.double(), plain, atol=1e-6) and not losses.requires_grad
    for got, reference in zip(found, torch.autograd.grad(plain.sum(), wanted), strict=True):
        assert torch.allclose(got, reference, rtol=1e-5, atol=1e-6)


def test_the_budget_decides() -> None:
    cpu = torch.device("cpu")
    assert fits(1000, 49152, cpu) and not fits(2000, 49152, cpu)
    assert chunk_rows(49152, cpu) * 49152 * 8 <= 256 * 2**20 < (chunk_rows(49152, cpu) + 1) * 49152 * 8
    assert chunk_rows(10**9, cpu) == 1
    logits, targets = torch.randn(4, 7), torch.tensor([1, 2, 3, 4])
    assert torch.equal(token_losses(logits, targets), F.cross_entropy(logits, targets, reduction="none"))


def test_a_model_without_a_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("untied")
    monkeypatch.setattr(model.llm, "get_output_embeddings", lambda: None)
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no output head"):
        knows_head(model.llm)
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no output head"):
        run(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_half_precision_logits_is_taken_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(40, 3000, generator=generator) * 4).to(dtype).requires_grad_()
    targets = torch.randint(3000, (40,), generator=generator)
    found = token_losses(logits, targets)
    assert found.dtype is torch.float32
    assert torch.allclose(found.double(), F.cross_entropy(logits.double(), targets, reduction="none"), atol=1e-4)
    hidden = torch.eye(40, dtype=dtype)
    total, losses = chunked_losses(hidden, targets, lambda rows: rows @ logits.detach(), [], 7)
    assert torch.allclose(losses, found, atol=1e-4) and total.item() == pytest.approx(found.sum().item(), rel=1e-5)

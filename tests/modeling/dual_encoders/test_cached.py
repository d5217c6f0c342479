"""The cached-feature method against one pass over everything: the same gradient, also with dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from polymodal.modeling.dual_encoders.gradient_cache import cached_backward
from polymodal.modeling.dual_encoders.losses import clip_loss

WIDTH = 6
Item = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Towers(nn.Module):
    """Two encoders with dropout, a temperature, and a head for a term of each micro-batch, with dropout too."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(4, WIDTH), nn.Dropout(dropout), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.text = nn.Sequential(nn.Linear(3, WIDTH), nn.Dropout(dropout))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(WIDTH, 1))
        self.embedded = 0
        self.double()

    def embed(self, item: Item) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        self.embedded += 1
        hidden = self.image(item[0])
        return [F.normalize(hidden, dim=-1), F.normalize(self.text(item[1]), dim=-1), item[2]], {"hidden": hidden}

    def contrast(self, image: torch.Tensor, text: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        assert ids.dtype is torch.int64 and not ids.requires_grad
        nearest = (image @ text.T).argmax(1)
        right = (nearest == torch.arange(len(image), device=image.device)).double().mean()
        return {"clip": clip_loss(image, text, self.scale, image, text, 0, ids, ids), "metric/right": right}

    def extra(self, start: int, item: Item, tensors: Any, carry: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        said = self.head(carry["hidden"] * tensors[1])[:, 0]
        # The target depends on the place in the step, so a wrong `start` would show.
        wanted = torch.arange(start, start + len(said), dtype=said.dtype, device=said.device)
        term = ((said - wanted) ** 2).sum() / 8
        # A metric has a gradient here, that must not be used.
        return {"match": term, "metric/size": term - term.detach() + len(said)}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def pairs(split: list[int]) -> list[Item]:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(8, width, generator=generator, dtype=torch.float64) for width in (4, 3))
    ids = torch.tensor([0, 1, 2, 0, 4, 5, 1, 7])
    return list(zip(image.split(split), text.split(split), ids.split(split), strict=True))


def in_one_pass(model: Towers, items: list[Item]) -> dict[str, torch.Tensor]:
    """Everything in one graph, in the order in which random numbers are drawn: embed, contrast, then the rest."""
    embedded = [model.embed(item) for item in items]
    terms = model.contrast(*(torch.cat(parts) for parts in zip(*(tensors for tensors, _ in embedded), strict=True)))
    start = 0
    for item, (tensors, carry) in zip(items, embedded, strict=True):
        for name, term in model.extra(start, item, tensors, carry).items():
            terms[name] = terms.get(name, 0) + term / (len(items) if name == "metric/size" else 1)
        start += len(item[0])
    (terms["clip"] + terms["match"]).backward()
    return terms


@pytest.mark.parametrize("split", [[8], [4, 4], [3, 3, 2], [1] * 8])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_is_that_of_one_pass(split: list[int], dropout: float) -> None:
    found = []
    for method in (in_one_pass, lambda model, items: cached_backward(model.embed, model.contrast, model.extra, items)):
        torch.manual_seed(3)
        model = Towers(dropout)
        terms = method(model, pairs(split))
        found.append((terms, gradients(model), torch.get_rng_state()))
    (terms, expected, random), (cached, ours, random_after) = found
    assert terms.keys() == cached.keys() == {"clip", "match", "metric/right", "metric/size"}
    for name, value in cached.items():
        assert not value.requires_grad and value.item() == pytest.approx(terms[name].item(), rel=1e-12)
    assert ours.keys() == expected.keys() == dict(Towers(0.0).named_parameters()).keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-4
        assert torch.allclose(ours[name], gradient, rtol=0, atol=1e-12), name
    # What comes after the step draws what it would have drawn.
    assert torch.equal(random, random_after)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradient_is_that_of_one_pass_on_a_gpu() -> None:
    """Whose dropout draws from a generator of its own."""
    items = [tuple(tensor.cuda() for tensor in item) for item in pairs([3, 3, 2])]
    found = []
    for method in (in_one_pass, lambda model, items: cached_backward(model.embed, model.contrast, model.extra, items)):
        torch.manual_seed(3)
        model = Towers(0.5).cuda()
        method(model, items)
        found.append((gradients(model), torch.cuda.get_rng_state()))
    (expected, random), (ours, random_after) = found
    assert all(torch.allclose(ours[name], expected[name], rtol=0, atol=1e-9) for name in expected)
    assert torch.equal(random, random_after)


def test_split_makes_no_difference_without_dropout() -> None:
    found = []
    for split in ([8], [3, 3, 2]):
        torch.manual_seed(3)
        model = Towers(0.0)
        cached_backward(model.embed, model.contrast, model.extra, pairs(split))
        found.append(gradients(model))
    assert all(torch.allclose(found[0][name], found[1][name], rtol=0, atol=1e-12) for name in found[0])


@pytest.mark.parametrize(("split", "passes"), [([8], 1), ([4, 4], 3), ([2, 2, 2, 2], 7)])
def test_first_micro_batch_is_embedded_once(split: list[int], passes: int) -> None:
    model = Towers(0.0)
    cached_backward(model.embed, model.contrast, model.extra, pairs(split))
    assert model.embedded == passes


def test_gradients_add_up_and_terms_may_be_missing() -> None:
    model = Towers(0.0)
    items = pairs([4, 4])
    terms = cached_backward(model.embed, model.contrast, lambda *_: {}, items)
    assert terms.keys() == {"clip", "metric/right"}
    once = gradients(model)
    assert not any(name.startswith("head") for name in once)
    cached_backward(model.embed, model.contrast, lambda *_: {}, items)
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, 2 * once[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("frozen", ["text", "image"])
def test_frozen_tower(frozen: str) -> None:
    """Locked-image tuning: a tower without gradient takes part, and the other's gradient is as in one pass."""
    found = []
    for method in (in_one_pass, lambda model, items: cached_backward(model.embed, model.contrast, model.extra, items)):
        torch.manual_seed(3)
        model = Towers(0.5)
        getattr(model, frozen).requires_grad_(False)
        method(model, pairs([3, 3, 2]))
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() and not any(name.startswith(frozen) for name in found[0])
    assert all(torch.allclose(found[0][name], found[1][name], rtol=0, atol=1e-12) for name in found[0])


def test_autocast_around_the_whole_step() -> None:
    """Weights that autocast keeps from the pass without gradient get their gradient in the other one."""

    def trained(run: Callable[[Towers], Any]) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model = Towers(0.0).float()
        with torch.autocast("cpu", torch.bfloat16):
            run(model)
        return gradients(model)

    items = [(image.float(), text.float(), ids) for image, text, ids in pairs([3, 3, 2])]
    expected = trained(lambda model: in_one_pass(model, items))
    ours = trained(lambda model: cached_backward(model.embed, model.contrast, model.extra, items))
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(ours[name], gradient, rtol=0.05, atol=0.02 * gradient.abs().max().item()), name


def test_an_error_in_embedding_leaves_torchs_random_numbers_in_order() -> None:
    model, items = Towers(0.5), pairs([4, 4])

    def fails_the_second_time(item: Item) -> Any:
        found = model.embed(item)
        if model.embedded == 3:
            raise RuntimeError("out of memory")
        return found

    torch.manual_seed(0)
    states: list[torch.Tensor] = []

    def contrast(*tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        states.append(torch.get_rng_state())
        return model.contrast(*tensors)

    with pytest.raises(RuntimeError, match="out of memory"):
        cached_backward(fails_the_second_time, contrast, lambda *_: {}, items)
    assert torch.equal(torch.get_rng_state(), states[0])

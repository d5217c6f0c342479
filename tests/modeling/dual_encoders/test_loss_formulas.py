"""Every loss against its paper's formula, written out here in plain Python with loops; gradients by differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from polymodal.errors import ConfigError
from polymodal.modeling.dual_encoders.losses import (
    IGNORED,
    clamp_logit_scale,
    clip_loss,
    itc_loss,
    itg_count,
    itg_loss,
    itg_targets,
    itm_loss,
    pair_ids,
    right_pairs,
    siglip_loss,
)

Nested = Any  # a number, or nested lists of them
Formula = Callable[..., float]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def log_softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [x - math.log(total) for x in row]


def entropy(rows: Nested, targets: Nested) -> float:
    """Mean over rows of -sum of target * log probability."""
    return -sum(dot(target, log_softmax(row)) for row, target in zip(rows, targets, strict=True)) / len(rows)


def soft_targets(ids: list[int], smoothing: float) -> Nested:
    """With smoothing 0.1: 0.9 equally over the pairs of the row's image, and 0.1 over all."""
    return [[(1 - smoothing) * (own == other) / ids.count(own) + smoothing / len(ids) for other in ids] for own in ids]


def clip_formula(ids: list[int], smoothing: float, image: Nested, text: Nested, logit_scale: float) -> float:
    rows = [[math.exp(logit_scale) * dot(i, t) for t in text] for i in image]
    targets = soft_targets(ids, smoothing)
    return (entropy(rows, targets) + entropy([list(column) for column in zip(*rows)], targets)) / 2


def siglip_formula(ids: list[int], image: Nested, text: Nested, logit_scale: float, logit_bias: float) -> float:
    total = 0.0
    for own, row in zip(ids, image, strict=True):
        for other, words in zip(ids, text, strict=True):
            logit = math.exp(logit_scale) * dot(row, words) + logit_bias
            total -= math.log(1 / (1 + math.exp(-logit if own == other else logit)))
    return total / len(image)


def itc_formula(ids: list[int], smoothing: float, image: Nested, text: Nested, temperature: float) -> float:
    close = [[max(dot(query, t) for query in queries) / temperature for t in text] for queries in image]
    targets = soft_targets(ids, smoothing)
    return (entropy(close, targets) + entropy([list(column) for column in zip(*close)], targets)) / 2


def itm_formula(logits: Nested) -> float:
    total = 0.0
    for number, queries in enumerate(logits):
        mean = [sum(query[c] for query in queries) / len(queries) for c in (0, 1)]
        total -= log_softmax(mean)[1 if number < len(logits) // 3 else 0]
    return total / len(logits)


def itg_formula(tokens: list[list[int]], lengths: list[int], logits: Nested) -> float:
    losses = []
    for row, ids, length in zip(logits, tokens, lengths, strict=True):
        for t in range(length - 1):
            log = log_softmax(row[t])
            losses.append(-0.9 * log[ids[t + 1]] - 0.1 * sum(log) / len(log))
    return sum(losses) / len(losses)


def differences(formula: Formula, arguments: list[torch.Tensor], step: float = 1e-6) -> list[torch.Tensor]:
    """The formula's gradient for each argument, by central differences."""
    found = []
    for which, argument in enumerate(arguments):
        gradient = torch.zeros_like(argument).flatten()
        for place in range(argument.numel()):
            values = []
            for sign in (1, -1):
                moved = [other.clone() for other in arguments]
                moved[which].view(-1)[place] += sign * step
                values.append(formula(*(other.tolist() for other in moved)))
            gradient[place] = (values[0] - values[1]) / (2 * step)
        found.append(gradient.view_as(argument))
    return found


def assert_is(ours: Callable[..., torch.Tensor], formula: Formula, arguments: list[torch.Tensor]) -> None:
    """Value and gradients of ours are the formula's, in float64 and in float32."""
    expected, gradients = formula(*(argument.tolist() for argument in arguments)), differences(formula, arguments)
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-5)):
        leaves = [argument.to(dtype, copy=True).requires_grad_() for argument in arguments]
        loss = ours(*leaves)
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=tolerance)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            assert leaf.grad is not None
            assert torch.allclose(leaf.grad.double(), gradient, rtol=0, atol=tolerance), dtype


def features(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def in_shares(loss: Callable[..., torch.Tensor], pairs: int, split: int) -> torch.Tensor:
    """The sum of the shares that two processes would compute."""
    return loss(slice(0, split), 0) + loss(slice(split, pairs), split)


APART, SHARED = [0, 1, 2, 3, 4], [7, 3, 7, 7, 1]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ids", [None, APART, SHARED])
def test_clip(ids: list[int] | None, smoothing: float) -> None:
    known = None if ids is None else torch.tensor(ids)

    def ours(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        def share(own: slice, offset: int) -> torch.Tensor:
            own_ids = None if known is None else known[own]
            return clip_loss(image[own], text[own], scale, image, text, offset, own_ids, known, smoothing)

        return in_shares(share, len(image), 2)

    arguments = [features(5, 4), features(5, 4).flip(0) * 0.9, scalar(1.3)]
    assert_is(ours, lambda *a: clip_formula(ids or APART, smoothing, *a), arguments)


@pytest.mark.parametrize("ids", [None, APART, SHARED])
@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 100])
def test_siglip(ids: list[int] | None, chunk: int | None) -> None:
    known = None if ids is None else torch.tensor(ids)

    def ours(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        def share(own: slice, offset: int) -> torch.Tensor:
            own_ids = None if known is None else known[own]
            return siglip_loss(image[own], text[own], scale, bias, text, offset, chunk, own_ids, known)

        return in_shares(share, len(image), 2)

    arguments = [features(5, 4), features(5, 4).flip(0) * 0.9, scalar(1.3), scalar(-0.7)]
    assert_is(ours, lambda *a: siglip_formula(ids or APART, *a), arguments)


def test_siglip_equals_transformers() -> None:
    """At its published start, t' = log 10 and b = -10, as `SiglipModel` computes it."""
    from transformers import SiglipConfig, SiglipModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = SiglipConfig(
        text_config=small | {"vocab_size": 9, "max_position_embeddings": 4, "projection_size": 8},
        vision_config=small | {"image_size": 4, "patch_size": 2},
    )
    model = SiglipModel(config).eval()
    torch.nn.init.constant_(model.logit_scale, math.log(10))
    torch.nn.init.constant_(model.logit_bias, -10.0)
    generator = torch.Generator().manual_seed(0)
    pixels, ids = torch.randn(3, 3, 4, 4, generator=generator), torch.randint(9, (3, 4), generator=generator)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels, return_loss=True)
        ours = siglip_loss(
            out.image_embeds, out.text_embeds, model.logit_scale, model.logit_bias, out.text_embeds, 0, chunk=2
        )
    assert ours.item() == pytest.approx(out.loss.item(), rel=1e-6)


@pytest.mark.parametrize("chunk", [0, -3])
def test_siglip_refuses_empty_chunks(chunk: int) -> None:
    with pytest.raises(ConfigError, match=f"not chunk={chunk}"):
        siglip_loss(features(2, 4), features(2, 4), scalar(0.0), scalar(0.0), features(2, 4), 0, chunk)


def test_siglip_in_chunks_keeps_no_logits() -> None:
    """All that the backward pass keeps for [64, 64] logits is smaller than they are."""
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    sizes = {}
    image, text = features(64, 4).requires_grad_(), features(64, 4).requires_grad_()
    for chunk in (None, 4):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            siglip_loss(image, text, scalar(1.0).requires_grad_(), scalar(0.0), text, 0, chunk)
        sizes[chunk] = max(kept)
    assert sizes[None] == 64 * 64 and sizes[4] <= 64 * 4


def test_the_logit_scale_stays_at_most_ln_100() -> None:
    for start, end in ((7.0, math.log(100)), (1.5, 1.5), (-3.0, -3.0)):
        parameter = torch.nn.Parameter(torch.tensor(start))
        clamp_logit_scale(parameter)
        assert parameter.item() == pytest.approx(end) and parameter.is_leaf and parameter.requires_grad


def test_losses_are_float32_under_autocast() -> None:
    image, text = features(5, 4).float(), features(5, 4).float() * 0.9
    scale = torch.tensor(math.log(100.0))
    plain = clip_loss(image, text, scale, image, text, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(clip_loss(image, text, scale, image, text, 0), plain)
    half = [tensor.bfloat16() for tensor in (image, text)]
    assert clip_loss(*half, scale, *half, 0).dtype is torch.float32


@pytest.mark.parametrize("smoothing", [0.1, 0.0])
@pytest.mark.parametrize("ids", [None, APART, SHARED])
def test_itc(ids: list[int] | None, smoothing: float) -> None:
    known = None if ids is None else torch.tensor(ids)

    def ours(image: torch.Tensor, text: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        def share(own: slice, offset: int) -> torch.Tensor:
            own_ids = None if known is None else known[own]
            return itc_loss(image[own], text[own], temperature, image, text, own_ids, known, offset, smoothing)[0]

        return in_shares(share, len(image), 2)

    arguments = [features(5, 3, 4), features(5, 4), scalar(0.4)]
    assert_is(ours, lambda *a: itc_formula(ids or APART, smoothing, *a), arguments)


def test_itc_similarities_are_the_largest_over_queries() -> None:
    image, text = features(5, 3, 4), features(5, 4)
    _, to_text, to_image = itc_loss(image[1:3], text[1:3], scalar(0.5), image, text, None, None, 1)
    assert not to_text.requires_grad and to_text.shape == to_image.shape == (2, 5)
    for row in range(2):
        for column in range(5):
            a = max(dot(query, text[column].tolist()) for query in image[1 + row].tolist()) / 0.5
            b = max(dot(query, text[1 + row].tolist()) for query in image[column].tolist()) / 0.5
            assert to_text[row, column].item() == pytest.approx(a)
            assert to_image[row, column].item() == pytest.approx(b)


def test_itm() -> None:
    logits = features(9, 4, 2) * 3
    assert_is(lambda logits: itm_loss(logits)[0], itm_formula, [logits])
    # Two micro-batches of one step: their rows are thirds of their own.
    parts = [[0, 3, 6], [1, 2, 4, 5, 7, 8]]
    assert_is(lambda logits: sum(itm_loss(logits[part], pairs=3)[0] for part in parts), itm_formula, [logits])
    mean = logits.mean(1)
    right = sum(bool(mean[row, 1] > mean[row, 0]) == (row < 3) for row in range(9))
    assert sum(int(itm_loss(logits[part])[1]) for part in parts) == right == int(itm_loss(mean)[1])


TOKENS, LENGTHS = [[5, 2, 1, 6, 0], [5, 3, 0, 0, 0], [5, 4, 4, 1, 2]], [4, 2, 5]


def test_itg() -> None:
    ids, mask = torch.tensor(TOKENS), torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]
    logits = features(3, 5, 7) * 3
    labels = ids.masked_fill(~mask, IGNORED)
    assert_is(lambda logits: itg_loss(logits, labels), lambda *a: itg_formula(TOKENS, LENGTHS, *a), [logits])
    # The head at the positions that predict alone, over two micro-batches.
    count = itg_count(mask)
    assert int(count) == sum(LENGTHS) - 3

    def selected(logits: torch.Tensor) -> torch.Tensor:
        total = logits.new_zeros(())
        for part in (slice(0, 1), slice(1, 3)):
            _, rows, targets = itg_targets(ids[part], mask[part], start_id=6)
            total = total + itg_loss(logits[part].flatten(0, 1)[rows], targets, count=count)
        return total

    assert_is(selected, lambda *a: itg_formula(TOKENS, LENGTHS, *a), [logits])


def test_itg_targets() -> None:
    ids, mask = torch.tensor(TOKENS), torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]
    decoder_ids, rows, targets = itg_targets(ids, mask, start_id=6)
    assert decoder_ids.tolist() == [[6, *row[1:]] for row in TOKENS] and ids.tolist() == TOKENS
    assert rows.tolist() == [0, 1, 2, 5, 10, 11, 12, 13]
    assert targets.tolist() == [2, 1, 6, 3, 4, 4, 1, 2]
    empty = itg_loss(torch.zeros(0, 7, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    assert empty.item() == 0.0


# Image 7 is shown with texts 0 and 1, image 3 with text 1 too, image 5 with text 2.
SHOWN = [(7, 0), (7, 1), (3, 1), (5, 2)]
RIGHT = [[1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_equal_texts_are_right_for_every_image_they_are_shown_with() -> None:
    tokens = torch.tensor([[4, 5, 0], [6, 0, 0], [6, 0, 9], [4, 5, 5]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    ids = pair_ids(torch.tensor([image for image, _ in SHOWN]) * 2**40, tokens, mask)
    texts, images = right_pairs(ids, ids)
    assert texts.int().tolist() == RIGHT and torch.equal(images, texts.T)
    halves = [right_pairs(ids[part], ids) for part in (slice(0, 2), slice(2, 4))]
    assert torch.equal(torch.cat([half[0] for half in halves]), texts)
    assert torch.equal(torch.cat([half[1] for half in halves]), images)


@pytest.mark.parametrize("chunk", [None, 3])
def test_eight_images_of_one_caption_are_not_each_others_negatives(chunk: int | None) -> None:
    image, text = features(8, 4), features(1, 4).expand(8, 4)
    ids = pair_ids(torch.arange(8), torch.full((8, 3), 5), torch.ones(8, 3))
    logits = scalar(2.0).exp() * image @ text.T - 0.7
    found = siglip_loss(image, text, scalar(2.0), scalar(-0.7), text, 0, chunk, ids, ids)
    assert torch.isclose(found, -F.logsigmoid(logits).sum() / 8)


def test_two_captions_of_eight_images_reach_the_least_loss() -> None:
    """Pairs whose features say exactly what the captions do: nothing is left to learn, and no gradient."""
    kinds = torch.arange(8) % 2
    place = torch.eye(2, dtype=torch.float64)[kinds]
    ids = pair_ids(torch.arange(8), kinds[:, None], torch.ones(8, 1))
    scale = scalar(8.0)
    known = place.clone().requires_grad_()
    loss = clip_loss(known, place, scale, known, place, 0, ids, ids)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4)) and known.grad is not None and known.grad.abs().max() < 1e-9

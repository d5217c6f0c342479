"""MultimodalLM on tiny random parts: the merge, the layout, label-position logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from polymodal.config import ImageConfig, ProjectorConfig
from polymodal.errors import PolymodalError
from polymodal.media_plan import Size, plan_image
from polymodal.modeling.encoders.hf_vision import HFVisionEncoder
from polymodal.modeling.merge import lay_out, merge_media
from polymodal.modeling.projectors import build_projector
from polymodal.modeling.vlm import MultimodalLM

VOCAB, WIDTH, IMAGE_ID = 64, 24, 64
IMAGE = ImageConfig(
    image_aspect_ratio="squash", tile_size=(28, 28), image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)
)


def tiny_llm(kind: str = "llama") -> torch.nn.Module:
    shape = {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 256,
    }  # fmt: skip
    if kind == "gemma2":  # caps its logits after the head: the label-position path must keep that
        return Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=0.5, sliding_window=64))
    return LlamaForCausalLM(LlamaConfig(**shape))


@pytest.fixture(params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest) -> MultimodalLM:
    torch.manual_seed(0)
    tower = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         image_size=28, patch_size=14)
    )  # fmt: skip
    encoder = HFVisionEncoder(tower)
    projector = build_projector(ProjectorConfig(), encoder.embed_dim, encoder.grid, WIDTH)
    return MultimodalLM(encoder, projector, tiny_llm(request.param), IMAGE_ID).eval()


def batch_of(model: MultimodalLM, rows: list[list[int]], images: list[int]) -> dict:
    """Rows of ids in which -1 stands for one image of four tokens; padded right."""
    plan = plan_image(Size(40, 50), IMAGE, model.tokens_per_tile)
    expanded = [[x for i in row for x in ([IMAGE_ID] * plan.num_tokens if i < 0 else [i])] for row in rows]
    length = max(map(len, expanded))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for r, row in enumerate(expanded):
        ids[r, : len(row)] = torch.tensor(row)
        mask[r, : len(row)] = True
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": ids, "attention_mask": mask, "plans": [plan] * len(images), "sample_of_image": images,
        "pixel_values": torch.randn(len(images), 3, 28, 28, generator=generator),
    }  # fmt: skip


def test_loss_at_label_positions_equals_full_logits(model: MultimodalLM) -> None:
    batch = batch_of(model, [[1, -1, 2, 3, 4, 5], [6, 7, 8]], [0])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 6:9] = batch["input_ids"][0, 6:9]
    labels[1, 1:3] = batch["input_ids"][1, 1:3]
    out = model(**batch, labels=labels)
    full = model(**batch).logits
    reference = F.cross_entropy(
        full[:, :-1].reshape(-1, VOCAB).double(), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )
    assert out.num_targets == 5 and out.logits.shape == (5, VOCAB)
    assert out.loss_sum.item() == pytest.approx(reference.item(), abs=1e-4)
    out.loss_sum.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.projector.parameters())


def test_a_batch_without_labels_or_images_still_has_a_gradient_path(model: MultimodalLM) -> None:
    batch = batch_of(model, [[1, 2, 3]], [])
    batch["pixel_values"] = None
    out = model(**batch, labels=torch.full_like(batch["input_ids"], -100), touch_media=True)
    assert out.num_targets == 0 and out.loss_sum.item() == 0.0
    out.loss_sum.backward()
    gradients = [p.grad for p in model.projector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_padded_rows_equal_single_rows(model: MultimodalLM) -> None:
    rows = [[1, -1, 2, -1, 3, 4, 5, 6], [6, -1, 8]]
    together = batch_of(model, rows, [0, 0, 1])
    full = model(**together).logits
    alone = batch_of(model, rows[1:], [0])
    alone["pixel_values"] = together["pixel_values"][2:]
    assert torch.allclose(full[1, :6], model(**alone).logits[0], atol=1e-5)


def test_features_in_place_of_pixels(model: MultimodalLM) -> None:
    batch = batch_of(model, [[1, -1, 2]], [0])
    full = model(**batch).logits
    batch["features"] = model.encode_images(batch.pop("pixel_values"))
    assert torch.equal(full, model(**batch).logits)


def test_merge_names_modality_sample_and_counts() -> None:
    text, mask = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, :3] = True
    with pytest.raises(PolymodalError, match="image: sample 1 has 3 placeholders but 2 features"):
        merge_media(text, mask, [torch.ones(2, 3)], [1], "image")
    with pytest.raises(PolymodalError, match="image: sample 0 has 0 placeholders but 3 features"):
        merge_media(text, mask, [torch.ones(3, 3)], [0], "image")
    merged = merge_media(text, mask, [torch.ones(3, 3)], [1], "image")
    assert merged.shape == text.shape and merged[1, :3].eq(1).all() and merged.sum() == 9


def test_layout_puts_every_token_of_a_canvas_in_reading_order() -> None:
    config = IMAGE.model_copy(
        update={
            "image_aspect_ratio": "anyres", "image_grid_pinpoints": ((28, 56), (56, 28), (56, 56)),
            "mm_patch_merge_type": "spatial_unpad",
        }
    )  # fmt: skip
    plan = plan_image(Size(56, 56), config, Size(2, 2))
    assert plan.grid == Size(2, 2)
    tiles = torch.arange(5 * 4, dtype=torch.float32).view(5, 4, 1)
    newline = torch.tensor([-1.0])
    # Global view 0..3; then the canvas row by row across its tiles (4..7 | 8..11 over 12..15 | 16..19).
    expected = [0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 7, 10, 11, -1, 12, 13, 16, 17, -1, 14, 15, 18, 19, -1]
    assert lay_out(tiles, plan, newline).squeeze(1).tolist() == expected


def test_layout_refuses_what_was_not_planned() -> None:
    plan = plan_image(Size(40, 50), IMAGE, Size(2, 2))
    with pytest.raises(PolymodalError, match="the plan says 4 tokens, the layout gives 6"):
        lay_out(torch.zeros(1, 6, 3), plan, None)

"""BLIP-2 and InstructBLIP: the same numbers and greedy text as transformers' own classes on the same random weights.

Tower (`Blip2VisionModel` up to its post_layernorm), Q-Former, projection and decoder are ours; only the retrieval
heads, which are linear layers, are applied as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2VisionModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    OPTForCausalLM,
)
from transformers.models.blip_2.configuration_blip_2 import Blip2VisionConfig

from polymodal.config import ImageConfig, ProjectorConfig, QFormerConfig
from polymodal.generation.generate import generate_ids
from polymodal.generation.params import GenerationParams
from polymodal.media_plan import Size, plan_image
from polymodal.modeling.encoders.hf_vision import HFVisionEncoder
from polymodal.modeling.projectors import build_projector
from polymodal.modeling.projectors.qformer import QFormer, QFormerProjector
from polymodal.modeling.projectors.qformer_files import from_transformers, load_exactly, of_qformer
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Batch

WIDTHS = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
VISION: dict[str, Any] = {**WIDTHS, "hidden_size": 24, "image_size": 28, "patch_size": 7, "initializer_range": 0.2}
QFORMER: dict[str, Any] = {
    **WIDTHS, "hidden_size": 32, "vocab_size": 60, "max_position_embeddings": 20, "initializer_range": 0.2,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "model_type": "opt", "vocab_size": 80, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "init_std": 0.3,
}  # fmt: skip
QUERIES, IMAGE_ID, IMAGES = 6, 79, 2
SETTINGS: dict[str, Any] = {
    "num_query_tokens": QUERIES, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "vocab_size": 60, "max_position_embeddings": 20, "max_text_length": 12,
}  # fmt: skip
IMAGE = ImageConfig(
    image_aspect_ratio="squash", tile_size=(28, 28), image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)
)


def randomise(model: torch.nn.Module) -> None:
    """Give every weight a value of its own: transformers starts queries, biases and norms at zero and one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def their_config(config_class: type, **qformer: Any) -> Any:
    return config_class(
        vision_config=VISION, qformer_config={**QFORMER, **qformer}, text_config=TEXT, num_query_tokens=QUERIES,
        image_text_hidden_size=12, image_token_index=IMAGE_ID,
    )  # fmt: skip


def our_tower(state: Mapping[str, Tensor]) -> HFVisionEncoder:
    tower = Blip2VisionModel(Blip2VisionConfig(**VISION))
    prefix = "vision_model."
    tower.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    # BLIP-2 keeps the class token and looks at the last layer.
    return HFVisionEncoder(tower.eval(), select_layer=-1, select_feature="cls_patch")


def our_model(theirs: Any, text_context: bool) -> MultimodalLM:
    state = theirs.state_dict()
    encoder = our_tower(state)
    settings = QFormerConfig(**SETTINGS, text_context=text_context)
    config = ProjectorConfig(mm_projector_type="qformer", qformer=settings)
    projector = build_projector(config, encoder.embed_dim, encoder.grid, TEXT["hidden_size"])
    load_exactly(projector, from_transformers(state), "transformers")
    llm = OPTForCausalLM(theirs.config.text_config).eval()
    llm.load_state_dict(theirs.language_model.state_dict())
    return MultimodalLM(encoder, projector, llm, IMAGE_ID).eval()


def pixels() -> Tensor:
    return torch.randn(IMAGES, 3, 28, 28, generator=torch.Generator().manual_seed(5))


def prompts() -> Tensor:
    """[B, T]: the placeholders first, as BLIP-2 writes them, then text."""
    text = torch.randint(3, 70, (IMAGES, 5), generator=torch.Generator().manual_seed(6))
    return torch.cat((torch.full((IMAGES, QUERIES), IMAGE_ID), text), dim=1)


def questions() -> tuple[Tensor, Tensor]:
    """Ids of two questions of unequal length, and their mask."""
    ids = torch.tensor([[2, 11, 12, 13, 3], [2, 21, 3, 0, 0]])
    return ids, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("family", ["blip2", "instructblip"])
@torch.inference_mode()
def test_same_tokens_logits_and_greedy_text(family: str) -> None:
    torch.manual_seed(0)
    extra: dict[str, Tensor] = {}
    context = None
    if family == "blip2":
        theirs: Any = Blip2ForConditionalGeneration(their_config(Blip2Config)).eval()
    else:
        theirs = InstructBlipForConditionalGeneration(their_config(InstructBlipConfig)).eval()
        ids, mask = questions()
        extra = {"qformer_input_ids": ids, "qformer_attention_mask": mask}
        context = ids.masked_fill(mask == 0, -1)
    randomise(theirs)
    ours = our_model(theirs, text_context=family == "instructblip")
    plans = (plan_image(Size(28, 28), IMAGE, ours.projector.output_grid),) * IMAGES
    rows = tuple(range(IMAGES))

    expected = theirs.get_image_features(pixels(), **extra).pooler_output
    projected = torch.stack(ours.project_images(ours.encode_images(pixels()), plans, context))
    assert projected.shape == (IMAGES, QUERIES, TEXT["hidden_size"])
    torch.testing.assert_close(projected, expected, rtol=1e-5, atol=1e-5)
    # The queries tell images apart, and with a context, questions too.
    assert (projected[0] - projected[1]).abs().max() > 1e-2

    reference = theirs(pixel_values=pixels(), input_ids=prompts(), **extra).logits
    logits = ours(prompts(), None, None, plans, rows, pixels(), context_ids=context).logits
    torch.testing.assert_close(logits, reference, rtol=1e-5, atol=1e-5)

    # OPT gives all ids that were read and made.
    made = theirs.generate(
        pixel_values=pixels(), input_ids=prompts(), max_new_tokens=10, do_sample=False, suppress_tokens=[IMAGE_ID],
        eos_token_id=-1, pad_token_id=1, **extra,
    )[:, -10:]  # fmt: skip
    full = torch.ones_like(prompts(), dtype=torch.bool)
    batch = Batch(prompts(), full, prompts(), plans, rows, pixels(), context_ids=context)
    assert generate_ids(ours, batch, GenerationParams(max_new_tokens=10), [-1]) == made.tolist()
    assert len({tuple(row) for row in made.tolist()}) == IMAGES


@torch.inference_mode()
def test_another_question_gives_other_tokens_and_padding_none() -> None:
    torch.manual_seed(0)
    theirs: Any = InstructBlipForConditionalGeneration(their_config(InstructBlipConfig)).eval()
    randomise(theirs)
    ours = our_model(theirs, text_context=True)
    features = ours.encode_images(pixels())
    row = torch.tensor([[2, 11, 12, 3]]).expand(IMAGES, -1)
    base = ours.project(features, row)
    assert (ours.project(features, torch.tensor([[2, 12, 11, 3]]).expand(IMAGES, -1)) - base).abs().max() > 1e-3
    padded = F.pad(row, (0, 3), value=-1)
    torch.testing.assert_close(ours.project(features, padded), base, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_retrieval_gives_the_same_features_and_matching_logits() -> None:
    torch.manual_seed(0)
    theirs: Any = Blip2ForImageTextRetrieval(their_config(Blip2Config, use_qformer_text_input=True)).eval()
    theirs.config.image_token_index = None  # texts without placeholders, as the published checkpoints take them
    randomise(theirs)
    state = theirs.state_dict()
    encoder = our_tower(state)
    qformer = QFormer(encoder.embed_dim, QFormerConfig(**SETTINGS), text=True).eval()
    load_exactly(qformer, of_qformer(from_transformers(state)), "transformers")
    features = encoder(pixels())
    ids, mask = questions()

    expected = theirs(pixel_values=pixels(), input_ids=ids, attention_mask=mask, use_image_text_matching_head=False)
    queries = qformer.queries(features)
    image = F.normalize(theirs.vision_projection(queries), dim=-1)
    text = F.normalize(theirs.text_projection(qformer.encode(None, ids, mask.bool())[:, 0]), dim=-1)
    torch.testing.assert_close(image, expected.image_embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text, expected.text_embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((image @ text.T).amax(dim=1), expected.logits_per_image, rtol=1e-5, atol=1e-5)

    matched = theirs(pixel_values=pixels(), input_ids=ids, attention_mask=mask, use_image_text_matching_head=True)
    hidden = qformer.encode(features, ids, mask.bool())
    assert hidden.shape == (IMAGES, QUERIES + ids.shape[1], SETTINGS["hidden_size"])
    logits = theirs.itm_head(qformer.queries(features, ids, mask.bool())).mean(dim=1)
    torch.testing.assert_close(logits, matched.logits_per_image, rtol=1e-5, atol=1e-5)


def test_names_go_into_a_projector_without_its_text_path() -> None:
    """Published captioning weights have no text parts; those for retrieval do, and stage 2 drops them."""
    theirs: Any = Blip2ForConditionalGeneration(their_config(Blip2Config))
    found = from_transformers(theirs.state_dict())
    projector = QFormerProjector(QFormer(24, QFormerConfig(**SETTINGS), text=False), TEXT["hidden_size"])
    assert found.keys() == projector.state_dict().keys()

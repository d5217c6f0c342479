"""BLIP-2 with a T5 (FlanT5 as published): encoder input, loss, logits and greedy text as transformers has them.

The same random weights in both; the T5 is of version 1.1 (gated, its decoder's output unscaled) and of version 1.0.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2VisionModel, T5ForConditionalGeneration

from polymodal.config import ImageConfig, ProjectorConfig, QFormerConfig
from polymodal.generation.generate import generate_ids
from polymodal.generation.params import GenerationParams
from polymodal.media_plan import Size, plan_image
from polymodal.modeling.encoders.hf_vision import HFVisionEncoder
from polymodal.modeling.projectors import build_projector
from polymodal.modeling.projectors.qformer import QFormerProjector
from polymodal.modeling.projectors.qformer_files import from_transformers, load_exactly
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Sample, Slot, collate

LAYERS = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.2}
VISION: dict[str, Any] = {**LAYERS, "hidden_size": 24, "image_size": 28, "patch_size": 7}
QFORMER: dict[str, Any] = {**LAYERS, "hidden_size": 32, "vocab_size": 60, "max_position_embeddings": 20}
TEXT: dict[str, Any] = {
    "model_type": "t5", "vocab_size": 80, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
NEW = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
QUERIES, IMAGE_ID = 6, 79
IMAGE = ImageConfig(
    image_aspect_ratio="squash", tile_size=(28, 28), image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)
)


def both(new: bool) -> tuple[Any, MultimodalLM]:
    torch.manual_seed(0)
    theirs = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=VISION, qformer_config=QFORMER, text_config={**TEXT, **(NEW if new else {})},
            num_query_tokens=QUERIES, image_token_index=IMAGE_ID,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # queries, biases and norms start at zero and one
            # A random decoder repeats one word, unless what it looks at weighs more than what it said.
            by = 0.5 if "decoder" in name else 0.1
            parameter.add_(by * torch.randn(parameter.shape))
    state = theirs.state_dict()
    tower = Blip2VisionModel(theirs.config.vision_config)
    tower.load_state_dict(
        {k.removeprefix("vision_model."): v for k, v in state.items() if k.startswith("vision_model.")}
    )
    encoder = HFVisionEncoder(tower.eval(), select_layer=-1, select_feature="cls_patch")
    qformer = QFormerConfig(
        **{key: value for key, value in QFORMER.items() if key != "initializer_range"},
        num_query_tokens=QUERIES,
        max_text_length=12,
    )
    settings = ProjectorConfig(mm_projector_type="qformer", qformer=qformer)
    projector = build_projector(settings, encoder.embed_dim, encoder.grid, TEXT["d_model"])
    assert isinstance(projector, QFormerProjector)
    load_exactly(projector, from_transformers(state), "transformers")
    llm = T5ForConditionalGeneration(theirs.config.text_config)
    llm.load_state_dict(theirs.language_model.state_dict())
    assert llm.config.scale_decoder_outputs is not new
    return theirs, MultimodalLM(encoder, projector, llm, IMAGE_ID).eval()


def samples() -> list[Sample]:
    """Two images, prompts of 5 and 3 tokens behind them, answers of 4 and 6."""
    generator = torch.Generator().manual_seed(4)
    plan = plan_image(Size(28, 28), IMAGE, Size(1, QUERIES))
    found = []
    for prompt, answer in ((5, 4), (3, 6)):
        text = torch.randint(2, 79, (prompt + answer,), generator=generator)
        ids = torch.cat((torch.full((QUERIES,), IMAGE_ID), text))
        mask = torch.arange(len(ids)) >= QUERIES + prompt
        pixels = torch.randn(1, 3, 28, 28, generator=generator)
        found.append(Sample(ids, mask, (Slot("image", 0, QUERIES, 0),), (plan,), (pixels,)))
    return found


def padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


@pytest.mark.parametrize("new", [True, False], ids=["v1.1", "v1.0"])
@torch.inference_mode()
def test_same_encoder_input_loss_logits_and_greedy_text(new: bool) -> None:
    theirs, ours = both(new)
    sources = [sample.input_ids[~sample.loss_mask] for sample in samples()]
    answers = [sample.input_ids[sample.loss_mask] for sample in samples()]
    inputs = {
        "pixel_values": torch.cat([tiles for sample in samples() for tiles in sample.pixels or ()]),
        "input_ids": padded(sources, 0),
        "attention_mask": padded([torch.ones_like(source) for source in sources], 0),
    }
    read: dict[str, list[Tensor]] = {"theirs": [], "ours": []}
    for name, llm in (("theirs", theirs.language_model), ("ours", ours.llm)):
        llm.get_encoder().register_forward_pre_hook(
            lambda _module, _args, kwargs, into=read[name]: into.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
    reference = theirs(**inputs, labels=padded(answers, -100))
    out = ours(**collate(samples(), 0).inputs())

    real = inputs["attention_mask"].bool()
    assert read["ours"][0].shape == read["theirs"][0].shape
    torch.testing.assert_close(read["ours"][0][real], read["theirs"][0][real], rtol=1e-5, atol=1e-5)
    logits = torch.cat([reference.logits[row, : len(answer)] for row, answer in enumerate(answers)])
    torch.testing.assert_close(out.logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss_sum / out.num_targets, reference.loss, rtol=1e-5, atol=1e-5)
    # It is the image that is read: with the other one it is another text.
    swapped = [Sample(**{**vars(a), "pixels": b.pixels}) for a, b in zip(samples(), samples()[::-1], strict=True)]
    assert (ours(**collate(swapped, 0).inputs()).logits - logits).abs().max() > 1e-2

    made = theirs.generate(**inputs, max_new_tokens=10, do_sample=False, eos_token_id=78, suppress_tokens=[IMAGE_ID])
    prompts = [
        Sample(source, torch.zeros(len(source), dtype=torch.bool), sample.slots, sample.plans, sample.pixels)
        for source, sample in zip(sources, samples(), strict=True)
    ]
    text = generate_ids(ours, collate(prompts, 0, side="left"), GenerationParams(max_new_tokens=10), [78])
    # Where one row of theirs ended before the other, it goes on with padding.
    ends = [([*row, 78]).index(78) + 1 for row in made[:, 1:].tolist()]
    assert text == [row[:end] for row, end in zip(made[:, 1:].tolist(), ends, strict=True)]
    assert text[0] != text[1]

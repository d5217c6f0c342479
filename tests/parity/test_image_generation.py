"""Image generation of random small Janus and Emu3: the logits that each code is chosen from equal ours.

Janus keeps codes in a table and a head of its own; here both stand behind the words', so that a code is an id like any
other. Emu3's codes are words of its vocabulary, and each row of an image ends with one id more. What transformers does
in its own loop or in logits processors, our state machine does with allowed ids and a second row in the same cache.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
)
from transformers.generation.logits_process import ClassifierFreeGuidanceLogitsProcessor, LogitsProcessorList

from polymodal.config.output import new_layout
from polymodal.generation.modalities import Block, image_block, stream_modalities
from polymodal.generation.params import GenerationParams, ImageParams
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Sample, collate

WORDS, CODES, LENGTH, STOP = 40, 24, 16, 2
BOS, PAD, BOI, EOI = 1, 0, 5, 6


class Joined(nn.Module):
    """Janus as one language model: words, then codes, in its embeddings as in its logits."""

    def __init__(self, janus: JanusForConditionalGeneration) -> None:
        super().__init__()
        self.janus, self.config = janus, janus.config.text_config
        codes = janus.prepare_embeddings_for_image_generation(torch.arange(CODES))
        self.table = nn.Embedding.from_pretrained(torch.cat([janus.get_input_embeddings().weight, codes]))

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(
        self, input_ids: Any = None, inputs_embeds: Any = None, position_ids: Any = None, logits_to_keep: int = 1,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        embeds = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        out = self.janus.model.language_model(inputs_embeds=embeds, position_ids=position_ids, **kwargs)
        last = out.last_hidden_state[:, -1:]
        out.logits = torch.cat([self.janus.lm_head(last), self.janus.model.generation_head(last)], dim=-1)
        return out


@pytest.fixture(scope="module")
def janus() -> JanusForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=BOS, pad_token_id=PAD, eos_token_id=STOP,
    )  # fmt: skip
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
        "projection_dim": 32, "num_image_tokens": LENGTH,
    }  # fmt: skip
    codes = {
        "embed_dim": 8, "num_embeddings": CODES, "latent_channels": 8, "base_channels": 32, "num_res_blocks": 1,
        "channel_multiplier": (1, 1), "num_patches": 4, "projection_dim": 32, "image_token_embed_dim": 32,
    }  # fmt: skip
    model = JanusForConditionalGeneration(JanusConfig(text_config=text, vision_config=vision, vq_config=codes)).eval()
    for parameter in model.parameters():  # far enough from one another that a wrong row would show
        parameter.data.mul_(4)
    model.generation_config.generation_kwargs = {"boi_token_id": BOI}
    model.generation_config.update(bos_token_id=BOS, pad_token_id=PAD, eos_token_id=STOP, do_sample=False)
    return model


def ours(
    llm: Any, vocabulary: Any, block: Block, prompts: list[list[int]], conditions: list[list[int]], guidance: float
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """The ids of each row, and what each code was chosen from."""
    model = MultimodalLM(llm=llm, image_token_id=1000).eval()
    model.vocabulary = vocabulary
    samples = [Sample(torch.tensor(ids), torch.zeros(len(ids), dtype=torch.bool)) for ids in prompts]
    params = GenerationParams(modalities=("image",), image=ImageParams(temperature=0.0, guidance=guidance))
    seen: list[torch.Tensor] = []
    made: list[list[int]] = [[] for _ in prompts]
    batch = collate(samples, PAD, "left")
    for ids, _ in stream_modalities(model, batch, params, [STOP], block, WORDS, conditions, look=seen.append):
        for row, token in zip(made, ids, strict=True):
            row += [] if token is None else [token]
    return made, seen


@pytest.mark.parametrize("guidance", [1.5, 5.0])
def test_janus_chooses_codes_from_our_logits(janus: JanusForConditionalGeneration, guidance: float) -> None:
    prompts = [[BOS, 11, 12, 13, 14, 15], [BOS, 21, 22]]
    width = max(map(len, prompts)) + 1
    rows = [[PAD] * (width - len(p) - 1) + p + [BOI] for p in prompts]
    mask = [[0] * (width - len(p) - 1) + [1] * (len(p) + 1) for p in prompts]
    raw: list[torch.Tensor] = []

    def record(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raw.append(scores.clone())
        return scores

    theirs = janus.generate(
        torch.tensor(rows), attention_mask=torch.tensor(mask), generation_mode="image", guidance_scale=guidance,
        logits_processor=LogitsProcessorList([record]), do_sample=False,
    )  # fmt: skip
    assert theirs.shape == (2, LENGTH) and len(raw) == LENGTH
    guide = ClassifierFreeGuidanceLogitsProcessor(guidance)
    expected = [guide(torch.tensor(rows), scores) for scores in raw]

    vocabulary = new_layout(WORDS, {"<boi>": BOI, "<eoi>": EOI}, CODES)
    without = [[BOS, *[PAD] * (len(p) - 1)] for p in prompts]  # as Janus has it: the words are padding that is seen
    block = image_block(vocabulary, LENGTH)
    made, seen = ours(Joined(janus), vocabulary, block, prompts, without, guidance)
    for row in range(2):
        assert made[row] == [BOI, *vocabulary.image.encode(theirs[row].tolist()), EOI, STOP]
        for step in range(LENGTH):
            torch.testing.assert_close(seen[2 * step + row], expected[step][row], atol=2e-4, rtol=1e-4)
    assert made[0] != made[1]
    # Another way of having no condition gives other logits: the second row is not left aside.
    other = ours(Joined(janus), vocabulary, block, prompts, [[BOS]] * 2, guidance)[1]
    assert (other[-1] - seen[-1]).abs().max() > 1e-3


@pytest.fixture(scope="module")
def emu3() -> Emu3ForConditionalGeneration:
    torch.manual_seed(0)
    text = {
        "vocab_size": WORDS + CODES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": BOS,
        "pad_token_id": PAD, "eos_token_id": STOP, "attention_dropout": 0.0,
    }  # fmt: skip
    codes = {
        "codebook_size": CODES, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1],
        "num_res_blocks": 1, "attn_resolutions": [], "hidden_size": 32, "num_attention_heads": 1,
        "double_latent": False, "temporal_downsample_factor": 1,
    }  # fmt: skip
    names = {f"<|visual token {code:06d}|>": WORDS + code for code in range(CODES)} | {"<image>": 30}
    names |= {"<|extra_200|>": EOL}
    model = Emu3ForConditionalGeneration(Emu3Config(text_config=text, vq_config=codes, vocabulary_map=names)).eval()
    model.lm_head.weight.data.mul_(20)
    return model


EOL, ROWS, COLUMNS = 7, 3, 4


def test_emu3_chooses_codes_from_our_logits(emu3: Emu3ForConditionalGeneration) -> None:
    vocabulary = new_layout(WORDS, {"<boi>": BOI, "<eoi>": EOI}, CODES)
    code, line = (vocabulary.image.offset, vocabulary.image.end), (EOL, EOL + 1)
    block = Block(BOI, (*[*[code] * COLUMNS, line] * ROWS, (EOI, EOI + 1)))
    guidance, prompt, negative = 3.0, [BOS, 11, 12, 13, 14], [BOS, 31]

    def allowed(_row: int, ids: torch.Tensor) -> list[int]:
        place = len(ids) - len(prompt) - 1
        first, end = block.steps[place] if place < len(block.steps) else (STOP, STOP + 1)
        return list(range(first, end))

    theirs = emu3.generate(
        torch.tensor([[*prompt, BOI]]), attention_mask=torch.ones(1, len(prompt) + 1, dtype=torch.int64),
        negative_prompt_ids=torch.tensor([[*negative, BOI]]),
        negative_prompt_attention_mask=torch.ones(1, len(negative) + 1, dtype=torch.int64),
        guidance_scale=guidance, prefix_allowed_tokens_fn=allowed, do_sample=False, max_new_tokens=len(block.steps) + 1,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    expected = [scores[0, code[0] : code[1]] for scores in theirs.scores if scores[0, code[0]].isfinite()]
    ids = theirs.sequences[0, len(prompt) :].tolist()

    made, seen = ours(emu3, vocabulary, block, [prompt], [negative], guidance)
    assert made == [ids]
    assert len(seen) == len(expected) == ROWS * COLUMNS
    for mine, scores in zip(seen, expected, strict=True):  # theirs are guided as log-probabilities
        torch.testing.assert_close(mine.log_softmax(-1), scores.log_softmax(-1), atol=2e-4, rtol=1e-4)

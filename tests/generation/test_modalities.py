"""The state machine over text and images: what may be said when, guidance in one cache, a batch as each row alone."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from polymodal.config import ImageOutputConfig
from polymodal.config.output import new_layout
from polymodal.errors import PolymodalError
from polymodal.generation.generate import generate_ids
from polymodal.generation.modalities import audio_block, image_block, stream_modalities, video_block
from polymodal.generation.params import GenerationParams, ImageParams
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Sample, collate

TEXT, STOP, LENGTH = 20, 2, 6
LAYOUT = new_layout(TEXT, {"<boi>": 20, "<eoi>": 21}, 10)  # codes are the ids from 22 to 31
BLOCK = image_block(LAYOUT, LENGTH)
PROMPTS = [[1, 5, 9, 3, 11, 4], [8], [7, 7, 3]]


@pytest.fixture
def model() -> MultimodalLM:
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=2, max_position_embeddings=48)
    )  # fmt: skip
    llm.lm_head.weight.data.mul_(30)
    model = MultimodalLM(llm=llm, image_token_id=64).eval()
    model.vocabulary = LAYOUT
    return model


def prompt(ids: list[int]) -> Sample:
    return Sample(torch.tensor(ids), torch.zeros(len(ids), dtype=torch.bool))


def run(model: MultimodalLM, prompts: list[list[int]], params: GenerationParams) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    batch = collate([prompt(p) for p in prompts], 0, "left")
    for ids, _ in stream_modalities(model, batch, params, [STOP], BLOCK, 22, [[0]] * len(prompts)):
        for row, token in zip(rows, ids, strict=True):
            row += [] if token is None else [token]
    return rows


def like(model: MultimodalLM, token: int, much: float = 1e4) -> None:
    """Make a model say a token wherever it may."""
    model.llm.lm_head.weight.data[token] = 0
    bias = torch.zeros(64)
    bias[token] = much
    model.llm.lm_head.bias = torch.nn.Parameter(bias)


def settings(temperature: float = 0.0, guidance: float = 1.0, **more: object) -> GenerationParams:
    image = ImageParams(temperature=temperature, guidance=guidance, max_images=int(more.pop("max_images", 4)))  # type: ignore[call-overload]
    return GenerationParams(image=image, seed=3, temperature=temperature, **{"modalities": ("image",), **more})  # type: ignore[arg-type]


def test_an_image_alone_is_one_block_of_codes_and_its_end(model: MultimodalLM) -> None:
    for row in run(model, PROMPTS, settings(1.0, 3.0)):
        assert (row[0], row[-2:]) == (20, [21, STOP]) and len(row) == LENGTH + 3
        assert all(22 <= token < 32 for token in row[1:-2])


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("modalities", [("image",), ("text", "image"), ("image", "text")])
def test_a_batch_of_unequal_prompts_draws_what_each_draws_alone(
    model: MultimodalLM, guidance: float, temperature: float, modalities: tuple[str, ...]
) -> None:
    model.llm.lm_head.weight.data[20] *= 4  # images are begun at different places of the rows' texts
    params = settings(temperature, guidance, modalities=modalities, max_new_tokens=12)
    together = run(model, PROMPTS, params)
    assert together == [run(model, [p], params)[0] for p in PROMPTS]
    assert any(20 in row for row in together)


def test_guided_codes_are_those_of_two_rows_without_a_cache(model: MultimodalLM) -> None:
    guidance = 2.5
    for ids in PROMPTS:
        row = run(model, [ids], settings(0.0, guidance))[0]
        for step in range(1, LENGTH + 1):
            given, without = (model(torch.tensor([start + row[:step]])).logits[0, -1, 22:32] for start in (ids, [0]))
            assert row[step] == 22 + int((without + guidance * (given - without)).argmax())


def test_a_second_image_is_guided_without_what_was_said_before_it(model: MultimodalLM) -> None:
    like(model, 20, 25.0)
    row = run(model, [PROMPTS[0]], settings(0.0, 2.5, modalities=("text", "image"), max_images=2, max_new_tokens=4))[0]
    begins = [place for place, token in enumerate(row) if token == 20]
    assert len(begins) == 2
    for begin in begins:
        for step in range(1, LENGTH + 1):
            starts = (PROMPTS[0] + row[:begin], [0])
            given, without = (
                model(torch.tensor([start + row[begin : begin + step]])).logits[0, -1, 22:32] for start in starts
            )
            assert row[begin + step] == 22 + int((without + 2.5 * (given - without)).argmax())


def test_text_holds_no_code_and_ends_nothing_that_was_not_begun(model: MultimodalLM) -> None:
    for token in (21, 25, 40):  # an end without a beginning, a code, a row that nothing uses
        like(model, token)
        params = settings(modalities=("text", "image"), max_new_tokens=5)
        said = [i for row in run(model, PROMPTS, params) for i in row]
        assert token == 25 or token not in said
        batch = collate([prompt(p) for p in PROMPTS], 0, "left")
        assert all(i < TEXT for row in generate_ids(model, batch, params, [STOP], 22) for i in row)
    like(model, 20)
    batch = collate([prompt(p) for p in PROMPTS], 0, "left")
    assert all(i < TEXT for row in generate_ids(model, batch, params, [STOP], 22) for i in row)


def test_an_image_is_begun_only_where_all_of_it_fits_and_not_too_often(model: MultimodalLM) -> None:
    like(model, 20)
    params = settings(modalities=("text", "image"), max_new_tokens=30, max_images=100)
    row = run(model, [PROMPTS[0]], params)[0]
    assert len(row) == 48 - len(PROMPTS[0])  # the context is full, and every image in it whole
    assert row.count(20) == row.count(21) == 42 // BLOCK.length
    assert run(model, [PROMPTS[0]], settings(modalities=("text", "image"), max_images=2))[0].count(20) == 2
    with pytest.raises(PolymodalError, match=r"an image takes 8 positions, .* has 7 left; shorten the conversation"):
        run(model, [[3] * 41], settings())
    assert len(run(model, [[3] * 40], settings())[0]) == 8


def test_codes_have_settings_of_their_own_and_no_penalty(model: MultimodalLM) -> None:
    like(model, 25, 3.0)
    greedy = settings(0.0, repetition_penalty=100.0)
    assert run(model, [[3]], greedy)[0][1:-2].count(25) > 1
    image = ImageParams(temperature=5.0, guidance=1.0, top_k=1)
    assert run(model, [[3]], GenerationParams(modalities=("image",), image=image, seed=1)) == run(model, [[3]], greedy)
    free = image.model_copy(update={"top_k": 0})
    rows = [run(model, [[3]], GenerationParams(modalities=("image",), image=free, seed=seed))[0] for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]


def test_blocks_of_videos_and_sounds_are_of_the_same_kind() -> None:
    names = {"<boi>": 20, "<eoi>": 21, "<bov>": 22, "<eov>": 23, "<frame>": 24, "<boa>": 25, "<eoa>": 26}
    layout = new_layout(TEXT, names, 10, (4, 5))
    assert (layout.image.offset, [each.offset for each in layout.audio], layout.size) == (27, [37, 41], 46)
    code = (27, 37)
    assert video_block(layout, 2, 2).steps == (code, code, (24, 25), code, code, (23, 24))
    assert audio_block(layout, 2).steps == ((37, 41), (41, 46), (37, 41), (41, 46), (26, 27))


def test_what_a_request_leaves_open_is_the_model_s_choice() -> None:
    own = ImageOutputConfig(image_tokenizer="x", temperature=0.3, guidance=4.0)
    open_, said = GenerationParams(), GenerationParams(image=ImageParams(temperature=0.0, guidance=1.0))
    assert (open_.settled(own).image.temperature, open_.settled(own).image.guidance) == (0.3, 4.0)
    assert said.settled(own).image == said.image

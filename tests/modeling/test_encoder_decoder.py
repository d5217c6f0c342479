"""Encoder-decoder language models (T5 of both kinds, BART) in a `MultimodalLM`, against the bare model of transformers.

BART has absolute positions, so whatever moved a prompt by its padding would show.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from polymodal.backends import load_processor
from polymodal.backends.local import LocalBackend
from polymodal.checkpoints.model_folder import load_model, read_config, save_model
from polymodal.config import LLMConfig, ModelConfig, ProjectorConfig, TemplateConfig
from polymodal.errors import ConfigError, PolymodalError
from polymodal.generation.generate import generate_ids
from polymodal.generation.params import GenerationParams
from polymodal.media_plan import Size
from polymodal.messages import Message, assistant, user
from polymodal.modeling.build import build_model
from polymodal.modeling.language_model import decoder_start_id, layer_counts, load_llm
from polymodal.modeling.projectors import build_projector
from polymodal.modeling.token_loss import knows_head
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Sample, collate
from polymodal.processing.processor import Processor, last_run

SIZES: dict[str, Any] = {"vocab_size": 40, "d_model": 16}
T5: dict[str, Any] = {"d_kv": 4, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
BART: dict[str, Any] = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (
    ("layers", 2), ("attention_heads", 4), ("ffn_dim", 24))}  # fmt: skip
FAMILIES = ("t5", "t5_v1_1", "bart")
START = 0


def make_llm(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": START}
    llm: Any
    if family == "bart":
        config = BartConfig(**SIZES, **BART, **ids, max_position_embeddings=64, scale_embedding=True, init_std=0.3)
        llm = BartForConditionalGeneration(config)
        with torch.no_grad():
            llm.final_logits_bias.normal_()  # a constant that BART adds behind its head
    else:
        new = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if family == "t5_v1_1" else {}
        llm = T5ForConditionalGeneration(T5Config(**{**SIZES, **T5, **ids, **new, **changes}))
        if new:
            assert not llm.config.scale_decoder_outputs
            llm.lm_head.weight = torch.nn.Parameter(torch.randn(40, 16))
    return llm.eval()


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> MultimodalLM:
    return MultimodalLM(llm=make_llm(request.param), image_token_id=40).eval()


def samples() -> list[Sample]:
    """Prompts of 5, 2 and 7 tokens with answers of 3, 4 and 1, and what a template writes behind them."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for source, answer, tail in ((5, 3, 1), (2, 4, 0), (7, 1, 2)):
        ids = torch.randint(2, 40, (source + answer + tail,), generator=generator)
        mask = torch.zeros(len(ids), dtype=torch.bool)
        mask[source : source + answer] = True
        made.append(Sample(ids, mask, id=str(source)))
    return made


def prompts() -> list[Sample]:
    """The samples up to their answers."""
    found = []
    for sample in samples():
        length = int(sample.loss_mask.int().argmax())
        found.append(Sample(sample.input_ids[:length], sample.loss_mask[:length]))
    return found


def test_losses_are_those_of_the_bare_model(model: MultimodalLM) -> None:
    batch = collate(samples(), 0)
    out = model(**batch.inputs())
    assert batch.target_places is not None
    assert out.num_targets == len(batch.target_places) == 8
    position = 0
    for sample in samples():
        source, answer = sample.input_ids[: int(sample.loss_mask.int().argmax())], sample.input_ids[sample.loss_mask]
        theirs = model.llm(input_ids=source[None], labels=answer[None])
        part = slice(position, position + len(answer))
        torch.testing.assert_close(out.logits[part], theirs.logits[0], atol=1e-5, rtol=1e-5)
        assert out.targets[part].tolist() == answer.tolist()
        torch.testing.assert_close(out.losses[part].mean(), theirs.loss, atol=1e-5, rtol=1e-5)
        position += len(answer)
    torch.testing.assert_close(out.loss_sum, out.losses.sum())


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_is_each_sample_alone(model: MultimodalLM, side: Any) -> None:
    batch = collate(samples(), 0, side)
    together = model(**batch.inputs())
    alone = [model(**collate([sample], 0).inputs()) for sample in samples()]
    torch.testing.assert_close(together.losses, torch.cat([out.losses for out in alone]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.logits, torch.cat([out.logits for out in alone]), atol=1e-5, rtol=1e-5)


def naive(model: MultimodalLM, prompt: torch.Tensor, steps: int, stops: set[int]) -> list[int]:
    """Greedy, everything anew in every step, by the bare model."""
    made: list[int] = []
    while len(made) < steps and not (made and made[-1] in stops):
        said = torch.tensor([[START, *made]])
        made.append(int(model.llm(input_ids=prompt[None], decoder_input_ids=said).logits[0, -1].argmax()))
    return made


@torch.inference_mode()
def test_cached_generation_of_a_padded_batch_is_uncached_generation_one_by_one(model: MultimodalLM) -> None:
    params = GenerationParams(max_new_tokens=9)
    free = [naive(model, prompt.input_ids, 9, set()) for prompt in prompts()]
    assert len({tuple(row) for row in free}) > 1
    stops = {free[0][3], free[1][5]}
    for given in (set[int](), stops):
        wanted = [naive(model, prompt.input_ids, 9, given) for prompt in prompts()]
        batch = collate(prompts(), 0, side="left")
        assert generate_ids(model, batch, params, sorted(given) or [-1]) == wanted
        for prompt, row in zip(prompts(), wanted, strict=True):
            assert generate_ids(model, collate([prompt], 0, side="left"), params, sorted(given) or [-1]) == [row]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_generation_is_what_transformers_generates(family: str) -> None:
    # transformers' own `generate` makes a T5 a cache of as many layers as its encoder has, and fails on three.
    llm = make_llm(family, **({} if family == "bart" else {"num_decoder_layers": 2}))
    llm.generation_config.forced_eos_token_id = None
    model = MultimodalLM(llm=llm, image_token_id=40).eval()
    prompt = prompts()[0].input_ids[None]
    theirs = llm.generate(input_ids=prompt, max_new_tokens=7, do_sample=False, num_beams=1, eos_token_id=39)
    assert not (theirs == 39).any()  # nothing ended it early
    batch = collate(prompts()[:1], 0, side="left")
    assert generate_ids(model, batch, GenerationParams(max_new_tokens=7), [-1]) == [theirs[0, 1:].tolist()]


@pytest.mark.parametrize("family", ["t5", "t5_v1_1"])
def test_the_loss_in_chunks_is_the_whole_loss(family: str) -> None:
    gradients = []
    for budget in (None, 1):
        model = MultimodalLM(llm=make_llm(family), image_token_id=40).eval()
        model.logits_budget = budget
        out = model(**collate(samples(), 0).inputs())
        assert (out.logits is None) == (budget is not None)
        out.loss_sum.backward()
        gradients.append((out.losses, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    for name, gradient in gradients[0][1].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_a_head_that_is_followed_by_more_is_never_taken_in_chunks() -> None:
    """BART adds a constant to its logits; in chunks it would be lost."""
    model = MultimodalLM(llm=make_llm("bart"), image_token_id=40).eval()
    assert not knows_head(model.llm)
    usual = model(**collate(samples(), 0).inputs()).losses
    model.logits_budget = 1
    out = model(**collate(samples(), 0).inputs())
    assert out.logits is not None
    assert torch.equal(out.losses, usual)


def test_layers_are_counted_on_both_sides() -> None:
    assert layer_counts(make_llm("t5").config) == (2, 3)
    assert layer_counts(make_llm("bart").config) == (2, 2)


def test_media_and_earlier_answers_are_the_encoders() -> None:
    """Placeholders are replaced where the encoder reads; the gradient reaches the projector through it."""
    from polymodal.config import ImageConfig
    from polymodal.media_plan import plan_image

    llm = make_llm("t5")
    projector: Any = build_projector(ProjectorConfig(mm_projector_type="linear"), 6, Size(1, 3), 16)
    model = MultimodalLM(None, projector, llm, 40).eval()
    rules = ImageConfig(
        image_aspect_ratio="squash", tile_size=(8, 8), image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)
    )
    plan = plan_image(Size(8, 8), rules, Size(1, 3))
    features = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[7, 40, 40, 40, 8, 21, 22, 9, 31, 32, 33]])
    labels = torch.tensor([[-100] * 8 + [31, 32, 33]])
    out = model(ids, None, labels, [plan], [0], features=features)

    text = llm.shared(ids[:, :8].masked_fill(ids[:, :8] == 40, 0))
    source = torch.cat((text[:, :1], projector(features), text[:, 4:]), dim=1)
    theirs = llm(inputs_embeds=source, labels=labels[:, 8:])
    torch.testing.assert_close(out.logits, theirs.logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss_sum / out.num_targets, theirs.loss, atol=1e-5, rtol=1e-5)
    out.loss_sum.backward()
    ours = projector.state_dict().keys()
    assert all(parameter.grad.abs().max() > 0 for parameter in projector.parameters()) and ours
    # With another earlier answer the last one is scored otherwise: it is context.
    other = ids.clone()
    other[0, 5:7] = torch.tensor([23, 24])
    assert (model(other, None, labels, [plan], [0], features=features).losses - out.losses).abs().max() > 1e-3


def test_what_cannot_be_done_is_refused() -> None:
    model = MultimodalLM(llm=make_llm("t5"), image_token_id=40)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with pytest.raises(PolymodalError, match="no logits without labels"):
        model(ids)
    with pytest.raises(ConfigError, match=r"batch\.packing: T5ForConditionalGeneration is an encoder-decoder.*none"):
        model(ids, labels=ids, segments=[2, 3])
    with pytest.raises(PolymodalError, match="sample 0: 3 tokens carry a label, but its last answer has 2"):
        model(ids, labels=torch.tensor([[-100, 6, -100, 8, 9]]))
    model.llm.config.decoder_start_token_id = None
    model.llm.generation_config.decoder_start_token_id = None
    with pytest.raises(ConfigError, match=r"does not say which token its decoder starts from; set decoder_start"):
        decoder_start_id(model.llm)


def test_the_kind_is_found_out_and_a_wrong_claim_refused(tiny_t5_folder: Path, tiny_llm_folder: Path) -> None:
    assert load_llm(LLMConfig(model_name_or_path=str(tiny_t5_folder))).config.is_encoder_decoder
    assert not load_llm(LLMConfig(model_name_or_path=str(tiny_llm_folder))).config.is_encoder_decoder
    for folder, claim, kind in ((tiny_t5_folder, False, "an encoder-decoder"), (tiny_llm_folder, True, "a causal")):
        with pytest.raises(ConfigError, match=f"llm.encoder_decoder is {str(claim).lower()}, but .* is {kind}"):
            load_llm(LLMConfig(model_name_or_path=str(folder), encoder_decoder=claim))


def conversation(answers: int) -> list[Message]:
    return [turn for n in range(answers) for turn in (user(f"question {n}?"), assistant(f"answer {n}"))]


def t5_model(folder: Path, **llm: Any) -> tuple[MultimodalLM, Any, ModelConfig]:
    config = ModelConfig(llm=LLMConfig(model_name_or_path=str(folder), **llm))
    return *build_model(config), config


def test_only_the_last_answer_is_trained_and_counted(tiny_t5_folder: Path) -> None:
    model, tokenizer, config = t5_model(tiny_t5_folder)
    processor = Processor(config, tokenizer, None, model.image_token_id, last_answer_only=True)
    usual = Processor(config, tokenizer, None, model.image_token_id)
    for answers in (1, 2, 3):
        sample = processor(conversation(answers))
        trained = tokenizer.decode(sample.input_ids[sample.loss_mask])
        assert trained == f"answer {answers - 1}<|im_end|>"
        assert torch.equal(sample.input_ids, usual(conversation(answers)).input_ids)
        out = model(**collate([sample], processor.pad_id).inputs())
        assert out.num_targets == int(sample.loss_mask[1:].sum())
    silent = [*conversation(2)[:3], replace(conversation(2)[3], train=False)]
    assert not processor(silent).loss_mask.any()
    with pytest.raises(PolymodalError, match="trained on the last answer only"):
        model(**collate([usual(conversation(2))], usual.pad_id).inputs())
    assert processor.with_template("vicuna").last_answer_only


@pytest.mark.parametrize(
    ("mask", "kept"),
    [("0110110", "0000110"), ("0110", "0110"), ("0000", "0000"), ("1101", "0001"), ("11", "11"), ("101010", "000010")],
)
def test_last_run(mask: str, kept: str) -> None:
    found = last_run(torch.tensor([digit == "1" for digit in mask]))
    assert "".join("01"[value] for value in found.tolist()) == kept


def test_a_model_folder_carries_a_t5(tiny_t5_folder: Path, tmp_path: Path) -> None:
    model, tokenizer, config = t5_model(tiny_t5_folder)
    processor = Processor(config, tokenizer, None, model.image_token_id, last_answer_only=True)
    batch = collate([processor(conversation(2))], processor.pad_id)
    for bundled in (True, False):
        folder = tmp_path / f"model_{bundled}"
        if bundled:
            with torch.no_grad():
                model.llm.shared.weight += 0.1
        else:
            model = t5_model(tiny_t5_folder)[0]
        save_model(folder, model, config, tokenizer, llm_trained=bundled)
        assert (folder / "llm" / "model.safetensors").is_file() == bundled
        again = load_model(folder)
        assert torch.equal(again.model(**batch.inputs()).losses, model(**batch.inputs()).losses)
        assert again.config.llm.encoder_decoder is True and read_config(folder).llm.encoder_decoder is True
        # The processor opens without the language model, and still knows what is trained.
        assert load_processor(folder).last_answer_only
        text = json.loads((folder / "polymodal.json").read_text())["config"]["llm"]["model_name_or_path"]
        assert text == ("bundled" if bundled else str(tiny_t5_folder))


def test_the_chat_backend_answers(tiny_t5_folder: Path) -> None:
    model, tokenizer, config = t5_model(tiny_t5_folder)
    backend = LocalBackend(model, tokenizer, config)
    assert backend.processor.last_answer_only
    params = GenerationParams(max_new_tokens=12)
    reply = backend.generate([*conversation(1), user("and now?")], params)
    prompt = backend.processor([*conversation(1), user("and now?")], add_generation_prompt=True)
    made = generate_ids(model, collate([prompt], 0, side="left"), params, backend.processor.template.stop_ids, 259)[0]
    kept = [i for i in made if i not in backend.processor.template.stop_ids]
    assert reply.text == tokenizer.decode(kept, skip_special_tokens=True).lstrip(" ")
    assert reply.usage.completion_tokens == len(made)


def test_the_t5_preset_ends_the_encoders_input_as_t5_does(tiny_t5_folder: Path) -> None:
    model, tokenizer, config = t5_model(tiny_t5_folder)
    config = config.model_copy(update={"template": TemplateConfig(chat_template="t5")})
    processor = Processor(config, tokenizer, None, model.image_token_id, last_answer_only=True)
    prompt = processor([user("Colour?")], add_generation_prompt=True)
    assert tokenizer.decode(prompt.input_ids) == "Colour?" + tokenizer.eos_token
    sample = processor([user("Colour?"), assistant("red")])
    assert torch.equal(sample.input_ids[: len(prompt.input_ids)], prompt.input_ids)
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == "red" + tokenizer.eos_token


@pytest.mark.filterwarnings("ignore:llm.dtype is")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_types(tiny_t5_folder: Path, dtype: str) -> None:
    exact, tokenizer, config = t5_model(tiny_t5_folder)
    short = t5_model(tiny_t5_folder, dtype=dtype)[0]
    processor = Processor(config, tokenizer, None, exact.image_token_id, last_answer_only=True)
    batch = collate([processor(conversation(1)), processor(conversation(2))], processor.pad_id)
    torch.testing.assert_close(
        short(**batch.inputs()).losses, exact(**batch.inputs()).losses, atol=0.3, rtol=0.05, check_dtype=False
    )
    prompt = collate([processor(conversation(1)[:1], add_generation_prompt=True)], 0, side="left")
    assert len(generate_ids(short, prompt, GenerationParams(max_new_tokens=3), [-1])[0]) == 3

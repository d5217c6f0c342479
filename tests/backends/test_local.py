"""LocalBackend: replies, streams, counts, and conversations that are too long."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage
from transformers import DynamicCache

from polymodal.backends import load
from polymodal.backends.base import Reply, TextDelta
from polymodal.backends.local import LocalBackend, shared_beginnings
from polymodal.config import TemplateConfig
from polymodal.errors import PolymodalError
from polymodal.generation.generate import can_share
from polymodal.generation.kept import common_beginning
from polymodal.generation.params import GenerationParams
from polymodal.generation.streaming import Step
from polymodal.messages import Audio, Image, Message, Text, assistant, system, user
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Batch, Sample
from tests.processing.tool_templates import QWEN3


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> LocalBackend:
    return load(tiny_model_folder, "cpu")


def image(width: int = 40, height: int = 30) -> PILImage.Image:
    return PILImage.new("RGB", (width, height), (200, 30, 90))


def test_a_reply_counts_its_tokens(model: LocalBackend) -> None:
    messages = [user(Image(image()), "What?", Image(image(10, 60)))]
    reply = model.generate(messages, GenerationParams(max_new_tokens=7))
    sample = model.processor(messages, add_generation_prompt=True)
    assert reply.usage.prompt_tokens == sample.input_ids.numel()
    assert reply.usage.image_tokens == 2 * 16
    assert reply.usage.completion_tokens == 7 and reply.finish_reason == "length"
    assert reply.message.role == "assistant"
    assert 0 < reply.timing.first_token_s <= reply.timing.total_s


def test_a_stream_joins_to_the_reply(model: LocalBackend) -> None:
    params = GenerationParams(max_new_tokens=20, temperature=3.0, seed=4)
    *deltas, reply = model.stream([user("Hello")], params)
    assert isinstance(reply, Reply) and all(isinstance(delta, TextDelta) for delta in deltas)
    assert "".join(delta.text for delta in deltas) == reply.text == model.generate([user("Hello")], params).text


def test_a_stop_text_ends_the_answer(model: LocalBackend) -> None:
    params = GenerationParams(max_new_tokens=30, temperature=3.0, seed=4)
    text = model.generate([user("Hello")], params).text
    stop = next(c for c in text[3:] if c.isprintable() and c != " ")
    reply = model.generate([user("Hello")], params.model_copy(update={"stop": (stop,)}))
    assert reply.text == text[: text.index(stop)] and reply.finish_reason == "stop"


def test_a_batch_answers_as_one_by_one_and_keeps_its_failures(model: LocalBackend) -> None:
    asked = [[user("Hello")], [], [user(Image(image()), "What?")], [user("Hello, and what is this?")]]
    free = GenerationParams(max_new_tokens=20)
    letter = next(c for c in model.generate(asked[0], free).text[2:] if c.isprintable() and c != " ")
    for params in (free, free.model_copy(update={"stop": (letter,)})):
        together = model.generate_batch(asked, params)
        assert isinstance(together[1], PolymodalError)
        for messages, answer in zip(asked, together, strict=True):
            assert not messages or answer == model.generate(messages, params).text.strip()
    assert model.generate_batch([], free) == []


def test_a_batch_is_padded_on_the_left(model: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []

    def seen(_model: object, batch: Batch, *_: object) -> Iterator[Step]:
        masks.append(batch.attention_mask)
        yield from ()

    monkeypatch.setattr("polymodal.backends.local.stream_ids", seen)
    model.generate_batch([[user("Hello")], [user("Hello, and what is this?")]], GenerationParams())
    assert masks[0][:, -1].all() and masks[0][:, 0].tolist() == [False, True]


def test_the_oldest_text_turns_are_cut_and_media_never(model: LocalBackend) -> None:
    long = "word " * 60
    history = [system("Be short."), user(Image(image()), "first"), assistant("seen"), user(long), assistant("old")]
    history += [user(long[:100]), assistant("new")]
    sample = model.prepare([*history, user("last")], 16)
    text = model.tokenizer.decode([i for i in sample.input_ids.tolist() if i != model.model.image_token_id])
    assert sample.input_ids.numel() <= model.context_length
    assert "first" in text and "last" in text and "Be short." in text and len(sample.plans) == 1
    assert "old" not in text


def test_a_model_answers_after_a_result_and_turns_with_tools_are_never_cut(model: LocalBackend) -> None:
    config = model.config.model_copy(update={"template": TemplateConfig(chat_template=QWEN3)})
    asking = LocalBackend(model.model, model.tokenizer, config)
    tool = {"type": "function", "function": {"name": "clock"}}
    called = Message(
        "assistant", (), tool_calls=({"type": "function", "function": {"name": "clock", "arguments": {}}},)
    )
    chat = [replace(user("Time?"), tools=(tool,)), called, Message("tool", (Text("noon"),))]
    assert asking.generate(chat, GenerationParams(max_new_tokens=3)).usage.completion_tokens == 3
    long = [*chat, assistant("Noon."), user("old " * 90), assistant("old"), user("last")]
    prompt = model.tokenizer.decode(asking.prepare(long, 16).input_ids)
    assert "old" not in prompt and "noon" in prompt and "clock" in prompt and "last" in prompt


def test_media_that_do_not_fit_are_refused(model: LocalBackend) -> None:
    with pytest.raises(PolymodalError, match=r"takes \d+ tokens and the model's context is 512"):
        model.generate([user(*[Image(image())] * 40, "What?")])


def test_an_answer_ends_at_the_last_position(model: LocalBackend) -> None:
    params = GenerationParams(max_new_tokens=10**6)
    reply = model.generate([user("word " * 60)], params)
    assert reply.usage.prompt_tokens + reply.usage.completion_tokens == 512 and reply.finish_reason == "length"
    batch = model.generate_batch([[user("word " * 60)], [user(Image(image()), "word " * 62)]], params)
    assert batch[0] == reply.text.strip() and isinstance(batch[1], str)


def test_a_refusal_names_the_room_for_the_answer(model: LocalBackend) -> None:
    asked = [user("word " * 85)]
    length = model.prepare(asked, 1).input_ids.numel()
    assert 384 < length < 512
    words = f"takes {length} tokens and the model's context is 512, 128 of it kept for the answer; lower max_new_tokens"
    for answer in (lambda: model.generate(asked), lambda: model.generate_batch([asked], GenerationParams())[0]):
        with pytest.raises(PolymodalError, match=words):
            raise answer()
    assert model.generate(asked, GenerationParams(max_new_tokens=512 - length)).finish_reason == "length"


def test_what_cannot_be_answered_is_refused(model: LocalBackend) -> None:
    with pytest.raises(PolymodalError, match="must end with a user message"):
        model.generate([user("Hello"), assistant("Hi")])
    with pytest.raises(PolymodalError, match="must end with a user message"):
        model.generate([])
    with pytest.raises(PolymodalError, match="has no audio encoder"):
        model.generate([user(Audio("a.wav"), "What?")])


def test_ask_takes_a_question_and_images(model: LocalBackend) -> None:
    params = GenerationParams(max_new_tokens=4)
    asked = {"role": "user", "content": [{"type": "image", "image": image()}, {"type": "text", "text": "What?"}]}
    expected = model.generate([user(Image(image()), "What?")], params).text
    assert model.generate([asked], params).text == expected
    assert model.generate("Hello", params).text == model.generate([user("Hello")], params).text
    assert model.generate_batch(["Hello", [asked], None], params)[:2] == [
        model.generate("Hello", params).text.strip(), expected.strip()
    ]  # fmt: skip
    assert model.ask("What?", image(), params=params) == expected


def test_questions_about_the_same_images_read_them_once(model: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = image(), image(10, 60)
    asked = [
        [user(Image(one), "What?")], [user(Image(other), "What is this thing?")], [user(Image(one), "And which?")],
        [user(Image(one), "x", Image(other), "y")], [user(Image(one.copy()), "Why")],
        [user(Image(one), "x", Image(other), "and how many?")],
    ]  # fmt: skip
    params = GenerationParams(max_new_tokens=12)
    alone = [model.generate(messages, params).text.strip() for messages in asked]
    tiles: list[int] = []
    read: list[tuple[int, int]] = []
    encode, run = model.model.encode_images, model.model.llm.forward
    monkeypatch.setattr(model.model, "encode_images", lambda pixels: tiles.append(len(pixels)) or encode(pixels))

    def counted(**given: Any) -> Any:
        if "inputs_embeds" in given:
            read.append(tuple(given["inputs_embeds"].shape[:2]))
        return run(**given)

    monkeypatch.setattr(model.model.llm, "forward", counted)
    assert model.generate_batch(asked, params) == alone and len(set(alone)) > 1
    assert tiles == [1 + 1 + 2]  # of eight in all
    (beginnings, longest), (rows, rest) = read
    assert (beginnings, rows) == (3, 6) and rest < longest


def test_a_batch_with_nothing_in_common_is_read_as_it_is(model: LocalBackend) -> None:
    def samples(*conversations: list[Message]) -> list[Sample]:
        return [model.processor(messages, add_generation_prompt=True) for messages in conversations]

    one, other = [user(Image(image()), "What?")], [user(Image(image(10, 60)), "What?")]
    assert shared_beginnings(samples(one, other)) is None
    assert shared_beginnings(samples(one, one, [user("Hello")])) is None
    assert shared_beginnings(samples([user("What?", Image(image()))], [user("Why?", Image(image()))])) is None
    once, rows, rest = shared_beginnings(samples(one, other, one)) or ([], [], [])
    assert (len(once), rows) == (2, [0, 1, 0]) and not any(sample.plans for sample in rest)
    assert torch.equal(torch.cat((once[0].input_ids, rest[0].input_ids)), samples(one)[0].input_ids)


def reading(model: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """What is read from here on: tiles, and positions of prompts."""
    tiles: list[int] = []
    read: list[int] = []
    encode, run = model.model.encode_images, model.model.llm.forward
    monkeypatch.setattr(model.model, "encode_images", lambda pixels: tiles.append(len(pixels)) or encode(pixels))

    def counted(**given: Any) -> Any:
        if "inputs_embeds" in given:
            read.append(given["inputs_embeds"].shape[1])
        return run(**given)

    monkeypatch.setattr(model.model.llm, "forward", counted)
    return tiles, read


def fresh(model: LocalBackend, keeps_last: bool = True) -> LocalBackend:
    backend = LocalBackend(model.model, model.tokenizer, model.config)
    assert backend.keeps_last
    backend.keeps_last = keeps_last
    return backend


def test_a_conversation_that_goes_on_reads_its_images_once(
    model: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = GenerationParams(max_new_tokens=9)
    plain, keeping = fresh(model, keeps_last=False), fresh(model)
    talk = [user(Image(image()), "What is this?")]
    one = [plain.generate(talk, params).text]
    talks = [[*talk], [*talk, assistant(one[0]), user("And this?", Image(image(10, 60)))], [*talk[:1], assistant("x")]]
    talks[2] += [user("What else?")]
    talks.append([user(Image(image()), "Why?")])
    expected = [plain.generate(messages, params) for messages in talks]
    tiles, read = reading(model, monkeypatch)
    found = [keeping.generate(messages, params) for messages in talks]
    assert [reply.text for reply in found] == [reply.text for reply in expected]
    assert [reply.usage for reply in found] == [reply.usage for reply in expected]
    assert tiles == [1, 1]  # the second talk's second image; the third and fourth go on from the first image
    lengths = [reply.usage.prompt_tokens or 0 for reply in expected]
    assert read[0] == lengths[0] and all(part < whole - 16 for part, whole in zip(read[1:], lengths[1:], strict=True))


def test_other_images_are_read_even_where_the_ids_are_the_same(
    model: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = GenerationParams(max_new_tokens=4)
    other = PILImage.new("RGB", (40, 30), (0, 220, 10))
    asked = [[user("a", Image(image()), "?")], [user("a", Image(other), "?")], [user("a", Image(other), Image(other))]]
    plain = [fresh(model, keeps_last=False).generate(messages, params).text for messages in asked]
    keeping = fresh(model)
    tiles, read = reading(model, monkeypatch)
    assert [keeping.generate(messages, params).text for messages in asked] == plain
    # With a second image beside it, the first is made ready by the rules for several: `media_keys` say whether alike.
    assert tiles == [1, 1, 1] and len(read) == 3
    one, two = (keeping.processor(messages) for messages in asked[:2])
    assert torch.equal(one.input_ids, two.input_ids) and common_beginning(one, two) == one.slots[0].start
    # One id is left over even of the same prompt, and no medium is cut.
    assert common_beginning(one, one) == len(one.input_ids) - 1
    cut = replace(one, input_ids=one.input_ids[: one.slots[0].start + 3])
    assert common_beginning(cut, one) == one.slots[0].start


def test_what_was_read_with_other_weights_is_not_used(model: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    keeping, params = fresh(model), GenerationParams(max_new_tokens=6)
    talk = [user(Image(image()), "What?")]
    before = keeping.generate(talk, params).text
    weight = model.model.llm.model.layers[0].self_attn.v_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(torch.randn_like(weight))
        tiles, _ = reading(model, monkeypatch)
        assert keeping.generate(talk, params).text == fresh(model, keeps_last=False).generate(talk, params).text
        assert tiles == [1, 1]
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert keeping.generate(talk, params).text == before


def test_a_stream_that_was_closed_is_gone_on_from(model: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    keeping, params = fresh(model), GenerationParams(max_new_tokens=20)
    talk = [user(Image(image()), "What?")]
    stream = keeping.stream(talk, params)
    next(stream)
    stream.close()
    tiles, read = reading(model, monkeypatch)
    assert keeping.generate(talk, params).text == fresh(model, keeps_last=False).generate(talk, params).text
    assert tiles == [1] and read[0] == 1  # the second is the plain one's
    # A failure in the middle of the layers leaves caches of several lengths, which are thrown away.
    layer = model.model.llm.model.layers[1]
    with monkeypatch.context() as patched:
        patched.setattr(layer, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            keeping.generate([*talk, assistant("x"), user("y")], params)
    assert not keeping.prefixes
    assert keeping.generate(talk, params).text == fresh(model, keeps_last=False).generate(talk, params).text


def test_threads_do_not_share_what_was_read(model: LocalBackend) -> None:
    params = GenerationParams(max_new_tokens=12)
    talks = [[user(Image(image(40, 30 + number)), "What?")] for number in range(4)]
    plain = [fresh(model, keeps_last=False).generate(talk, params).text for talk in talks]
    keeping = fresh(model)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: keeping.generate(talks[number % 4], params).text, range(24)))
    assert found == plain * 6


def test_drafts_that_an_answer_stopped_before_are_not_kept(
    model: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping, talk, ahead = fresh(model), [user("Hello, hello, hello, hello")], []
    plain = fresh(model, keeps_last=False)
    keeping.looks_up = True
    real = DynamicCache.crop
    monkeypatch.setattr(DynamicCache, "crop", lambda self, n: ahead.append(n) or real(self, n))
    for events in range(1, 40):
        keeping.forget()
        stream = keeping.stream(talk, GenerationParams(max_new_tokens=200))
        said = "".join(next(stream).text for _ in range(events))  # type: ignore[union-attr]  # none is the last
        ahead.clear()
        stream.close()
        last = keeping.prefixes.kept[0]
        assert last.cache.get_seq_length() == len(last.sample.input_ids)
        if ahead:  # the cache held a draft
            break
    assert ahead
    more, params = [*talk, assistant(said), user("And?")], GenerationParams(max_new_tokens=20)
    assert keeping.generate(more, params).text == plain.generate(more, params).text


def test_a_batch_frees_what_was_kept_and_encoder_decoders_keep_nothing(model: LocalBackend) -> None:
    keeping, params = fresh(model), GenerationParams(max_new_tokens=2)
    keeping.generate([user("Hello")], params)
    assert len(keeping.prefixes) == 1
    keeping.generate_batch([[user("Hello")]], params)
    assert not keeping.prefixes
    keeping.generate([user("Hello")], params)
    keeping.forget()
    assert not keeping.prefixes
    seq2seq = LocalBackend(encoder_decoder(model), model.tokenizer, model.config)
    assert not seq2seq.keeps_last
    seq2seq.looks_up = True  # which goes without
    assert seq2seq.generate([user("Hello")], params).text == seq2seq.generate([user("Hello")], params).text
    assert not seq2seq.prefixes


def encoder_decoder(model: LocalBackend) -> MultimodalLM:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    return MultimodalLM(
        llm=T5ForConditionalGeneration(T5Config(vocab_size=300, **sizes)).eval(),
        image_token_id=model.model.image_token_id,
    )


def test_layers_that_forget_share_nothing(model: LocalBackend) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    assert can_share(model.model)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    llm = MistralForCausalLM(MistralConfig(**small, num_key_value_heads=2, vocab_size=300, sliding_window=8))
    assert not can_share(MultimodalLM(llm=llm, image_token_id=299))

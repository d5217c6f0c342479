"""TransformersBackend: every family's own greedy text, order of parts, typed control tokens, batches, refusals."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file

from polymodal.backends import load
from polymodal.backends.base import Reply, TextDelta
from polymodal.backends.transformers import TransformersBackend, open_transformers
from polymodal.backends.transformers.folder import open_processor
from polymodal.data.readers.conversations import Record
from polymodal.errors import CheckpointError, ConfigError, PolymodalError
from polymodal.evaluation.tasks.questions import ask_records
from polymodal.generation.params import GenerationParams
from polymodal.messages import Audio, Image, Message, Video, assistant, system, user
from polymodal.safety.model_folder import check_folder

FAMILIES = ["llava_next", "idefics3", "smolvlm", "qwen2_5_vl", "internvl", "gemma3"]
SHORT = GenerationParams(max_new_tokens=8)

Folders = Callable[[str], Path]


def noise(height: int, width: int, seed: int = 0) -> PILImage.Image:
    rng = np.random.default_rng(seed)
    return PILImage.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


WIDE, TALL = noise(40, 90), noise(70, 50, 1)


@pytest.fixture(scope="module")
def opened(tiny_vlm: Folders) -> Callable[[str], TransformersBackend]:
    models: dict[str, TransformersBackend] = {}

    def open_family(family: str) -> TransformersBackend:
        if family not in models:
            models[family] = open_transformers(check_folder(tiny_vlm(family)), "cpu")
        return models[family]

    return open_family


Opened = Callable[[str], TransformersBackend]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_that_of_the_models_own_generate(family: str, opened: Opened) -> None:
    model = opened(family)
    parts = [
        {"type": "text", "text": "Look: "},
        {"type": "image", "image": WIDE},
        {"type": "image", "image": TALL},
        {"type": "text", "text": "What?"},
    ]
    chat = [{"role": "system", "content": [{"type": "text", "text": "Be short."}]}, {"role": "user", "content": parts}]
    inputs = model.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    config = model.model.config
    media = [config.image_token_id, *([config.video_token_id] if "qwen" in family else [])]  # which we never make
    theirs = model.model.generate(**inputs, max_new_tokens=16, do_sample=False, suppress_tokens=media)[0]
    theirs = theirs[inputs["input_ids"].shape[1] :]
    messages = [system("Be short."), user("Look: ", Image(WIDE), Image(TALL), "What?")]
    *deltas, reply = model.stream(messages, GenerationParams(max_new_tokens=16))
    assert isinstance(reply, Reply) and all(isinstance(delta, TextDelta) for delta in deltas)
    assert reply.text == model.tokenizer.decode(theirs, skip_special_tokens=True).lstrip(" ")
    assert "".join(delta.text for delta in deltas) == reply.text
    assert reply.usage.prompt_tokens == inputs["input_ids"].numel()
    placeholders = inputs["input_ids"] == config.image_token_id
    assert reply.usage.image_tokens == placeholders.sum() > 0
    assert reply.usage.completion_tokens == len(theirs)
    assert 0 < reply.timing.first_token_s <= reply.timing.total_s


@pytest.mark.parametrize("family", FAMILIES)
def test_the_image_and_its_place_matter(family: str, opened: Opened) -> None:
    def prompt(*messages: Message) -> list[int]:
        return list(opened(family).prepare(messages, 4)["input_ids"][0])

    before, after = prompt(user(Image(WIDE), "What?")), prompt(user("What?", Image(WIDE)))
    assert before != after and sorted(before) == sorted(after)
    one, other = (
        opened(family).prepare([user(Image(p), "What?")], 4)["pixel_values"] for p in (WIDE, noise(40, 90, 2))
    )
    assert one.shape == other.shape and not torch.equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_as_one_by_one_and_keeps_its_failures(family: str, opened: Opened) -> None:
    model = opened(family)
    asked = [
        [user(Image(WIDE), "What?")], [user("Hello")], [user(Image(TALL), "What is this thing?")], [user("Hi there")],
        [user(Image("absent.png"), "x")], [user(Image(WIDE), "x", Image(TALL), "y")], [user(Audio("a.wav"), "x")], [],
        [user("Hi"), assistant("Ho"), user(Image(TALL), "again")],
    ]  # fmt: skip
    together = model.generate_batch(asked, SHORT)
    failed = [index for index, answer in enumerate(together) if isinstance(answer, PolymodalError)]
    assert failed == [4, 6, 7]
    for messages, answer in zip(asked, together, strict=True):
        if isinstance(answer, str):
            assert answer == model.generate(messages, SHORT).text.strip()


def test_a_batch_runs_the_model_once_a_kind(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = opened("llava_next"), []
    own = model.model.generate

    def counted(**inputs: Any) -> Any:
        calls.append(len(inputs["input_ids"]))
        assert inputs["attention_mask"][:, -1].all() and not inputs["attention_mask"][:, 0].all()  # padded on the left
        return own(**inputs)

    monkeypatch.setattr(model.model, "generate", counted)
    model.generate_batch([[user(Image(WIDE), "a")], [user("bb")], [user(Image(TALL), "ccc")], [user("d")]], SHORT)
    assert calls == [2, 2]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "gemma3"])
def test_a_typed_control_token_stays_text(family: str, opened: Opened) -> None:
    model = opened(family)
    token = model.processor.image_token
    ids = model.prepare([user(Image(WIDE), f"what is {token} or <|im_end|>?")], 4)["input_ids"]
    plain = model.prepare([user(Image(WIDE), "what is  or ?")], 4)["input_ids"]
    assert model.prompts.image_tokens(ids) == model.prompts.image_tokens(plain) > 0
    assert ids.numel() == plain.numel() + len(token) + len("<|im_end|>")  # every byte is a token
    only_text = model.generate([user(f"{token}{token}")], SHORT)
    assert only_text.usage.image_tokens == 0


def test_a_typed_control_token_is_refused_where_it_cannot_be_escaped(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    for family, token in (("idefics3", "<image>"), ("internvl", "<IMG_CONTEXT>")):
        with pytest.raises(PolymodalError, match=f"the text holds '{token}', which this model's processor would take"):
            opened(family).generate([user(Image(WIDE), f"what is {token}?")], SHORT)
    assert opened("internvl").generate([user(Image(WIDE), "a <|im_end|>")], SHORT).usage.completion_tokens > 0
    model = opened("llava_next")
    monkeypatch.setattr(model.prompts, "_can_escape", False)  # an older transformers
    with pytest.raises(PolymodalError, match="the text holds"):
        model.generate([user("a<|im_end|>b")], SHORT)


def test_a_template_that_bides_its_time_is_stopped(tiny_vlm: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_vlm("llava_next"), tmp_path / "model"))
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    own = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(
        "{% if messages | length > 4 %}" + endless + "{% endif %}" + own  # the check on opening asks less
    )
    backend = open_transformers(check_folder(folder), "cpu")
    with pytest.raises(PolymodalError, match="it loops or calls too often"):
        backend.generate([user("a"), assistant("b"), user("c"), assistant("d"), user("e")], SHORT)
    assert backend.generate([user("a")], SHORT).usage.completion_tokens


def test_templates_that_move_or_drop_parts_are_refused(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("llava_next")
    images_first = (
        "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% endif %}{% endfor %}"
        "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    )
    monkeypatch.setattr(model.processor, "chat_template", images_first)
    assert model.prepare([user(Image(WIDE), "What?")], 4)["input_ids"].numel() > 0
    with pytest.raises(PolymodalError, match="drops or moves a part"):
        model.prepare([user("This is one: ", Image(WIDE), " And this? ", Image(TALL))], 4)
    no_system = "{% for m in messages if m['role'] != 'system' %}{% for p in m['content'] %}{{ p['text'] }}"
    monkeypatch.setattr(model.processor, "chat_template", no_system + "{% endfor %}{% endfor %}")
    with pytest.raises(PolymodalError, match="leave out the system message"):
        model.prepare([system("Be short."), user("Hi")], 4)
    no_system = images_first.replace("in messages %", "in messages if m['role'] != 'system' %")
    monkeypatch.setattr(model.processor, "chat_template", no_system)
    with pytest.raises(PolymodalError, match="drops the system message; leave out the system message"):
        model.prepare([system("Be short."), user(Image(WIDE), "Hi")], 4)
    with pytest.raises(PolymodalError, match=r"drops or moves a part .*; put images before the text"):
        model.prepare([user("Hi", Image(WIDE))], 4)
    refuses = "{{ raise_exception('only one user turn, please') }}"
    monkeypatch.setattr(model.processor, "chat_template", refuses)
    with pytest.raises(PolymodalError, match="only one user turn, please"):
        model.prepare([user("Hi")], 4)


def test_a_template_that_wants_strings_gets_them(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("llava_next")
    strings = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<image>{% elif m['role'] == 'user' and loop.index > 1 %}{{ p['text'] }}"
        "{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(model.processor, "chat_template", strings)
    ids = model.prepare([user("Hi"), assistant("Ho"), user(Image(WIDE), "and?")], 4)["input_ids"][0]
    assert model.tokenizer.decode(ids[ids != model.prompts.seen_ids[0]]) == "HiHoand?"


def test_settings_mean_the_same_as_for_our_own_models(opened: Opened) -> None:
    model, messages = opened("llava_next"), [user(Image(WIDE), "What?")]
    hot = GenerationParams(max_new_tokens=12, temperature=3.0, seed=4)
    first = model.generate(messages, hot)
    assert first.text == model.generate(messages, hot).text
    assert first.text != model.generate(messages, hot.model_copy(update={"seed": 5})).text
    before = torch.random.get_rng_state()
    model.generate(messages, hot)
    assert torch.equal(before, torch.random.get_rng_state())  # the seed is this answer's own
    only_one = GenerationParams(max_new_tokens=12, temperature=3.0, top_k=1)
    assert model.generate(messages, only_one).text == model.generate(messages, GenerationParams(max_new_tokens=12)).text
    stop = next(c for c in first.text[2:] if c.isprintable() and c != " ")
    cut = model.generate(messages, hot.model_copy(update={"stop": (stop,)}))
    assert cut.text == first.text[: first.text.index(stop)] and cut.finish_reason == "stop"
    assert first.finish_reason == "length"


def test_the_models_own_end_tokens_stop_it(tiny_vlm: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_vlm("llava_next"), folder)
    model = open_transformers(check_folder(folder), "cpu")
    made = model.model.generate(**model.prepare([user(Image(WIDE), "What?")], 4), max_new_tokens=6, do_sample=False)
    third = int(made[0, -4])
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [third]}))
    reply = open_transformers(check_folder(folder), "cpu").generate(
        [user(Image(WIDE), "What?")], GenerationParams(max_new_tokens=6)
    )
    assert reply.finish_reason == "stop" and reply.usage.completion_tokens <= 3


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_the_templates_end_token_stops_it(family: str, tiny_vlm: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_vlm(family), tmp_path / "model"))
    start, end = (f"<|{name}|>" for name in ("endoftext", "im_end"))
    change_json(folder / "tokenizer_config.json", eos_token=start)  # as in folders that were tuned from a base model
    model = open_transformers(check_folder(folder), "cpu")
    change_json(folder / "generation_config.json", eos_token_id=model.tokenizer.eos_token_id)
    model = open_transformers(check_folder(folder), "cpu")
    assert set(model.stop_ids) == set(model.tokenizer.convert_tokens_to_ids([start, end]))
    with torch.no_grad():
        model.model.get_output_embeddings().weight.zero_()[model.tokenizer.convert_tokens_to_ids(end)] = 1e-3
        hidden = model.model.get_output_embeddings()
        hidden.register_forward_pre_hook(lambda _, args: (torch.ones_like(args[0]),))
    reply = model.generate([user("Hello")], SHORT)
    assert reply.finish_reason == "stop" and reply.usage.completion_tokens == 1


LEFT_OUT: dict[str, Any] = {
    "stop_strings": ["<|endofturn|>"], "num_beams": 4, "num_return_sequences": 2, "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1, "min_new_tokens": 5, "max_time": 1e-4, "penalty_alpha": 0.6, "guidance_scale": 1.5,
    "prompt_lookup_num_tokens": 3, "dola_layers": "high", "forced_eos_token_id": 70, "bad_words_ids": [[5]],
    "watermarking_config": {"greenlist_ratio": 0.25, "bias": 2.0}, "suppress_tokens": [80, 81], "token_healing": True,
    "exponential_decay_length_penalty": [2, 1.2], "sequence_bias": [[[5], -10.0]], "chat_format": "chatml",
    "begin_suppress_tokens": [1], "forced_bos_token_id": 9, "min_p": 0.5, "typical_p": 0.2,
    "encoder_no_repeat_ngram_size": 2,
}  # fmt: skip


def test_generation_settings_of_the_folder_do_not_leak(tiny_vlm: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_vlm("qwen2_5_vl"), tmp_path / "model"))
    messages = [user(Image(WIDE), "What?")]
    silent = {"max_length": 20, "cache_implementation": "static", "use_cache": False, "num_beams": 1, "top_k": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = open_transformers(check_folder(folder), "cpu").generate(messages, SHORT)
        change_json(folder / "generation_config.json", **silent, repetition_penalty=1.0, suppress_tokens=None)
        models = [open_transformers(check_folder(folder), "cpu")]
    change_json(folder / "generation_config.json", **LEFT_OUT)
    names = ", ".join(sorted(LEFT_OUT))
    with pytest.warns(UserWarning, match=f"generation_config.json: left out {names}; only temperature, top_p, top_k"):
        models.append(open_transformers(check_folder(folder), "cpu"))
    for model in models:
        reply = model.generate(messages, SHORT)
        assert (reply.text, reply.usage, reply.finish_reason) == (expected.text, expected.usage, "length")
    change_json(folder / "generation_config.json", eos_token_id=["<|im_end|>"])
    with pytest.raises(CheckpointError, match=r"eos_token_id is .* ids of tokens are whole numbers"):
        open_transformers(check_folder(folder), "cpu")


def test_the_folders_sampling_is_for_callers_without_settings(tiny_vlm: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_vlm("qwen2_5_vl"), tmp_path / "model"))
    asked = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
    change_json(folder / "generation_config.json", **asked)
    assert (
        open_transformers(check_folder(folder), "cpu").defaults == GenerationParams()
    )  # unless it says that it samples
    change_json(folder / "generation_config.json", do_sample=True)
    model = open_transformers(check_folder(folder), "cpu")
    assert model.defaults == GenerationParams(**asked)
    assert model.generate([user("Hi")], SHORT).text == model.generate([user("Hi")], SHORT).text  # greedy, as asked
    change_json(folder / "generation_config.json", temperature=-1.0)
    with pytest.raises(PolymodalError, match=r"generation_config.json: temperature: .* greater than or equal to 0"):
        open_transformers(check_folder(folder), "cpu")


def test_closing_a_stream_stops_the_model(opened: Opened) -> None:
    model = opened("llava_next")
    stream = model.stream([user("Hello")], GenerationParams(max_new_tokens=400))
    assert isinstance(next(stream), TextDelta)
    stream.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "generate" for thread in threading.enumerate())
    assert model.generate([user("Hello")], SHORT).usage.completion_tokens == 8


def test_too_long_a_conversation_loses_old_text_and_never_media(opened: Opened) -> None:
    model, long = opened("idefics3"), "word " * 30
    history = [
        user(Image(WIDE), "first"),
        assistant("seen"),
        user(long),
        assistant("old"),
        user(long),
        assistant("new"),
    ]
    ids = model.prepare([*history, user("last " * 20)], 16)["input_ids"][0]
    text = model.tokenizer.decode(ids)
    assert len(ids) <= model.context_length == 512
    assert "first" in text and "last" in text and "old" not in text and model.prompts.image_tokens(ids) > 0
    with pytest.raises(PolymodalError, match=r"takes \d+ tokens and the model's context is 512"):
        model.generate([user(*[Image(WIDE)] * 30, "What?")], SHORT)


def test_an_answer_ends_at_the_last_position(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("llava_next")
    asked = [[user("Hello")], [user("Hello there")], [user("Hi")]]
    length = model.prepare(asked[1], 1)["input_ids"].shape[1]
    monkeypatch.setattr(model, "context_length", 2 * length)
    params = GenerationParams(max_new_tokens=10**6)
    replies = [model.generate(messages, params) for messages in asked]
    assert {r.usage.prompt_tokens + r.usage.completion_tokens for r in replies} == {2 * length}
    assert {r.finish_reason for r in replies} == {"length"}
    assert model.generate_batch(asked, params) == [r.text.strip() for r in replies]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 60)])
def test_odd_images_are_answered(family: str, size: tuple[int, int], opened: Opened) -> None:
    assert opened(family).generate([user(Image(noise(*size)), "x")], SHORT).usage.image_tokens > 0


def test_what_cannot_be_asked_is_refused(opened: Opened) -> None:
    model = opened("llava_next")
    assert model.generate("Hello", SHORT).text == model.generate([user("Hello")], SHORT).text
    assert model.generate_batch(["Hello", "Hi"], SHORT)[0] == model.generate("Hello", SHORT).text.strip()
    for messages, reason in [
        ([], "must end with a user message"),
        ([user("a"), assistant("b")], "must end with a user message"),
        (
            [user(Audio("a.wav"), "What?")],
            "audio parts cannot be given to this model, which takes text and image parts",
        ),
        ([assistant(Video("a.mp4")), user("What?")], "must stand in a user's message"),
        ([user("half \ud83d")], "half of a surrogate pair"),
        ([user(Image("absent.png"), "What?")], "no such file"),
    ]:
        with pytest.raises(PolymodalError, match=reason):
            model.generate(messages, SHORT)


def test_an_error_of_the_model_reaches_the_caller(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("llava_next")

    def fail(**_: Any) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(model.model, "generate", fail)
    with pytest.raises(ZeroDivisionError, match="boom"):
        model.generate([user("Hello")], SHORT)


def test_eval_asks_in_batches(opened: Opened) -> None:
    def record(image: PILImage.Image | str) -> Record:
        messages = (user(Image(image), "Is it red?"), assistant("Yes"))
        return Record(id="r", messages=messages, kind="exists", source="test", extra={"answers": ["Yes"]})

    records = [record(WIDE), record("absent.png"), record(TALL), record(PILImage.new("RGB", (9, 9), (128, 128, 128)))]
    alone, together = (ask_records(opened("idefics3"), records, batch_size=size).samples for size in (1, 4))
    assert alone == together
    assert [item.error is None for item in together] == [True, False, True, True]
    assert together[1].answer is None and together[1].score == 0.0
    assert together[3].answer == together[3].blind


def test_load_opens_a_folder_of_transformers(tiny_vlm: Folders) -> None:
    model = load(tiny_vlm("idefics3"), "cpu")
    assert isinstance(model, TransformersBackend) and model.name == str(tiny_vlm("idefics3"))
    assert model.ask("What?", WIDE, params=SHORT) == model.generate([user(Image(WIDE), "What?")], SHORT).text
    with pytest.raises(ConfigError, match="an address and a key are for endpoints"):
        load(tiny_vlm("idefics3"), base_url="http://localhost/v1")


def test_images_go_through_pillow_without_torchvision(tiny_vlm: Folders) -> None:
    for family in FAMILIES:
        assert type(open_processor(tiny_vlm(family)).image_processor).__name__.endswith("Pil")


def test_smolvlm_sees_what_its_own_processor_makes(
    opened: Opened, tiny_vlm: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without num2words Idefics3's processor stands in; with something in its place SmolVLM's own can be made."""
    from transformers.models.smolvlm import processing_smolvlm

    from polymodal.backends.transformers import folder as transformers_folder

    messages = [user("Two: ", Image(WIDE), Image(TALL), "What?")]
    monkeypatch.setattr(transformers_folder, "IMAGES_ONLY", {})
    monkeypatch.setitem(sys.modules, "num2words", types.ModuleType("num2words"))
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    own = open_processor(tiny_vlm("smolvlm"))
    assert type(own).__name__ == "SmolVLMProcessor"
    text = "<|im_start|>user\nTwo: <image><image>What?<|im_end|>\n<|im_start|>assistant\n"
    theirs = own(text=[text], images=[[WIDE, TALL]], return_tensors="pt")
    ours = opened("smolvlm").prepare(messages, 4)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_folders_that_cannot_be_opened_say_why(tiny_vlm: Folders, tiny_llm_folder: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(tiny_vlm("idefics3"), tmp_path / name))

    with pytest.raises(CheckpointError, match="'llama' is not one that transformers takes images and text with"):
        load(tiny_llm_folder, "cpu")
    folder = broken("no_template")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        load(folder, "cpu")
    folder = broken("no_processor")
    (folder / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match="processor"):
        load(folder, "cpu")
    folder = broken("no_weights")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be loaded .*no file named model\.safetensors"):
        load(folder, "cpu")
    folder = broken("wide")
    settings = json.loads((folder / "config.json").read_text())
    change_json(folder / "config.json", text_config={**settings["text_config"], "num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match=r"tensors do not fit .* missing"):
        load(folder, "cpu")
    change_json(folder / "config.json", text_config={**settings["text_config"], "num_hidden_layers": 1})
    with pytest.raises(CheckpointError, match=r"tensors do not fit .* not expected"):
        load(folder, "cpu")
    folder = broken("nan")
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        load(folder, "cpu")
    folder = broken("text")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load(folder, "cpu")
    folder = broken("untyped")
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="model_type is missing"):
        load(folder, "cpu")


def test_code_and_pickles_in_a_folder_are_never_run(tiny_vlm: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_vlm("idefics3"), tmp_path / "evil"))
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    change_json(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    with pytest.raises(PolymodalError):
        load(folder, "cpu")
    folder = Path(shutil.copytree(tiny_vlm("idefics3"), tmp_path / "pickle"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(PolymodalError):
        load(folder, "cpu")
    assert not mark.exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fingerprint_tells_weights_apart(family: str, tiny_vlm: Folders) -> None:
    one, same = (open_transformers(check_folder(tiny_vlm(family)), "cpu") for _ in range(2))
    assert one.fingerprint() == same.fingerprint() and set(one.settings()) == {"preprocessing", "template"}
    with torch.no_grad():
        next(same.model.parameters()).add_(0.01)
    assert one.fingerprint() != same.fingerprint()

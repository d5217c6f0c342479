"""Captioners (BLIP, GIT, an encoder with a decoder): the stock class's own ids, alone, from a text, as an answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from polymodal.backends import load
from polymodal.cli import main
from polymodal.errors import CheckpointError, PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Image, assistant, system, user

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", "a", "picture", "of", "what", "colour", "is", "it", "?"]
WORDS += [f"{letter}{number}" for letter in "bcdefg" for number in range(8)]
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
TEXT = {**SMALL, "vocab_size": len(WORDS), "max_position_embeddings": 64, "pad_token_id": 0}
TOWER = {**SMALL, "image_size": 16, "patch_size": 8, "initializer_range": 0.02}
PARAMS = GenerationParams(max_new_tokens=12)
STOCK: dict[str, str] = {
    "caption": "BlipForConditionalGeneration",
    "question": "BlipForQuestionAnswering",
    "git": "GitForCausalLM",
    "encoder-decoder": "VisionEncoderDecoderModel",
    "match": "BlipForImageTextRetrieval",
}

Folders = Callable[[str], Path]


def make(kind: str) -> Any:
    import transformers as hf

    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    if kind == "git":
        return hf.GitForCausalLM(hf.GitConfig(**{**TEXT, **ends}, vision_config=TOWER))
    if kind == "encoder-decoder":
        decoder = hf.BertConfig(**{**TEXT, **ends}, is_decoder=True, add_cross_attention=True)
        config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**TOWER), decoder)
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 3
        return hf.VisionEncoderDecoderModel(config)
    # As published: the start [DEC] behind BERT's words, an end of generation that the class overrides with [SEP].
    text = {**TEXT, "bos_token_id": 4, "sep_token_id": 3, "eos_token_id": 2, "encoder_hidden_size": 16}
    config = hf.BlipConfig(text_config={**text, "projection_dim": 16}, vision_config=TOWER, image_text_hidden_size=8)
    return {**STOCK, "match": "BlipForImageTextRetrieval"} and getattr(
        hf, {**STOCK, "match": "BlipForImageTextRetrieval"}[kind]
    )(config)


def write_parts(folder: Path, kind: str) -> None:
    from transformers import BertTokenizer, BlipImageProcessorPil, CLIPImageProcessorPil, ViTImageProcessorPil

    size = {"height": 16, "width": 16}
    more = {"git": {"crop_size": size, "size": {"shortest_edge": 16}}}.get(kind, {"size": size})
    images = {"git": CLIPImageProcessorPil, "encoder-decoder": ViTImageProcessorPil}.get(kind, BlipImageProcessorPil)
    images(**more).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, bos_token="[DEC]").save_pretrained(folder)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    made: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("captioner") / kind
            torch.manual_seed(1)
            model = make(kind).eval()
            with torch.no_grad():  # sharp, and the image matters
                for name, parameter in model.named_parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(400 if "patch_embedding" in name else 8)
            model.save_pretrained(folder)
            write_parts(folder, kind)
            made[kind] = folder
        return made[kind]

    return folder_of


def image(seed: int = 0) -> PILImage.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return PILImage.fromarray(colours.repeat(12, 0).repeat(15, 1))


def stock_ids(folder: Path, kind: str, shown: PILImage.Image, text: str | None) -> tuple[Any, list[int], int]:
    """What the documentation of each class does, and how many of its ids are not the answer's."""
    import transformers as hf

    model = getattr(hf, STOCK[kind]).from_pretrained(folder).eval()
    tokenizer, images = (
        hf.AutoTokenizer.from_pretrained(folder),
        hf.AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )
    inputs: dict[str, Any] = {"pixel_values": images(shown, return_tensors="pt").pixel_values}
    given = 1
    if text is not None:
        if kind in ("caption", "question"):
            encoded = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            inputs |= dict(encoded)
            given = 1 if kind == "question" else encoded["input_ids"].shape[1] - 1
        else:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            inputs["input_ids" if kind == "git" else "decoder_input_ids"] = torch.tensor([[2, *ids]])
            given = 1 + len(ids)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, num_beams=1)[0].tolist()
    return tokenizer, ids[given:], given


CASES = [(kind, text) for kind in ("caption", "git", "encoder-decoder") for text in (None, "a picture of")]


@pytest.mark.parametrize(("kind", "text"), [*CASES, ("question", "what colour is it?")])
def test_the_text_is_that_of_the_stock_class(kind: str, text: str | None, captioner: Folders) -> None:
    model = load(captioner(kind), "cpu")
    said = set()
    for seed in range(4):
        tokenizer, ids, given = stock_ids(captioner(kind), kind, image(seed), text)
        reply = model.generate([user(Image(image(seed)), *([text] if text else []))], PARAMS)
        assert reply.text == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert reply.usage.completion_tokens == len(ids)
        assert reply.finish_reason == ("stop" if ids[-1] == 3 else "length")
        if kind != "question":
            assert reply.usage.prompt_tokens - (kind == "caption" and text is not None) >= given - 1
        said.add(reply.text)
    assert len(said) > 1 and all(said)  # the image matters


def test_what_a_captioner_cannot_do_is_one_line(captioner: Folders) -> None:
    model, question = load(captioner("caption"), "cpu"), load(captioner("question"), "cpu")
    shown = Image(image())
    for messages, said in [
        ([user("hello")], "one image at a time, and was given none"),
        ([user(shown, shown)], "was given image, image"),
        ([system("Be short."), user(shown)], "knows no conversation"),
        ([user(shown), assistant("a"), user("and?")], "knows no conversation"),
        ([user(shown, "a [SEP] b")], r"holds '\[SEP\]', which this model would take for control"),
        ([user(shown, "a " * 100)], "context is 64"),
    ]:
        with pytest.raises(PolymodalError, match=said):
            model.generate(messages, PARAMS)
    with pytest.raises(PolymodalError, match="answers questions and captions nothing"):
        question.generate([user(shown)], PARAMS)
    with pytest.raises(CheckpointError, match="polymodal embed"):
        load(captioner("match"), "cpu")


def test_an_encoder_decoder_that_cannot_begin_is_refused(captioner: Folders, tmp_path: Path) -> None:
    shutil.copytree(captioner("encoder-decoder"), tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        said = json.loads((tmp_path / "model" / name).read_text())
        for part in (said, said.get("decoder", {})):
            for key in ("bos_token_id", "decoder_start_token_id"):
                part[key] = None
        (tmp_path / "model" / name).write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="set decoder_start_token_id"):
        load(tmp_path / "model", "cpu")


def test_streams_batches_and_sampling_are_those_of_any_backend(captioner: Folders) -> None:
    model = load(captioner("caption"), "cpu")
    *deltas, reply = model.stream([user(Image(image()))], PARAMS)
    assert "".join(delta.text for delta in deltas) == reply.text
    asked = [[user(Image(image(1)))], [user("hello")], [user(Image(image(2)), "a picture of")]]
    one, fault, other = model.generate_batch(asked, PARAMS)
    assert isinstance(fault, PolymodalError)
    assert [one, other] == [model.generate(asked[i], PARAMS).text.strip() for i in (0, 2)]
    assert model.generate([user(Image(image()))]).usage.completion_tokens <= 64  # the decoder's positions
    hot = GenerationParams(max_new_tokens=12, temperature=2.0, seed=3)
    assert model.generate(asked[0], hot).text == model.generate(asked[0], hot).text != one


def test_the_command_line_needs_no_prompt(
    captioner: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image().save(tmp_path / "a.png")
    ask = ["generate", "--model", str(captioner("caption")), "--max-new-tokens", "12", "--device", "cpu"]
    for text in (None, "a picture of"):
        tokenizer, ids, _ = stock_ids(captioner("caption"), "caption", image(), text)
        more = [] if text is None else ["--prompt", text]
        assert main([*ask, "--image", str(tmp_path / "a.png"), *more]) == 0
        assert capsys.readouterr().out.strip() == tokenizer.decode(ids, skip_special_tokens=True)
    assert main(ask) == 2
    assert "give --prompt, --image or both" in capsys.readouterr().err


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has no chat template, and a processor that puts the image before the text by itself."""
    import transformers as hf

    folder = tmp_path_factory.mktemp("paligemma")
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=hf.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).backend_tokenizer,
        bos_token="[CLS]", eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
    )  # fmt: skip
    images = hf.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    processor = hf.PaliGemmaProcessor(images, tokenizer)
    processor.save_pretrained(folder)
    text = {**SMALL, "vocab_size": len(tokenizer), "head_dim": 8, "num_key_value_heads": 1, "bos_token_id": 2}
    config = hf.PaliGemmaConfig(
        text_config={**text, "eos_token_id": 3, "pad_token_id": 0, "model_type": "gemma"},
        vision_config={**TOWER, "model_type": "siglip_vision_model"},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=16,
    )
    torch.manual_seed(0)
    hf.PaliGemmaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("text", [None, "what is it"])
def test_a_processor_that_puts_the_image_itself_needs_no_template(text: str | None, paligemma: Path) -> None:
    model: Any = load(paligemma, "cpu")
    inputs = model.processor(images=image(), text=text or "", return_tensors="pt")
    never = [model.model.config.image_token_id, *range(len(model.tokenizer), model.model.config.text_config.vocab_size)]
    ids = model.model.generate(**inputs, max_new_tokens=12, do_sample=False, suppress_tokens=never)
    written = ids[0][inputs["input_ids"].shape[1] :]
    asked = [user(Image(image()), *([text] if text else []))]
    reply = model.generate(asked, PARAMS)
    assert reply.text == model.tokenizer.decode(written, skip_special_tokens=True)
    assert (reply.usage.prompt_tokens, reply.usage.image_tokens) == (inputs["input_ids"].numel(), 4)
    assert model.generate_batch([asked, asked], PARAMS) == [reply.text.strip()] * 2
    with pytest.raises(PolymodalError, match="knows no conversation"):
        model.generate([user("hello")], PARAMS)
    with pytest.raises(PolymodalError, match="'<image>', which this model's processor would take for control"):
        model.generate([user(Image(image()), "<image> what")], PARAMS)


def test_of_the_folders_generation_settings_the_end_and_sampling_are_taken(captioner: Folders, tmp_path: Path) -> None:
    shutil.copytree(captioner("git"), tmp_path / "model")
    said = {"eos_token_id": 3, "bos_token_id": 2, "num_beams": 4, "min_length": 9, "do_sample": True, "top_k": 5}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(said))
    with pytest.warns(UserWarning, match="left out min_length, num_beams"):
        model: Any = load(tmp_path / "model", "cpu")
    assert (model.defaults.temperature, model.defaults.top_k) == (1.0, 5)
    plain = load(captioner("git"), "cpu").generate([user(Image(image()))], PARAMS)
    assert model.generate([user(Image(image()))], PARAMS).text == plain.text


@pytest.mark.parametrize("kind", ["caption", "question", "git", "encoder-decoder"])
def test_a_captioner_can_be_scored(kind: str, captioner: Folders, private_cache: Path) -> None:
    from polymodal.evaluation.runner import run_task
    from polymodal.evaluation.task import Example, Task

    model = load(captioner(kind), "cpu")
    assert model.fingerprint() == load(captioner(kind), "cpu").fingerprint()
    ask = ["a dog"] if kind == "question" else []
    examples = [Example(str(n), (user(Image(image(n)), *ask),), ("a dog",)) for n in range(2)]
    task = Task("toy", "", "exact", ("",), lambda _folder, _split: (), "", 12)
    run = run_task(model, task, examples)
    assert [s.answer for s in run.samples] == [model.generate(e.messages, PARAMS).text.strip() for e in examples]
    assert run.batch_size == 1
    told = [replace(e, messages=(user(*e.messages[0].media, "Describe it."),)) for e in examples]
    captioned = run_task(model, replace(task, captions=True), told).samples
    assert ([s.answer for s in captioned] == [s.answer for s in run.samples]) == (kind != "question")
    assert captioned[0].prompt == ("<image>Describe it." if kind == "question" else "<image>")

"""Tiny random models of transformers' own classes, saved as they are published, and the comparison with ours.

Test modules get everything here through the fixture `hf`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from polymodal.backends.local import LocalBackend
from polymodal.checkpoints.model_folder import Loaded, load_model, save_model
from polymodal.generation.generate import generate_ids
from polymodal.generation.params import GenerationParams
from polymodal.interop.huggingface.load import load_hf
from polymodal.messages import Image, assistant, user
from polymodal.processing.collate import collate
from polymodal.safety.model_folder import check_folder

QUESTION = "What is this?"
SHAPES = [(75, 100), (31, 150), (140, 60)]
"""Height and width of the images: one wide, one very wide, one tall."""
CORPUS = ["USER: What is this? ASSISTANT: a picture of a cat", "<|im_start|>user What do you see here? A dog, a tree."]


def image(number: int) -> PILImage.Image:
    """A blurred random image."""
    height, width = SHAPES[number]
    noise = np.random.default_rng(height * 1000 + width).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3))
    return PILImage.fromarray(noise.astype(np.uint8)).resize((width, height), PILImage.Resampling.BICUBIC)


def byte_tokenizer(specials: Sequence[str], *, bos: str | None, eos: str, adds_bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as of Llama 3, Qwen 2 and OPT; the beginning is put in by the tokenizer where asked."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=list(specials))
    )
    return _finish(raw, bos, eos, adds_bos)


def spiece_tokenizer(specials: Sequence[str], *, bos: str, eos: str, scheme: str) -> PreTrainedTokenizerFast:
    """A BPE with a mark for spaces, as of Llama and Mistral: "legacy" marks after special tokens too, "first" once."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)  # no piece goes over a space
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ["<unk>", *specials, *[f"<0x{byte:02X}>" for byte in range(256)]]
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, special_tokens=names))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if scheme == "legacy":
        raw.pre_tokenizer = pre_tokenizers.Sequence([])
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    data = json.loads(raw.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    return _finish(Tokenizer.from_str(json.dumps(data)), bos, eos, True, unk_token="<unk>")


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """A Unigram whose every text ends with `</s>`, as of T5."""
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    raw.train_from_iterator(CORPUS * 4, trainer)
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece in [CLS] ... [SEP], as of a Q-Former."""
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    raw.train_from_iterator(CORPUS, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def _finish(raw: Tokenizer, bos: str | None, eos: str, adds_bos: bool, **more: str) -> PreTrainedTokenizerFast:
    if adds_bos and bos is not None:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos, pad_token=eos, **more)


def add_placeholder(tokenizer: PreTrainedTokenizerFast) -> int:
    """Give a tokenizer the token that stands for an image."""
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids("<image>"))


def lively(model: Any) -> Any:
    """Move every weight away from its start, so that none could be left out unseen, and sharpen the logits."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def older(
    folder: Path,
    target: Path,
    rename: Callable[[str], str],
    extra: dict[str, torch.Tensor],
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Save a folder again as older versions wrote it: other names, several files and an index."""
    target.mkdir()
    for path in folder.iterdir():
        if path.is_dir() or path.suffix == ".safetensors":
            continue
        (target / path.name).write_bytes(path.read_bytes())
    for path in folder.glob("*/*"):
        (target / path.parent.name).mkdir(exist_ok=True)
        (target / path.parent.name / path.name).write_bytes(path.read_bytes())
    given = load_file(folder / "model.safetensors") if tensors is None else tensors
    found = {rename(name): tensor for name, tensor in given.items()} | extra
    names = sorted(found)
    files = [f"model-{number + 1:05d}-of-00003.safetensors" for number in range(3)]
    for number, file in enumerate(files):
        save_file({name: found[name].clone() for name in names[number::3]}, target / file)
    weight_map = {name: files[place % 3] for place, name in enumerate(names)}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def backend(folder: Path) -> LocalBackend:
    """Load a published folder and put it behind the chat protocol."""
    return as_backend(load_hf(check_folder(folder)))


def as_backend(loaded: Loaded) -> LocalBackend:
    """Put a loaded model behind the chat protocol."""
    return LocalBackend(loaded.model, loaded.tokenizer, loaded.config)


@torch.inference_mode()
def saved_as_ours(folder: Path, target: Path, rows: list[int]) -> Loaded:
    """Load a published folder, save it as a folder of ours, load that, and compare all that decides an answer."""
    first = load_hf(check_folder(folder))
    save_model(target, first.model, first.config, first.tokenizer, history=first.history)
    second = load_model(target)
    before, after = as_backend(first), as_backend(second)
    question = [user(*(Image(image(i)) for i in rows), QUESTION)]
    samples = [ours.processor(question, add_generation_prompt=True) for ours in (before, after)]
    assert samples[0].input_ids.tolist() == samples[1].input_ids.tolist()
    assert torch.equal(tiles(samples[0]), tiles(samples[1]))
    assert before.processor.template.stop_ids == after.processor.template.stop_ids
    assert second.history == first.history
    same_weights(first, second)
    params = GenerationParams(max_new_tokens=6)
    assert before.generate(question, params).text == after.generate(question, params).text
    return second


def same_weights(first: Loaded, second: Loaded) -> None:
    """The same names and values; parts that nothing reads included."""
    one, other = first.model.state_dict(), second.model.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def tiles(sample: Any) -> torch.Tensor:
    """All tiles of a sample."""
    return torch.cat(list(sample.pixels))


@torch.inference_mode()
def same_chat(theirs: Any, inputs: Callable[[list[int]], Any], ours: LocalBackend, rows: list[list[int]]) -> None:
    """Compare a batch of ours with the stock model row by row: ids, tiles, logits and greedy tokens.

    Args:
        theirs: The stock model, with a causal language model.
        inputs: The stock processor: numbers of images to its output for one conversation.
        ours: The same model, loaded.
        rows: The images of each conversation.
    """
    samples = [
        ours.processor([user(*(Image(image(i)) for i in row), QUESTION)], add_generation_prompt=True) for row in rows
    ]
    batch = collate(samples, ours.processor.pad_id, side="left")
    logits = ours.model(**{**batch.inputs(), "labels": None}).logits
    params = GenerationParams(max_new_tokens=10)
    stop = list(ours.processor.template.stop_ids)
    made = generate_ids(ours.model, batch, params, stop, len(ours.tokenizer))
    for number, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        expected = inputs(row)
        assert sample.input_ids.tolist() == expected["input_ids"][0].tolist()
        pixels = expected["pixel_values"]
        torch.testing.assert_close(tiles(sample), real_tiles(pixels, sample), rtol=0, atol=1e-5)
        reference = theirs(**expected).logits[0]
        real = batch.attention_mask[number]
        assert float((logits[number][real] - reference).abs().max()) < 1e-4
        assert float(reference.abs().max()) > 1e-2
        whole = theirs.generate(
            **expected, max_new_tokens=10, do_sample=False, suppress_tokens=[ours.model.image_token_id]
        )[0].tolist()
        answer = whole[-(len(whole) - len(sample.input_ids)) :] if len(whole) > 10 else whole
        assert made[number] == answer[: len(made[number])]
        assert len(made[number]) == 10 or made[number][-1] in stop


def real_tiles(pixels: Any, sample: Any) -> torch.Tensor:
    """The stock processor's tiles without the rows of zeros that fill its batch."""
    if isinstance(pixels, list):
        return torch.cat([torch.as_tensor(np.asarray(one)) for one in pixels])
    if pixels.ndim == 4:
        return pixels
    counts = [plan.num_tiles for plan in sample.plans]
    return torch.cat([one[:count] for one, count in zip(pixels, counts, strict=True)])


@torch.inference_mode()
def same_answer(theirs: Any, inputs: Callable[[list[int]], Any], ours: LocalBackend, rows: list[list[int]]) -> None:
    """As `same_chat`, for an encoder-decoder: what is read, the logits of a given answer, and greedy tokens."""
    answers = ["a cat", "a dog, a tree"]
    messages = [[user(*(Image(image(i)) for i in row), QUESTION)] for row in rows]
    asked = [ours.processor(turns, add_generation_prompt=True) for turns in messages]
    taught = [
        ours.processor([*turns, assistant(answer)])
        for turns, answer in zip(messages, answers[: len(rows)], strict=True)
    ]
    out = ours.model(**collate(taught, ours.processor.pad_id).inputs())
    batch = collate(asked, ours.processor.pad_id, side="left")
    stop = list(ours.processor.template.stop_ids)
    made = generate_ids(ours.model, batch, GenerationParams(max_new_tokens=10), stop, len(ours.tokenizer))
    start = 0
    for number, (row, sample) in enumerate(zip(rows, taught, strict=True)):
        expected = inputs(row)
        labels = sample.input_ids[sample.loss_mask]
        assert sample.input_ids[~sample.loss_mask].tolist() == expected["input_ids"][0].tolist()
        assert asked[number].input_ids.tolist() == expected["input_ids"][0].tolist()
        assert labels.tolist() == ours.tokenizer(answers[number])["input_ids"]
        reference = theirs(**expected, labels=labels[None]).logits[0]
        found = out.logits[start : start + len(labels)]
        start += len(labels)
        assert float((found - reference).abs().max()) < 1e-4
        whole = theirs.generate(
            **expected, max_new_tokens=10, do_sample=False, suppress_tokens=[ours.model.image_token_id]
        )[0].tolist()[1:]
        assert made[number] == whole[: len(made[number])]


@pytest.fixture(scope="session")
def hf() -> SimpleNamespace:
    """Everything above."""
    names = (
        "QUESTION image byte_tokenizer spiece_tokenizer unigram_tokenizer word_tokenizer add_placeholder lively "
        "older backend as_backend saved_as_ours same_weights same_chat same_answer"
    )
    return SimpleNamespace(**{name: globals()[name] for name in names.split()})

"""A language model as a graph of ONNX Runtime: the same logits and answers, alone, in batches and turn after turn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image as PILImage

from polymodal import Audio, Image, user
from polymodal.backends import load
from polymodal.backends.local import LocalBackend
from polymodal.checkpoints.model_folder import save_model
from polymodal.config import LLMConfig, ModelConfig
from polymodal.errors import CheckpointError, ConfigError, PolymodalError
from polymodal.generation.generate import stream_ids
from polymodal.generation.params import GenerationParams
from polymodal.messages import assistant
from polymodal.modeling import onnx_llm
from polymodal.modeling.build import build_model
from polymodal.modeling.encoders.audio import DeferredAudioEncoder
from polymodal.modeling.onnx_llm import OnnxCache, OnnxLLM, make_graph
from polymodal.processing.collate import collate
from polymodal.speech import AudioChunk, wav_bytes
from tests.conftest import make_byte_tokenizer, write_tiny_llm

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
KINDS = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "qwen2": {},
    "mistral": {"sliding_window": None},
    "gemma": {"head_dim": 16},
}
PARAMS = GenerationParams(max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(senses_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose heads are wide enough for the graph."""
    where = tmp_path_factory.mktemp("fast")
    write_tiny_llm(where / "llm", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    config = senses_config.model_copy(update={"llm": LLMConfig(model_name_or_path=str(where / "llm"))})
    torch.manual_seed(2)
    model, tokenizer = build_model(config)
    save_model(where / "model", model, config, tokenizer, llm_trained=True, vision_trained=True)
    return where / "model"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def fast(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> LocalBackend:
    """That model as a float32 graph."""
    monkeypatch.setenv("POLYMODAL_CACHE", str(cache))
    backend = load(folder, "cpu", quantize="float32")
    assert isinstance(backend, LocalBackend) and isinstance(backend.model.llm, OnnxLLM)
    return backend


def image(red: int, size: tuple[int, int] = (40, 30)) -> Image:
    return Image(PILImage.new("RGB", size, (red, 40, 90)))


QUESTIONS: list[Any] = [
    [user("Say something.")],
    [user(image(10), "What is this?")],
    [user(image(10), "And what is its colour, if it has one?")],
    [user(image(200), image(90), "Compare.")],
    [user("x")],
]


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "llama")]
)
def test_a_graph_s_logits_are_the_model_s(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path))
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind]})
    torch.manual_seed(0)
    llm = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 300, (1, 30))
    with torch.inference_mode():
        wanted = llm(input_ids=ids).logits[0].float()
    for bits, most in ((32, 1e-4), (8, 0.05), (4, 0.5)) if kind == "llama" else ((32, 1e-4),):
        graph = OnnxLLM(make_graph(llm, bits, make_byte_tokenizer())).eval()
        monkeypatch.setattr(onnx_llm, "CHUNK", 7)
        held, embeds = OnnxCache(graph), graph.embed_tokens(ids)
        found = [graph.read(embeds[:, :20], held), *(graph.read(embeds[:, n : n + 1], held) for n in range(20, 30))]
        off = (torch.cat(found) - wanted[19:]).abs().max()
        assert off <= most * max(1.0, float(wanted.abs().max())), (bits, off)
        assert make_graph(llm, bits, None) == onnx_llm.graph_folder(onnx_llm.weights_key(llm), bits)  # made once


def test_answers_are_the_model_s_alone_and_in_batches(fast: LocalBackend, folder: Path) -> None:
    plain = load(folder, "cpu")
    alone = [plain.generate(question, PARAMS).text for question in QUESTIONS]
    assert len(set(alone)) > 2
    assert [fast.generate(question, PARAMS).text for question in QUESTIONS] == alone
    assert fast.generate_batch(QUESTIONS, PARAMS) == plain.generate_batch(QUESTIONS, PARAMS)
    same = [[user(image(10), text)] for text in ("What?", "Which colour has it?", "Why?")]  # read the image once
    assert fast.generate_batch(same, PARAMS) == plain.generate_batch(same, PARAMS)
    drawn = GenerationParams(max_new_tokens=12, temperature=0.9, seed=5)
    assert fast.generate(QUESTIONS[1], drawn).text == plain.generate(QUESTIONS[1], drawn).text


def test_the_next_turn_reads_only_what_is_new(
    fast: LocalBackend, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, read = load(folder, "cpu"), []
    real = OnnxLLM._run
    monkeypatch.setattr(OnnxLLM, "_run", lambda self, e, *rest: read.append(e.shape[1]) or real(self, e, *rest))
    first = [user(image(10, (120, 90)), "What is this? " * 8)]
    said = fast.generate(first, PARAMS)
    begun = read[0]
    talk = [*first, assistant(said.text), user("Why?")]
    del read[:]
    assert fast.generate(talk, PARAMS).text == plain.generate(talk, PARAMS).text
    assert read[0] < begun / 2
    other = [user(image(10, (120, 90)), "What is this? " * 4 + "No.")]
    assert fast.generate(other, PARAMS).text == plain.generate(other, PARAMS).text


def test_drafts_are_read_at_once_and_forgotten_where_they_are_wrong(
    fast: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = OnnxLLM._run
    monkeypatch.setattr(OnnxLLM, "_run", lambda self, e, *rest: read.append(e.shape[1]) or real(self, e, *rest))
    batch, params = collate([fast.prepare(QUESTIONS[1], 60)], 0, "left"), GenerationParams(max_new_tokens=60)

    def run(known: list[int] | None) -> list[int | None]:
        read.clear()
        prompt = None if known is None else torch.tensor(known)
        return [row[0] for row, _ in stream_ids(fast.model, batch, params, [], 300, prompt=prompt)]

    made = run(None)
    assert len(read) == len(made) == 60
    assert run(made) == made and len(read) < 20
    wrong = [token if n % 6 else 3 for n, token in enumerate(made)]
    assert run(wrong) == made and len(read) < 50 and sum(read[1:]) > 60


def test_files_that_did_not_change_are_not_read_again(
    fast: LocalBackend, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("polymodal.modeling.build.load_llm", lambda *_: pytest.fail("the weights were read"))
        again = load(folder, "cpu", quantize="float32")
    assert again.generate(QUESTIONS[1], PARAMS).text == fast.generate(QUESTIONS[1], PARAMS).text
    assert isinstance(again, LocalBackend) and isinstance(again.model.audio_encoder, DeferredAudioEncoder)
    tone = AudioChunk(np.sin(np.arange(16_000) / 9).astype(np.float32), 16_000, "")
    sound = [user(Audio(wav_bytes([tone])), "What is heard?")]
    assert again.generate(sound, PARAMS).text == load(folder, "cpu").generate(sound, PARAMS).text
    assert again.fingerprint() == fast.fingerprint() != load(folder, "cpu").fingerprint()
    eight = load(folder, "cpu", quantize="int8")
    assert isinstance(eight, LocalBackend) and eight.model.llm.bits == 8 and eight.fingerprint() != fast.fingerprint()
    assert fast.looks_up and not eight.looks_up  # rounded activations differ with how many are read at once


def test_what_a_graph_cannot_do_is_refused(fast: LocalBackend, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be trained"):
        fast.model.train()
    with pytest.raises(ConfigError, match="next logits alone"):
        fast.model.llm(inputs_embeds=torch.zeros(1, 2, 64))
    with pytest.raises(CheckpointError, match="its language model is a graph"):
        save_model(tmp_path / "saved", fast.model, fast.config, fast.tokenizer)
    with pytest.raises(ConfigError, match="int4 is for the CPU"):
        load(folder, "cuda", quantize="int4")


def test_a_graph_that_computes_something_else_is_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path))
    export = onnx_llm._export

    def wrong(source: Path, target: Path, work: Path) -> None:
        llm = transformers.AutoModelForCausalLM.from_pretrained(source)
        with torch.no_grad():
            llm.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        llm.save_pretrained(source)
        export(source, target, work)

    monkeypatch.setattr(onnx_llm, "_export", wrong)
    with pytest.raises(CheckpointError, match="computes something else"):
        load(folder, "cpu", quantize="int4")
    with pytest.raises(CheckpointError, match=r"computes something else.*tried before; remove .*\.refused to retry"):
        load(folder, "cpu", quantize="int4")
    assert not [path for path in (tmp_path / "onnx").iterdir() if path.name.endswith("bit")]
    with pytest.warns(UserWarning, match="computes something else.*used without"):
        assert load(folder, "cpu", quantize="int8").ask("x", params=PARAMS) is not None
    assert not isinstance(load(folder, "cpu", quantize="auto").model.llm, OnnxLLM)  # too small to pay
    monkeypatch.setattr(onnx_llm, "WORTH", (0, 10**9))
    with pytest.warns(UserWarning, match="used without"):
        plain = load(folder, "cpu", quantize="auto")
    assert isinstance(plain, LocalBackend) and not isinstance(plain.model.llm, OnnxLLM)


def test_a_graph_that_nobody_asked_for_needs_no_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(onnx_llm, "WORTH", (0, 10**9))
    with pytest.warns(UserWarning, match="cannot be written .*used without"):
        assert load(folder, "cpu", quantize="auto").ask("x", params=PARAMS) is not None
    with pytest.raises(PolymodalError, match="cannot be written"):
        load(folder, "cpu", quantize="int8")


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(
        ConfigError, match=r"need onnxruntime-genai, which is not installed: pip install 'polymodal\[fast\]'"
    ):
        load(folder, "cpu", quantize="int4")

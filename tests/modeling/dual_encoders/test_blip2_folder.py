"""Stage 1 of BLIP-2 to its folder and back, from a recipe and a BERT, on to stage 2, and as transformers has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polymodal.config import ImageConfig, QFormerConfig, VisionConfig
from polymodal.errors import CheckpointError, ConfigError
from polymodal.modeling.dual_encoders.blip2_stage1 import Blip2Stage1
from polymodal.modeling.dual_encoders.blip2_stage1_folder import (
    MODEL_TYPE,
    build_blip2,
    from_retrieval,
    load_blip2,
    to_retrieval,
    train_wordpiece,
)
from polymodal.modeling.dual_encoders.config import Blip2ModelConfig, ObjectiveConfig
from polymodal.modeling.dual_encoders.registry import build_pair_model, load_pair_model
from polymodal.modeling.projectors.qformer_files import load_qformer

Make = Callable[..., Any]
OBJECTIVE = ObjectiveConfig(type="blip2")
IMAGE = ImageConfig(tile_size=(28, 28), image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))


def saved(model: Blip2Stage1, folder: Path) -> Path:
    folder.mkdir()
    model.vision_encoder.save(folder.parent / "tower")
    model.vision = model.vision.model_copy(update={"vision_tower": str(folder.parent / "tower")})
    model.save(folder)
    return folder


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(bool((left[name] == right[name]).all()) for name in left)


def test_what_is_written_is_read(tmp_path: Path, blip2_model: Make, blip2_batch: Make) -> None:
    model = blip2_model().eval()
    folder = saved(model, tmp_path / "final")
    again = load_pair_model(str(folder), model.image, OBJECTIVE)
    assert isinstance(again, Blip2Stage1) and again.label_smoothing == 0.1
    assert same_weights(model, again.eval())
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab() and again.tokenizer.bos_token == "[DEC]"
    batch = blip2_batch(model)
    assert bool((model.embed(batch).image == again.embed(batch).image).all())
    assert not (folder / "vision").exists()


def test_a_trained_tower_is_written_too(tmp_path: Path, blip2_model: Make) -> None:
    model = blip2_model()
    model.vision_encoder.requires_grad_(True)
    folder = saved(model, tmp_path / "final")
    for left in (tmp_path / "tower").iterdir():
        left.unlink()
    again = load_blip2(str(folder), None, OBJECTIVE)
    assert again.vision.vision_tower == "bundled" and same_weights(model, again)
    (tmp_path / "next").mkdir()
    again.vision_encoder.requires_grad_(False)
    again.save(tmp_path / "next")
    assert same_weights(model, load_blip2(str(tmp_path / "next"), None, OBJECTIVE))


def test_damaged_folders_are_refused(tmp_path: Path, blip2_model: Make) -> None:
    model = blip2_model()
    folder = saved(model, tmp_path / "final")
    document = json.loads((folder / "config.json").read_text())
    assert document["model_type"] == MODEL_TYPE
    (folder / "config.json").write_text(json.dumps({**document, "stage1": {"image": {}}}))
    with pytest.raises(CheckpointError, match="key 'vision' is missing"):
        load_blip2(str(folder), None, OBJECTIVE)
    (folder / "config.json").write_text(json.dumps({**document, "model_type": "bert"}))
    with pytest.raises(CheckpointError, match="not a stage 1 of BLIP-2"):
        load_blip2(str(folder), None, OBJECTIVE)
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "heads.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"heads.safetensors is missing"):
        load_blip2(str(folder), None, OBJECTIVE)
    with torch.no_grad():
        model.itm_head.bias.fill_(torch.nan)
    (tmp_path / "nan").mkdir()
    with pytest.raises(CheckpointError, match=r"itm_head.bias holds NaN"):
        model.save(tmp_path / "nan")


def recipe_model(tmp_path: Path, blip2_model: Make, **changes: Any) -> Blip2ModelConfig:
    model = blip2_model()
    model.vision_encoder.save(tmp_path / "tower")
    model.tokenizer.save_pretrained(tmp_path / "tokenizer")
    values: dict[str, Any] = {
        "family": "blip2",
        "vision": {
            "vision_tower": str(tmp_path / "tower"),
            "type": "eva_clip",
            "mm_vision_select_layer": -1,
            "mm_vision_select_feature": "cls_patch",
        },
        "image": IMAGE,
        "qformer": {
            "num_query_tokens": 3,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
        },
        "tokenizer": str(tmp_path / "tokenizer"),
        "projection_dim": 8,
    }
    return Blip2ModelConfig(**{**values, **changes})


def test_a_recipe_builds_it(tmp_path: Path, blip2_model: Make) -> None:
    model = build_pair_model(recipe_model(tmp_path, blip2_model), ObjectiveConfig(type="blip2", label_smoothing=0.2))
    assert isinstance(model, Blip2Stage1) and model.label_smoothing == 0.2
    assert model.qformer.config.vocab_size == len(model.tokenizer) == len(model.words)
    assert model.qformer.config.pad_token_id == model.tokenizer.pad_token_id
    assert model.max_text == 32 and model.features_shape == (5, 24)
    assert float(model.qformer.query_tokens.detach().std()) < 0.05
    with pytest.raises(ConfigError, match="objective 'clip' is none for a Q-Former"):
        build_pair_model(recipe_model(tmp_path, blip2_model), ObjectiveConfig(type="clip"))
    with pytest.raises(ConfigError, match="give `tokenizer`"):
        recipe_model(tmp_path, blip2_model, tokenizer=None)


def test_words_start_from_a_language_model(tmp_path: Path, blip2_model: Make, tiny_llm_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = recipe_model(tmp_path, blip2_model, words=str(tiny_llm_folder))
    model = build_pair_model(settings, ObjectiveConfig(type="blip2"))
    assert isinstance(model, Blip2Stage1)
    table, known = model.words.detach(), AutoModelForCausalLM.from_pretrained(str(tiny_llm_folder))
    vocab = {p: i for p, i in model.tokenizer.get_vocab().items() if i not in model.tokenizer.all_special_ids}
    tokens: Any = known.get_input_embeddings().weight.detach()
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(str(tiny_llm_folder))
    rows, means = [], []
    for piece, row in vocab.items():
        text = piece[2:] if piece.startswith("##") else f" {piece}"
        means.append(tokens[words(text)["input_ids"]].mean(0))
        rows.append(table[row])
    ours, theirs = torch.stack(rows), torch.stack(means)
    assert float(ours.std()) == pytest.approx(model.qformer.config.initializer_range, rel=1e-3)
    # Angles between words are those of the language model, as far as 16 of 32 directions tell.
    centred = theirs - theirs.mean(0)
    similar = [torch.nn.functional.normalize(one, dim=1) for one in (ours, centred)]
    pairs = torch.stack([(one @ one.T).flatten() for one in similar])
    assert float(torch.corrcoef(pairs)[0, 1]) > 0.8

    fresh = build_pair_model(recipe_model(tmp_path, blip2_model), ObjectiveConfig(type="blip2"))
    assert isinstance(fresh, Blip2Stage1) and not torch.equal(fresh.words, model.words)
    with pytest.raises(ConfigError, match="has word embeddings of its own"):
        recipe_model(tmp_path, blip2_model, words="smollm2", bert="folder")
    wide = {**settings.qformer.model_dump(), "hidden_size": 64}
    with pytest.raises(ConfigError, match="has embeddings of width 32, the Q-Former needs 64"):
        build_pair_model(
            recipe_model(tmp_path, blip2_model, words=str(tiny_llm_folder), qformer=wide), ObjectiveConfig(type="blip2")
        )


def test_a_bert_gives_all_it_has(tmp_path: Path, blip2_model: Make) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    words = {token: n for n, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog"])}
    BertTokenizerFast(vocab=words).save_pretrained(tmp_path / "bert")
    torch.manual_seed(3)
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=7,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=24,
            initializer_range=0.5,
        )
    )
    torch.nn.init.normal_(bert.cls.predictions.bias)
    bert.save_pretrained(tmp_path / "bert")
    model = build_blip2(recipe_model(tmp_path, blip2_model, bert=str(tmp_path / "bert"), tokenizer=None), OBJECTIVE)
    assert len(model.tokenizer) == 8 and model.words.shape == (8, 16)
    assert bool((model.words[:7] == bert.bert.embeddings.word_embeddings.weight).all())
    layers = model.qformer.transformer.encoder.layer
    for number, layer in enumerate(layers):
        theirs = bert.bert.encoder.layer[number]
        assert bool((layer.intermediate.dense.weight == theirs.intermediate.dense.weight).all())
        assert bool((layer.intermediate_query.dense.weight == theirs.intermediate.dense.weight).all())
    ids = torch.tensor([[2, 5, 6, 3]])
    head = model.lm_head(torch.ones(1, 16), model.words)[:, :7]
    assert (head - bert.cls(torch.ones(1, 16))).abs().max() < 1e-5
    # Three of its four layers, without token types: those of the first type are all that BERT adds.
    with torch.no_grad():
        bert.bert.embeddings.token_type_embeddings.weight.zero_()
        del bert.bert.encoder.layer[3:]
        read = bert.bert.eval()(input_ids=ids).last_hidden_state
        ours = model.eval().qformer.encode(None, ids, torch.ones_like(ids).bool())
    assert (read - ours).abs().max() < 1e-5


def make_retrieval(vocabulary: int, queries: int = 4) -> Any:
    from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerConfig, Blip2VisionConfig

    torch.manual_seed(7)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            initializer_range=0.2,
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=40,
            use_qformer_text_input=True,
            initializer_range=0.3,
        ).to_dict(),
        num_query_tokens=queries,
        image_text_hidden_size=8,
    )
    model = Blip2ForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # theirs start with queries and biases of zero
    return model


def compare(ours: Blip2Stage1, theirs: Any, batch: Any) -> None:
    """Both of its forwards against ours, on every image with every text of as many."""
    with torch.no_grad():
        mask = batch.attention_mask.long()
        embedded = ours.embed(batch)
        contrast = theirs(batch.pixel_values, batch.input_ids, mask)
        close = torch.einsum("iqd,td->iqt", embedded.image, embedded.text).amax(1)
        assert (contrast.logits_per_image - close).abs().max() <= 1e-5
        assert (contrast.text_embeds - embedded.text).abs().max() <= 1e-5
        assert (contrast.image_embeds - embedded.image).abs().max() <= 1e-5
        matching = theirs(batch.pixel_values, batch.input_ids, mask, use_image_text_matching_head=True)
        logits = ours.match_queries(ours.encode(batch.pixel_values), batch.input_ids, batch.attention_mask).mean(1)
        assert (matching.logits_per_image - logits).abs().max() <= 1e-5
        assert float(logits.std()) > 0.01


def test_a_retrieval_model_of_transformers_scores_the_same(blip2_model: Make, blip2_batch: Make) -> None:
    tiny = blip2_model()
    theirs = make_retrieval(len(tiny.tokenizer))
    ours = from_retrieval(theirs, tiny.tokenizer, tiny.vision, tiny.image)
    compare(ours, theirs, blip2_batch(ours))
    back = to_retrieval(ours)
    assert same_weights(back, theirs)


def test_ours_scores_the_same_as_a_retrieval_model_of_transformers(
    tmp_path: Path, blip2_model: Make, blip2_batch: Make
) -> None:
    from transformers import Blip2ForImageTextRetrieval

    ours = blip2_model(dropout=0.1).eval()
    to_retrieval(ours).save_pretrained(tmp_path)
    compare(ours, Blip2ForImageTextRetrieval.from_pretrained(tmp_path).eval(), blip2_batch(ours))


def test_other_towers_have_no_retrieval_model(blip2_model: Make) -> None:
    model = blip2_model()
    model.vision = model.vision.model_copy(update={"mm_vision_select_layer": -2})
    with pytest.raises(ConfigError, match="reads an eva_clip tower at layer -1"):
        to_retrieval(model)


def test_stage_2_starts_from_it_without_the_text_path(tmp_path: Path, blip2_model: Make, blip2_batch: Make) -> None:
    model = blip2_model().eval()
    folder = saved(model, tmp_path / "final")
    whole, blind = load_qformer(folder), load_qformer(folder, text=False)
    assert same_weights(whole, model.qformer)
    kept = blind.state_dict()
    assert not any(name.startswith("embeddings.") or ".intermediate." in name for name in kept)
    assert all(bool((tensor == model.qformer.state_dict()[name]).all()) for name, tensor in kept.items())
    features = model.encode(blip2_batch(model).pixel_values)
    assert (blind.queries(features) - model.qformer.queries(features)).abs().max() <= 1e-6
    assert isinstance(whole.config, QFormerConfig)


def test_the_tokenizer_may_not_be_larger_than_the_qformer(blip2_model: Make) -> None:
    model = blip2_model()
    larger = train_wordpiece(["a whole other set of words, longer than before: xylophone"] * 2)
    theirs = make_retrieval(len(larger) - 1)
    with pytest.raises(ConfigError, match=f"the tokenizer has {len(larger)} tokens"):
        from_retrieval(theirs, larger, VisionConfig(**model.vision.model_dump()), model.image)

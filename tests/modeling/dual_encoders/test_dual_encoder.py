"""Two encoders as stock models: the same features as transformers, what a fresh one starts from, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polymodal.config import ImageConfig
from polymodal.errors import PolymodalError
from polymodal.media_plan import Size, plan_image
from polymodal.modeling.dual_encoders.base import PairBatch
from polymodal.modeling.dual_encoders.clip_siglip import image_processor
from polymodal.modeling.dual_encoders.config import ObjectiveConfig, PairModelConfig
from polymodal.modeling.dual_encoders.losses import clip_loss
from polymodal.modeling.dual_encoders.registry import build_pair_model, load_pair_model
from polymodal.modeling.encoders.pixel_norm import PixelNorm
from polymodal.processing.image_config_hf import image_config_from_hf
from polymodal.processing.image_transform import make_tiles, tile_bytes

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that adds no end token by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("words")
    known = ["<unk>", "<pad>", "<bos>", "<end>", "a", "red", "cat", "dog"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def image_rules(ratio: str = "squash", side: int = 28) -> ImageConfig:
    return ImageConfig(image_aspect_ratio=ratio, tile_size=(side, side), image_mean=MEAN, image_std=STD)  # type: ignore[arg-type]


def settings(words: Path, family: str, **changes: Any) -> PairModelConfig:
    plain: dict[str, Any] = {
        "family": family,
        "vision": {**SMALL, "patch_size": 7},
        "text": {**SMALL, "max_position_embeddings": 8},
        "projection_dim": 12,
        "tokenizer": str(words),
        "image": image_rules(),
    }
    return PairModelConfig(**{**plain, **changes})


def batch_of(model: Any, count: int = 4) -> PairBatch:
    chance = torch.Generator().manual_seed(0)
    texts = ["a red cat", "dog", "a dog", "red red cat a"][:count]
    padding = "max_length" if model.text_length else True
    encoded = model.tokenizer(texts, padding=padding, return_tensors="pt")
    ids = encoded["input_ids"]
    mask = encoded.get("attention_mask", torch.ones_like(ids)).bool()
    pixels = torch.randint(0, 256, (count, 3, 28, 28), generator=chance, dtype=torch.uint8)
    return PairBatch(ids, mask, torch.arange(count), pixels)


@pytest.mark.parametrize("ratio", ["squash", "crop"])
@pytest.mark.parametrize("family", ["clip", "siglip", "vision-text-dual-encoder"])
def test_the_written_image_processor_makes_our_tiles(family: str, ratio: str) -> None:
    """And is read back as the same rules."""
    from PIL import Image

    config = image_rules(ratio)
    processor = image_processor(family, config)
    chance = np.random.default_rng(0)
    for height, width in ((60, 40), (28, 28), (33, 90)):
        image = Image.fromarray(chance.integers(0, 256, (height, width, 3), dtype=np.uint8))
        plan = plan_image(Size(height, width), config, Size(1, 1))
        theirs = processor(image, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(make_tiles(image, plan, config), theirs, atol=1e-5)
        ours = PixelNorm(config.image_mean, config.image_std)(torch.from_numpy(tile_bytes(image, plan, config)))
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5)
    assert image_config_from_hf(processor.to_dict()) == config


def test_encoders_with_weights_become_a_pair(words: Path, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(1)
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL, image_size=28, patch_size=14))
    text = transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=8, max_position_embeddings=10))
    vision.save_pretrained(tmp_path / "vision")
    text.save_pretrained(tmp_path / "text")
    named = {"vision": str(tmp_path / "vision"), "text": str(tmp_path / "text")}
    model: Any = build_pair_model(settings(words, "pair", **named), ObjectiveConfig(type="clip"))
    model.eval()
    for part, source in ((model.vision_model, vision), (model.text_model, text)):
        assert all(torch.equal(a, b) for a, b in zip(part.state_dict().values(), source.state_dict().values()))
    batch = batch_of(model)
    with torch.no_grad():
        features = model.encode(batch.pixel_values)
        assert features.shape == (4, *model.features_shape)
        torch.testing.assert_close(
            features[:, 0],
            vision.eval()(model.pixel_norm(batch.pixel_values)).pooler_output,  # type: ignore[arg-type]
        )
        live = model.embed(batch)
        kept = model.embed(PairBatch(batch.input_ids, batch.attention_mask, batch.image_ids, features=features))
        torch.testing.assert_close(live.image, kept.image)
        model.save(tmp_path)
        stock = transformers.AutoModel.from_pretrained(tmp_path).eval()
        theirs = stock(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            pixel_values=model.pixel_norm(batch.pixel_values),  # type: ignore[arg-type]
        )
    torch.testing.assert_close(live.image, theirs.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(live.text, theirs.text_embeds, atol=1e-6, rtol=0)


def test_what_a_fresh_model_starts_from(words: Path) -> None:
    clip: Any = build_pair_model(settings(words, "clip"), ObjectiveConfig(type="clip"))
    assert clip.facts() == {"logit_scale": pytest.approx(1 / 0.07)} and not hasattr(clip, "logit_bias")
    # CLIP reads a text off its end token: the tokenizer was made to write it.
    assert clip.tokenizer("a cat")["input_ids"] == [4, 6, 3]
    assert clip.tokenizer("a cat dog dog dog dog dog red red", truncation=True)["input_ids"][-1] == 3
    siglip: Any = build_pair_model(settings(words, "siglip"), ObjectiveConfig(type="siglip"))
    assert siglip.facts() == {"logit_scale": pytest.approx(10), "logit_bias": -10.0} and siglip.text_length == 8
    # SigLIP's loss on a model without a bias: one is added, trained, and no part of the stock model.
    both: Any = build_pair_model(settings(words, "clip"), ObjectiveConfig(type="siglip"))
    assert both.facts() == {"logit_scale": pytest.approx(10), "logit_bias": -10.0}
    assert "logit_bias" in dict(both.named_parameters()) and "logit_bias" not in both._stock[0].state_dict()
    names = [name for name, _ in both.named_parameters()]
    assert {name.split(".")[0] for name in names} == {
        "logit_scale",
        "logit_bias",
        "vision_model",
        "text_model",
        "visual_projection",
        "text_projection",
    }


def test_the_loss_is_that_of_the_paper_and_smoothing_reaches_it(words: Path) -> None:
    torch.manual_seed(0)
    model: Any = build_pair_model(settings(words, "clip"), ObjectiveConfig(type="clip"))
    batch = batch_of(model)
    own = model.embed(batch)
    arguments = (own, batch.image_ids, own.image, own.text, batch.image_ids, 0)
    loss = model.contrast(*arguments)["clip"]
    expected = clip_loss(own.image, own.text, model.logit_scale, own.image, own.text, 0)
    torch.testing.assert_close(loss, expected)
    stock = model._stock[0](
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        pixel_values=model.pixel_norm(batch.pixel_values),  # type: ignore[arg-type]
        return_loss=True,
    )
    torch.testing.assert_close(loss, stock.loss)
    smooth: Any = build_pair_model(settings(words, "clip"), ObjectiveConfig(type="clip", label_smoothing=0.2))
    smooth.load_state_dict(model.state_dict())
    logits = stock.logits_per_image
    both = [torch.nn.functional.cross_entropy(x, torch.arange(4), label_smoothing=0.2) for x in (logits, logits.T)]
    torch.testing.assert_close(smooth.contrast(*arguments)["clip"], (both[0] + both[1]) / 2)


def test_the_temperature_is_kept_in_its_range(words: Path) -> None:
    model: Any = build_pair_model(settings(words, "clip"), ObjectiveConfig(type="clip"))
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    model.after_step()
    assert model.facts()["logit_scale"] == pytest.approx(100)


def test_one_pair_is_refused(words: Path) -> None:
    model: Any = build_pair_model(settings(words, "clip"), ObjectiveConfig(type="clip"))
    batch = batch_of(model, 1)
    own = model.embed(batch)
    with pytest.raises(PolymodalError, match=r"one pair .* raise batch\.global_size"):
        model.contrast(own, batch.image_ids, own.image, own.text, batch.image_ids, 0)


def test_folders_that_cannot_be_used_are_refused(words: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertModel

    clip = ObjectiveConfig(type="clip")
    with pytest.raises(PolymodalError, match="cannot be opened as a model"):
        load_pair_model(str(tmp_path / "nowhere"), image_rules(), clip)
    BertModel(BertConfig(**SMALL, vocab_size=8)).save_pretrained(tmp_path / "bert")
    with pytest.raises(PolymodalError, match="model_type 'bert' does not learn from pairs"):
        load_pair_model(str(tmp_path / "bert"), image_rules(), clip)
    model: Any = build_pair_model(settings(words, "clip"), clip)
    (tmp_path / "clip").mkdir()
    model.save(tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    weights.pop("logit_scale")
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PolymodalError, match="1 missing: logit_scale"):
        load_pair_model(str(tmp_path / "clip"), image_rules(), clip)


def test_encoders_that_cannot_be_contrasted_are_refused(words: Path) -> None:
    clip = ObjectiveConfig(type="clip")
    eye = {**SMALL, "patch_size": 7, "model_type": "clip_vision_model"}
    t5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    with pytest.raises(PolymodalError, match="text encoder 't5': has no fixed positions"):
        build_pair_model(settings(words, "pair", vision=eye, text=t5), clip)
    distil = {"model_type": "distilbert", "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
    model: Any = build_pair_model(settings(words, "pair", vision=eye, text=distil), clip)
    with pytest.raises(PolymodalError, match="text encoder DistilBertModel gives no pooled output"):
        model.embed(batch_of(model))
    roberta = {**SMALL, "model_type": "roberta", "max_position_embeddings": 10}
    model = build_pair_model(settings(words, "pair", vision=eye, text=roberta), clip)
    assert model.max_text == 8
    long = torch.full((2, 8), 5)
    seen = batch_of(model, 2)
    model.embed(PairBatch(long, long.bool(), seen.image_ids, seen.pixel_values))


def test_an_unsafe_folder_is_not_opened(words: Path, tmp_path: Path) -> None:
    build_pair_model(settings(words, "clip"), ObjectiveConfig(type="clip")).save(tmp_path / "m")
    document = json.loads((tmp_path / "m" / "config.json").read_text())
    document["auto_map"] = {"AutoModel": "evil.Model"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(document))
    with pytest.raises(PolymodalError, match="auto_map"):
        load_pair_model(str(tmp_path / "m"), image_rules(), ObjectiveConfig(type="clip"))

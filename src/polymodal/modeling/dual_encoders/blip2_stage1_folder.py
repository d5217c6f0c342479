"""Stage 1 of BLIP-2 from a recipe, from its folder, and from and to `Blip2ForImageTextRetrieval` of transformers.

A fresh one takes BERT's weights, as in the paper and with the vocabulary head as in LAVIS; or, in a small run that has
no BERT, a WordPiece vocabulary learnt from its own captions and word embeddings reduced from a language model's.
"""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import BertTokenizerFast, Blip2Config, Blip2ForImageTextRetrieval, PreTrainedTokenizerBase

from polymodal.config import ImageConfig, LLMConfig, QFormerConfig, TowerConfig, parse_config
from polymodal.errors import CheckpointError, ConfigError, DataError
from polymodal.media_plan import Size
from polymodal.modeling.dual_encoders.blip2_stage1 import HEADS, HEADS_NAME, LABEL_SMOOTHING, MODEL_TYPE, Blip2Stage1
from polymodal.modeling.dual_encoders.config import Blip2ModelConfig, ObjectiveConfig
from polymodal.modeling.encoders.hf_vision import HFVisionEncoder
from polymodal.modeling.encoders.vision import build_vision_encoder
from polymodal.modeling.language_model import load_llm, load_tokenizer, open_tokenizer
from polymodal.modeling.projectors import qformer_files
from polymodal.modeling.projectors.qformer import QFormer
from polymodal.safety.config_json import read_json
from polymodal.utils.safetensors_io import read_tensors

DECODE_TOKEN = "[DEC]"
"""First token of a text that is to be generated, and the tokenizer's `bos_token`."""

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", DECODE_TOKEN)
CONTINUES = "##"
"""What WordPiece puts before a piece that goes on a word."""

_RETRIEVAL_HEADS = ("vision_projection", "text_projection", "itm_head")
_BERT_HEAD = {
    "cls.predictions.transform.dense.weight": "dense.weight",
    "cls.predictions.transform.dense.bias": "dense.bias",
    "cls.predictions.transform.LayerNorm.weight": "norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "norm.bias",
    "cls.predictions.bias": "bias",
}


def build_blip2(settings: Blip2ModelConfig, objective: ObjectiveConfig) -> Blip2Stage1:
    """Build stage 1 from a recipe."""
    encoder = build_vision_encoder(settings.vision, None, tile=Size(*settings.image.tile_size))
    tokenizer = load_wordpiece(str(settings.tokenizer or settings.bert))
    follows = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = settings.qformer.model_copy(update=follows)
    qformer = QFormer(encoder.embed_dim, config, text=True, norm=settings.norm)
    smoothing = _smoothing(objective)
    model = Blip2Stage1(
        encoder, settings.vision, qformer, tokenizer, settings.image, settings.projection_dim, smoothing
    )
    if settings.bert is not None:
        qformer_files.init_from_bert(qformer, Path(settings.bert))
        _start_head(model, Path(settings.bert))
    if settings.words is not None:
        start_words(model.words, tokenizer, settings.words, config.initializer_range)
    return model


def load_blip2(source: str, image: ImageConfig | None, objective: ObjectiveConfig) -> Blip2Stage1:
    """Load what stage 1 left."""
    folder = Path(source)
    document = read_json(folder / qformer_files.CONFIG_NAME)
    where = f"{folder / qformer_files.CONFIG_NAME}: stage1"
    stage = document.get("stage1")
    if document.get("model_type") != MODEL_TYPE or not isinstance(stage, dict):
        raise CheckpointError(f"{folder}: not a stage 1 of BLIP-2 (model_type {MODEL_TYPE!r} expected)")
    lacking = [key for key in ("vision", "image", "projection_dim") if key not in stage]
    if lacking:
        raise CheckpointError(f"{where}: key {lacking[0]!r} is missing")
    vision = parse_config(TowerConfig, stage["vision"], where)
    rules = image or parse_config(ImageConfig, stage["image"], where)
    model = Blip2Stage1(
        build_vision_encoder(vision, folder, tile=Size(*rules.tile_size)),
        vision,
        qformer_files.load_qformer(folder, text=True),
        load_wordpiece(folder),
        rules,
        stage["projection_dim"],
        _smoothing(objective),
    )
    heads = {name for name in model.state_dict() if name.startswith(HEADS)}
    qformer_files.load_exactly(model, read_tensors(folder / HEADS_NAME), str(folder / HEADS_NAME), heads)
    return model


def train_wordpiece(captions: Sequence[str], size: int = 8000, min_frequency: int = 2) -> PreTrainedTokenizerBase:
    """Learn a tokenizer like BERT's; the same captions give the same vocabulary."""
    normalise, split = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = {
        word for caption in captions for word, _ in split.pre_tokenize_str(normalise.normalize_str(caption)) if word
    }
    if not words:
        raise DataError("no text to learn a tokenizer from: every caption is empty")
    # The trainer numbers pieces in the order of a hash table; the letters inside words are numbered beforehand, as
    # special tokens, which leaves nothing to chance.
    inner = sorted({f"{CONTINUES}{letter}" for word in words for letter in word[1:]})
    letters = len({letter for word in words for letter in word}) + len(inner) + len(SPECIAL_TOKENS)
    if letters > size:
        raise DataError(f"the captions need {letters} pieces for their letters alone; allow more than {size}")
    learner: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalise, split
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, min_frequency=min_frequency, special_tokens=[*SPECIAL_TOKENS, *inner], show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    return BertTokenizerFast(vocab=learner.get_vocab(), do_lower_case=True, bos_token=DECODE_TOKEN)


def load_wordpiece(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load a BERT tokenizer, with "[DEC]" added where it is not there yet, as BLIP-2 does."""
    tokenizer = open_tokenizer(str(folder), f"text tokenizer {folder}")
    lacking = [name for name in ("cls_token", "sep_token", "pad_token") if getattr(tokenizer, name) is None]
    if lacking:
        raise CheckpointError(
            f"text tokenizer {folder}: has no {lacking[0]}; a BERT tokenizer is needed (WordPiece, [CLS] and [SEP])"
        )
    if tokenizer.bos_token != DECODE_TOKEN:
        tokenizer.add_special_tokens({"bos_token": DECODE_TOKEN})
    return tokenizer


@torch.no_grad()
def start_words(table: Tensor, tokenizer: PreTrainedTokenizerBase, source: str, deviation: float) -> None:
    """Fill a table of word embeddings, [V, H], from those of a language model."""
    # Where there is no BERT, the words still need not start as noise: each piece of the WordPiece vocabulary gets the
    # mean embedding of the language model's tokens for its text, reduced to the Q-Former's width by principal
    # components and scaled as fresh weights are. Special tokens stay random. Ours, not BLIP-2's.
    settings = LLMConfig(model_name_or_path=source)
    model: Any = load_llm(settings)
    words = load_tokenizer(settings)
    embeddings: Tensor = model.get_input_embeddings().weight.float()
    width = table.shape[1]
    if embeddings.shape[1] < width:
        raise ConfigError(
            f"init.model.words {source!r} has embeddings of width {embeddings.shape[1]}, the Q-Former needs {width} "
            "(qformer.hidden_size)"
        )
    pieces = {piece: row for piece, row in tokenizer.get_vocab().items() if row not in tokenizer.all_special_ids}
    texts = [p.removeprefix(CONTINUES) if p.startswith(CONTINUES) else f" {p}" for p in pieces]
    # One row for each piece: the mean over the tokens of its text.
    means = torch.stack([embeddings[ids].mean(dim=0) for ids in words(texts, add_special_tokens=False)["input_ids"]])
    centred = means - means.mean(dim=0)
    _, axes = torch.linalg.eigh(centred.T @ centred)  # in rising order
    reduced = centred @ axes[:, -width:].flip(1)
    table[list(pieces.values())] = (reduced * (deviation / reduced.std())).to(table)


def from_retrieval(
    model: Blip2ForImageTextRetrieval, tokenizer: PreTrainedTokenizerBase, vision: TowerConfig, image: ImageConfig
) -> Blip2Stage1:
    """Take over a retrieval model of transformers; contrast and matching then score the same."""
    _check_tower(vision)
    settings = model.config.qformer_config
    config = _qformer_config(settings.to_dict(), model.config.num_query_tokens, model.config.vision_config)
    encoder = HFVisionEncoder(copy.deepcopy(model.vision_model), -1, "cls_patch")
    qformer = QFormer(encoder.embed_dim, config, text=True)
    ours = Blip2Stage1(encoder, vision, qformer, tokenizer, image, model.config.image_text_hidden_size)
    state = model.state_dict()
    qformer_files.load_exactly(
        qformer, qformer_files.of_qformer(qformer_files.from_transformers(state)), type(model).__name__
    )
    heads = {name: tensor for name, tensor in state.items() if name.startswith(_RETRIEVAL_HEADS)}
    qformer_files.load_exactly(ours, heads, type(model).__name__, set(heads))
    return ours.eval()


def to_retrieval(model: Blip2Stage1) -> Blip2ForImageTextRetrieval:
    """Write our model as the retrieval model of transformers; contrast and matching then score the same."""
    _check_tower(model.vision)
    if model.qformer.norm_kind != "none":
        raise ConfigError(f"norm {model.qformer.norm_kind!r} before the Q-Former: transformers' BLIP-2 has none there")
    tower: Any = model.vision_encoder.model
    config = Blip2Config(
        vision_config=tower.config.to_dict(),
        qformer_config=model.qformer.transformer.config.to_dict(),
        num_query_tokens=model.qformer.num_queries,
        image_text_hidden_size=model.vision_projection.out_features,
    )
    theirs = Blip2ForImageTextRetrieval(config)
    state: dict[str, Tensor] = {f"vision_model.{name}": t for name, t in tower.state_dict().items()}
    for name, tensor in model.qformer.state_dict().items():
        state[re.sub(r"^transformer\.", "qformer.", re.sub(r"^ln_vision\.", "vision_model.post_layernorm.", name))] = (
            tensor
        )
    state |= {name: t for name, t in model.state_dict().items() if name.startswith(_RETRIEVAL_HEADS)}
    qformer_files.load_exactly(theirs, state, "stage 1")
    return theirs.eval()


def _smoothing(objective: ObjectiveConfig) -> float:
    if objective.type != "blip2":
        raise ConfigError(f"objective {objective.type!r} is none for a Q-Former; use blip2")
    if objective.distill is not None:
        raise ConfigError("objective.distill: the vision tower of BLIP-2 is frozen and learns from no teacher")
    return LABEL_SMOOTHING if objective.label_smoothing is None else objective.label_smoothing


def _start_head(model: Blip2Stage1, folder: Path) -> None:
    """Copy BERT's vocabulary head, where its folder has one."""
    found: dict[str, Tensor] = {}
    for name, tensor in qformer_files.read_folder_tensors(folder).items():
        if qformer_files.modern_name(name) in _BERT_HEAD:
            found[_BERT_HEAD[qformer_files.modern_name(name)]] = tensor
    if not found:
        return
    if "bias" in found:  # words that BERT does not have come last
        fresh = model.lm_head.bias.detach()
        found["bias"] = torch.cat((found["bias"].to(fresh), fresh[len(found["bias"]) :]))
    qformer_files.load_exactly(model.lm_head, found, str(folder))


def _check_tower(vision: TowerConfig) -> None:
    read = (vision.type, vision.mm_vision_select_layer, vision.mm_vision_select_feature)
    if read != ("eva_clip", -1, "cls_patch"):
        raise ConfigError(
            "transformers' BLIP-2 reads an eva_clip tower at layer -1 with its class token (cls_patch), this one is "
            f"{read[0]} at layer {read[1]}, {read[2]}"
        )


def _qformer_config(settings: dict[str, Any], queries: int, vision: Any) -> QFormerConfig:
    """Our settings from those of transformers."""
    shared = {key: settings[key] for key in QFormerConfig.model_fields if key in settings}
    return QFormerConfig(
        **{**shared, "num_query_tokens": queries, "vision_norm_eps": vision.layer_norm_eps},
        max_text_length=min(32, settings["max_position_embeddings"]),
    )

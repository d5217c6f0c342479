"""Stage 1 of BLIP-2 from a recipe, from and to its folder, and from and to `Blip2ForImageTextRetrieval`.

The folder is the Q-Former's own (`modeling.projectors.qformer_files`: `qformer.safetensors`, `config.json`), so stage 2
starts from it with `projector: {mm_projector_type: qformer, pretrained: FOLDER}` and drops the text path. Beside it lie
the heads of the three losses, the tokenizer, and in `config.json` where the vision tower is from and how images are
cut. The tower itself is written only where it was trained.

BERT gives the vocabulary head too, where its folder holds one, as in LAVIS.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polymodal.config import ImageConfig, LLMConfig, VisionConfig, parse_config
from polymodal.errors import CheckpointError, ConfigError, DataError, first_line
from polymodal.media_plan import Size
from polymodal.modeling.dual_encoders.blip2_stage1 import LABEL_SMOOTHING, Blip2Stage1
from polymodal.modeling.dual_encoders.config import Blip2ModelConfig, ObjectiveConfig
from polymodal.modeling.encoders.vision import BUNDLED, build_vision_encoder
from polymodal.modeling.language_model import load_llm, load_tokenizer
from polymodal.modeling.projectors.qformer import QFormer
from polymodal.modeling.projectors.qformer_files import (
    CONFIG_NAME,
    from_transformers,
    init_from_bert,
    load_exactly,
    load_qformer,
    of_qformer,
    read_folder_tensors,
    write_qformer,
)
from polymodal.safety.config_json import read_json
from polymodal.utils.files import write_text
from polymodal.utils.modules import frozen
from polymodal.utils.safetensors_io import read_tensors

if TYPE_CHECKING:
    from transformers import Blip2ForImageTextRetrieval, PreTrainedTokenizerBase


# ---- The text tokenizer of BLIP-2's Q-Former: BERT's WordPiece with the token "[DEC]", read from a folder or trained
# BLIP-2 (Li et al. 2023, arXiv:2301.12597) takes `bert-base-uncased` and adds "[DEC]", which stands in place of "[CLS]"
# where the text is to be generated. A small run needs neither BERT's folder nor its 30,522 pieces: `train_wordpiece`
# learns them from the run's own captions. The `tokenizers` trainer numbers pieces in the order of a hash table, so that
# two runs differ; here the pieces of single letters are numbered beforehand, which leaves nothing to chance.


DECODE_TOKEN = "[DEC]"
"""First token of a text that is to be generated, and the tokenizer's `bos_token`."""

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", DECODE_TOKEN)


def train_wordpiece(captions: Sequence[str], size: int = 8000, min_frequency: int = 2) -> PreTrainedTokenizerBase:
    """Learn a WordPiece vocabulary; the same captions give the same vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizerFast

    normalise, split = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = {
        word for caption in captions for word, _ in split.pre_tokenize_str(normalise.normalize_str(caption)) if word
    }
    if not words:
        raise DataError("no text to learn a tokenizer from: every caption is empty")
    # The trainer meets letters inside words in random order; as special tokens they have fixed numbers.
    inner = sorted({f"##{letter}" for word in words for letter in word[1:]})
    letters = len({letter for word in words for letter in word}) + len(inner) + len(SPECIAL_TOKENS)
    if letters > size:
        raise DataError(f"the captions need {letters} pieces for their letters alone; allow more than {size}")
    learner: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalise, split
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL_TOKENS, *inner],
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    return BertTokenizerFast(vocab=learner.get_vocab(), do_lower_case=True, bos_token=DECODE_TOKEN)


def load_wordpiece(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load a BERT tokenizer, with "[DEC]" added where it is not there yet, as BLIP-2 does."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"text tokenizer {folder}: {first_line(error)}") from error
    lacking = [name for name in ("cls_token", "sep_token", "pad_token") if getattr(tokenizer, name) is None]
    if lacking:
        raise CheckpointError(
            f"text tokenizer {folder}: has no {lacking[0]}; a BERT tokenizer is needed (WordPiece, [CLS] and [SEP])"
        )
    if tokenizer.bos_token != DECODE_TOKEN:
        tokenizer.add_special_tokens({"bos_token": DECODE_TOKEN})
    return tokenizer


# ---- Word embeddings of a Q-Former's text path, started from those of a language model ----
# Where there is no BERT to start from, the words still need not start as noise: a language model knows which of them
# are
# alike. Each piece of the WordPiece vocabulary gets the mean embedding of the language model's tokens for its text,
# reduced to the Q-Former's width by principal components and scaled as fresh weights are. Special tokens stay random.
# Ours; BLIP-2 starts the whole Q-Former from bert-base-uncased instead (`modeling.projectors.qformer_files`).


CONTINUES = "##"
"""What WordPiece puts before a piece that goes on a word."""


@torch.no_grad()
def start_words(table: Tensor, tokenizer: PreTrainedTokenizerBase, source: str, deviation: float) -> None:
    """Fill a table of word embeddings."""
    # table [V, H]
    settings = LLMConfig(model_name_or_path=source)
    model: Any = load_llm(settings)
    words = load_tokenizer(settings)
    known: Tensor = model.get_input_embeddings().weight.float()
    width = table.shape[1]
    if known.shape[1] < width:
        raise ConfigError(
            f"init.model.words {source!r} has embeddings of width {known.shape[1]}, the Q-Former needs {width} "
            "(qformer.hidden_size)"
        )
    pieces = {piece: row for piece, row in tokenizer.get_vocab().items() if row not in tokenizer.all_special_ids}
    texts = [p.removeprefix(CONTINUES) if p.startswith(CONTINUES) else f" {p}" for p in pieces]
    # One row for each piece: the mean over the tokens of its text.
    means = torch.stack([known[ids].mean(dim=0) for ids in words(texts, add_special_tokens=False)["input_ids"]])
    centred = means - means.mean(dim=0)
    _, axes = torch.linalg.eigh(centred.T @ centred)  # in rising order
    reduced = centred @ axes[:, -width:].flip(1)
    table[list(pieces.values())] = (reduced * (deviation / reduced.std())).to(table)


MODEL_TYPE = "blip2-stage1"
"""`model_type` in `config.json`, by which the folder is told from those of other pair models."""

HEADS_NAME = "heads.safetensors"
_HEADS = ("vision_projection.", "text_projection.", "itm_head.", "lm_head.", "temperature")
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
    model = Blip2Stage1(
        encoder,
        settings.vision,
        qformer,
        tokenizer,
        settings.image,
        settings.projection_dim,
        _smoothing(objective),
    )
    if settings.bert is not None:
        init_from_bert(qformer, Path(settings.bert))
        _start_head(model, Path(settings.bert))
    if settings.words is not None:
        start_words(model.words, tokenizer, settings.words, config.initializer_range)
    return model


def load_blip2(source: str, image: ImageConfig | None, objective: ObjectiveConfig) -> Blip2Stage1:
    """Load what stage 1 left."""
    folder = Path(source)
    document = read_json(folder / CONFIG_NAME)
    where = f"{folder / CONFIG_NAME}: stage1"
    stage = document.get("stage1")
    if document.get("model_type") != MODEL_TYPE or not isinstance(stage, dict):
        raise CheckpointError(f"{folder}: not a stage 1 of BLIP-2 (model_type {MODEL_TYPE!r} expected)")
    lacking = [key for key in ("vision", "image", "projection_dim") if key not in stage]
    if lacking:
        raise CheckpointError(f"{where}: key {lacking[0]!r} is missing")
    vision = parse_config(VisionConfig, stage["vision"], where)
    rules = image or parse_config(ImageConfig, stage["image"], where)
    model = Blip2Stage1(
        build_vision_encoder(vision, folder, tile=Size(*rules.tile_size)),
        vision,
        load_qformer(folder, text=True),
        load_wordpiece(folder),
        rules,
        stage["projection_dim"],
        _smoothing(objective),
    )
    tensors = read_tensors(folder / HEADS_NAME)
    load_exactly(model, tensors, str(folder / HEADS_NAME), {name for name in model.state_dict() if _is_head(name)})
    return model


def write_blip2(folder: Path, model: Blip2Stage1) -> None:
    """Write stage 1 into a folder that is there, such as one that is being written."""
    from safetensors.torch import save_file

    heads = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items() if _is_head(name)}
    for name, tensor in heads.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{folder / HEADS_NAME}: {name} holds NaN or infinity; nothing was saved")
    write_qformer(folder, model.qformer)
    save_file(heads, folder / HEADS_NAME)
    model.tokenizer.save_pretrained(folder)
    vision = model.vision
    if vision.vision_tower == BUNDLED or not frozen(model.tower):
        vision = vision.model_copy(update={"vision_tower": BUNDLED})
        model.vision_encoder.save(folder / "vision")
    document = read_json(folder / CONFIG_NAME)
    document["model_type"] = MODEL_TYPE
    document["stage1"] = {
        "vision": vision.model_dump(mode="json"),
        "image": model.image.model_dump(mode="json"),
        "projection_dim": model.vision_projection.out_features,
    }
    write_text(folder / CONFIG_NAME, json.dumps(document, indent=2) + "\n")


def from_retrieval(
    model: Blip2ForImageTextRetrieval, tokenizer: PreTrainedTokenizerBase, vision: VisionConfig, image: ImageConfig
) -> Blip2Stage1:
    """Take over a retrieval model of transformers; contrast and matching then score the same."""
    from polymodal.modeling.encoders.hf_vision import HFVisionEncoder

    _check_tower(vision)
    settings = model.config.qformer_config
    config = _qformer_config(settings.to_dict(), model.config.num_query_tokens, model.config.vision_config)
    encoder = HFVisionEncoder(_copy(model.vision_model), -1, "cls_patch")
    qformer = QFormer(encoder.embed_dim, config, text=True)
    ours = Blip2Stage1(encoder, vision, qformer, tokenizer, image, model.config.image_text_hidden_size)
    state = model.state_dict()
    load_exactly(qformer, of_qformer(from_transformers(state)), type(model).__name__)
    heads = {name: tensor for name, tensor in state.items() if name.startswith(_RETRIEVAL_HEADS)}
    load_exactly(ours, heads, type(model).__name__, set(heads))
    return ours.eval()


def to_retrieval(model: Blip2Stage1) -> Blip2ForImageTextRetrieval:
    """Write our model as the retrieval model of transformers; contrast and matching then score the same."""
    from transformers import Blip2Config, Blip2ForImageTextRetrieval

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
    load_exactly(theirs, state, "stage 1")
    return theirs.eval()


def _is_head(name: str) -> bool:
    return name.startswith(_HEADS)


def _smoothing(objective: ObjectiveConfig) -> float:
    if objective.type != "blip2":
        raise ConfigError(f"objective {objective.type!r} is none for a Q-Former; use blip2")
    if objective.distill is not None:
        raise ConfigError("objective.distill: the vision tower of BLIP-2 is frozen and learns from no teacher")
    return LABEL_SMOOTHING if objective.label_smoothing is None else objective.label_smoothing


def _start_head(model: Blip2Stage1, folder: Path) -> None:
    """Copy BERT's vocabulary head, where its folder has one."""
    found: dict[str, Tensor] = {}
    for name, tensor in read_folder_tensors(folder).items():
        plain = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))
        if plain in _BERT_HEAD:
            found[_BERT_HEAD[plain]] = tensor
    if not found:
        return
    if "bias" in found:  # words that BERT does not have come last
        fresh = model.lm_head.bias.detach()
        found["bias"] = torch.cat((found["bias"].to(fresh), fresh[len(found["bias"]) :]))
    load_exactly(model.lm_head, found, str(folder))


def _check_tower(vision: VisionConfig) -> None:
    read = (vision.type, vision.mm_vision_select_layer, vision.mm_vision_select_feature)
    if read != ("eva_clip", -1, "cls_patch"):
        raise ConfigError(
            "transformers' BLIP-2 reads an eva_clip tower at layer -1 with its class token (cls_patch), this one is "
            f"{read[0]} at layer {read[1]}, {read[2]}"
        )


def _qformer_config(settings: dict[str, Any], queries: int, vision: Any) -> Any:
    """Our settings from those of transformers."""
    from polymodal.config import QFormerConfig

    shared = {key: settings[key] for key in QFormerConfig.model_fields if key in settings}
    return QFormerConfig(
        **{**shared, "num_query_tokens": queries, "vision_norm_eps": vision.layer_norm_eps},
        max_text_length=min(32, settings["max_position_embeddings"]),
    )


def _copy(module: Any) -> Any:
    import copy

    return copy.deepcopy(module)

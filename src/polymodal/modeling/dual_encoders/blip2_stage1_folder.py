"""Stage 1 of BLIP-2 from a recipe, from and to its folder, and from and to `Blip2ForImageTextRetrieval`.

The folder is the Q-Former's own (`modeling.projectors.qformer_files`: `qformer.safetensors`, `config.json`), so stage 2 starts
from it with `projector: {mm_projector_type: qformer, pretrained: FOLDER}` and drops the text path. Beside it lie the
heads of the three losses, the tokenizer, and in `config.json` where the vision tower is from and how pictures are cut.
The tower itself is written only where it was trained.

BERT gives the vocabulary head too, where its folder holds one, as in LAVIS.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polymodal.config import ImageConfig, VisionConfig, parse_config
from polymodal.errors import CheckpointError, ConfigError
from polymodal.media_plan import Size
from polymodal.modeling.dual_encoders.blip2_stage1 import LABEL_SMOOTHING, Blip2Stage1
from polymodal.modeling.dual_encoders.config import Blip2ModelConfig, ObjectiveConfig
from polymodal.modeling.encoders.vision import BUNDLED, build_vision_encoder
from polymodal.modeling.projectors.qformer import QFormer
from polymodal.modeling.projectors.qformer_files import (
    CONFIG_NAME,
    from_transformers,
    load_exactly,
    load_qformer,
    of_qformer,
    read_folder_tensors,
    write_qformer,
)
from polymodal.projectors.qformer_start import init_from_bert
from polymodal.representation.word_start import start_words
from polymodal.representation.wordpiece import load_wordpiece
from polymodal.safety.config_json import read_json
from polymodal.utils.files import write_text
from polymodal.utils.modules import frozen
from polymodal.utils.safetensors_io import read_tensors

if TYPE_CHECKING:
    from transformers import Blip2ForImageTextRetrieval, PreTrainedTokenizerBase

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
    """Build stage 1 from a recipe.

    Args:
        settings: Tower, Q-Former, tokenizer and picture rules.
        objective: The loss.

    Returns:
        The model; weights are drawn from torch's random state, except those of the tower, of a BERT, and `words`.

    Raises:
        ConfigError: The objective is not BLIP-2's, or parts do not fit each other.
        CheckpointError: The tower, the tokenizer, the BERT or the language model cannot be opened, or does not fit.
    """
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
    """Load what stage 1 left.

    Args:
        source: The folder.
        image: Picture rules in place of the folder's; the folder's when None.
        objective: The loss.

    Returns:
        The model, in float32.

    Raises:
        ConfigError: The objective is not BLIP-2's.
        CheckpointError: The folder is incomplete or damaged.
    """
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
    """Write stage 1 into a folder that is there, such as one that is being written.

    Args:
        folder: The folder.
        model: The model.

    Raises:
        CheckpointError: A weight is not finite.
    """
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
    """Take over a retrieval model of transformers; contrast and matching then score the same.

    Args:
        model: The model. It has no vocabulary head and no temperature, so these are fresh.
        tokenizer: BERT's with "[DEC]", as the Q-Former knows it.
        vision: Where the tower is from; of type eva_clip, its last layer, with the class token.
        image: How a picture becomes the one tile that the tower takes.

    Returns:
        Our model, holding a copy of the weights.

    Raises:
        ConfigError: The tower is to be read elsewhere than BLIP-2 reads it.
        CheckpointError: The weights do not fit.
    """
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
    """Write our model as the retrieval model of transformers; contrast and matching then score the same.

    Args:
        model: Its tower must be of type eva_clip, its last layer, with the class token.

    Returns:
        A model whose `save_pretrained` others load; the vocabulary head and the temperature are left out.

    Raises:
        ConfigError: The tower is another one, or the Q-Former standardises its input, which the class cannot.
    """
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

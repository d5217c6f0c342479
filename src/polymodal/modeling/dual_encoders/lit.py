"""A text tower learnt against any frozen image tower of ours: how retrieval by towers without text is compared.

Locked-image tuning (Zhai et al. 2022, arXiv:2111.07991) with SigLIP's loss and SigLIP's attention pooling (Zhai et al.
2023, arXiv:2303.15343): the tower's features are frozen and may be kept; a pooling head over its patches, with learned
positions so that left and right can be told, and the text tower are trained. The same head and text tower on two
image towers make their retrieval scores comparable. LiT pools nothing anew; here towers without a pooled output, such
as EfficientNet-Lite0, take part.

Parameters: `vision_encoder.*` (the tower), `head.*`, `text_model.*`, `logit_scale`, `logit_bias`. The folder is ours,
since no stock class holds such a tower: `config.json`, `model.safetensors` without the tower, the tokenizer.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipTextConfig, SiglipTextModel

from polymodal.config import ImageConfig, TowerConfig, parse_config
from polymodal.errors import CheckpointError, ConfigError
from polymodal.media_plan import Size
from polymodal.modeling.dual_encoders import clip_siglip
from polymodal.modeling.dual_encoders.base import Embedded, PairBatch, TowerPairModel
from polymodal.modeling.dual_encoders.config import ObjectiveConfig, TowerTextConfig
from polymodal.modeling.dual_encoders.losses import unit
from polymodal.modeling.encoders.vision import VisionEncoder, build_vision_encoder
from polymodal.modeling.projectors.qformer_files import load_exactly
from polymodal.safety.config_json import read_json
from polymodal.utils.files import write_text
from polymodal.utils.safetensors_io import read_tensors, write_tensors

MODEL_TYPE = "polymodal-tower-text"
"""`model_type` in `config.json`, by which the folder is told from those of other pair models."""

_WEIGHTS = "model.safetensors"
_TOWER = "vision_encoder."


class PoolingHead(nn.Module):
    """Patches to one vector: a learned query attends to them, as in SigLIP."""

    def __init__(self, embed_dim: int, patches: int, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.project = nn.Linear(embed_dim, width)
        self.positions = nn.Parameter(torch.randn(patches, width) * 0.02)
        self.before = nn.LayerNorm(width)
        self.probe = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.after = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, features: Tensor) -> Tensor:
        """Pool features ``[B, P, E]`` to ``[B, D]``."""
        seen = self.before(self.project(self.norm(features)) + self.positions)
        probe = self.probe.expand(len(features), -1, -1)
        pooled = self.attention(probe, seen, seen, need_weights=False)[0]
        return (pooled + self.mlp(self.after(pooled)))[:, 0]


class TowerText(clip_siglip.ScaledPairModel, TowerPairModel):
    """A `PairModel`: an image tower of ours, a pooling head and a text tower of SigLIP's class."""

    def __init__(
        self,
        encoder: VisionEncoder,
        vision: TowerConfig,
        text_model: Any,
        tokenizer: Any,
        image: ImageConfig,
        objective: ObjectiveConfig,
    ) -> None:
        super().__init__(encoder, vision, tokenizer, image)
        if objective.type != "siglip" or objective.distill is not None:
            raise ConfigError("family 'tower' is trained with objective siglip, without distill: its tower is frozen")
        settings = text_model.config
        if len(tokenizer) > settings.vocab_size:
            raise ConfigError(f"the tokenizer has {len(tokenizer)} tokens, the text tower knows {settings.vocab_size}")
        self.text_model = text_model
        width = settings.projection_size
        self.head = PoolingHead(encoder.embed_dim, encoder.grid.area, width, max(1, width // 64))
        self.logit_scale = nn.Parameter(torch.tensor(clip_siglip.LOGIT_SCALE_SIGLIP))
        self.logit_bias = nn.Parameter(torch.tensor(clip_siglip.LOGIT_BIAS_SIGLIP))
        self.objective = objective
        tokenizer.model_input_names = ["input_ids"]
        self.max_text = self.text_length = settings.max_position_embeddings  # as in SigLIP, padding is read

    def embed(self, batch: PairBatch) -> Embedded:
        """Encode both sides; see `PairModel.embed`."""
        if batch.features is not None:
            features = batch.features.to(self.logit_scale.dtype)
        else:
            assert batch.pixel_values is not None
            features = self.encode(batch.pixel_values)
        text = self.text_model(input_ids=batch.input_ids).pooler_output
        return Embedded(unit(self.head(features)), unit(text))

    def save(self, folder: Path) -> None:
        """Write all but the tower, and the tower too where it is trained or came from a model's own folder."""
        write_tensors(folder / _WEIGHTS, {k: v for k, v in self.state_dict().items() if not k.startswith(_TOWER)})
        self.tokenizer.save_pretrained(folder)
        document = {
            "model_type": MODEL_TYPE,
            "vision": self.save_tower(folder).model_dump(mode="json"),
            "image": self.image.model_dump(mode="json"),
            "text": self.text_model.config.to_diff_dict(),
        }
        write_text(folder / "config.json", json.dumps(document, indent=2) + "\n")


def build_tower_text(settings: TowerTextConfig, objective: ObjectiveConfig) -> TowerText:
    """Build the model from a recipe."""
    tokenizer = clip_siglip.load_text_tokenizer(settings.tokenizer, None)
    given = clip_siglip.stock_keys(SiglipTextConfig, settings.text, "init.model.text")
    text = {
        "vocab_size": len(tokenizer),
        "projection_size": settings.projection_dim,
        **clip_siglip.special_ids(tokenizer),
        **given,
    }
    return _make(settings.vision, settings.image, text, tokenizer, objective, None)


def load_tower_text(source: str, image: ImageConfig, objective: ObjectiveConfig) -> TowerText:
    """Load what a stage left."""
    folder = Path(source)
    document = read_json(folder / "config.json")
    lacking = [key for key in ("vision", "text") if not isinstance(document.get(key), dict)]
    if lacking:
        raise CheckpointError(f"{folder / 'config.json'}: key {lacking[0]!r} is missing")
    vision = parse_config(TowerConfig, document["vision"], f"{folder / 'config.json'}: vision")
    model = _make(vision, image, document["text"], clip_siglip.load_text_tokenizer(source, None), objective, folder)
    wanted = {name for name in model.state_dict() if not name.startswith(_TOWER)}
    load_exactly(model, read_tensors(folder / _WEIGHTS), str(folder / _WEIGHTS), wanted)
    return model


def _make(
    vision: TowerConfig,
    image: ImageConfig,
    text: dict[str, Any],
    tokenizer: Any,
    objective: ObjectiveConfig,
    folder: Path | None,
) -> TowerText:
    encoder = build_vision_encoder(vision, folder, tile=Size(*image.tile_size))
    return TowerText(encoder, vision, SiglipTextModel(SiglipTextConfig(**text)), tokenizer, image, objective)

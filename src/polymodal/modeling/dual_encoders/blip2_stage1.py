"""BLIP-2's first stage: a Q-Former learns from pairs of image and text beside a frozen vision tower.

Li et al. 2023, arXiv:2301.12597, section 3.1. One Q-Former holds 32 learned queries that look at the image, and a
text path; the attention mask decides who sees whom, and so which of three things it learns: contrast (ITC), matching
(ITM) and captioning (ITG); `losses` has their losses.

The folder is the Q-Former's own (`modeling.projectors.qformer_files`: `qformer.safetensors`, `config.json`), so stage 2
starts from it with `projector: {mm_projector_type: qformer, pretrained: FOLDER}` and drops the text path. Beside it lie
the heads of the three losses, the tokenizer, and in `config.json` where the vision tower is from and how images are
cut. `blip2_stage1_folder` reads it.

Differences from the reference (LAVIS): three passes instead of four, since the queries' outputs under the captioning
mask are those of a pass over the queries alone (UniLM, Dong et al. 2019, arXiv:1905.03197), so one pass gives both the
contrastive image features and the captioning logits; only positions that predict a token go through the vocabulary
head; negatives are drawn once for the whole step, and pairs of one image, or with one text, are never each other's; the
temperature is kept above 0.001, as in BLIP.
Parameters: `vision_encoder.*`, `qformer.*` (with `ln_vision`, trained as in the paper), `vision_projection`,
`text_projection`, `itm_head` (as in `Blip2ForImageTextRetrieval` of transformers), `lm_head.*`, `temperature`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polymodal.config import ImageConfig, TowerConfig
from polymodal.errors import ConfigError
from polymodal.modeling.dual_encoders import losses
from polymodal.modeling.dual_encoders.base import METRIC, Embedded, Everyone, PairBatch, TowerPairModel
from polymodal.modeling.encoders.vision import VisionEncoder, fingerprint
from polymodal.modeling.projectors.mlp import Standardize
from polymodal.modeling.projectors.qformer import QFormer
from polymodal.modeling.projectors.qformer_files import CONFIG_NAME, write_qformer
from polymodal.safety.config_json import read_json
from polymodal.utils.files import write_text
from polymodal.utils.safetensors_io import write_tensors

MODEL_TYPE = "blip2-stage1"
"""`model_type` in `config.json`, by which the folder is told from those of other pair models."""

HEADS_NAME = "heads.safetensors"
HEADS = ("vision_projection.", "text_projection.", "itm_head.", "lm_head.", "temperature")
LABEL_SMOOTHING = 0.1
TEMPERATURE = 0.07
COLDEST = 1e-3
"""The temperature divides cosines; at zero they would be infinite."""

# Who sees whom. Queries and text go through one transformer side by side, [Q; T]; the mask alone makes it two separate
# encoders, one joint encoder or a captioner (figure 2). Each mask is True where a row may look at a column, which
# transformers' `Blip2QFormerModel` takes as it is with sdpa attention. Cross-attention to the image is not masked.


def bidirectional_mask(text_mask: Tensor, queries: int) -> Tensor:  # text_mask [b, T] -> [b, 1, Q + T, Q + T]
    """Everyone sees everyone, for image-text matching."""
    return _mask(text_mask, queries, queries_see_text=True, text_sees_queries=True)


def unimodal_mask(text_mask: Tensor, queries: int) -> Tensor:  # text_mask [b, T] -> [b, 1, Q + T, Q + T]
    """Queries see queries and text sees text, for contrastive learning."""
    mask = _mask(text_mask, queries, queries_see_text=False, text_sees_queries=False)
    # A row that sees nothing would be no number.
    empty = ~mask.any(dim=-1, keepdim=True)
    return mask | (empty & torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device))


def unilm_mask(text_mask: Tensor, queries: int) -> Tensor:  # text_mask [b, T] -> [b, 1, Q + T, Q + T]
    """Queries see queries; text sees the queries and itself up to the same place, for captioning."""
    mask = _mask(text_mask, queries, queries_see_text=False, text_sees_queries=True)
    # Queries come first, so this takes nothing from the text's view of them.
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril_()
    causal[:queries] = True
    return mask & causal


def _mask(text_mask: Tensor, queries: int, queries_see_text: bool, text_sees_queries: bool) -> Tensor:
    count, length = text_mask.shape
    mask = torch.ones((count, 1, queries + length, queries + length), dtype=torch.bool, device=text_mask.device)
    mask[..., queries:] = text_mask.bool()[:, None, None]
    if not queries_see_text:
        mask[:, :, :queries, queries:] = False
    if not text_sees_queries:
        mask[:, :, queries:, :queries] = False
    return mask


class VocabularyHead(nn.Module):
    """Hidden states to words as BERT does it: a layer, GELU, LayerNorm, then the word embeddings themselves."""

    def __init__(self, width: int, vocab_size: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:  # hidden [..., H], words [V, H] -> [..., V]
        """Compute logits."""
        return F.linear(self.norm(F.gelu(self.dense(hidden))), words, self.bias)


class Blip2Stage1(TowerPairModel):
    """A `PairModel`: vision tower, Q-Former with its text path, and the heads of the three losses."""

    needs_features = True

    def __init__(
        self,
        encoder: VisionEncoder,
        vision: TowerConfig,
        qformer: QFormer,
        tokenizer: Any,
        image: ImageConfig,
        projection_dim: int = 256,
        label_smoothing: float = LABEL_SMOOTHING,
    ) -> None:
        super().__init__(encoder, vision, tokenizer, image)
        settings = qformer.config
        if qformer.embeddings is None:
            raise ConfigError("stage 1 of BLIP-2 needs a Q-Former with its text path, and this one has none")
        if qformer.embed_dim != encoder.embed_dim:
            raise ConfigError(
                f"the Q-Former takes features of width {qformer.embed_dim}, the vision tower gives {encoder.embed_dim}"
            )
        if len(tokenizer) > settings.vocab_size:
            raise ConfigError(
                f"the tokenizer has {len(tokenizer)} tokens, the Q-Former knows {settings.vocab_size} "
                "(qformer.vocab_size)"
            )
        if tokenizer.bos_token_id is None:
            raise ConfigError("the text tokenizer has no bos_token ([DEC]), which begins a caption")
        self.qformer = qformer
        width = settings.hidden_size
        self.vision_projection = nn.Linear(width, projection_dim)
        self.text_projection = nn.Linear(width, projection_dim)
        self.itm_head = nn.Linear(width, 2)
        self.lm_head = VocabularyHead(width, settings.vocab_size, settings.layer_norm_eps)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE))
        # LAVIS leaves these two at torch's own start; BERT's head starts as every layer of BERT.
        nn.init.normal_(self.lm_head.dense.weight, std=settings.initializer_range)
        nn.init.zeros_(self.lm_head.dense.bias)
        self.label_smoothing = label_smoothing
        self.max_text = settings.max_text_length

    @property
    def words(self) -> Tensor:
        """The word embeddings, [V, H], which are also the vocabulary head's last layer."""
        embeddings: Any = self.qformer.embeddings
        weight: Tensor = embeddings.word_embeddings.weight
        return weight

    def embed(self, batch: PairBatch) -> Embedded:
        """Two passes: queries and caption under the captioning mask, and the text alone."""
        decoder_ids, _, _ = losses.itg_targets(batch.input_ids, batch.attention_mask, self.tokenizer.bos_token_id)
        mask = unilm_mask(batch.attention_mask, self.qformer.num_queries)
        hidden = self.qformer.encode(self._features(batch), decoder_ids, mask4d=mask)
        queries, caption = hidden.tensor_split([self.qformer.num_queries], dim=1)
        text = self.embed_texts(batch.input_ids, batch.attention_mask)
        return Embedded(losses.unit(self.vision_projection(queries)), text, {"caption": caption})

    def contrast(
        self, own: Embedded, own_ids: Tensor, all_image: Tensor, all_text: Tensor, all_ids: Tensor, offset: int
    ) -> dict[str, Tensor]:
        """ITC, and how many images have a text of theirs as the nearest of the step; see `PairModel.contrast`."""
        if len(all_ids) < 2:
            raise ConfigError("a step of one pair has nothing to contrast it with; raise batch.global_size")
        smoothing = self.label_smoothing
        share, to_text, _ = losses.itc_loss(
            own.image, own.text, self.temperature, all_image, all_text, own_ids, all_ids, offset, smoothing
        )
        right = losses.right_pairs(own_ids, all_ids)[0]
        found = right.gather(1, to_text.argmax(dim=1, keepdim=True)).float().mean()
        return {"itc": share, f"{METRIC}itc_accuracy": found}

    def extra(self, batch: PairBatch, embedded: Embedded, everyone: Everyone) -> dict[str, Tensor]:
        """ITM with hard negatives of the whole step, and ITG from what `embed` carried on; see `PairModel.extra`."""
        assert everyone.features is not None
        images, texts = self.negatives(everyone, len(batch))
        logits = self.match_queries(
            everyone.features[images], everyone.input_ids[texts], everyone.attention_mask[texts]
        )
        itm, right = losses.itm_loss(logits, len(everyone.image_ids))
        _, rows, targets = losses.itg_targets(batch.input_ids, batch.attention_mask, self.tokenizer.bos_token_id)
        hidden = embedded.carry["caption"].flatten(0, 1).index_select(0, rows)
        words = self.lm_head(hidden, self.words)
        count = losses.itg_count(everyone.attention_mask)
        return {
            "itm": itm,
            "itg": losses.itg_loss(words, targets, self.label_smoothing, count),
            f"{METRIC}itm_accuracy": right / len(logits),
        }

    @torch.no_grad()
    def negatives(self, everyone: Everyone, count: int) -> tuple[Tensor, Tensor]:  # -> [3b]
        """Draw hard negatives for some pairs of a step."""
        own = slice(everyone.offset, everyone.offset + count)
        to_text, to_image = losses.similarities(
            everyone.image[own], everyone.text[own], self.temperature, everyone.image, everyone.text
        )
        ids, random = everyone.pair_ids, torch.Generator().manual_seed(everyone.seed)
        right_texts, right_images = losses.right_pairs(ids[own], ids)
        drawn = []
        for logits, right in ((to_image, right_images), (to_text, right_texts)):
            # Where nothing else is left, another image with this text has to do.
            logits = logits.masked_fill(right & ~right.all(dim=1, keepdim=True), -torch.inf)
            drawn.append(losses.draw_negatives(logits, ids[own, 0], ids[:, 0], everyone.offset, random))
        images, texts = drawn
        return losses.itm_inputs(images, texts, everyone.offset)

    def embed_images(self, features: Tensor) -> Tensor:  # [B, P, E] -> [B, Q, D]
        """Image features for retrieval, from a pass over the queries alone."""
        return losses.unit(self.vision_projection(self.qformer.queries(self._cast(features))))

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Text features, from a pass over the text alone."""
        # input_ids [B, T], attention_mask [B, T] -> [B, D]
        hidden = self.qformer.encode(None, input_ids, attention_mask)
        return losses.unit(self.text_projection(hidden[:, 0]))

    def match_queries(self, features: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What every query says about whether image and text match."""
        # features [B, P, E], input_ids [B, T], attention_mask [B, T] -> [B, Q, 2]
        mask = bidirectional_mask(attention_mask, self.qformer.num_queries)
        logits: Tensor = self.itm_head(self.qformer.queries(self._cast(features), input_ids, mask4d=mask))
        return logits

    def measure(self, features: Tensor) -> None:  # [B, P, E]
        """Measure the channels that a "standardize" norm scales, before the first step of a new model."""
        if isinstance(self.qformer.norm, Standardize):
            self.qformer.norm.measure(features)

    def checkpoint_layers(self) -> None:
        """Keep only the input of each layer and compute the rest again in the backward pass."""
        self.qformer.transformer.gradient_checkpointing_enable({"use_reentrant": False})

    def after_step(self) -> None:
        """Keep the temperature above zero."""
        with torch.no_grad():
            self.temperature.clamp_(min=COLDEST)

    def facts(self) -> dict[str, Any]:
        """The temperature that cosines are divided by."""
        return {"temperature": float(self.temperature.detach())}

    def save(self, folder: Path) -> None:
        """Write what stage 2 starts from, and what stage 1 goes on from."""
        heads = {name: tensor for name, tensor in self.state_dict().items() if name.startswith(HEADS)}
        write_tensors(folder / HEADS_NAME, heads)
        write_qformer(folder, self.qformer)
        self.tokenizer.save_pretrained(folder)
        document = read_json(folder / CONFIG_NAME)
        document["model_type"] = MODEL_TYPE
        document["stage1"] = {
            "vision": self.save_tower(folder).model_dump(mode="json"),
            "image": self.image.model_dump(mode="json"),
            "tower": fingerprint(self.vision_encoder),
            "projection_dim": self.vision_projection.out_features,
        }
        write_text(folder / CONFIG_NAME, json.dumps(document, indent=2) + "\n")

    def _features(self, batch: PairBatch) -> Tensor:
        if batch.features is not None:
            return self._cast(batch.features)
        assert batch.pixel_values is not None
        return self._cast(self.encode(batch.pixel_values))

    def _cast(self, features: Tensor) -> Tensor:
        """Features are kept in half precision; the Q-Former's own type decides."""
        return features.to(self.qformer.ln_vision.weight.dtype)

"""MultimodalLM: pixels -> encoder -> projector -> placeholder positions of a language model.

The merge preserves length: the processor has already expanded the placeholders, so the model only scatters. Labels,
masks and positions are never rebuilt here, and the count of tokens is read from the plan, never recomputed.

The layout of tiles follows LLaVA-1.5 (arXiv 2310.03744) and LLaVA-NeXT's AnyRes; unlike those, nothing is truncated,
padded or re-labelled inside `forward`, and logits are computed only where there is a label. Samples packed in one row
are kept apart by `polymodal.modeling.packed_attention`; `polymodal.modeling.token_loss` keeps the logits within memory.
An encoder-decoder language model takes the same sequence; `polymodal.modeling.seq2seq` cuts it before the last answer.
"""

import inspect
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from polymodal.errors import ConfigError, PolymodalError
from polymodal.media_plan import ImagePlan, Size
from polymodal.modeling.encoders.pixel_norm import PixelNorm
from polymodal.modeling.encoders.vision import VisionEncoder
from polymodal.modeling.language_model import decoder_start_id
from polymodal.modeling.packed_attention import SEGMENTS, choose_method, packed_inputs
from polymodal.modeling.projectors import Projector
from polymodal.modeling.seq2seq import split_rows, take
from polymodal.modeling.token_loss import label_losses
from polymodal.utils.modules import evaluating, frozen


@dataclass(frozen=True)
class Output:
    """What `forward` returns."""

    # Sum of the token losses, float32 scalar; divide by the global count of targets. None without labels
    loss_sum: Tensor | None
    num_targets: int  # How many tokens carry a label
    # [R, V] at the positions that predict a label, or [B, T, V] without labels; None where they would not fit into
    # memory and the loss was taken in chunks
    logits: Tensor | None
    targets: Tensor | None  # [R] the labels those logits predict, row by row; None without labels
    losses: Tensor | None = None  # [R] float32, each target's loss, detached; None without labels


class MultimodalLM(nn.Module):
    """A vision encoder, a projector and a language model.

    Args:
        llm: A causal LM, or an encoder-decoder, which reads what lies before the last answer and is taught to say that.
        image_token_id: The placeholder's id; may lie past the vocabulary.
        vision_encoder: [N, 3, H, W] -> [N, P, E]; None for a text-only model.
        projector: [N, P, E] -> [N, Q, D]; comes with the encoder.
        image_newline: Add the learned token that ends each row of an AnyRes canvas.
        image_mean: Per channel, for tiles that come as uint8; with `image_std`.
        image_std: Per channel.

    Attributes:
        logits_budget: Bytes of logits above which the loss is taken in chunks; None leaves it to the device.
        context_tokenizer: Of a projector that reads the question beside an image; None for one that does not.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        image_token_id: int,
        vision_encoder: VisionEncoder | None = None,
        projector: Projector | None = None,
        image_newline: bool = False,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.llm = llm
        self.vision_encoder = vision_encoder
        self.projector = projector
        self.image_token_id = image_token_id
        self.image_newline: nn.Parameter | None = None
        if image_newline:
            self.add_image_newline()
        self._takes_positions = "position_ids" in inspect.signature(llm.forward).parameters
        self.logits_budget: int | None = None
        self.context_tokenizer: PreTrainedTokenizerBase | None = None
        self._packing: str | None = None
        self.pixel_norm: PixelNorm | None = None
        if image_mean is not None and image_std is not None:
            self.pixel_norm = PixelNorm(image_mean, image_std)

    def add_image_newline(self) -> None:
        """Add the learned token that ends each row of an AnyRes canvas, where there is none yet."""
        if self.image_newline is None:
            table = self.llm.get_input_embeddings().weight
            # LLaVA-NeXT's scale: a newline starts as long as an average embedding.
            newline = torch.randn(table.shape[1]) / table.shape[1] ** 0.5
            self.image_newline = nn.Parameter(newline.to(table.device))

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.llm.get_input_embeddings().weight.device

    @property
    def encoder_decoder(self) -> bool:
        """Whether the language model is an encoder-decoder."""
        return bool(self.llm.config.is_encoder_decoder)

    @property
    def tokens_per_tile(self) -> Size | None:
        """Projected tokens per tile, as a grid; None for a text-only model."""
        return self.projector.output_grid if self.projector is not None else None

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Encode tiles.

        Args:
            pixel_values: [N, 3, H, W], normalised, or uint8 to be normalised here: a quarter of the bytes to move.

        Returns:
            [N, P, E] features. No gradient is kept where the whole encoder is frozen.

        Raises:
            PolymodalError: The model has no vision encoder, or was not told how to normalise.
        """
        if self.vision_encoder is None:
            raise PolymodalError("this model has no vision encoder; leave the image out")
        if self.pixel_norm is not None:
            pixel_values = self.pixel_norm(pixel_values)
        elif pixel_values.dtype == torch.uint8:
            raise PolymodalError("uint8 tiles: this model was built without image_mean and image_std")
        with torch.no_grad() if frozen(self.vision_encoder) else nullcontext():
            return self.vision_encoder(pixel_values)

    @property
    def reads_context(self) -> bool:
        """Whether the projector reads the question beside an image (InstructBLIP)."""
        return bool(getattr(self.projector, "text_context", False))

    def project(self, features: Tensor, context_ids: Tensor | None = None) -> Tensor:
        """Project tiles.

        Args:
            features: [N, P, E].
            context_ids: [N, t], what the projector reads beside each tile, -1 behind the end; None where it reads
                nothing.

        Returns:
            [N, Q, D].

        Raises:
            PolymodalError: The model has no projector, or a context is given to one that reads none.
        """
        projector: Any = self.projector
        if projector is None:
            raise PolymodalError("this model has no vision encoder; leave the image out")
        features = features.to(next(projector.parameters()).dtype)
        if context_ids is not None and not self.reads_context:
            raise PolymodalError("context_ids were given, but this model's projector reads no text")
        projected: Tensor = projector(features, context_ids) if self.reads_context else projector(features)
        return projected

    def project_images(
        self, features: Tensor, plans: Sequence[ImagePlan], context_ids: Tensor | None = None
    ) -> list[Tensor]:
        """Project features and lay each image's tokens out as its plan says.

        Args:
            features: [N, P, E], the tiles of all images, in order.
            plans: One plan an image; their tiles add up to N.
            context_ids: [images, t], what the projector reads beside each image, -1 behind the end of a row; None
                where it reads nothing.

        Returns:
            One [num_tokens, D] tensor an image.

        Raises:
            PolymodalError: The tiles do not add up, or a layout has another length than planned.
        """
        counts = [plan.num_tiles for plan in plans]
        if self.projector is None or sum(counts) != len(features):
            raise PolymodalError(f"image: {sum(counts)} tiles were planned, {len(features)} were given")
        if context_ids is not None:
            if len(context_ids) != len(plans):
                raise PolymodalError(f"image: {len(plans)} images and {len(context_ids)} contexts were given")
            # Known on the host, the lengths need not be waited for.
            images = [number for number, count in enumerate(counts) for _ in range(count)]
            context_ids = context_ids[torch.tensor(images, device=context_ids.device)]
        split = self.project(features, context_ids).split(counts)
        return [lay_out(part, plan, self.image_newline) for part, plan in zip(split, plans, strict=True)]

    def embed(
        self,
        input_ids: Tensor,
        plans: Sequence[ImagePlan] = (),
        sample_of_image: Sequence[int] = (),
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        media_places: Tensor | None = None,
        context_ids: Tensor | None = None,
    ) -> Tensor:
        """Embed text and scatter media into their placeholders.

        Args:
            input_ids: [B, T]; placeholders expanded.
            plans: One plan an image, in order of row, then of place.
            sample_of_image: The row of each image.
            pixel_values: [N, 3, H, W], or None.
            features: [N, P, E] in place of `pixel_values`.
            media_places: [M] positions of placeholders in the flattened [B * T], where they are known beforehand.
            context_ids: As in `project_images`.

        Returns:
            [B, T, D].

        Raises:
            PolymodalError: Placeholders and features differ in number.
        """
        is_media = input_ids == self.image_token_id
        text = self.llm.get_input_embeddings()(input_ids.masked_fill(is_media, 0))
        if features is None and pixel_values is not None:
            features = self.encode_images(pixel_values)
        media = self.project_images(features, plans, context_ids) if features is not None else []
        return merge_media(text, is_media, media, sample_of_image, "image", media_places)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        plans: Sequence[ImagePlan] = (),
        sample_of_image: Sequence[int] = (),
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        segments: Sequence[int] | None = None,
        target_places: Tensor | None = None,
        media_places: Tensor | None = None,
        touch_media: bool = False,
        context_ids: Tensor | None = None,
    ) -> Output:
        """Run the model over whole sequences; media come as in `embed`.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T] bool, False on padding; None where there is none.
            labels: [B, T], not shifted, -100 where untrained. With labels only their positions get logits.
            plans: As in `embed`.
            sample_of_image: As in `embed`.
            pixel_values: As in `embed`.
            features: As in `embed`.
            segments: Lengths of the samples that are packed in the single row; they do not see each other. The first
                token of each must carry no label.
            target_places: [R] positions of the flattened [B * T] that predict a label, where they are known
                beforehand; looking for them waits for the device.
            media_places: As in `embed`.
            touch_media: Let every trained media part take part in this forward even where the batch does not need
                it, so that all processes take part in every collective; its gradient is then zero, not None.
            context_ids: As in `project_images`.

        Returns:
            The sum of losses and logits at label positions, or all logits.

        Raises:
            PolymodalError: Placeholders and features differ in number, or this model cannot be given packed samples;
                of an encoder-decoder also: several answers of a row carry labels, or there are no labels.
        """
        embeds = self.embed(input_ids, plans, sample_of_image, pixel_values, features, media_places, context_ids)
        if touch_media:
            embeds = embeds + self._touch(has_images=pixel_values is not None or features is not None).to(embeds)
        if self.encoder_decoder and segments is None:
            return self._answer_losses(embeds, attention_mask, labels)
        if segments is not None:
            kwargs = packed_inputs(self.llm, self.prepare_packing(), segments, embeds)
        else:
            kwargs = self.decoder_inputs(attention_mask)
        if labels is None:
            return Output(None, 0, self.llm(inputs_embeds=embeds, use_cache=False, **kwargs).logits, None)
        # Position t predicts token t + 1; the last position predicts nothing.
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
        rows = (shifted != -100).nonzero().squeeze(1) if target_places is None else target_places
        return self._score(embeds, kwargs, rows, shifted.index_select(0, rows))

    def _answer_losses(self, embeds: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Output:
        """The losses of an encoder-decoder: it reads what lies before the answer and is scored on the answer."""
        if labels is None:
            raise PolymodalError("an encoder-decoder has no logits without labels; to generate, see `generation`")
        split = split_rows(labels, attention_mask, decoder_start_id(self.llm))
        kwargs = {"attention_mask": split.source_mask, "decoder_input_ids": split.decoder_input_ids}
        return self._score(take(embeds, split.source_index), kwargs, split.places, split.targets)

    def _score(self, embeds: Tensor, kwargs: dict[str, Any], rows: Tensor, targets: Tensor) -> Output:
        logits, losses, loss_sum = label_losses(self.llm, embeds, kwargs, rows, targets, self.logits_budget)
        return Output(loss_sum, rows.numel(), logits, targets, losses)

    def prepare_packing(self) -> str:
        """Find out once how this language model keeps packed samples apart, and install what it needs.

        Returns:
            The way, of `polymodal.modeling.packed_attention`.

        Raises:
            ConfigError: It cannot.
        """
        if self.encoder_decoder:
            raise ConfigError(
                f"batch.packing: {type(self.llm).__name__} is an encoder-decoder, whose encoder sees the whole row, so "
                "samples cannot share one; set batch.packing to none"
            )
        if self._packing is None:
            self._packing = choose_method(self.llm)
            if self._packing != SEGMENTS and "flash" not in str(self.llm.config._attn_implementation):
                warnings.warn(
                    f"{type(self.llm).__name__} does not take another attention: packed samples are kept apart by a "
                    "block-diagonal mask, which is slower in long packs",
                    stacklevel=2,
                )
        return self._packing

    def _touch(self, has_images: bool) -> Tensor:
        """Zero, with a gradient path to every trained media part; these run on an empty tile if they have not run."""
        zero = torch.zeros((), device=self.device)
        if self.image_newline is not None:
            zero = zero + self.image_newline.float().sum() * 0
        encoder: Any = self.vision_encoder
        if has_images or encoder is None or self.projector is None:
            return zero
        weights = list(encoder.parameters())
        features = torch.zeros((1, encoder.grid.area, encoder.embed_dim), device=self.device)
        # A sharded encoder gathers its weights from all processes even when it is frozen.
        if any(weight.requires_grad or hasattr(weight, "full_tensor") for weight in weights):
            pixels = torch.zeros(
                (1, 3, encoder.tile.height, encoder.tile.width), device=self.device, dtype=weights[0].dtype
            )
            with evaluating(encoder):
                features = self.encode_images(pixels)
        context = torch.zeros((1, 1), dtype=torch.int64, device=self.device) if self.reads_context else None
        return zero + self.project(features, context).float().sum() * 0

    def decoder_inputs(self, attention_mask: Tensor | None, cache: Cache | None = None) -> dict[str, Any]:
        """Masks and positions for the decoder.

        Args:
            attention_mask: [B, T_total] bool; with a cache it covers the cached positions too.
            cache: The key-value cache of a generation; None over whole sequences.

        Returns:
            Keyword arguments of the language model.
        """
        if attention_mask is None or (bool(attention_mask[:, 0].all()) and cache is None):
            # Padding on the right is invisible to causal attention: no mask means the fast causal kernel.
            return {}
        kwargs: dict[str, Any] = {"attention_mask": attention_mask.long()}
        if self._takes_positions:
            positions = attention_mask.long().cumsum(dim=1).sub(1).clamp(min=0)
            seen = cache.get_seq_length() if cache is not None else 0
            kwargs["position_ids"] = positions[:, seen:]
        return kwargs


def merge_media(
    text: Tensor,  # [B, T, D]
    is_media: Tensor,  # [B, T]
    media: Sequence[Tensor],
    sample_of_media: Sequence[int],
    modality: str,
    places: Tensor | None = None,  # [M]
) -> Tensor:  # [B, T, D]
    """Put media tokens where the placeholders are; the length does not change."""
    if places is not None and len(places) == sum(len(item) for item in media):
        return _put(text, places, media)
    given = [0] * len(text)
    for item, row in zip(media, sample_of_media, strict=True):
        given[row] += len(item)
    for row, (places, features) in enumerate(zip(is_media.sum(dim=1).tolist(), given, strict=True)):
        if places != features:
            raise PolymodalError(f"{modality}: sample {row} has {places} placeholders but {features} features")
    return _put(text, is_media.reshape(-1).nonzero().squeeze(1), media)


def _put(text: Tensor, places: Tensor, media: Sequence[Tensor]) -> Tensor:
    if not media:
        return text
    flat = text.reshape(-1, text.shape[-1])
    return flat.index_copy(0, places, torch.cat(list(media)).to(flat.dtype)).view_as(text)


def lay_out(tiles: Tensor, plan: ImagePlan, newline: Tensor | None) -> Tensor:
    """Order one image's projected tokens as its plan says."""
    # tiles [n, Q, D], newline [D] -> [num_tokens, D]
    if plan.merge == "flat" or plan.kept is None or plan.unpadded is None:
        tokens = tiles.flatten(0, 1)
        if plan.newline and newline is not None:
            tokens = torch.cat((tokens, newline.to(tokens)[None]))
    else:
        width = tiles.shape[-1]
        overview = tiles[: 1 if plan.overview == "first" else 0].flatten(0, 1)
        rows, columns, kept = plan.grid.height, plan.grid.width, plan.kept
        canvas = tiles[len(tiles) - rows * columns :].view(rows, columns, plan.tokens.height, plan.tokens.width, width)
        canvas = canvas.permute(0, 2, 1, 3, 4).reshape(rows * plan.tokens.height, columns * plan.tokens.width, width)
        canvas = canvas[kept.top : kept.top + kept.height, kept.left : kept.left + kept.width]
        if (kept.height, kept.width) != (plan.unpadded.height, plan.unpadded.width):  # anyres_max_N shrinks
            size = [plan.unpadded.height, plan.unpadded.width]
            canvas = F.interpolate(canvas.permute(2, 0, 1)[None], size, mode="bilinear")[0].permute(1, 2, 0)
        if plan.newline and newline is not None:
            canvas = torch.cat((canvas, newline.to(canvas).expand(len(canvas), 1, width)), dim=1)
        tokens = torch.cat((overview, canvas.flatten(0, 1)))
    if len(tokens) != plan.num_tokens:
        raise PolymodalError(f"image: the plan says {plan.num_tokens} tokens, the layout gives {len(tokens)}")
    return tokens

"""MultimodalLM: pixels and sounds -> encoder -> projector -> placeholder positions of a language model.

The merge preserves length: the processor has already expanded the placeholders, so the model only scatters. Labels,
masks and positions are never rebuilt here, and the count of tokens is read from the plan, never recomputed.

The layout of tiles follows LLaVA-1.5 (arXiv 2310.03744) and LLaVA-NeXT's AnyRes; unlike those, nothing is truncated,
padded or re-labelled inside `forward`, and logits are computed only where there is a label. Samples packed in one row
are kept apart by `polymodal.modeling.packed_attention`; `polymodal.modeling.token_loss` keeps the logits within memory.
An encoder-decoder language model takes the same sequence; `polymodal.modeling.seq2seq` cuts it before the last answer.
A video is tiles, one a frame, which pass the temporal encoder before the projector; a sound has both of its own. Media
that the model makes are ids like any other: `polymodal.modeling.vocabulary` makes room for their codes.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedTokenizerBase

from polymodal.config import VocabularyLayout
from polymodal.errors import ConfigError, PolymodalError
from polymodal.media_plan import AudioPlan, AudioWindow, ImagePlan, MediaPlan, Size, VideoPlan
from polymodal.modeling.encoders.audio import AudioEncoder
from polymodal.modeling.encoders.pixel_norm import PixelNorm
from polymodal.modeling.encoders.video_temporal import TemporalEncoder, look_along_time
from polymodal.modeling.encoders.vision import VisionEncoder
from polymodal.modeling.language_model import decoder_start_id, in_order
from polymodal.modeling.merge import lay_out, merge_media
from polymodal.modeling.own import measured_projector
from polymodal.modeling.packed_attention import SEGMENTS, choose_method, packed_inputs
from polymodal.modeling.projectors import Projector
from polymodal.modeling.projectors.mlp import PooledProjector
from polymodal.modeling.projectors.summary import SummaryProjector
from polymodal.modeling.seq2seq import split_rows, take
from polymodal.modeling.token_loss import Output, label_losses
from polymodal.modeling.tokenizers.base import ImageTokenizer
from polymodal.modeling.touch import touch_audio, touch_images
from polymodal.utils.modules import frozen

if TYPE_CHECKING:  # whose module takes a second to load
    from transformers import PreTrainedModel


class MultimodalLM(nn.Module):
    """A vision encoder, a projector and a language model; for videos and sounds a temporal and an audio encoder.

    Args:
        vision_encoder: [N, 3, H, W] -> [N, P, E]; None for a text-only model.
        projector: [N, P, E] -> [N, Q, D]; comes with the encoder. One without an `output_grid` is run once to find Q.
        llm: A causal LM, or an encoder-decoder, which reads what lies before the last answer and is taught to say that.
        image_token_id: The placeholder's id; may lie past the vocabulary, as it does where None.
        image_newline: Add the learned token that ends each row of an AnyRes canvas.
        image_mean: Per channel, for tiles that come as uint8; with `image_std`.
        image_std: Per channel.
        temporal_encoder: [N, T, P, E] -> [N, T', P', E]; None where a video's frames are only put side by side.
        audio_encoder: [N, F, L] -> [N, P, E']; None for a model that takes no sound.
        audio_projector: [N, P, E'] -> [N, P, D]; comes with the audio encoder.

    Attributes:
        logits_budget: Bytes of logits above which the loss is taken in chunks; None leaves it to the device.
        context_tokenizer: Of a projector that reads the question beside an image; None for one that does not.
        image_tokenizer: Images to codes and back; None for a model that only writes.
        vocabulary: Where the codes lie among the language model's ids; comes with the tokenizer.
    """

    def __init__(
        self,
        vision_encoder: VisionEncoder | None = None,
        projector: Projector | None = None,
        llm: PreTrainedModel | None = None,
        image_token_id: int | None = None,
        image_newline: bool = False,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        temporal_encoder: TemporalEncoder | None = None,
        audio_encoder: AudioEncoder | None = None,
        audio_projector: Projector | None = None,
    ) -> None:
        super().__init__()
        self.llm = in_order(vision_encoder, projector, llm)
        self.vision_encoder = vision_encoder
        if projector is not None and vision_encoder is not None and not hasattr(projector, "output_grid"):
            projector = measured_projector(projector, vision_encoder, self.llm.get_input_embeddings().weight.shape[1])
        self.projector = projector
        self.temporal_encoder = temporal_encoder
        self.audio_encoder = audio_encoder
        self.audio_projector = audio_projector
        table = self.llm.get_input_embeddings()
        self.image_token_id: int = table.weight.shape[0] if image_token_id is None else image_token_id
        self.image_newline: nn.Parameter | None = None
        if image_newline:
            self.add_image_newline()
        self._takes_positions = "position_ids" in inspect.signature(self.llm.forward).parameters
        self.logits_budget: int | None = None
        self.context_tokenizer: PreTrainedTokenizerBase | None = None
        self.image_tokenizer: ImageTokenizer | None = None
        self.vocabulary: VocabularyLayout | None = None
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

    @property
    def audio_window(self) -> AudioWindow | None:
        """What the audio encoder takes at once; None for a model without one."""
        if (encoder := self.audio_encoder) is None:
            return None
        return AudioWindow(encoder.mel_bins, encoder.max_frames, encoder.frames_per_token)

    def encode_images(self, pixel_values: Tensor | Sequence[Tensor]) -> Any:
        """Encode tiles.

        Args:
            pixel_values: [N, 3, H, W], normalised, or uint8, a quarter of the bytes to move; of several sizes one each.

        Returns:
            [N, P, E] features, or one a tensor given. No gradient is kept where the whole encoder is frozen.

        Raises:
            PolymodalError: The model has no vision encoder, or was not told how to normalise.
        """
        if self.vision_encoder is None:
            raise PolymodalError("this model has no vision encoder; leave the image out")
        parts: Sequence[Tensor] = [pixel_values] if (one := isinstance(pixel_values, Tensor)) else pixel_values
        if self.pixel_norm is not None:
            parts = [self.pixel_norm(part) for part in parts]
        elif any(part.dtype == torch.uint8 for part in parts):
            raise PolymodalError("uint8 tiles: this model was built without image_mean and image_std")
        encoder: Any = self.vision_encoder
        with torch.no_grad() if frozen(self.vision_encoder) else nullcontext():
            return encoder(parts[0] if one else parts)

    def encode_audio(self, audio_values: Tensor, plans: Sequence[AudioPlan]) -> Tensor:
        """Encode sounds.

        Args:
            audio_values: [W, F, L], all windows of all sounds.
            plans: One plan a sound; their windows add up to W.

        Returns:
            [A, E'] features of what has sound in it, one sound after the other. No gradient is kept where the whole
            encoder is frozen.

        Raises:
            PolymodalError: The model has no audio encoder, or the windows do not add up.
        """
        if self.audio_encoder is None:
            raise PolymodalError("this model has no audio encoder; leave the sound out")
        frames = [count for plan in plans for count in plan.frames]
        tokens = [count for plan in plans for count in plan.tokens]
        if len(frames) != len(audio_values):
            raise PolymodalError(f"audio: {len(frames)} windows were planned, {len(audio_values)} were given")
        with torch.no_grad() if frozen(self.audio_encoder) else nullcontext():
            encoded = self.audio_encoder(audio_values, torch.tensor(frames, device=audio_values.device))
        return torch.cat([window[:count] for window, count in zip(encoded, tokens, strict=True)])

    @property
    def reads_context(self) -> bool:
        """Whether the projector reads the question beside an image (InstructBLIP)."""
        return bool(getattr(self.projector, "text_context", False))

    def project(self, features: Tensor, context_ids: Tensor | None = None, tokens: Size | None = None) -> Tensor:
        """Project tiles.

        Args:
            features: [N, P, E].
            context_ids: [N, t], what the projector reads beside each tile, -1 behind the end; None where it reads
                nothing.
            tokens: Rows and columns of what is to come out, of images with a grid of their own.

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
        more: Any = tokens if isinstance(projector, PooledProjector | SummaryProjector) else context_ids
        projected: Tensor = projector(features, more) if more is not None else projector(features)
        return projected

    def project_images(
        self,
        features: Tensor | Sequence[Tensor],
        plans: Sequence[ImagePlan | VideoPlan],
        context_ids: Tensor | None = None,
    ) -> list[Tensor]:
        """Look along the frames of videos, project features, and lay each medium's tokens out as its plan says.

        Args:
            features: [N, P, E], the tiles of all images and the frames of all videos, in order; or a tensor of each.
            plans: One plan an image or video; their tiles add up to N.
            context_ids: [media, t], what the projector reads beside each, -1 behind the end of a row; None where it
                reads nothing.

        Returns:
            One [num_tokens, D] tensor an image or video.

        Raises:
            PolymodalError: The tiles do not add up, or a layout has another length than planned.
        """
        counts = [plan.num_tiles for plan in plans]
        given = len(features) if isinstance(features, Tensor) else sum(map(len, features))
        if self.projector is None or sum(counts) != given:
            raise PolymodalError(f"image: {sum(counts)} tiles were planned, {given} were given")
        if context_ids is not None and len(context_ids) != len(plans):
            raise PolymodalError(f"image: {len(plans)} images and {len(context_ids)} contexts were given")
        split = features.split(counts) if isinstance(features, Tensor) else features
        dtype = next(iter(self.projector.parameters())).dtype  # images and videos go together again
        times = [plan.times if isinstance(plan, VideoPlan) else () for plan in plans]
        parts = look_along_time(self.temporal_encoder, [part.to(dtype) for part in split], times)
        shapes = [(part.shape[1], plan.tokens) for part, plan in zip(parts, plans, strict=True)]
        projected: list[Tensor] = list(parts)
        for shape in sorted(set(shapes)):  # one, but where videos are pooled in space or images keep their shape
            some = [number for number, own in enumerate(shapes) if own == shape]
            of_part = [number for number in some for _ in parts[number]]
            # Known on the host, the lengths need not be waited for.
            context = None if context_ids is None else context_ids[torch.tensor(of_part, device=context_ids.device)]
            tiles = self.project(torch.cat([parts[number] for number in some]), context, shape[1])
            for number, tokens in zip(some, tiles.split([len(parts[number]) for number in some]), strict=True):
                projected[number] = tokens
        return [lay_out(part, plan, self.image_newline) for part, plan in zip(projected, plans, strict=True)]

    def project_audio(self, features: Tensor, plans: Sequence[AudioPlan]) -> list[Tensor]:
        """Project sounds.

        Args:
            features: [A, E'], as from `encode_audio`.
            plans: One plan a sound.

        Returns:
            One [num_tokens, D] tensor a sound.

        Raises:
            PolymodalError: Features and plans differ in number.
        """
        counts = [plan.num_tokens for plan in plans]
        if self.audio_projector is None or sum(counts) != len(features):
            raise PolymodalError(f"audio: {sum(counts)} tokens were planned, {len(features)} were given")
        dtype = next(iter(self.audio_projector.parameters())).dtype
        return list(self.audio_projector(features.to(dtype)[None])[0].split(counts))

    def embed(
        self,
        input_ids: Tensor,
        plans: Sequence[MediaPlan] = (),
        sample_of_image: Sequence[int] = (),
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        features: Tensor | Sequence[Tensor] | None = None,
        media_places: Tensor | None = None,
        context_ids: Tensor | None = None,
        audio_values: Tensor | None = None,
        audio_features: Tensor | None = None,
        touch_media: bool = False,
    ) -> Tensor:
        """Embed text and scatter media into their placeholders.

        Args:
            input_ids: [B, T]; placeholders expanded.
            plans: One plan a medium, in order of row, then of place.
            sample_of_image: The row of each medium.
            pixel_values: [N, 3, H, W], tiles of images and frames of videos; of several sizes a tensor each; or None.
            features: [N, P, E] in place of `pixel_values`; or a tensor each.
            media_places: [M] positions of placeholders in the flattened [B * T], where they are known beforehand.
            context_ids: As in `project_images`.
            audio_values: [W, F, L], the windows of sounds, or None.
            audio_features: [A, E'] in place of `audio_values`.
            touch_media: As in `forward`.

        Returns:
            [B, T, D].

        Raises:
            PolymodalError: Placeholders and features differ in number.
        """
        is_media = input_ids == self.image_token_id
        text = self.llm.get_input_embeddings()(input_ids.masked_fill(is_media, 0))
        seen = [plan for plan in plans if not isinstance(plan, AudioPlan)]
        heard = [plan for plan in plans if isinstance(plan, AudioPlan)]
        if heard and context_ids is not None:
            rows = [number for number, plan in enumerate(plans) if not isinstance(plan, AudioPlan)]
            context_ids = context_ids[torch.tensor(rows, device=context_ids.device)]
        # Where processes share modules, each runs all of them, and in this order.
        zero = torch.zeros((), device=text.device)
        if features is None and pixel_values is not None:
            features = self.encode_images(pixel_values)
        images = iter(self.project_images(features, seen, context_ids) if features is not None else [])
        if touch_media:
            zero = zero + touch_images(self, features is not None, any(isinstance(p, VideoPlan) for p in seen))
        if audio_features is None and audio_values is not None:
            audio_features = self.encode_audio(audio_values, heard)
        sounds = iter(self.project_audio(audio_features, heard) if audio_features is not None else [])
        if touch_media and audio_features is None:
            zero = zero + touch_audio(self)
        given = [next(sounds if isinstance(plan, AudioPlan) else images, None) for plan in plans]
        media = [tokens for tokens in given if tokens is not None]
        rows = [row for row, tokens in zip(sample_of_image, given, strict=True) if tokens is not None]
        merged = merge_media(text, is_media, media, rows, "media", media_places)
        return merged + zero.to(merged) if touch_media else merged

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        plans: Sequence[MediaPlan] = (),
        sample_of_image: Sequence[int] = (),
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        features: Tensor | Sequence[Tensor] | None = None,
        segments: Sequence[int] | None = None,
        target_places: Tensor | None = None,
        media_places: Tensor | None = None,
        touch_media: bool = False,
        context_ids: Tensor | None = None,
        audio_values: Tensor | None = None,
        audio_features: Tensor | None = None,
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
            audio_values: As in `embed`.
            audio_features: As in `embed`.

        Returns:
            The sum of losses and logits at label positions, or all logits.

        Raises:
            PolymodalError: Placeholders and features differ in number, or this model cannot be given packed samples;
                of an encoder-decoder also: several answers of a row carry labels, or there are no labels.
        """
        media = (plans, sample_of_image, pixel_values, features, media_places, context_ids, audio_values)
        embeds = self.embed(input_ids, *media, audio_features, touch_media)
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

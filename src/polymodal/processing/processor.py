"""The one road in: messages -> `Sample`. train, chat, serve and eval all call this."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image as PILImage
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from polymodal.config import ModelConfig, TemplateConfig
from polymodal.errors import ConfigError, DataError
from polymodal.media.video import probe
from polymodal.media_plan import AudioWindow, ImagePlan, Size, VideoPlan, plan_image
from polymodal.messages import Image, Message, Part, Text, Video
from polymodal.processing.chat_template.encode import ChatTemplate
from polymodal.processing.collate import Sample
from polymodal.processing.document_pages import unread
from polymodal.processing.image_codes import ImageCodes
from polymodal.processing.media_parts import Opened, Pixels, expand, only_image, open_media


class ContextReader:
    """What a projector reads beside an image, in ids of its own tokenizer: the question, as in InstructBLIP."""

    # That is the text of the user turn that holds the image; an image in another turn has none, so that no answer is
    # ever read. Ids are framed as the tokenizer frames a text ([CLS] ... [SEP]), and the text is cut to what fits.
    # Differs from the reference: special tokens that a user types stay plain text.

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.max_length = max_length
        # A copy of its own: transformers changes a tokenizer's settings in calls, which threads must not share.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        framed = self._backend.encode("a", add_special_tokens=True)
        words = [place for place, special in enumerate(framed.special_tokens_mask) if not special]
        self._before, self._after = framed.ids[: words[0]], framed.ids[words[-1] + 1 :]
        self._empty = self._before + self._after or [tokenizer.pad_token_id or 0]
        self.identity = [hashlib.sha256(self._backend.to_str().encode()).hexdigest(), max_length]

    def __call__(self, messages: Sequence[Message]) -> tuple[torch.Tensor, ...]:
        """Read the context of each image."""
        texts = [message.text if message.role == "user" else "" for message in messages for _ in message.media]
        return tuple(torch.tensor(self.ids(text), dtype=torch.int64) for text in texts)

    def ids(self, text: str) -> list[int]:
        """Tokenise a text, framed and cut."""
        room = self.max_length - len(self._before) - len(self._after)
        body = self._backend.encode(text.strip(), add_special_tokens=False).ids[:room]
        return [*self._before, *body, *self._after] if body else list(self._empty)


class Processor:
    """Turns conversations into tensors, in the way one model was trained on.

    Args:
        config: The model's configuration; image rules and template are read from it.
        tokenizer: The language model's tokenizer.
        tokens: Projected tokens per tile, as a grid.
        image_token_id: The placeholder's id.
        last_answer_only: Of several answers only the last one is trained, the others are context: what an
            encoder-decoder language model can be taught. The loss mask, and so every count of trained tokens, says so.
        context_tokenizer: Of a projector that reads the question beside an image; None for one that does not.
        positions: Most tokens that the language model was made for; None where it has no limit, or none is known.
        window: What the audio encoder takes at once; None for a model without one.
        codes: How images become ids, of assistants and, without a vision encoder or where it is wanted, of users; None
            for a model that only writes.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Size | None,
        image_token_id: int,
        last_answer_only: bool = False,
        context_tokenizer: PreTrainedTokenizerBase | None = None,
        positions: int | None = None,
        window: AudioWindow | None = None,
        codes: ImageCodes | None = None,
    ) -> None:
        self.config = config
        self.codes = codes
        self.positions = positions
        self.window = window
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.image_token_id = image_token_id
        self.last_answer_only = last_answer_only
        self.context_tokenizer = context_tokenizer
        self.context = context_reader(config, context_tokenizer)
        self.template = ChatTemplate(tokenizer, config.template, image_token_id)
        self.pad_id: int = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        id: str = "",
        pixels: Pixels = True,  # whether to make tiles and windows; "uint8" leaves normalising to the device
    ) -> Sample:
        """Process one conversation; raises `PolymodalError` where a part or the template does not take it."""
        messages = expand(messages, self.config)
        as_codes = [self._made_of_codes(message, part) for message in messages for part in message.media]
        opened = self._opened(messages)
        messages = self._with_times(messages, opened)
        counts = (medium.plan.num_tokens for medium in opened)
        ids = iter([self.codes.encode(part.source) for part in self._of_codes(messages)] if self.codes else [])
        taken = [next(ids) if as_code else next(counts) for as_code in as_codes]
        rendered = self.template.render(messages, taken, add_generation_prompt=add_generation_prompt)
        loss_mask = torch.tensor(rendered.loss_mask, dtype=torch.bool)
        if self.last_answer_only:
            last = next((message.train for message in reversed(messages) if message.role == "assistant"), True)
            loss_mask = last_run(loss_mask) & last
        return Sample(
            input_ids=torch.tensor(rendered.input_ids, dtype=torch.int64),
            loss_mask=loss_mask,
            slots=rendered.slots,
            plans=tuple(medium.plan for medium in opened),
            pixels=tuple(medium.tiles(pixels) for medium in opened if medium.tiles is not None) if pixels else None,
            sounds=tuple(medium.windows for medium in opened if medium.windows is not None) if pixels else None,
            media_keys=tuple(medium.key for medium in opened),
            id=id,
            contexts=self.context(self.seen(messages)) if self.context is not None else (),
            tokenizer=self.tokenizer,
        )

    def media(self, messages: Sequence[Message]) -> list[Opened]:
        """Open the media of a conversation that an encoder reads.

        Args:
            messages: The conversation.

        Returns:
            What its `Sample` has of them, in order.
        """
        return self._opened(expand(unread(messages), self.config))

    def _opened(self, messages: Sequence[Message]) -> list[Opened]:
        parts = [part for message in self.seen(messages) for part in message.media]
        return [open_media(part, self.config, self.tokens, self.window, alone=only_image(parts)) for part in parts]

    def medium(self, messages: Sequence[Message], place: int) -> Opened:
        """Open one medium of a conversation alone.

        Args:
            messages: The conversation.
            place: Which of its media that are no codes, documents counted by their pages.

        Returns:
            What the whole conversation's `Sample` has of it.
        """
        parts = [part for each in self.seen(expand(unread(messages), self.config)) for part in each.media]
        return open_media(parts[place], self.config, self.tokens, self.window, alone=only_image(parts))

    def _made_of_codes(self, message: Message, part: Part) -> bool:
        """Whether a medium is written as ids; refuses an answer's image where the model makes none."""
        answer = message.role == "assistant"
        if answer and isinstance(part, Image) and self.codes is None:
            raise DataError(
                "an image in the assistant's turn, and this model makes none: give it an image tokenizer (init.output "
                "of a recipe), or move the image to a question",
                "misplaced-medium",
            )
        if self.codes is None or not isinstance(part, Image):
            return False
        return answer or self.config.image is None or self.codes.config.questions == "codes"

    def made_of_codes(self, messages: Sequence[Message]) -> list[Image]:
        """Find what of a conversation is written as ids.

        Args:
            messages: The conversation.

        Returns:
            The images, in order; pages of documents among them.
        """
        return self._of_codes(expand(unread(messages), self.config))

    def _of_codes(self, messages: Sequence[Message]) -> list[Image]:
        found = [(each, part) for each in messages for part in each.media]
        return [part for each, part in found if isinstance(part, Image) and self._made_of_codes(each, part)]

    def seen(self, messages: Sequence[Message]) -> list[Message]:
        """Leave out what is written as ids.

        Args:
            messages: A conversation, documents as their pages.

        Returns:
            Its texts, and the media that an encoder reads.
        """
        return [replace(m, parts=tuple(p for p in m.parts if not self._made_of_codes(m, p))) for m in messages]

    def _with_times(self, messages: Sequence[Message], opened: Sequence[Opened]) -> Sequence[Message]:
        """Tell the model about each video, where its configuration says how."""
        if self.config.video is None or not (said := self.config.video.time_instruction):
            return messages
        media = iter(opened)

        def told(message: Message, part: Part) -> tuple[Part, ...]:
            bare = isinstance(part, Text) or self._made_of_codes(message, part)
            plan = None if bare else next(media).plan
            if not isinstance(part, Video) or not isinstance(plan, VideoPlan):
                return (part,)
            times = ", ".join(f"{time:.2f}s" for time in plan.times)
            duration = probe(part.source).duration or max(plan.times)  # of all of it, whichever frames are taken
            text = said.format(duration=duration, num_frames=len(plan.times), times=times)
            return Text(text), part

        return [replace(each, parts=tuple(new for part in each.parts for new in told(each, part))) for each in messages]

    def with_template(self, template: str | TemplateConfig | None) -> Processor:
        """The same processor under another chat template.

        Args:
            template: A preset's name, jinja text or whole settings; None for this processor itself.

        Returns:
            The processor.
        """
        if template is None:
            return self
        if isinstance(template, str):
            template = self.config.template.model_copy(update={"chat_template": template})
        return self.with_config(self.config.model_copy(update={"template": template}))

    def with_config(self, config: ModelConfig) -> Processor:
        """The same processor under another configuration.

        Args:
            config: With other image rules of the same tile, or another template.

        Returns:
            The processor.
        """
        codes = self.codes
        if codes is not None and config.output is not None and config.output.image != codes.config:
            codes = ImageCodes(codes.tokenizer, codes.vocabulary, config.output.image)
        more = (self.last_answer_only, self.context_tokenizer, self.positions, self.window, codes)
        return Processor(config, self.tokenizer, self.tokens, self.image_token_id, *more)

    def longest(self, max_length: int) -> int:
        """The most tokens of a row.

        Args:
            max_length: What the user allows.

        Returns:
            That, or the language model's positions where these are fewer.
        """
        return max_length if self.positions is None else min(max_length, self.positions)

    def plan(self, image: PILImage.Image, *, alone: bool = True) -> ImagePlan:
        """Plan one decoded image.

        Args:
            image: The image, upright.
            alone: Whether it is the only image of its conversation.

        Returns:
            Its tiles and tokens.
        """
        if self.config.image is None or self.tokens is None:
            raise ConfigError("this model has no vision encoder; leave the image out")
        return plan_image(Size(image.height, image.width), self.config.image, self.tokens, alone=alone)


def context_reader(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> ContextReader | None:
    """Make what reads an image's context."""
    settings = config.projector.qformer
    if config.vision is None or settings is None or not settings.text_context:
        return None
    if tokenizer is None:
        raise ConfigError("projector.qformer.text_context: the processor was given no context_tokenizer")
    return ContextReader(tokenizer, settings.max_text_length)


def last_run(loss_mask: torch.Tensor) -> torch.Tensor:  # [T] -> [T]
    """Keep the last run of a mask."""
    trained = loss_mask.nonzero().flatten()
    if not len(trained):
        return loss_mask
    breaks = (~loss_mask[: int(trained[-1])]).nonzero().flatten()
    kept = loss_mask.clone()
    kept[: int(breaks[-1]) if len(breaks) else 0] = False
    return kept

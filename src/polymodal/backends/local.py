"""A model of ours behind the chat protocol."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from polymodal.backends.base import Backend, Reply, TextDelta, fit_context, stream_reply
from polymodal.config import ModelConfig
from polymodal.errors import PolymodalError
from polymodal.generation.generate import generate_ids, stream_ids
from polymodal.generation.params import GenerationParams
from polymodal.generation.streaming import TextStream
from polymodal.messages import Message
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Sample, collate
from polymodal.processing.processor import Processor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def processor_of(model: MultimodalLM, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> Processor:
    """The processor that makes what a model takes."""
    return Processor(
        config, tokenizer, model.tokens_per_tile, model.image_token_id, model.encoder_decoder, model.context_tokenizer
    )


class LocalBackend(Backend):
    """Answers conversations with a `MultimodalLM`.

    Args:
        model: The model, in eval mode.
        tokenizer: Its tokenizer.
        config: Its configuration.
        name: What replies call it.
        history: The stages the model went through; plain data.
    """

    def __init__(
        self,
        model: MultimodalLM,
        tokenizer: PreTrainedTokenizerBase,
        config: ModelConfig,
        name: str = "model",
        history: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.name = name
        self.history = tuple(history)
        self.processor = processor_of(model, tokenizer, config)

    @property
    def context_length(self) -> int:
        """The most positions the language model was made for."""
        text_config = self.model.llm.config.get_text_config()
        return int(getattr(text_config, "max_position_embeddings", 1 << 30))

    def stream(
        self, messages: Sequence[Message], params: GenerationParams | None = None
    ) -> Iterator[TextDelta | Reply]:
        """Answer a conversation piece by piece.

        Args:
            messages: The conversation; ends with a user message.
            params: The settings; greedy where None.

        Yields:
            `TextDelta`s as text becomes certain, then the whole `Reply`.

        Raises:
            PolymodalError: An image cannot be read, or the conversation does not fit the context.
        """
        params = params or GenerationParams()
        begin = time.perf_counter()
        sample = self.prepare(messages, params.max_new_tokens)
        yield from stream_reply(
            self._tokens(sample, params),
            TextStream(self.tokenizer, params.stop, self.processor.template.stop_ids, skip_space=True),
            begin=begin,
            prompt_tokens=sample.input_ids.numel(),
            image_tokens=sum(plan.num_tokens for plan in sample.plans),
            model=self.name,
        )

    def generate_batch(
        self, conversations: Sequence[Sequence[Message]], params: GenerationParams
    ) -> list[str | PolymodalError]:
        """Answer several conversations as one padded batch.

        Args:
            conversations: Each ends with a user message.
            params: The settings; stop texts are not looked for.

        Returns:
            For each the answer's text, or why there is none.
        """
        prepared: list[Sample | PolymodalError] = []
        for messages in conversations:
            try:
                prepared.append(self.prepare(messages, params.max_new_tokens))
            except PolymodalError as error:
                prepared.append(error)
        texts: list[str] = []
        if samples := [p for p in prepared if not isinstance(p, PolymodalError)]:
            batch = collate(samples, self.processor.pad_id, side="left")
            stop_ids = self.processor.template.stop_ids
            for ids in generate_ids(self.model, batch, params, stop_ids, len(self.tokenizer)):
                texts.append(self.tokenizer.decode([i for i in ids if i not in stop_ids], skip_special_tokens=True))
        remaining = iter(texts)
        return [p if isinstance(p, PolymodalError) else next(remaining).strip() for p in prepared]

    def prepare(self, messages: Sequence[Message], room: int) -> Sample:
        """Process a conversation so that it fits the context.

        Too long a conversation loses its oldest turns of plain text, a question with its answer at a time; media and
        the last question are never cut.

        Args:
            messages: The conversation.
            room: Positions to keep free for the answer.

        Returns:
            The prompt.

        Raises:
            PolymodalError: It does not fit even so; names both lengths.
        """

        def process(kept: list[Message]) -> tuple[Sample, int]:
            sample = self.processor(kept, add_generation_prompt=True)
            return sample, sample.input_ids.numel()

        # The answer of an encoder-decoder is the decoder's and takes nothing from what the encoder reads.
        return fit_context(messages, process, 0 if self.model.encoder_decoder else room, self.context_length)

    def _tokens(self, sample: Sample, params: GenerationParams) -> Iterator[tuple[int, float]]:
        """Each token of the answer, and the seconds spent on encoding before it."""
        batch = collate([sample], self.processor.pad_id, side="left")
        stop_ids = self.processor.template.stop_ids
        for step in stream_ids(self.model, batch, params, stop_ids, len(self.tokenizer)):
            token = step.ids[0]
            assert token is not None  # a single row ends with the stream
            yield token, step.encode_s

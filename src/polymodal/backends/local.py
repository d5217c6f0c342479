"""A model of ours behind the chat protocol."""

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from polymodal.backends.base import Answer, ModelBackend
from polymodal.config import ModelConfig
from polymodal.errors import PolymodalError
from polymodal.generation.generate import can_share, stream_ids
from polymodal.generation.params import GenerationParams
from polymodal.generation.streaming import Step
from polymodal.messages import Conversation, Message
from polymodal.modeling.language_model import positions_of
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Sample, collate
from polymodal.processing.processor import Processor
from polymodal.utils.files import sha256_json


def processor_of(model: MultimodalLM, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> Processor:
    """The processor that makes what a model takes."""
    more = (model.encoder_decoder, model.context_tokenizer, positions_of(model.llm.config), model.audio_window)
    return Processor(config, tokenizer, model.tokens_per_tile, model.image_token_id, *more)


class LocalBackend(ModelBackend[Sample]):
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
        self.config = config
        self.history = tuple(history)
        self.processor = processor_of(model, tokenizer, config)
        super().__init__(name, tokenizer, model.llm.config, self.processor.template.stop_ids)
        given = {"image": config.image, "video": config.video, "audio": model.audio_encoder}
        self.takes = tuple(kind for kind, there in given.items() if there is not None)

    def settings(self) -> dict[str, str]:
        """Hashes of the image rules and of the template."""
        config = self.config
        tower, rules, template, *senses = (
            part.model_dump(mode="json") if part is not None else None
            for part in (config.vision, config.image, config.template, config.video, config.audio)
        )
        return {
            # As it was before there were videos and sounds, for a model that takes none.
            "preprocessing": sha256_json([tower, rules, *(sense for sense in senses if sense is not None)]),
            "template": sha256_json([template, self.tokenizer.chat_template]),
        }

    def generate_batch(self, conversations: Sequence[Conversation], params: GenerationParams) -> list[Answer]:
        """Answer several conversations as one padded batch.

        Args:
            conversations: Each ends with a user message.
            params: The settings.

        Returns:
            For each the answer's text without white space around it, or why there is none.
        """
        prepared: list[Sample | PolymodalError] = []
        for messages in conversations:
            try:
                prepared.append(self.prepare(messages, params.max_new_tokens))
            except PolymodalError as error:
                prepared.append(error)
        samples = [p for p in prepared if not isinstance(p, PolymodalError)]
        texts = iter(self._texts(self._run(samples, params), len(samples), params) if samples else [])
        return [p if isinstance(p, PolymodalError) else next(texts) for p in prepared]

    def _process(self, messages: Sequence[Message]) -> Sample:
        return self.processor(messages, add_generation_prompt=True)

    def _sizes(self, inputs: Sample) -> tuple[int, int]:
        return inputs.input_ids.numel(), sum(plan.num_tokens for plan in inputs.plans)

    def _steps(self, inputs: Sample, params: GenerationParams) -> Generator[Step]:
        return self._run([inputs], params)

    def _run(self, samples: Sequence[Sample], params: GenerationParams) -> Generator[Step]:
        beginnings = None
        if len(samples) > 1 and can_share(self.model) and (found := shared_beginnings(samples)) is not None:
            once, rows, samples = found
            beginnings = collate(once, self.processor.pad_id, side="left"), rows
        batch = collate(samples, self.processor.pad_id, side="left")
        return stream_ids(self.model, batch, params, self.stop_ids, len(self.tokenizer), beginnings)


def shared_beginnings(samples: Sequence[Sample]) -> tuple[list[Sample], list[int], list[Sample]] | None:
    """Prompts up to their last image, each once; which one each prompt has; the rest of each. None if all differ."""
    once: dict[object, Sample] = {}
    keys: list[object] = []
    rest: list[Sample] = []
    for sample in samples:
        end = max((slot.start + slot.length for slot in sample.slots), default=0)
        if not 0 < end < len(sample.input_ids) or len(sample.media_keys) != len(sample.plans):
            return None
        contexts = tuple(tuple(ids.tolist()) for ids in sample.contexts)
        keys.append((sample.media_keys, tuple(sample.input_ids[:end].tolist()), contexts))
        before = replace(sample, input_ids=sample.input_ids[:end], loss_mask=sample.loss_mask[:end])
        once.setdefault(keys[-1], before)
        rest.append(Sample(sample.input_ids[end:], sample.loss_mask[end:], id=sample.id))
    number = {key: place for place, key in enumerate(once)}
    return (list(once.values()), [number[key] for key in keys], rest) if len(once) < len(samples) else None

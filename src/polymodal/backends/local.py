"""A model of ours behind the chat protocol.

What several prompts begin with is read once: in a batch their images (`shared_beginnings`), and from one call to the
next whatever an earlier conversation and this one have in common (`PrefixCache`), such as a long video.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from polymodal.backends.base import Answer, ModelBackend, RawPrompt, check_makes
from polymodal.checkpoints.model_folder import save_model
from polymodal.config import ImageConfig, ModelConfig
from polymodal.errors import CheckpointError, ConfigError, PolymodalError
from polymodal.generation.batching import Batcher, Row
from polymodal.generation.generate import can_share, new_cache, read_beginnings, stream_ids
from polymodal.generation.kept import Kept, MediaCache, PrefixCache, weights_of, without_beginning
from polymodal.generation.modalities import image_block, require_room, stream_modalities
from polymodal.generation.params import GenerationParams
from polymodal.generation.sampling import Sampler, unspoken
from polymodal.generation.streaming import Step
from polymodal.media_plan import AudioPlan, ImagePlan, Size, plan_image
from polymodal.messages import Conversation, Image, Message, Part, Source, Text, as_messages, assistant
from polymodal.modeling.language_model import positions_of
from polymodal.modeling.onnx_llm import OnnxLLM
from polymodal.modeling.own import Own
from polymodal.modeling.token_loss import Output
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.chat_template.calls import CallForm, find_form
from polymodal.processing.collate import Sample, collate
from polymodal.processing.image_codes import ImageCodes, empty_condition
from polymodal.processing.processor import Processor
from polymodal.utils.files import sha256_json


def processor_of(model: MultimodalLM, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> Processor:
    """The processor that makes what a model takes."""
    codes = None
    if model.image_tokenizer is not None and model.vocabulary is not None and config.output is not None:
        codes = ImageCodes(model.image_tokenizer, model.vocabulary, config.output.image)
    more = (model.encoder_decoder, model.context_tokenizer, positions_of(model.llm.config), model.audio_window, codes)
    return Processor(config, tokenizer, model.tokens_per_tile, model.image_token_id, *more)


class LocalBackend(ModelBackend[Sample]):
    """Answers conversations with a `MultimodalLM`.

    Args:
        model: The model, in eval mode.
        tokenizer: Its tokenizer.
        config: Its configuration.
        name: What replies call it.
        history: The stages the model went through; plain data.

    Attributes:
        keeps_last: Whether the key-value cache of the last conversation is kept, so that the next question about the
            same images, videos and sounds reads them no second time.
        salt: Keeps what is kept of some conversations apart from others.
        looks_up: Whether an answer that says again what was said is read several tokens at a time. On for float32
            graphs. Elsewhere it is to be asked for: torch on a CPU may lose a few percent where nothing is repeated,
            and with rounded weights or half precision several tokens give slightly other logits than one.
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
        self.keeps_last, self.salt = can_share(model), ""
        self.completes = not model.encoder_decoder and model.context_tokenizer is None
        self.looks_up = isinstance(model.llm, OnnxLLM) and model.llm.bits == 32
        self.prefixes = PrefixCache()  # whoever answers takes what it holds, so that no two threads share it
        given = {"image": config.image, "video": config.video, "audio": model.audio_encoder}
        self.takes = tuple(kind for kind, there in given.items() if there is not None)
        if self.processor.codes is not None:
            self.takes = tuple(dict.fromkeys(("image", *self.takes)))
            self.makes = ("text", "image")

    def settings(self) -> dict[str, str]:
        """Hashes of the rules of media, of the template, and of how positions are stretched."""
        config, rope = self.config, self.config.llm.rope_scaling
        tower, rules, template, *senses = (
            part.model_dump(mode="json") if part is not None else None
            for part in (config.vision, config.image, config.template, config.video, config.audio, config.output)
        )
        return {
            # As it was before there were videos and sounds, for a model that takes none.
            "preprocessing": sha256_json([tower, rules, *(sense for sense in senses if sense is not None)]),
            "template": sha256_json([template, self.tokenizer.chat_template]),
            **({} if rope is None else {"positions": sha256_json(rope.model_dump(mode="json"))}),
        }

    def generate_batch(self, conversations: Sequence[Conversation], params: GenerationParams) -> list[Answer]:
        """Answer several conversations as one padded batch.

        Args:
            conversations: Each ends with a user message.
            params: The settings.

        Returns:
            For each the answer's text without white space around it, or why there is none.
        """
        check_makes(self, params)
        self.forget()
        prepared = [self._try(messages, params) for messages in conversations]
        samples = [p for p in prepared if not isinstance(p, PolymodalError)]
        texts = iter(self._texts(self._run(samples, params), len(samples), params) if samples else [])
        return [p if isinstance(p, PolymodalError) else next(texts) for p in prepared]

    def generate_replies(
        self, conversations: Sequence[Conversation], params: GenerationParams
    ) -> list[Message | PolymodalError]:
        """Answer several conversations as one padded batch, with all that the answers may hold.

        Args:
            conversations: Each ends with a user message.
            params: The settings; each row is sampled from the same seed, as it would be alone.

        Returns:
            For each the answer, or why there is none.
        """
        check_makes(self, params)
        self.forget()
        prepared = [self._try(messages, params) for messages in conversations]
        samples = [p for p in prepared if not isinstance(p, PolymodalError)]
        answers = [self.answer_stream(params) for _ in samples]
        for ids, _ in self._run(samples, params) if samples else ():
            for answer, token in zip(answers, ids, strict=True):
                if token is not None and not answer.stopped:
                    deque(answer.push(token), maxlen=0)
            if all(answer.stopped for answer in answers):
                break
        said = iter(assistant(*answer.parts) for answer in answers)
        return [p if isinstance(p, PolymodalError) else next(said) for p in prepared]

    @cached_property
    def calls(self) -> CallForm | None:  # type: ignore[override]
        """How the model's chat template writes calls of tools."""
        return find_form(self.processor.template, self.tokenizer)

    def raw_prompt(self, given: Any) -> RawPrompt:
        """Make a prompt of a text that stands in no conversation.

        Args:
            given: The text, or its ids.

        Returns:
            The prompt, which `stream` takes in place of messages.

        Raises:
            PolymodalError: There is nothing in it, or an id is none of a text's.
        """
        ids = given
        if isinstance(given, str):
            spoken, alone = (self.tokenizer("a", add_special_tokens=on).input_ids for on in (True, False))
            begin = spoken[: next((i for i in range(len(spoken)) if spoken[i : i + len(alone)] == alone), 0)]
            ids = [*begin, *self.processor.template.plain(given, begin)]
        never = {*unspoken(self.model)}
        if wrong := [token for token in ids if token in never or not 0 <= token < len(self.tokenizer)]:
            raise PolymodalError(f"the id {wrong[0]} is none of a text's; ids are from 0 to {len(self.tokenizer) - 1}")
        if not ids:
            raise PolymodalError("there is nothing to go on from; give a text")
        return RawPrompt(tuple(ids))

    def _raw(self, prompt: RawPrompt) -> Sample:
        ids = torch.tensor(prompt.ids)
        return Sample(ids, torch.zeros(len(ids), dtype=torch.bool))

    def _try(self, messages: Conversation, params: GenerationParams) -> Sample | PolymodalError:
        try:
            sample = self.prepare(messages, params.max_new_tokens)
            if (codes := self.processor.codes) is not None:
                room = self.context_length - sample.input_ids.numel()
                require_room(room, params, image_block(codes.vocabulary, codes.count))
            return sample
        except PolymodalError as error:
            return error

    def _codes(self, params: GenerationParams) -> ImageCodes | None:
        return self.processor.codes if "image" in params.modalities else None

    def _process(self, messages: Sequence[Message]) -> Sample:
        return self.processor(messages, add_generation_prompt=True)

    def _sizes(self, inputs: Sample) -> tuple[int, int]:
        return inputs.input_ids.numel(), sum(plan.num_tokens for plan in inputs.plans)

    def _sounds(self, inputs: Sample) -> int:
        return sum(plan.num_tokens for plan in inputs.plans if isinstance(plan, AudioPlan))

    def forget(self) -> None:
        """Free the memory that earlier conversations take."""
        self.prefixes.clear()

    def _steps(self, inputs: Sample, params: GenerationParams, sampler: Sampler) -> Generator[Step]:
        prompt = inputs.input_ids if self.looks_up else None
        if not self.keeps_last or "image" in params.modalities:  # an image is drawn from a cache with more rows
            yield from self._run([inputs], params, prompt=prompt, samplers=[sampler])
            return
        weights, salt = weights_of(self.model), self.salt
        last, length = self.prefixes.find(inputs, weights, salt, take=True)
        cache = new_cache(self.model) if last is None else last.cache
        if last is not None and (surplus := len(last.sample.input_ids) - length):
            cache.crop(-surplus)
        del last
        made: list[int] = []
        try:
            before = torch.ones((1, length), dtype=torch.bool, device=self.model.device)
            for step in self._run([without_beginning(inputs, length)], params, (cache, before), prompt, [sampler]):
                made += [token for token in step[0] if token is not None]
                yield step
        finally:
            read = {layer.get_seq_length() for layer in cache.layers}  # of several lengths where a layer failed
            if len(read) == 1:
                ids = torch.cat((inputs.input_ids, torch.tensor(made, dtype=torch.int64)))
                held = read.pop()
                length = min(held, len(ids) - 1)  # the last id was not read; what stands there, if anything, is a draft
                if surplus := held - length:
                    cache.crop(-surplus)
                ids = ids[:length]
                self.prefixes.put(Kept(replace(inputs, input_ids=ids, pixels=None, sounds=None), cache, weights, salt))

    def batcher(self, streams: int, prefix_bytes: int, media_bytes: int) -> Batcher | None:
        """Prepare for several answers at once.

        Args:
            streams: The most that are made at once.
            prefix_bytes: For key-value caches of conversations; 0 for none.
            media_bytes: For the tokens of media.

        Returns:
            What makes them; None where they can only be made one by one.
        """
        if not can_share(self.model):
            return None
        self.keeps_last, self.prefixes = prefix_bytes > 0, PrefixCache(prefix_bytes)
        kept = self.prefixes if prefix_bytes else None
        return Batcher(self.model, len(self.tokenizer), streams, kept, MediaCache(media_bytes))

    def row(self, inputs: Sample, params: GenerationParams, salt: str = "") -> Row:
        """Begin an answer for `batcher`.

        Args:
            inputs: Of `prepare`.
            params: The settings.
            salt: Keeps what is kept of it from answers with another one.

        Returns:
            The answer's row.
        """
        return Row(inputs, self.sampler(params), params.max_new_tokens, salt)

    def _run(
        self,
        samples: Sequence[Sample],
        params: GenerationParams,
        past: tuple[DynamicCache, torch.Tensor] | None = None,
        prompt: torch.Tensor | None = None,  # As of `stream_ids`
        samplers: Sequence[Sampler] | None = None,
    ) -> Generator[Step]:
        if "image" in params.modalities:
            yield from self._draw(samples, params)
            return
        if len(samples) > 1 and can_share(self.model) and (found := shared_beginnings(samples)) is not None:
            once, rows, samples = found
            past = read_beginnings(self.model, collate(once, self.processor.pad_id, side="left"), rows)
        if samplers is None and params.alone:
            samplers = [self.sampler(params) for _ in samples]
        batch = collate(samples, self.processor.pad_id, side="left")
        yield from stream_ids(self.model, batch, params, self.stop_ids, len(self.tokenizer), past, prompt, samplers)

    def _draw(self, samples: Sequence[Sample], params: GenerationParams) -> Generator[Step]:
        codes = self.processor.codes
        assert codes is not None  # what the model makes was looked at before
        params = params.settled(codes.config)
        block = image_block(codes.vocabulary, codes.count)
        text_ids = max(len(self.tokenizer), block.begin + 1)
        conditions = [[empty_condition(self.tokenizer)]] * len(samples)
        batch = collate(samples, self.processor.pad_id, side="left")
        yield from stream_modalities(self.model, batch, params, self.stop_ids, block, text_ids, conditions)

    def forward(
        self,
        messages: Conversation | None = None,
        *,
        images: Sequence[Source | Image] = (),
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> Output:
        """Run the model once, for its loss and logits; `generate` and `ask` are for answers.

        Args:
            messages: A conversation in any form. Where it has answers, they are what the loss is of.
            images: Images that go in front of the first question, or where `<image>` stands in a text.
            input_ids: [B, T] in place of messages, with as many placeholders (`model.image_token_id`) as images take.
            attention_mask: [B, T], 0 on padding.
            labels: [B, T], -100 where untrained; not shifted.
            pixel_values: [N, 3, H, W], tiles in the order of the placeholders, one an image.

        Returns:
            `loss` (None without answers or labels), and `logits`: with labels at the positions that predict one,
            [R, V], else of all positions, [B, T, V].

        Raises:
            PolymodalError: An image cannot be read, or placeholders and images differ in number.
        """
        if (messages is None) == (input_ids is None):
            raise ConfigError("give messages, or input_ids")
        if messages is not None:
            conversation = with_media(as_messages(messages), [as_image(image) for image in images])
            asks = conversation[-1].role != "assistant"
            sample = self.processor(conversation, add_generation_prompt=asks)
            batch = collate([sample], self.processor.pad_id).to(self.model.device)
            given = batch.inputs()
            return self.model(**given) if sample.loss_mask.any() else self.model(**{**given, "labels": None})
        assert input_ids is not None
        plans, rows = self._plans(input_ids, pixel_values)
        mask = None if attention_mask is None else attention_mask.bool()
        return self.model(input_ids, mask, labels, plans, rows, pixel_values)

    def __call__(self, *args: Any, **kwargs: Any) -> Output:
        """Run the model once, as `forward` says."""
        return self.forward(*args, **kwargs)

    def _plans(self, input_ids: torch.Tensor, pixels: torch.Tensor | None) -> tuple[list[ImagePlan], list[int]]:
        """Plans of tiles that are an image each, and the row of each."""
        count = 0 if pixels is None else len(pixels)
        holes = (input_ids == self.model.image_token_id).sum(dim=1).tolist()
        grid = self.model.tokens_per_tile
        if grid is None or pixels is None:
            return [], []
        if (own := self.config.image) is not None and own.image_aspect_ratio == "native":
            raise ConfigError("pixel_values: images of a native model have a plan each; give messages in their place")
        rows = [row for row, number in enumerate(holes) for _ in range(number // grid.area)]
        if any(number % grid.area for number in holes) or len(rows) != count:
            raise PolymodalError(
                f"input_ids: {holes} placeholders in its rows for {count} images of {grid.area} tokens; "
                f"put {grid.area} of id {self.model.image_token_id} for each image"
            )
        height, width = pixels.shape[2:]
        rules = ImageConfig(
            image_aspect_ratio="squash", tile_size=(height, width), image_mean=(0.0,) * 3, image_std=(1.0,) * 3
        )
        return [plan_image(Size(height, width), rules, grid)] * count, rows

    def save(self, folder: str | Path, *, replace: bool = False) -> Path:
        """Write the model into a folder that `polymodal.load` opens.

        What was loaded from elsewhere and not changed is named there, not copied.

        Args:
            folder: A new folder.
            replace: Put it in the place of one that is there.

        Returns:
            The folder.

        Raises:
            CheckpointError: The folder is there, or a part is a module of yours, which no folder can name.
        """
        for name in ("vision_encoder", "projector"):
            part = getattr(self.model, name)
            if own := next((m for m in (part.modules() if part is not None else ()) if isinstance(m, Own)), None):
                raise CheckpointError(
                    f"{folder}: {name} is a module of yours ({type(own.module).__name__}), which no folder can "
                    "name; keep `model.model.state_dict()` and compose again"
                )
        save_model(Path(folder), self.model, self.config, self.tokenizer, history=list(self.history), replace=replace)
        return Path(folder)


def as_image(source: Any) -> Image:
    """An image as a part of a message."""
    return source if isinstance(source, Image) else Image(source)


def with_media(messages: Sequence[Message], images: Sequence[Image]) -> list[Message]:
    """Put images where `<image>` stands in the texts of users, or in front of the first question."""
    left, found = deque(images), []
    marked = any("<image>" in message.text for message in messages if message.role == "user")
    for message in messages:
        parts: list[Part] = []
        if left and message.role == "user" and not marked:
            parts, left = [*left, *message.parts], deque()
        for part in message.parts if not parts else ():
            if not (left and message.role == "user" and isinstance(part, Text)):
                parts.append(part)
                continue
            pieces = part.text.split("<image>")
            for number, piece in enumerate(pieces):
                if number and left:
                    parts.append(left.popleft())
                parts += [Text(piece.strip("\n") if marked else piece)] if piece.strip("\n") else []
        found.append(replace(message, parts=tuple(parts)))
    if left:
        raise PolymodalError(f"images: {len(left)} more than there are places marked <image>")
    return found


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

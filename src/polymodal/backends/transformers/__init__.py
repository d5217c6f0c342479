"""Any vision-language model of transformers behind the chat protocol, through its own class and processor.

Unlike `backends.local`, nothing of the model is ours: what its processor makes goes into its own `generate`. Choosing
the next token is ours (`generation.generate`), so that the same settings mean the same everywhere and a seed belongs to
one answer only; so is the text as it streams. The model runs in a thread of its own, one conversation after the other,
since several classes keep positions of the conversation at hand on themselves.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel, ProcessorMixin, StoppingCriteriaList

from polymodal.backends.base import Backend, Reply, TextDelta, fit_context, fits, require_question, stream_reply
from polymodal.backends.transformers.folder import open_model, open_processor
from polymodal.backends.transformers.prompt import Chat, PromptMaker
from polymodal.errors import PolymodalError
from polymodal.generation.generate import new_generator, sample_next
from polymodal.generation.params import GenerationParams
from polymodal.generation.streaming import TextStream
from polymodal.messages import Message
from polymodal.safety.model_folder import check_folder

Inputs = dict[str, Any]


def open_transformers(
    folder: Path,
    device: str | None = None,
    name: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
) -> TransformersBackend:
    """Open a model folder of transformers."""
    check_folder(folder)
    processor = open_processor(folder)  # before the weights: it is quick, and the likelier to be missing something
    model = open_model(folder, device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype, quantize)
    return TransformersBackend(model, processor, name or folder.name)


class TransformersBackend(Backend):
    """Answers conversations with a model of transformers."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, name: str = "model") -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.name = name
        config = model.config
        media = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video", "audio")]
        image_token_id = media[0] if media[0] is not None else getattr(config, "image_token_index", None)
        self.prompts = PromptMaker(processor, image_token_id)
        self.stop_ids = _stop_ids(model, self.tokenizer)
        self._never = sorted({int(i) for i in (*media, image_token_id) if i is not None})
        self._busy = threading.Lock()

    @property
    def context_length(self) -> int:
        """The most positions the language model was made for."""
        text_config = self.model.config.get_text_config()
        return int(getattr(text_config, "max_position_embeddings", None) or 1 << 30)

    def stream(
        self, messages: Sequence[Message], params: GenerationParams | None = None
    ) -> Iterator[TextDelta | Reply]:
        """Answer a conversation piece by piece. Closing the iterator stops the model."""
        # The times of encoding images are part of the time to the first token: these models encode inside their
        # first step.
        params = params or GenerationParams()
        begin = time.perf_counter()
        inputs = self.prepare(messages, params.max_new_tokens)
        prompt = inputs["input_ids"]
        with closing(self._steps(inputs, params)) as steps:
            yield from stream_reply(
                ((token, 0.0) for (token,) in steps),
                TextStream(self.tokenizer, params.stop, self.stop_ids, skip_space=True),
                begin=begin,
                prompt_tokens=prompt.numel(),
                image_tokens=self.prompts.image_tokens(prompt),
                model=self.name,
            )

    def generate_batch(
        self, conversations: Sequence[Sequence[Message]], params: GenerationParams
    ) -> list[str | PolymodalError]:
        """Answer several conversations, those of a kind together."""
        answers: dict[int, str | PolymodalError] = {}
        groups: dict[bool, dict[int, Chat]] = {}
        for index, messages in enumerate(conversations):
            try:
                require_question(messages)
                chat = self.prompts.chat(messages)
            except PolymodalError as error:
                answers[index] = error
            else:
                groups.setdefault(any(message.media for message in messages), {})[index] = chat
        for group in groups.values():
            answers |= self._together(group, params)
        return [
            answers[index] if index in answers else self._answer(messages, params)
            for index, messages in enumerate(conversations)
        ]

    def prepare(self, messages: Sequence[Message], room: int) -> Inputs:
        """Process a conversation so that it fits the context; the oldest questions of text are left out if need be."""

        def process(kept: list[Message]) -> tuple[Inputs, int]:
            inputs = self.prompts.inputs([self.prompts.chat(kept)])
            return inputs, inputs["input_ids"].shape[1]

        return fit_context(messages, process, self._room(room), self.context_length)

    def _room(self, new_tokens: int) -> int:
        # The answer of an encoder-decoder is the decoder's and takes nothing from what the encoder reads.
        return 0 if self.model.config.is_encoder_decoder else new_tokens

    def _together(self, group: dict[int, Chat], params: GenerationParams) -> dict[int, str]:
        """Answer a padded batch; nothing where these have to be asked one by one (unequal images, too long, ...)."""
        if len(group) < 2 or params.temperature > 0:
            return {}  # a seed belongs to one answer
        try:
            inputs = self.prompts.inputs(list(group.values()))
        except PolymodalError:
            return {}
        if not fits(inputs["input_ids"].shape[1], self._room(params.max_new_tokens), self.context_length):
            return {}
        rows = [TextStream(self.tokenizer, params.stop, self.stop_ids, skip_space=True) for _ in group]
        with closing(self._steps(inputs, params)) as steps:
            for step in steps:
                for row, token in zip(rows, step, strict=True):
                    if not row.stopped:
                        row.push(token)
                if all(row.stopped for row in rows):
                    break
        for row in rows:
            row.finish()
        return {index: row.text.strip() for index, row in zip(group, rows, strict=True)}

    def _steps(self, inputs: Inputs, params: GenerationParams) -> Generator[list[int]]:
        """Run the model in a thread and give one id a row after each step; the thread ends with the iterator."""
        steps: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()
        cancelled = threading.Event()

        def work() -> None:
            try:
                with self._busy:
                    self._run(inputs, params, steps.put, cancelled)
                steps.put(None)
            except BaseException as error:  # it belongs to who waits on the other side
                steps.put(error)

        thread = threading.Thread(target=work, name="generate", daemon=True)
        thread.start()
        try:
            while (step := steps.get()) is not None:
                if isinstance(step, BaseException):
                    raise step
                yield step
        finally:
            cancelled.set()
            thread.join()

    @torch.inference_mode()
    def _run(
        self, inputs: Inputs, params: GenerationParams, put: Callable[[list[int]], None], cancelled: threading.Event
    ) -> None:
        """Run the model, giving away the ids of each step."""
        moved = {
            key: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            if isinstance(value, torch.Tensor)
            else value
            for key, value in inputs.items()
        }
        generator = new_generator(params, self.model.device)
        start: int | None = None

        def choose(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            """Choose the next ids, tell the other side, and leave `generate` no other choice."""
            nonlocal start
            start = ids.shape[1] if start is None else start
            scores = scores.clone()
            scores[:, [i for i in self._never if i < scores.shape[1]]] = -torch.inf
            scores[:, len(self.tokenizer) :] = -torch.inf  # head rows past the tokenizer
            chosen = sample_next(scores, params, ids[:, start:], generator)
            put(chosen.tolist())
            return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)

        def stop(ids: torch.Tensor, _scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.full((len(ids),), cancelled.is_set(), device=ids.device)

        self.model.generate(
            **moved,
            max_new_tokens=params.max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=list(self.stop_ids) or None,
            logits_processor=LogitsProcessorList([choose]),
            stopping_criteria=StoppingCriteriaList([stop]),
        )


def _stop_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """What ends an answer: the model's own generation settings, and the tokenizer's end token."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))

"""Any model of transformers that takes images, videos or sounds, behind the chat protocol, with its own processor.

Unlike `backends.local`, nothing of the model is ours: what its processor makes goes into its own `generate`. Choosing
the next token is ours (`generation.sampling`), so that the same settings mean the same everywhere and a seed belongs to
one answer only; so is the text as it streams. Of the folder's generation_config.json end tokens are taken, and what is
sampled by where a caller gives no settings; the rest is left out, with a warning. The model runs in a thread of its
own, one conversation after the other, since several classes keep positions of the conversation at hand on themselves.
"""

from __future__ import annotations

import json
import queue
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, ProcessorMixin, StoppingCriteriaList

from polymodal.backends.base import Answer, ModelBackend, require_question
from polymodal.backends.transformers.folder import MEDIA, open_model, open_processor
from polymodal.backends.transformers.media import parts_of
from polymodal.backends.transformers.prompt import Chat, PromptMaker
from polymodal.config import parse_config
from polymodal.errors import CheckpointError, PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.generation.sampling import Sampler, new_generator, sample_next
from polymodal.generation.streaming import Step
from polymodal.messages import Conversation, Message
from polymodal.safety.config_json import read_json
from polymodal.safety.model_folder import FolderReport
from polymodal.utils.devices import best_device
from polymodal.utils.files import sha256_json

Inputs = dict[str, Any]


def open_transformers(
    report: FolderReport,
    device: str | None = None,
    name: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
) -> TransformersBackend:
    """Open a model folder of transformers that was looked over."""
    folder = report.folder
    processor = open_processor(folder)  # before the weights: it is quick, and the likelier to be missing something
    model = open_model(folder, device or best_device(), dtype, quantize)
    path = folder / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    return TransformersBackend(model, processor, name or folder.name, settings)


class TransformersBackend(ModelBackend[Inputs]):
    """Answers conversations with a model of transformers."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        name: str = "model",
        settings: dict[str, Any] | None = None,  # What the folder's generation_config.json says
    ) -> None:
        config = model.config
        # Of images, videos and sounds.
        media = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video", "audio")]
        media[0] = media[0] if media[0] is not None else getattr(config, "image_token_index", None)
        self.prompts = PromptMaker(processor, [i for i in media[:2] if i is not None])
        self.takes = self.prompts.takes
        defaults = take_settings(model, settings or {}, f"{name}: generation_config.json")
        stop_ids = _stop_ids(model, processor.tokenizer, self.prompts.end_id())
        super().__init__(name, processor.tokenizer, config, stop_ids)
        self.model = model
        self.processor = processor
        self.defaults = defaults
        self._never = sorted({int(i) for i in media if i is not None})
        self._busy = threading.Lock()

    def settings(self) -> dict[str, str]:
        """Hashes of the media processors' settings and of the template."""
        found = [getattr(self.processor, name, None) for name in MEDIA]  # what stands for an absent one says nothing
        rules = [part.to_dict() for part in found if part is not None and hasattr(part, "to_dict")]
        shown = json.dumps(rules, sort_keys=True, default=repr)
        return {"preprocessing": sha256_json(shown), "template": sha256_json(self.processor.chat_template)}

    def generate_batch(self, conversations: Sequence[Conversation], params: GenerationParams) -> list[Answer]:
        """Answer several conversations, those of a kind together."""
        answers: dict[int, Answer] = {}
        groups: dict[frozenset[str], dict[int, Chat]] = {}
        for index, messages in enumerate(conversations):
            try:
                asked = require_question(messages)
                chat = self.prompts.chat(asked)
            except PolymodalError as error:
                answers[index] = error
            else:
                kinds = {key for message in chat for part in parts_of(message) for key in part} - {"text"}
                groups.setdefault(frozenset(kinds), {})[index] = chat
        for group in groups.values():
            answers |= self._together(group, params)
        return [
            answers[index] if index in answers else self.answer(messages, params)
            for index, messages in enumerate(conversations)
        ]

    def _together(self, group: dict[int, Chat], params: GenerationParams) -> dict[int, str]:
        """Answer a padded batch; nothing where these have to be asked one by one (unequal images, too long, ...)."""
        if len(group) < 2 or params.temperature > 0 or params.alone:
            return {}  # a seed belongs to one answer
        try:
            inputs = self.prompts.inputs(list(group.values()))
        except PolymodalError:
            return {}
        if params.max_new_tokens > self._most(inputs["input_ids"].shape[1]):
            return {}
        return dict(zip(group, self._texts(self._steps(inputs, params), len(group), params), strict=True))

    def _most(self, length: int) -> int:
        """The tokens that fit behind a prompt; the answer ends at the last position."""
        return self.context_length - (length if self._answer_takes_room else 0)

    def _process(self, messages: Sequence[Message]) -> Inputs:
        return self.prompts.inputs([self.prompts.chat(messages)])

    def _sizes(self, inputs: Inputs) -> tuple[int, int]:
        return inputs["input_ids"].numel(), self.prompts.image_tokens(inputs["input_ids"])

    def _known_rows(self) -> int | None:
        """Rows of the head that may be chosen: none past the tokenizer."""
        return len(self.tokenizer)

    def _steps(self, inputs: Inputs, params: GenerationParams, sampler: Sampler | None = None) -> Generator[Step]:
        """Run the model in a thread, which ends with the iterator."""
        # These models encode images inside their first step, so the time of that is part of the first token's.
        steps: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()
        cancelled = threading.Event()

        def work() -> None:
            try:
                with self._busy:
                    self._run(inputs, params, steps.put, cancelled, sampler)
                steps.put(None)
            except BaseException as error:  # it belongs to who waits on the other side
                steps.put(error)

        thread = threading.Thread(target=work, name="generate", daemon=True)
        thread.start()
        try:
            while (step := steps.get()) is not None:
                if isinstance(step, BaseException):
                    raise step
                yield step, None
        finally:
            cancelled.set()
            thread.join()

    @torch.inference_mode()
    def _run(
        self,
        inputs: Inputs,
        params: GenerationParams,
        put: Callable[[list[int]], None],
        cancelled: threading.Event,
        sampler: Sampler | None,  # Of a single row
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
            if (known := self._known_rows()) is not None:
                scores[:, known:] = -torch.inf
            if sampler is None:
                chosen = sample_next(scores, params, ids[:, start:], generator)
            else:
                chosen = torch.tensor([sampler(scores[0])], device=scores.device)
            put(chosen.tolist())
            return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)

        def stop(ids: torch.Tensor, _scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.full((len(ids),), cancelled.is_set(), device=ids.device)

        self.model.generate(
            **moved,
            max_new_tokens=min(params.max_new_tokens, self._most(inputs["input_ids"].shape[1])),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=list(self.stop_ids) or None,
            logits_processor=LogitsProcessorList([choose]),
            stopping_criteria=StoppingCriteriaList([stop]),
        )


SAMPLED_BY = ("temperature", "top_p", "top_k")
"""What is taken from a folder's generation settings where a caller gives none, beside the end tokens."""
_IDS = ("bos_token_id", "pad_token_id", "decoder_start_token_id", "eos_token_id")
_SILENT = {
    "do_sample", "max_length", "max_new_tokens", "use_cache", "cache_implementation", "cache_config", "output_scores",
    "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_logits", "transformers_version",
}  # fmt: skip
"""What changes no answer, or is the caller's to say."""
_NOTHING_AT_1 = {"num_beams", "num_beam_groups", "num_return_sequences", "guidance_scale", "typical_p",
                 "repetition_penalty", "encoder_repetition_penalty", "length_penalty"}  # fmt: skip


def take_settings(model: PreTrainedModel, said: dict[str, Any], where: str) -> GenerationParams:
    """Take what this backend goes by from a folder's generation settings."""
    own = GenerationConfig.from_model_config(model.config)
    ids = {key: said[key] if said.get(key) is not None else getattr(own, key, None) for key in _IDS}
    for key, value in ids.items():
        if not all(type(one) is int for one in (value if isinstance(value, list) else [value]) if one is not None):
            raise CheckpointError(f"{where}: {key} is {str(value)[:40]!r}; ids of tokens are whole numbers")
    model.generation_config = GenerationConfig(**ids)
    ours = {*SAMPLED_BY, *_IDS, *_SILENT}
    if left_out := sorted(k for k, v in said.items() if k not in ours and k[0] != "_" and not _does_nothing(k, v)):
        warnings.warn(
            f"{where}: left out {', '.join(left_out)}; only temperature, top_p, top_k and the end tokens are taken",
            stacklevel=2,
        )
    if said.get("do_sample") is not True:
        return GenerationParams()
    taken = {key: said[key] for key in SAMPLED_BY if said.get(key) is not None}
    return parse_config(GenerationParams, {"temperature": 1.0, **taken}, where)


def _does_nothing(key: str, value: Any) -> bool:
    """Whether a generation setting is its own absence: one beam, a penalty of 1, an empty list, ..."""
    if value is None or key.endswith(("_id", "_ids", "_tokens")):
        return value is None
    return not value or (value == 1 and value is not True and key in _NOTHING_AT_1)


def _stop_ids(model: PreTrainedModel, tokenizer: Any, end_id: int | None) -> tuple[int, ...]:
    """What ends an answer: the model's own end tokens, the tokenizer's and the chat template's."""
    own = model.generation_config.eos_token_id
    ids = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, end_id]
    return tuple(dict.fromkeys(i for i in ids if i is not None))

"""Models that write about one image and were never taught a conversation: BLIP, GIT, an encoder with a decoder.

Without a text they caption; a text is a beginning that they go on from (BLIP, GIT, a decoder's task prompt), or the
question of BLIP's class for questions. What goes in is what the documentation of the stock class shows, and what comes
out is what it writes after the given beginning.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from polymodal.backends.base import Backend, ModelBackend, check_messages
from polymodal.backends.transformers import Inputs, TransformersBackend, take_settings
from polymodal.backends.transformers.folder import open_model, open_parts
from polymodal.errors import CheckpointError, PolymodalError
from polymodal.media.image import open_image
from polymodal.messages import Image, Message
from polymodal.processing.document_pages import expand_documents
from polymodal.safety.model_folder import FolderReport
from polymodal.utils.files import sha256_json

CAPTIONERS = {
    "blip": ("BlipForConditionalGeneration", "BlipForQuestionAnswering"),
    "git": ("GitForCausalLM",),
    "vision-encoder-decoder": ("VisionEncoderDecoderModel",),
}
"""`model_type` to the classes that write; the first where the folder names none."""


def open_captioner(report: FolderReport, device: str, name: str, dtype: str | None, quantize: str | None) -> Captioner:
    """Open the folder of a captioner that was looked over."""
    classes = CAPTIONERS[str(report.model_type)]
    given = report.config.get("architectures")
    named = given[0] if isinstance(given, list) and given else classes[0]
    if named not in classes:
        raise CheckpointError(
            f"{report.folder}: a {named} scores images beside texts and writes nothing; "
            "use `polymodal embed`, or `polymodal eval --task retrieval`"
        )
    images, tokenizer = open_parts(report.folder)
    model = open_model(report.folder, device, dtype, quantize, getattr(transformers, named))
    said = report.configs.get("generation_config.json", {})
    found = Captioner(model, images, tokenizer, name, said)
    if found.writer.start is None:
        raise CheckpointError(
            f"{report.folder}: neither config.json nor generation_config.json says with which token a text begins; "
            "set decoder_start_token_id (of an encoder with a decoder) or bos_token_id"
        )
    return found


class Captioner(TransformersBackend):
    """Captions one image, goes on from a text about it, or answers a question about it."""

    def __init__(self, model: Any, images: Any, tokenizer: Any, name: str, said: Mapping[str, Any]) -> None:
        config = model.config
        self.asks = type(model).__name__ == "BlipForQuestionAnswering"
        self.captions = not self.asks
        self.writer = _Writer(model, said, f"{name}: generation_config.json")
        ModelBackend.__init__(self, name, tokenizer, config, self.writer.ends)
        self.defaults = self.writer.defaults
        self._answer_takes_room = not self.asks  # the question is the encoder's
        self.model: Any = self.writer
        self.images = images
        self._never: list[int] = []
        self._busy = threading.Lock()

    def settings(self) -> dict[str, str]:
        """A hash of the image processor's settings."""
        return {"preprocessing": sha256_json(json.dumps(self.images.to_dict(), sort_keys=True, default=repr))}

    generate_batch = Backend.generate_batch  # one by one

    def _known_rows(self) -> None:
        """As the stock class: BLIP's start token lies past its tokenizer."""

    def _process(self, messages: Sequence[Message]) -> Inputs:
        source, text = self._asked(messages)
        pixels = self.images(images=open_image(source), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "input_ids": torch.tensor([self._beginning(text)])}

    def _sizes(self, inputs: Inputs) -> tuple[int, int]:
        # Images are looked at from every position, and take none of the text's.
        return inputs["input_ids"].numel(), 0

    def _asked(self, messages: Sequence[Message]) -> tuple[Any, str]:
        """The image and the text of a conversation, which may hold no more."""
        check_messages(messages)
        messages = expand_documents(messages)
        (message, *others), media = messages, [part for message in messages for part in message.media]
        if others:
            raise PolymodalError(
                f"{self.name} knows no conversation: give one image and at most one text, without a system message or "
                "earlier turns"
            )
        if len(media) != 1 or not isinstance(media[0], Image):
            given = ", ".join(type(part).__name__.lower() for part in media) or "none"
            raise PolymodalError(f"{self.name} writes about one image at a time, and was given {given}")
        text = message.text.strip()
        if self.asks and not text:
            raise PolymodalError(f"{self.name} answers questions and captions nothing; give one with the image")
        return media[0].source, text

    def _beginning(self, text: str) -> list[int]:
        """The ids that stand before what is written; of a question, the encoder's."""
        inner: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        if self.writer.family == "vision-encoder-decoder":  # whose task prompts are control tokens
            return inner
        controls = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        if typed := [self.tokenizer.convert_ids_to_tokens(i) for i in inner if i in controls]:
            raise PolymodalError(f"the text holds {typed[0]!r}, which this model would take for control; reword it")
        if self.writer.family == "git":
            return [self.tokenizer.cls_token_id if inner else self.writer.start, *inner]
        whole: list[int] = self.tokenizer(text)["input_ids"]  # [CLS] text [SEP]
        return whole if self.asks else [self.writer.start, *whole[1:-1]]


class _Writer:
    """A stock class as `TransformersBackend` runs it: `generate` from pixels and the ids that are written on from."""

    def __init__(self, model: Any, said: Mapping[str, Any], where: str) -> None:
        self.inner, self.family, config = model, str(model.config.model_type), model.config
        self.defaults = take_settings(model, dict(said), where)
        ids: Any = model.generation_config
        ends, starts = ids.eos_token_id, (ids.bos_token_id, ids.decoder_start_token_id)
        self.start: Any = starts[1] if starts[0] is None else starts[0]
        if self.family == "blip":
            ends, self.start = config.text_config.sep_token_id, config.text_config.bos_token_id
            model.text_decoder.generation_config = transformers.GenerationConfig()
        self.ends = [int(i) for i in (ends if isinstance(ends, list) else [ends]) if i is not None]

    def generate(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, **options: Any) -> Any:
        """Run the stock class."""
        if self.family == "blip":  # which names the end itself, and takes a captioner's last id away
            del options["eos_token_id"]
            if type(self.inner).__name__ == "BlipForConditionalGeneration":
                input_ids = torch.nn.functional.pad(input_ids, (0, 1))
        elif self.family == "vision-encoder-decoder":  # `generate` puts the decoder's start before them where it lacks
            given = {"decoder_input_ids": input_ids} if input_ids.numel() else {}
            return self.inner.generate(pixel_values=pixel_values, **given, **options)
        mask = torch.ones_like(input_ids)
        return self.inner.generate(pixel_values=pixel_values, input_ids=input_ids, attention_mask=mask, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

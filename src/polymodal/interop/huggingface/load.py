"""Published vision-language folders of transformers as models of ours, with the same pixels, ids and numbers.

`families` reads `config.json` and `weights` the tensors; here the image rules and the prompt of the folder's own
processor join them in one `ModelConfig`, so that such a model can be asked, trained further and saved as a folder of
ours. What cannot be expressed exactly is refused.

The prompt: LLaVA's processors take the chat template's text and give it to the tokenizer, which adds its
beginning-of-sequence token where the template wrote none. BLIP-2's and InstructBLIP's know no chat: the image's
placeholders come first, even before that token, then the text as it is. Both become jinja text here that writes
everything itself. Nothing is taken on trust: a question about an image is rendered by that template and tokenised piece
by piece, as everything is here, and must give the very ids that the stock way gives.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from polymodal.checkpoints.locate import commit_of
from polymodal.checkpoints.model_folder import Loaded
from polymodal.config import ImageConfig, LLMConfig, ModelConfig, TemplateConfig
from polymodal.errors import CheckpointError, ConfigError, PolymodalError
from polymodal.interop.huggingface.families import NotExpressibleError, Pieces, read_pieces
from polymodal.interop.huggingface.weights import compare, compose, compose_vision, fill, weight_files
from polymodal.messages import Image, user
from polymodal.modeling.language_model import load_tokenizer, positions_of, quieten_transformers
from polymodal.modeling.pretrained import most_parts
from polymodal.modeling.projectors.qformer_files import load_context_tokenizer
from polymodal.processing.chat_template.encode import ChatTemplate
from polymodal.processing.image_config_hf import image_config_from_hf
from polymodal.processing.processor import Processor
from polymodal.safety.jinja_sandbox import compile_template
from polymodal.safety.model_folder import FolderReport
from polymodal.utils.files import sha256_file

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]

HASHED_BYTES = 1 << 30
"""Files up to this size are hashed; larger ones only where the hub's cache already knows their hash."""
QUESTION = "What is shown here?"
PROBE_TOKENS = 3
"""Placeholders of the image in the question that is tried."""

_BLOB = re.compile(r"[0-9a-f]{64}")
_STORED: dict[str, Dtype] = {"BF16": "bfloat16", "F16": "float16"}
_IMAGE_TOKEN = "<image>"
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class Opened:
    """A published folder, all but its weights."""

    pieces: Pieces  # What its `config.json` says
    config: ModelConfig  # The same as our configuration, with image rules and template
    tokenizer: PreTrainedTokenizerBase  # Its tokenizer, which knows the placeholder
    image_token_id: int  # The placeholder's id
    context_tokenizer: PreTrainedTokenizerBase | None  # The Q-Former's; None for a projector that reads no text


def load_hf(report: FolderReport, *, dtype: Dtype | Literal["auto"] = "float32", source: str | None = None) -> Loaded:
    """Load a published model."""
    opened = open_hf(report, dtype=_stored(report) if dtype == "auto" else dtype)
    with torch.device("meta"):  # buffers too: nothing takes memory before the sizes are those of the files
        empty = compose(opened.pieces, opened.config, opened.image_token_id, most_parts(report.tensors()))
    compare(empty, opened.pieces, report)
    model = compose(opened.pieces, opened.config, opened.image_token_id)
    fill(model, opened.pieces, report, getattr(torch, opened.config.llm.dtype))
    # The special ids of generation, such as where a decoder starts.
    for name in _SPECIAL_IDS:
        if (token := report.configs.get("generation_config.json", {}).get(name)) is not None:
            setattr(model.llm.generation_config, name, token)
    model.context_tokenizer = opened.context_tokenizer
    entry = {
        "stage": "published",
        "source": source or str(report.folder),
        "revision": commit_of(report.folder),
        "model_type": opened.pieces.model_type,
        "files": {name: _identity(report.folder / name) for name in ("config.json", *weight_files(report))},
    }
    return Loaded(model, opened.tokenizer, opened.config, [entry])


def open_hf(report: FolderReport, *, dtype: Dtype = "float32") -> Opened:
    """Read everything of a published folder but its weights."""
    quieten_transformers()
    folder, pieces = report.folder, read_pieces(report)
    encoder_decoder = bool(pieces.text_settings.is_encoder_decoder)
    tokenizer = load_tokenizer(LLMConfig(model_name_or_path=str(folder.resolve())), folder)
    image_token_id = _placeholder(folder, pieces, tokenizer)
    config = ModelConfig(
        vision=pieces.vision,
        image=image_rules(report, pieces),
        projector=pieces.projector,
        llm=LLMConfig(model_name_or_path="bundled", dtype=dtype, encoder_decoder=encoder_decoder or None),
        template=_template(report, pieces, tokenizer, image_token_id),
        image_token_id=image_token_id,
    )
    return Opened(pieces, config, tokenizer, image_token_id, load_context_tokenizer(config.projector, folder))


def hf_processor(report: FolderReport) -> Processor:
    """Open only a published model's processor, without any weights."""
    opened = open_hf(report)
    with torch.device("meta"):
        _, projector = compose_vision(opened.pieces, opened.config, llm_dim=1)
    return Processor(
        opened.config,
        opened.tokenizer,
        projector.output_grid,
        opened.image_token_id,
        bool(opened.config.llm.encoder_decoder),
        opened.context_tokenizer,
        positions_of(opened.pieces.text_settings),
    )


def image_rules(report: FolderReport, pieces: Pieces) -> ImageConfig:
    """Read the image rules, and check that model and processor count alike."""
    folder, ratio = report.folder, pieces.vision_aspect_ratio
    processors = report.configs.get("processor_config.json", {}).get("vision_aspect_ratio", ratio)
    if ratio is not None and processors != ratio:
        raise CheckpointError(
            f"{folder}: vision_aspect_ratio is {ratio!r} in config.json and {processors!r} in processor_config.json; "
            "make them agree"
        )
    if report.image_processor is None:
        raise CheckpointError(f"{folder}: preprocessor_config.json is missing")
    try:
        image = image_config_from_hf(report.image_processor, vision_aspect_ratio=ratio)
    except ConfigError as error:
        raise NotExpressibleError(f"{folder}: {error}") from None
    if image.image_grid_pinpoints != pieces.pinpoints:
        raise CheckpointError(
            f"{folder}: image_grid_pinpoints of the preprocessor and of config.json differ; make them agree"
        )
    return image


def _stored(report: FolderReport) -> Dtype:
    """The type that most weights are stored in."""
    sizes: Counter[str] = Counter()
    for name in weight_files(report):
        for info in report.headers[name].values():
            sizes[info.dtype] += info.num_bytes
    return _STORED.get(sizes.most_common(1)[0][0], "float32") if sizes else "float32"


def _placeholder(folder: Path, pieces: Pieces, tokenizer: PreTrainedTokenizerBase) -> int:
    """Find the placeholder's id; where the tokenizer has no such token it is added, as BLIP-2's processor does."""
    wanted = pieces.image_token_id
    if wanted is not None and wanted < 0:
        raise CheckpointError(
            f"{folder}: config.json names {wanted} as the image's token (image_token_index), which is no token's id; "
            f"write the id that the tokenizer has for {_IMAGE_TOKEN!r}"
        )
    if wanted is not None and wanted < len(tokenizer):
        if wanted not in tokenizer.added_tokens_decoder:
            raise CheckpointError(
                f"{folder}: config.json names {wanted} as the image's token, which is the ordinary token "
                f"{tokenizer.convert_ids_to_tokens(wanted)!r} of the tokenizer"
            )
        return wanted
    own = tokenizer.get_added_vocab().get(_IMAGE_TOKEN)
    if own is None:
        tokenizer.add_special_tokens({"additional_special_tokens": [_IMAGE_TOKEN]}, replace_extra_special_tokens=False)
        own = int(tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN))
    if wanted not in (None, own):
        raise CheckpointError(
            f"{folder}: config.json names {wanted} as the image's token, the tokenizer has {own} for {_IMAGE_TOKEN!r}"
        )
    return own


def _identity(path: Path) -> dict[str, Any]:
    """Size and hash of a file; the hub's cache names a large file by its hash."""
    size, blob = path.stat().st_size, path.resolve().name
    if path.is_symlink() and _BLOB.fullmatch(blob):
        return {"bytes": size, "sha256": blob}
    return {"bytes": size, "sha256": sha256_file(path)} if size <= HASHED_BYTES else {"bytes": size}


def _template(
    report: FolderReport, pieces: Pieces, tokenizer: PreTrainedTokenizerBase, image_token_id: int
) -> TemplateConfig:
    """Find the template that gives the ids of the folder's own processor."""
    placeholder = tokenizer.convert_ids_to_tokens(image_token_id)
    assert isinstance(placeholder, str)  # one id gives one token
    before, after = _frame(tokenizer)
    if pieces.prompt == "chat":
        if report.chat_template is None:
            raise CheckpointError(
                f"{report.folder}: there is no chat template, so how the model wants to be asked is not known; "
                "add chat_template.jinja to the folder"
            )
        source = report.chat_template[1]
        wanted = _chat_ids(report.folder, tokenizer, source, placeholder)
        candidates = [source, *(f"{{{{ {_quoted(before + space)} }}}}{source}" for space in ("", " ") if before)]
    else:
        wanted = [image_token_id] * PROBE_TOKENS + list(tokenizer(QUESTION)["input_ids"])
        gap = "" if pieces.text_settings.is_encoder_decoder else " "
        candidates = [_plain(placeholder, before, space, after, gap) for space in ("", " ")]
    stop = _stop_ids(report, pieces)
    reason = "the ids differ"
    # Where the template's own generation prompt is no beginning of an answer, that prompt is taken as it is.
    for candidate, own in ((candidate, own) for own in (False, True) for candidate in candidates):
        own = own and pieces.prompt == "chat"
        config = TemplateConfig(chat_template=candidate, stop_token_ids=stop, own_generation_prompt=own)
        try:
            template = ChatTemplate(tokenizer, config, image_token_id)
            found = template.render([user(Image(b""), QUESTION)], [PROBE_TOKENS], add_generation_prompt=True)
        except PolymodalError as error:
            reason = str(error)
            continue
        if found.input_ids == wanted:
            return config
    raise NotExpressibleError(
        f"{report.folder}: its prompt cannot be written here as its own processor does ({reason})"
    )


def _stop_ids(report: FolderReport, pieces: Pieces) -> tuple[int, ...]:
    """The tokens at which the stock model stops: those of `generation_config.json` and of the language model."""
    given = (
        report.configs.get("generation_config.json", {}).get("eos_token_id"),
        getattr(pieces.text_settings, "eos_token_id", None),
    )
    found = [one for ids in given for one in (ids if isinstance(ids, list | tuple) else [ids])]
    return tuple(dict.fromkeys(int(token) for token in found if token is not None))


def _chat_ids(folder: Path, tokenizer: PreTrainedTokenizerBase, source: str, placeholder: str) -> list[int]:
    """What the folder's processor makes of a question about an image: render, expand, then tokenise the whole."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    variables: dict[str, Any] = {str(name): token for name, token in tokenizer.special_tokens_map.items()}
    try:
        text = compile_template(source)(
            **variables,
            messages=[{"role": "user", "content": content}],
            tools=None,
            documents=None,
            add_generation_prompt=True,
        )
    except (PolymodalError, TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder}: its chat template does not take a question about an image: {error}") from None
    if text.count(placeholder) != 1:
        raise CheckpointError(
            f"{folder}: its chat template writes {placeholder!r} {text.count(placeholder)} times for one image"
        )
    text = text.replace(placeholder, placeholder * PROBE_TOKENS)
    begun = tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token))
    return list(tokenizer(text, add_special_tokens=not begun)["input_ids"])


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The special tokens that the tokenizer puts before and after a text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    before, after = whole[:start], whole[start + len(bare) :]
    return "".join(tokenizer.convert_ids_to_tokens(before)), "".join(tokenizer.convert_ids_to_tokens(after))


_PLAIN = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{{- raise_exception('this model takes no system message; put the text into the question') -}}"
    "{%- elif message['role'] == 'user' -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{- placeholder -}}{%- endfor -%}"
    "{{- before if loop.first else space -}}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{{- after -}}"
    "{%- else -%}"
    "{{- gap -}}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{{- eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
"""BLIP-2's prompt; its variables are set in front of it."""


def _plain(placeholder: str, before: str, space: str, after: str, gap: str) -> str:
    """BLIP-2's prompt, with the folder's tokens as variables in front of it."""
    values = {"placeholder": placeholder, "before": before + space, "space": space, "after": after, "gap": gap}
    return "".join(f"{{%- set {name} = {_quoted(value)} -%}}" for name, value in values.items()) + _PLAIN


def _quoted(text: str) -> str:
    """A string as jinja writes it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"

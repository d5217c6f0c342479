"""Models of transformers, loaded only where a configuration and the files of the weights agree.

A `config.json` is a stranger's word. A class that is built from it takes the memory that it names before a tensor is
seen to be of another size, and what the files leave out starts at random values without an error. So a model is first
laid out on the meta device, where nothing takes memory, and compared with the files name by name and shape by shape;
then it is loaded. What transformers raises on a configuration that it was not made for, becomes one line.
"""

import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.modules import module as registry
from transformers.utils import is_flash_attn_2_available

from polymodal.errors import CheckpointError, PolymodalError
from polymodal.safety.config_json import check_settings, read_json, walk
from polymodal.safety.model_folder import check_folder, refuse_adapter
from polymodal.utils.safetensors_io import DERIVED, compare_tensors

MOST_PARTS = 400_000
"""Modules, parameters and buffers of a model whose files are not known beforehand."""
MOST_BUFFER = 1 << 30
"""Bytes of one buffer; they follow from the configuration alone, and no file can speak against them."""


class _TooLargeError(Exception):
    """A configuration asks for more than the files hold."""


def look_over(source: str, where: str, **kwargs: Any) -> int:
    """Check a folder, or a hub id's configuration, before transformers acts on it; gives how many parts it may have."""
    if "gguf_file" in kwargs:
        return MOST_PARTS
    if Path(source).is_dir():
        report = check_folder(Path(source))
        refuse_adapter(report)
        return most_parts(report.tensors())
    config_json(source, where, **kwargs)
    return MOST_PARTS


def config_json(source: str, where: str, **kwargs: Any) -> dict[str, Any]:
    """The `config.json` of a folder, or of a hub id, as plain data that was checked."""
    if (path := Path(source) / "config.json").is_file():
        settings = read_json(path)
    else:
        try:
            settings = dict(transformers.PreTrainedConfig.get_config_dict(source, **kwargs)[0])
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{where}: {one_line(error)}") from error
    check_settings(settings, where)
    return settings


def most_parts(tensors: Mapping[str, Any]) -> int:
    """How many parts a model may have for so many tensors; a few modules lie around each, and loading sets it anew."""
    return 2000 + 20 * len(tensors)


def load_checked(
    kind: Any,
    source: str,
    where: str,
    most: int = MOST_PARTS,
    *,
    may_lack: tuple[str, ...] = (),  # Beginnings of names that the files may leave out
    no_more: str = "",  # What of a file has no place and is refused; all of it by default
    **options: Any,
) -> Any:
    """Load a model whose configuration fits its files; every tensor is accounted for before memory is taken."""
    with building(where, most):
        laid_out = {key: value for key, value in options.items() if key != "quantization_config"}
        if "gguf_file" not in options:  # which is read whole or not at all
            laid_out |= {"device_map": "meta", "ignore_mismatched_sizes": True}
        model, report = kind.from_pretrained(source, **laid_out, output_loading_info=True)
        found = {str(name): tuple(shape) for name, shape, _ in report["mismatched_keys"]}
        wanted = {str(name): tuple(shape) for name, _, shape in report["mismatched_keys"]}
        wanted |= {name: () for name in map(str, report["missing_keys"]) if not name.startswith(may_lack)}
        extra = (name for name in map(str, report["unexpected_keys"]) if not DERIVED.search(name))
        compare_tensors(wanted, found | {name: () for name in extra if re.search(no_more, name)}, where)
        return model if "gguf_file" in options else kind.from_pretrained(source, **options)


def read_settings(source: str, where: str, **kwargs: Any) -> Any:
    """Read a configuration of transformers."""
    with building(where):
        return transformers.AutoConfig.from_pretrained(source, **kwargs)


def attention_of(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What to tell transformers about the attention that a `config.json` asks for, where it cannot run."""
    keys = ("attn_implementation", "attn_implementation_internal")
    asked = (value for _, key, value in walk(settings, where) if key.strip("_") in keys and isinstance(value, str))
    return next(({"attn_implementation": "sdpa"} for each in asked if usable_attention(each, where) != each), {})


def usable_attention(wanted: str, where: str) -> str:
    """The attention to compute with: what was asked for, or torch's own where flash attention cannot run."""
    if not wanted.startswith("flash_attention") or (torch.cuda.is_available() and is_flash_attn_2_available()):
        return wanted
    warnings.warn(f"{where}: asks for {wanted}, which needs a GPU and its package; sdpa takes its place", stacklevel=3)
    return "sdpa"


@contextmanager
def building(where: str | Path, most: int = MOST_PARTS) -> Iterator[None]:
    """While active, what transformers raises becomes one line, and no more than so many parts are made."""
    thread, count = threading.get_ident(), 0

    def grow(_module: Any, name: str, value: Any) -> None:
        nonlocal count
        if threading.get_ident() == thread and value is not None:
            count += 1
            if count > most:
                raise _TooLargeError("config.json asks for many more layers or experts than the weights have")
            buffer = isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
            if buffer and value.numel() * value.element_size() > MOST_BUFFER:
                raise _TooLargeError(f"config.json asks for a table {name} of {tuple(value.shape)} numbers")

    hooks = [
        registry.register_module_parameter_registration_hook(grow),
        registry.register_module_buffer_registration_hook(grow),
        registry.register_module_module_registration_hook(grow),
    ]
    try:
        yield
    except PolymodalError:
        raise
    except Exception as error:  # transformers raises anything on values that it was not made for
        raise CheckpointError(f"{where}: cannot be loaded ({one_line(error)})") from error
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def probe(llm: Any, where: str | Path) -> None:
    """Run two tokens through a language model, which shows values of its configuration that cannot be computed with."""
    ids = torch.zeros((1, 2), dtype=torch.long, device=llm.get_input_embeddings().weight.device)
    with building(where):
        decoder = {"decoder_input_ids": ids} if llm.config.is_encoder_decoder else {}
        logits = llm(input_ids=ids, use_cache=False, **decoder).logits
    if bool(logits.isnan().any()):
        raise CheckpointError(f"{where}: answers with NaN; a value of its config.json makes no sense with its weights")


def one_line(error: BaseException) -> str:
    """One line of an error that may run over many; a bare key or nothing at all gets its type in front."""
    text = " ".join(str(error).split())[:300]
    return text if " " in text else f"{type(error).__name__} {text}".strip()

"""Loading the language model: any causal LM of transformers, from a hub id, a folder or a GGUF file.

The language model knows nothing about media. It is loaded without remote code, from safetensors or GGUF only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from polymodal.config import LLMConfig
from polymodal.errors import CheckpointError, ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_LLM = "smollm2"
"""The name that stands for the language model of the default model; `checkpoints.smollm2` finds it."""


def resolve_llm(name: str) -> str:
    """Turn the configured name into something that transformers can open.

    Args:
        name: A folder, a hub id, a .gguf file, or "smollm2".

    Returns:
        A path or hub id.

    Raises:
        CheckpointError: The default language model is nowhere to be found; names the command that fetches it.
    """
    if name == DEFAULT_LLM:
        from polymodal.checkpoints.smollm2 import find_smollm2

        return str(find_smollm2())
    return name


def load_llm(config: LLMConfig) -> PreTrainedModel:
    """Load the causal LM.

    Args:
        config: Where from, and in which dtype.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: The folder, file or hub id cannot be opened.
    """
    from transformers import AutoModelForCausalLM

    source, kwargs = _source(config)
    dtype = getattr(torch, config.dtype)
    if dtype is not torch.float32 and not torch.cuda.is_available():
        _warn_slow_dtype(config.dtype)
    quieten_transformers()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            device_map=config.device_map,
            attn_implementation=config.attn_implementation,
            use_safetensors=True if "gguf_file" not in kwargs else None,
            **kwargs,
        )
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"language model {config.model_name_or_path!r}: {first_line(error)}") from error
    return model.eval()


def load_tokenizer(config: LLMConfig, folder: Path | None = None) -> PreTrainedTokenizerBase:
    """Load the language model's tokenizer, or the one saved in a model folder.

    Args:
        config: The language model.
        folder: A model folder of ours; the tokenizer in it is preferred where it carries one.

    Returns:
        The tokenizer (fast).

    Raises:
        CheckpointError: No tokenizer can be opened there.
    """
    from transformers import AutoTokenizer

    carried = folder is not None and (folder / "tokenizer.json").is_file()
    source, kwargs = (str(folder), {}) if carried else _source(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"tokenizer of {source!r}: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"tokenizer of {source!r}: a tokenizer.json is needed (slow tokenizers are not supported)"
        )
    return tokenizer


def quieten_transformers() -> None:
    """Keep transformers' progress bars and advice off the user's terminal; our own lines say what is going on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def output_head(llm: PreTrainedModel) -> torch.nn.Module:
    """The layer that makes logits.

    Args:
        llm: The causal LM.

    Returns:
        Its head.

    Raises:
        ConfigError: The language model has no output head.
    """
    head = llm.get_output_embeddings()
    if head is None:
        raise ConfigError(f"{type(llm).__name__} has no output head; a causal language model is needed")
    return head


@contextmanager
def head_only_at(llm: PreTrainedModel, rows: torch.Tensor) -> Iterator[None]:
    """While active, the language model's head sees only the chosen positions.

    The head is the dearest layer of a small model (a fifth to a quarter of the whole step), and most positions of a
    multimodal sample carry no label. Selecting before the head, inside the model's own forward, keeps whatever the
    architecture does after its head (soft caps, logit scales).

    Args:
        llm: The causal LM.
        rows: [R] int64, indices into the flattened [B * T] positions.

    Yields:
        Nothing; inside the block the model's `logits` are [R, V].

    Raises:
        ConfigError: The language model has no output head.
    """

    def select(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows),)

    handle = output_head(llm).register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def hidden_before_head(llm: PreTrainedModel, rows: torch.Tensor, shown: int) -> Iterator[list[torch.Tensor]]:
    """While active, keep what the head would see at the chosen positions, and let it see only the first few of them.

    Args:
        llm: The causal LM.
        rows: [R] int64, indices into the flattened [B * T] positions.
        shown: How many of them the model's own head still sees; its `logits` are [min(shown, R), V].

    Yields:
        A list that holds the [R, D] hidden states once the model ran.

    Raises:
        ConfigError: The language model has no output head.
    """
    kept: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        kept.append(args[0].reshape(-1, args[0].shape[-1]).index_select(0, rows))
        return (kept[-1][:shown],)

    handle = output_head(llm).register_forward_pre_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def after_head(llm: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    """What architectures do to their logits after the head: Gemma's soft cap, Cohere's and Granite's scales."""
    config = llm.config.get_text_config()
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    if scale is not None:
        logits = logits * scale
    if divisor is not None:
        logits = logits / divisor
    return torch.tanh(logits / cap) * cap if cap is not None else logits


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Switch dropout and running statistics off for a while, then put every part back into the mode it was in.

    Args:
        module: Whose mode changes.

    Yields:
        Nothing.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _source(config: LLMConfig) -> tuple[str, dict[str, str]]:
    name = resolve_llm(config.model_name_or_path)
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"language model: no file {name}")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_absolute() or name.startswith(("./", "../", "~")):
        if not path.expanduser().is_dir():
            raise CheckpointError(f"language model: no folder {name}")
        return str(path.expanduser()), {}
    return name, {"revision": config.revision} if config.revision else {}


def _warn_slow_dtype(dtype: str) -> None:
    import warnings

    warnings.warn(
        f"llm.dtype is {dtype} on a CPU, which most CPUs compute several times slower than float32",
        stacklevel=3,
    )

"""Loading the language model: any causal LM or encoder-decoder of transformers, from a hub id, a folder or a GGUF file.

The language model knows nothing about media. It is loaded without remote code, from safetensors or GGUF only; what a
GGUF file holds is always taken for a causal LM. `polymodal.modeling.seq2seq` says how an encoder-decoder takes one
sequence of ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from polymodal.config import LLMConfig
from polymodal.errors import CheckpointError, ConfigError, first_line
from polymodal.safety.config_json import check_settings
from polymodal.safety.model_folder import check_folder
from polymodal.utils.safetensors_io import check_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_LLM = "smollm2"
"""The name that stands for the language model of the default model; `modeling.default_llm` finds it."""


def resolve_llm(name: str) -> str:
    """Turn the configured name into something that transformers can open."""
    if name == DEFAULT_LLM:
        from polymodal.modeling.default_llm import find_smollm2

        return str(find_smollm2())
    return name


def load_llm(config: LLMConfig, quantize: str | None = None) -> PreTrainedModel:
    """Load the language model; whether it is a causal LM or an encoder-decoder is up to its own configuration."""
    from transformers import AutoConfig

    source, kwargs = _source(config)
    _look_over(source, kwargs, f"language model {config.model_name_or_path!r}")
    dtype = getattr(torch, config.dtype)
    if dtype is not torch.float32 and not torch.cuda.is_available():
        _warn_slow_dtype(config.dtype)
    quieten_transformers()
    options: dict[str, Any] = {"device_map": config.device_map}
    if quantize is not None:
        from polymodal.modeling.quantization import gpu_settings

        options = {"device_map": config.device_map or {"": "cuda"}, "quantization_config": gpu_settings(quantize)}
    try:
        if "gguf_file" in kwargs:
            found, known = False, {}
        else:
            settings = AutoConfig.from_pretrained(source, **kwargs)
            found, known = bool(settings.is_encoder_decoder), {"config": settings}
        model = model_class(found).from_pretrained(
            source,
            **known,
            dtype=dtype,
            **options,
            attn_implementation=config.attn_implementation,
            use_safetensors=True if "gguf_file" not in kwargs else None,
            trust_remote_code=False,
            **kwargs,
        )
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"language model {config.model_name_or_path!r}: {first_line(error)}") from error
    if config.encoder_decoder not in (None, found):
        kind = "an encoder-decoder" if found else "a causal language model"
        raise ConfigError(
            f"llm.encoder_decoder is {str(config.encoder_decoder).lower()}, but {config.model_name_or_path!r} is "
            f"{kind}; leave the setting out, it is found out by itself"
        )
    if found:
        decoder_start_id(model)
    if options["device_map"] is None:  # what a device map spreads out may not be in memory
        check_finite(dict(model.named_parameters()), f"language model {config.model_name_or_path!r}")
    return model.eval()


def model_class(encoder_decoder: bool) -> Any:
    """The class of transformers that opens a language model of this kind."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM


def layer_counts(config: Any) -> tuple[int, int]:
    """Layers of the encoder and of the decoder; a causal LM has none of the former."""
    config = config.get_text_config()
    layers = int(config.num_hidden_layers)
    if not config.is_encoder_decoder:
        return 0, layers
    # T5's and BART's names; both call the encoder's count num_hidden_layers too.
    names = ("num_decoder_layers", "decoder_layers")
    return layers, int(next((found for name in names if (found := getattr(config, name, None))), layers))


def decoder_start_id(llm: PreTrainedModel) -> int:
    """The token that an encoder-decoder's decoder starts from."""
    for settings in (llm.config, getattr(llm, "generation_config", None)):
        found = getattr(settings, "decoder_start_token_id", None)
        if found is not None:
            return int(found)
    raise ConfigError(
        f"{type(llm).__name__} does not say which token its decoder starts from; set decoder_start_token_id in its "
        "config.json (T5 starts from its pad token)"
    )


def load_tokenizer(config: LLMConfig, folder: Path | None = None) -> PreTrainedTokenizerBase:
    """Load the language model's tokenizer, or the one saved in a model folder."""
    from transformers import AutoTokenizer

    carried = folder is not None and (folder / "tokenizer.json").is_file()
    source, kwargs = (str(folder), {}) if carried else _source(config)
    if not carried and Path(source).is_dir() and not kwargs:  # a model folder was looked over when it was opened
        check_folder(Path(source), weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **kwargs)
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
    """The layer that makes logits."""
    head = llm.get_output_embeddings()
    if head is None:
        raise ConfigError(
            f"{type(llm).__name__} has no output head; a causal or encoder-decoder language model is needed"
        )
    return head


@contextmanager
def head_only_at(llm: PreTrainedModel, rows: torch.Tensor) -> Iterator[None]:  # rows [R]
    """While active, the language model's head sees only the chosen positions."""
    # The head is the dearest layer of a small model (a fifth to a quarter of the whole step), and most positions of a
    # multimodal sample carry no label. Selecting before the head, inside the model's own forward, keeps whatever the
    # architecture does after its head (soft caps, logit scales).

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
    """While active, keep what the head would see at the chosen positions, and let it see only the first few of them."""
    # rows [R]
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


def _look_over(source: str, kwargs: dict[str, str], where: str) -> None:
    """Check a folder, or the configuration of a hub id, before transformers acts on it; a GGUF file is none."""
    from transformers import PreTrainedConfig

    if "gguf_file" in kwargs:
        return
    if Path(source).is_dir():
        check_folder(Path(source))
        return
    try:
        settings, _ = PreTrainedConfig.get_config_dict(source, **kwargs)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where}: {first_line(error)}") from error
    check_settings(settings, where)


def _warn_slow_dtype(dtype: str) -> None:
    import warnings

    warnings.warn(
        f"llm.dtype is {dtype} on a CPU, which most CPUs compute several times slower than float32",
        stacklevel=3,
    )

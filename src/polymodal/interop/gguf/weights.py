"""Weights as GGUF, the format of llama.cpp: a language model in one file, tower and projector in another ("mmproj").

Metadata keys and tensor names are llama.cpp's; the `gguf` package, which is kept beside it, knows most of them. What
llama.cpp computes with an mmproj of projector type "mlp" (tools/mtmd/models/llava.cpp) is LLaVA's: a CLIP or SigLIP
tower up to the layers that are asked for, then two linear layers with GELU between them. Two things are not the same
there: GELU is its tanh approximation, by a table of half precision, and both files may be quantised.

Rotary embeddings of the "llama" architecture turn neighbouring channels there and two halves in transformers, so the
rows of its queries and keys are put in another order, which changes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polymodal.config import ImageConfig
from polymodal.errors import CheckpointError
from polymodal.interop.huggingface.export_class import plain_state, projector_state, refuse_nan
from polymodal.modeling.vlm import MultimodalLM

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`model_type` of a language model to what llama.cpp calls it."""
ROPES = ("default", "linear", "llama3")
"""Kinds of rotary embeddings that are written; llama.cpp takes the last as a tensor of factors."""
KINDS = {"float32": ("F32", "ALL_F32"), "float16": ("F16", "MOSTLY_F16"), "bfloat16": ("BF16", "MOSTLY_BF16"),
         "q8_0": ("Q8_0", "MOSTLY_Q8_0")}  # fmt: skip
"""Types of the weights on disk: what `gguf` calls such a tensor, and such a file."""
QUANTISED = 32
"""Values that share a scale in Q8_0; a row must hold a multiple of it."""


def reasons_against_llm(llm: Any) -> Iterator[str]:
    """What a GGUF file cannot say of a language model."""
    config = llm.config
    if config.model_type not in ARCHITECTURES:
        listed = ", ".join(sorted(ARCHITECTURES))
        yield f"a language model of type {config.model_type!r} is not among those that can be written ({listed})"
        return
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in ROPES:
        yield f"rotary embeddings of type {kind!r} are not written; only {', '.join(ROPES)} are"
    if config.hidden_act != "silu":
        yield f"hidden_act {config.hidden_act!r}: llama.cpp always takes 'silu' there"
    windowed = config.model_type == "mistral" and getattr(config, "sliding_window", None) is not None
    if windowed or getattr(config, "use_sliding_window", False):
        yield "llama.cpp reads no sliding window for this language model: train without it"


def write_llm(path: Path, llm: Any, kind: str, name: str, describe_tokens: Callable[[GGUFWriter], None]) -> int:
    """Write the language model's file; returns the bytes of its weights."""
    import gguf

    config = llm.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": 10000.0}
    writer = _open(path, ARCHITECTURES[config.model_type], kind, name)
    writer.add_vocab_size(len(llm.get_input_embeddings().weight))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    describe_tokens(writer)
    return _write(writer, lambda: _llm_tensors(llm, rope, size), kind)


def _llm_tensors(llm: Any, rope: dict[str, Any], size: int) -> Iterator[tuple[str, Tensor]]:
    """The language model's tensors by their names in GGUF."""
    import gguf

    config, arch = llm.config, ARCHITECTURES[llm.config.model_type]
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if arch == "llama" else {}
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(rope, size)
    for name, tensor in plain_state(llm).items():
        layer = name.split(".")[-2]
        yield _named(names, name), _neighbours(tensor, heads[layer]) if layer in heads else tensor


def _neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys, whose halves are turned against each other, so that neighbours are."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _llama3_factors(rope: dict[str, Any], size: int) -> Tensor:
    """What Llama 3.1 divides its frequencies by, as transformers computes it ([size / 2])."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.configuration_llama import LlamaConfig

    settings = LlamaConfig(hidden_size=size, num_attention_heads=1, head_dim=size, rope_parameters=dict(rope))
    changed, _ = ROPE_INIT_FUNCTIONS["llama3"](settings, torch.device("cpu"))
    plain = float(rope["rope_theta"]) ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / changed


def write_mmproj(path: Path, model: MultimodalLM, image: ImageConfig, kind: str, name: str) -> int:
    """Write the file of tower and projector; returns the bytes of its weights."""
    import gguf

    encoder: Any = model.vision_encoder
    config = encoder.model.config
    writer = _open(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MMPROJ], kind, name)
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(model.llm.get_input_embeddings().weight.shape[1])
    writer.add_vision_image_size(encoder.tile.height)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    # Layers behind the last that is asked for are left out; without the list, one more would be.
    writer.add_vision_block_count(max(encoder.select_layers))
    writer.add_array("clip.vision.feature_layer", list(encoder.select_layers))
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_image_mean(list(image.image_mean))
    writer.add_vision_image_std(list(image.image_std))
    if config.hidden_act != "quick_gelu":
        writer.add_vision_use_gelu(True)
    return _write(writer, lambda: _mmproj_tensors(model), kind)


def _mmproj_tensors(model: MultimodalLM) -> Iterator[tuple[str, Tensor]]:
    """Tower and projector by their names in GGUF."""
    import gguf

    encoder: Any = model.vision_encoder
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, encoder.model.config.num_hidden_layers)
    for name, tensor in encoder.model.state_dict().items():
        path = name.split(".")
        behind = path[:2] == ["encoder", "layers"] and int(path[2]) >= max(encoder.select_layers)
        # The final norm, SigLIP's pooling head and layers that are not asked for play no part.
        if not (behind or path[0] in ("post_layernorm", "head") or path[-1] == "position_ids"):
            yield _named(names, f"vision_tower.vision_model.{name}"), tensor
    state = projector_state(model, "llava")
    for layer in (0, 2):
        weight = state[f"layers.{layer}.weight"]
        yield f"mm.{layer}.weight", weight
        yield f"mm.{layer}.bias", state.get(f"layers.{layer}.bias", weight.new_zeros(len(weight)))


def _named(names: Any, name: str) -> str:
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise CheckpointError(f"llama.cpp has no name for the weight {name}")
    return found


def _open(path: Path, arch: str, kind: str, name: str) -> GGUFWriter:
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[KINDS[kind][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _write(writer: GGUFWriter, tensors: Callable[[], Iterator[tuple[str, Tensor]]], kind: str) -> int:
    """Write all tensors, one in memory at a time; returns their bytes."""
    import gguf
    import numpy as np

    total = 0
    for name, tensor in tensors():
        stored = _type_of(name, tensor, kind)
        refuse_nan(name, tensor)
        half = torch.finfo(torch.float16).max
        if stored.name == "F16" and tensor.numel() and float(tensor.abs().max()) > half:
            raise CheckpointError(f"{name} holds values past half precision's 65504: write float32 or bfloat16")
        width, size = gguf.GGML_QUANT_SIZES[stored]
        count = tensor.numel() // width * size
        total += count
        # The array's type plays no part beside `raw_dtype`, but for bytes, whose shape would be taken for packed.
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), count, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors():
        values = tensor.detach().float().cpu().contiguous().numpy()
        writer.write_tensor_data(gguf.quantize(values, _type_of(name, tensor, kind)))
    writer.close()
    return total


def _type_of(name: str, tensor: Tensor, kind: str) -> Any:
    """How a tensor is stored: norms, biases and positions stay exact, a convolution takes only two types."""
    from gguf import GGMLQuantizationType as Types

    if tensor.ndim == 1 or name in ("v.position_embd.weight", "v.class_embd"):
        return Types.F32
    if kind != "float32" and (tensor.ndim > 2 or (kind == "q8_0" and tensor.shape[-1] % QUANTISED)):
        return Types.F16
    return Types[KINDS[kind][0]]

"""A LoRA adapter of ours for the stock class: the same weights under the names that peft gives them there."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import CheckpointError
from polymodal.interop.huggingface.weight_names import Place, to_stock

if TYPE_CHECKING:
    from polymodal.modeling.vlm import MultimodalLM


def write_adapter(folder: Path, model: MultimodalLM, family: str) -> None:
    """Write the language model's adapter beside a stock folder.

    Modules are named in full, so that the adapter cannot stray into the vision tower, whose layers are called alike.

    Args:
        folder: Where to.
        model: The model, its adapter not merged.
        family: The stock folder's `model_type`.

    Raises:
        CheckpointError: The adapter is of a kind that stock loading does not take.
    """
    import torch
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import save_file

    had: Any = model.llm.peft_config["default"]  # type: ignore[index,union-attr]
    for name in ("trainable_token_indices", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters"):
        if getattr(had, name, None):
            raise CheckpointError(f"the adapter has {name}, which stock loading does not take; merge it")
    targets = [name for name, module in model.llm.named_modules() if isinstance(module, LoraLayer)]
    settings = deepcopy(had)
    settings.target_modules = {_name(family, target) for target in targets}
    settings.base_model_name_or_path = None
    settings.inference_mode = True
    tensors: dict[str, torch.Tensor] = {
        f"base_model.model.{_name(family, name)}": tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(model.llm).items()
    }
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} holds NaN or infinity; nothing was written")
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings.save_pretrained(str(folder))


def _name(family: str, name: str) -> str:
    found = to_stock(family, Place("llm", name), style="memory")
    assert found is not None  # every weight of a language model has a name
    return found

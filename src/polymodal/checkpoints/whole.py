"""A model in one folder that needs nothing else, its adapters added to the weights they adapt.

Used at the end of a pipeline and by `polymodal export --format polymodal`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.checkpoints.model_folder import Loaded, load_model, save_model
from polymodal.modeling.lora import fold_in, is_peft

if TYPE_CHECKING:
    import torch


def export_whole(source: Path, target: Path) -> None:
    """Write a model folder of ours as one that needs nothing else.

    Adapters are added to the weights they adapt and are gone; the language model and the vision tower lie in the
    folder, also where they were only referred to.

    Args:
        source: A model folder of ours.
        target: Where to; replaced where it is there.

    Raises:
        PolymodalError: The model cannot be read, or the folder not be written.
    """
    write_whole(load_model(source), target, replace=True)


def write_whole(
    loaded: Loaded,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    replace: bool = False,
) -> None:
    """Write a model in memory as a folder that needs nothing else.

    Args:
        loaded: The model; its adapter is gone afterwards, and with `dtype` its weights are of that type.
        target: Where to.
        dtype: Of the weights; None leaves them as they are.
        replace: Overwrite a folder that is there.

    Raises:
        PolymodalError: The folder cannot be written.
    """
    model, config = loaded.model, loaded.config
    folded = ["adapter"] if is_peft(model.llm) else []
    fold_in(model.llm)
    if dtype is not None:
        model.to(dtype)
        llm = config.llm.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
        config = config.model_copy(update={"llm": llm})
    save_model(
        target,
        model,
        config,
        loaded.tokenizer,
        history=[*loaded.history, {"stage": "export", "folded_in": folded}],
        llm_trained=True,
        vision_trained=config.vision is not None,
        replace=replace,
    )

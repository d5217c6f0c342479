"""A model in memory from any folder that is composed here: ours, a published one, or one of LLaVA's own repository.

`backends.load` puts the chat protocol over it; training starts from it; export writes it out again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from polymodal.checkpoints.locate import commit_of
from polymodal.checkpoints.model_folder import CONFIG_NAME, Loaded, load_model
from polymodal.errors import CheckpointError
from polymodal.interop.huggingface.families import is_hf_folder
from polymodal.interop.huggingface.load import Dtype, load_hf
from polymodal.interop.llava.config import is_llava_repo
from polymodal.interop.llava.load import load_llava_repo


def open_model(name: str | Path, *, dtype: Dtype = "float32", revision: str | None = None) -> Loaded:
    """Load a model whole."""
    from polymodal.checkpoints.locate import find_model

    folder = find_model(name, revision)
    if (folder / CONFIG_NAME).is_file():
        return load_model(folder)
    if is_llava_repo(folder) or is_hf_folder(folder):
        return open_published(folder, name, dtype=dtype)
    raise CheckpointError(
        f"{name}: neither a model folder of ours nor a published model that is composed here; `polymodal describe` "
        "says what it is"
    )


def open_published(folder: Path, name: str | Path, *, dtype: Dtype | Literal["auto"] = "float32") -> Loaded:
    """Load a published model of a family that is composed here, or an original LLaVA folder."""
    if is_llava_repo(folder):
        return load_llava_repo(folder, dtype="bfloat16" if dtype == "auto" else dtype)
    return load_hf(folder, dtype=dtype, source=str(name), revision=commit_of(folder))

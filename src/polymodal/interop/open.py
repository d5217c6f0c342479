"""A model in memory from any folder that is composed here: ours, a published one, or one of LLaVA's own repository."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from polymodal.checkpoints.locate import find_model
from polymodal.checkpoints.model_folder import Loaded, load_model
from polymodal.errors import CheckpointError
from polymodal.interop.huggingface.load import Dtype, load_hf
from polymodal.interop.llava import load_llava_repo
from polymodal.safety.model_folder import FolderReport, check_folder


def open_model(
    name: str | Path, *, dtype: Dtype = "float32", revision: str | None = None, parts: Mapping[str, str] | None = None
) -> Loaded:
    """Load a model whole."""
    report = check_folder(find_model(name, revision))
    if report.kind == "polymodal":
        return load_model(report, parts=parts)
    if report.kind in ("llava", "huggingface"):
        return open_published(report, name, dtype=dtype)
    raise CheckpointError(
        f"{name}: neither a model folder of ours nor a published model that is composed here; `polymodal describe` "
        "says what it is"
    )


def open_published(report: FolderReport, name: str | Path, *, dtype: Dtype | Literal["auto"] = "float32") -> Loaded:
    """Load a published model of a family that is composed here, or an original LLaVA folder."""
    if report.kind == "llava":
        return load_llava_repo(report, dtype="bfloat16" if dtype == "auto" else dtype)
    return load_hf(report, dtype=dtype, source=str(name))

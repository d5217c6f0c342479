"""What a model folder's JSON files may say: no foreign code, no impossible sizes, no bottomless nesting."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polymodal.errors import CheckpointError, first_line

MAX_CONFIG = 16 * 2**20
"""Bytes of a configuration."""
MAX_DEPTH = 64
"""Levels of nesting in a JSON file."""

ATTENTION = frozenset({"eager", "sdpa", "flex_attention", *(f"flash_attention_{n}" for n in (2, 3, 4))})
"""The ways to compute attention that come with transformers; anything else is fetched from somewhere."""
LARGEST = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 1 << 14,
    "num_attention_heads": 1 << 16,
    "vocab_size": 1 << 26,
    "max_position_embeddings": 1 << 31,
    "image_size": 1 << 16,
    "num_channels": 1 << 12,
}
"""Sizes above these are no model's, and would be allocated before they are found wrong."""
COUNTS = re.compile(r"(n|num)_(.*_)?(layer|block|expert|head)s?|(en|de)coder_layers")
"""Keys that count parts of a model, whatever the model calls them."""
MOST_PARTS = 1 << 16
POSITIVE = frozenset({"patch_size", "r"})
"""Sizes that something is divided by."""
SMALL = re.compile(r"(.*_)?eps(ilon)?")
"""What is added to a variance; it is a small number in every model."""
DTYPES = re.compile(r"auto|(torch\.)?(bfloat16|(float|u?int)\d+(_\w+)?|complex\d+|bool|half|double|float)")
MEANT = {"fp16": "float16", "f16": "float16", "bf16": "bfloat16", "fp32": "float32", "f32": "float32"}


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Make sure that a configuration asks for no foreign code and for no impossible sizes."""
    for path, key, value in walk(settings, where):
        at = f"{where}: {path}"
        if key in ("auto_map", "custom_pipelines") and value:
            raise CheckpointError(f"{at} asks for code of the folder's own, which is never run{_own_class(settings)}")
        if key == "trust_remote_code" and value:
            raise CheckpointError(f"{at} is set; code from elsewhere is never run; remove the key")
        if key.strip("_") in ("attn_implementation", "attn_implementation_internal"):
            for name in value.values() if isinstance(value, dict) else (value,):
                if name is not None and str(name).removeprefix("paged|") not in ATTENTION:
                    raise CheckpointError(
                        f"{at} is {str(name)[:80]!r}, which would be fetched and run; "
                        f"only {', '.join(sorted(ATTENTION))} are taken"
                    )
        if key.strip("_").startswith("experts_implementation") and not re.fullmatch(r"\w+", str(value)):
            raise CheckpointError(f"{at} is {str(value)[:80]!r}, which would be fetched and run")
        if key == "parent_library" and not re.fullmatch(r"(transformers|peft)(\.\w+)*", str(value)):
            raise CheckpointError(f"{at} is {str(value)[:80]!r}, a module that would be imported")
        _check_numbers(at, key, value)
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and not DTYPES.fullmatch(value):
            meant = f"; write {MEANT[value.lower()]}" if value.lower() in MEANT else ", such as float32 or bfloat16"
            raise CheckpointError(f"{at} is {value[:40]!r}, which is no type of torch{meant}")


def _check_numbers(at: str, key: str, value: Any) -> None:
    """Refuse what is no number, and what no model can have."""
    for number in value if isinstance(value, list) else (value,):
        if isinstance(number, float) and (math.isnan(number) or (math.isinf(number) and not key.endswith("limit"))):
            raise CheckpointError(f"{at} is {number}, which is no number to compute with")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    large = LARGEST.get(key) or (MOST_PARTS if COUNTS.fullmatch(key) else None)
    if large and not (isinstance(value, int) and 0 <= value <= large):
        raise CheckpointError(f"{at} is {str(value)[:40]}, which is no model's (0 to {large:,})")
    if key in POSITIVE and value <= 0:
        raise CheckpointError(f"{at} is {str(value)[:40]}; more than 0 is expected")
    if SMALL.fullmatch(key) and not 0 <= value <= 1:
        raise CheckpointError(f"{at} is {str(value)[:40]}, which is no model's (0 to 1)")


def read_json(path: Path, limit: int = MAX_CONFIG) -> dict[str, Any]:
    """Read an object from a JSON file that a stranger wrote."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{path}: {size:,} bytes; more than {limit:,} are no configuration")
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except RecursionError:
        raise CheckpointError(f"{path}: nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({first_line(error)})") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: an object was expected")
    for _ in walk(document, str(path)):
        pass  # raises where it is nested too deep
    return document


def _own_class(settings: Mapping[str, Any]) -> str:
    """What a person can do about `auto_map`."""
    model_type = str(settings.get("model_type") or "").replace("-", "_")
    library = find_spec("transformers")
    there = library is not None and (Path(str(library.origin)).parent / "models" / model_type).is_dir()
    if there and re.fullmatch(r"\w+", model_type):
        return f"; transformers has a class of its own for {model_type!r}: remove the key to use that"
    return "; a model that transformers knows by itself is needed"


def walk(settings: Mapping[str, Any], where: str) -> Iterator[tuple[str, str, Any]]:
    """Every key of nested JSON with its dotted path and value."""
    stack: list[tuple[str, Any, int]] = [("", settings, 0)]
    while stack:
        path, value, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{where}: nested more than {MAX_DEPTH} levels deep")
        if isinstance(value, Mapping):
            for key, inner in value.items():
                at = f"{path}.{key}" if path else str(key)
                yield at, str(key), inner
                if isinstance(inner, Mapping | list):
                    stack.append((at, inner, depth + 1))
        elif isinstance(value, list):
            stack.extend((path, inner, depth + 1) for inner in value if isinstance(inner, Mapping | list))

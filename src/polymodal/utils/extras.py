"""Packages that not everybody has: imported where they are used, with one line where that cannot be done."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from polymodal.errors import ConfigError, PolymodalError, first_line


def extra(
    module: str,  # Such as "pyarrow.parquet"
    needs: str,  # Who needs it, such as "reading parquet needs"
    install: str,  # What gets it, such as "polymodal[data]"
    error: type[PolymodalError] = ConfigError,
    package: str | None = None,  # Where the module is another package's
) -> Any:
    """Import a module of an optional package; what is missing or broken is one line that says how to get it."""
    try:
        return import_module(module)
    except Exception as reason:  # what is built for another version raises anything
        raise lacking(package or module.partition(".")[0], needs, install, reason, error) from reason


def lacking(
    package: str, needs: str, install: str, reason: Exception, error: type[PolymodalError] = ConfigError
) -> PolymodalError:
    """What to say of an optional package that could not be imported."""
    name, command = package.replace("_", "-"), "pip install " + (f"'{install}'" if "[" in install else install)
    if find_spec(package) is None:
        return error(f"{needs} {name}, which is not installed: {command}")
    return error(f"{needs} {name}, which is installed but cannot be imported: {first_line(reason)[:160]} ({command})")

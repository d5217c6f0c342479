"""Configuration classes that refuse what they do not know, and their one-line errors."""

import difflib
import inspect
import re
import reprlib
import warnings
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, ValidationInfo, model_validator

from polymodal.errors import ConfigError, unknown_name


class Strict(BaseModel):
    """A frozen model that refuses keys it does not know, and numbers that are none."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    RENAMED: ClassVar[dict[str, str]] = {}
    """Keys of earlier versions and what each is called now; files that have them stay valid."""

    def __init__(self, **data: Any) -> None:
        """Check the values, as `parse_config` does those of a file; a mistake is a `ConfigError`."""
        try:
            self.__pydantic_validator__.validate_python(data, self_instance=self)
        except ValidationError as error:
            raise _mistake(type(self), error, type(self).__name__) from None

    # So that pydantic does not call it for what is nested, whose mistakes are told with their whole path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The schema with each key's sentence out of the docstrings, where `polymodal config` reads them."""
        document = handler.resolve_ref_schema(handler(core_schema))
        document["description"] = (cls.__doc__ or "").partition("\n\n")[0]
        told = sentences(cls)
        for name, field in cls.model_fields.items():
            about = document.get("properties", {}).get(field.alias or name, {})
            about.pop("title", None)
            if name in told:
                about["description"] = told[name]
        return document

    @model_validator(mode="before")
    @classmethod
    def _take_earlier_names(cls, data: Any, info: ValidationInfo) -> Any:
        for old, new in cls.RENAMED.items() if isinstance(data, dict) else ():
            if old in data and new not in data:
                where = (info.context or {}).get("where", cls.__name__)
                warnings.warn(f"{where}: the key {old!r} is called {new!r} now", FutureWarning, stacklevel=3)
                data = {new if key == old else key: value for key, value in data.items()}
        return data


def sentences(cls: type) -> dict[str, str]:
    """What the docstrings of a class and of those it builds on say of each key."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__[: cls.__mro__.index(BaseModel)]):
        _, _, section = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")
        entries = re.split(r"^    (\w+): ", section.partition("\n\n")[0], flags=re.MULTILINE)[1:]
        found |= {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}
    return found


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def parse_config(cls: type[ConfigT], data: Any, where: str) -> ConfigT:
    """Validate plain data into a config, with one-line errors."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping of keys, found {type(data).__name__}")
    try:
        return cls.model_validate(data, context={"where": where})
    except ValidationError as error:
        raise _mistake(cls, error, where) from None


def mistakes(cls: type[BaseModel], data: Any, where: str) -> list[ConfigError]:
    """Everything that is wrong with plain data, a line each."""
    try:
        parse_config(cls, data, where)
    except ConfigError as error:
        cause = error.__context__
        if isinstance(cause, ValidationError):
            return [_mistake(cls, cause, where, number) for number in range(cause.error_count())]
        return [error]
    return []


def _mistake(cls: type[BaseModel], error: ValidationError, where: str, number: int = 0) -> ConfigError:
    """One of the mistakes that pydantic found, in one line."""
    first = error.errors()[number]
    path = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        unknown = unknown_name("key", path.split(".")[-1], _fields_at(cls, first["loc"][:-1]))
        return ConfigError(f"{where}: {unknown} (at {path})")
    told = first["type"] != "missing" and not (first["type"] == "value_error" and isinstance(first["input"], dict))
    given = f" (given {shown(first['input'])})" if told else ""
    close = []
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        choices = re.findall("'([^']*)'", first["ctx"]["expected"])
        close = difflib.get_close_matches(first["input"], choices, n=1, cutoff=0.5)
    given += f"; did you mean {close[0]!r}?" if close else ""
    return ConfigError(f"{where}: {path or 'config'}: {first['msg'].removeprefix('Value error, ')}{given}")


def shown(value: Any) -> str:
    """A value as an error line has room for; a number of thousands of digits cannot be written at all."""
    try:
        text = repr(value[:100]) if isinstance(value, str) else reprlib.repr(value)
    except ValueError:
        return f"a number of {value.bit_length():,} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= 100 else f"{text[:100]}..."


def _fields_at(cls: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """Names of the fields at a location inside a nested config class."""
    models = [cls]  # a union's members until a tag, the next key, picks one; their first until then
    for key in loc:
        field = models[0].model_fields.get(key)
        tagged = [m for m in models if any(key in get_args(f.annotation) for f in m.model_fields.values())]
        if len(models) > 1 and tagged:
            models = tagged[:1]
        elif field is not None:
            models = _nested_models(field.annotation) or models
    return list(models[0].model_fields)


def _nested_models(annotation: Any) -> list[type[BaseModel]]:
    """The config classes inside an annotation, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _nested_models(inner)]

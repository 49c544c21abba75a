"""Turns a setting, as text or as a value, into the type of its annotation, or says what is accepted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

NULL_TEXTS = ("", "null", "~")  # YAML 1.1; only a setting that may be None reads them so
UNIONS = (UnionType, Union)  # of a plain type and None; of an Annotated one and None
TRUTHS = {"true": True, "false": False}


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the value seen and what is accepted."""


@dataclass(frozen=True)
class Span:
    """The numbers that a setting accepts: low..high, multiples of `step` if it is above 1."""

    low: float
    high: float
    step: int = 1

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high and (self.step == 1 or number % self.step == 0)

    def __str__(self) -> str:
        steps = f", multiples of {self.step}" if self.step > 1 else ""
        return f"{self.low:.10g}..{self.high:.10g}{steps}"


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """Returns the annotation of each field of a dataclass of settings."""
    return get_type_hints(kind, include_extras=True)


def validate(settings: object) -> None:
    """Turns each field of a frozen dataclass into its annotation's type; raises ConfigError for the first that is not.

    For `__post_init__`. What fields must be together is for the class to say.
    """
    for key, hint in hints_of(type(settings)).items():
        value = getattr(settings, key)
        try:
            object.__setattr__(settings, key, typed(hint, value))
        except ValueError:
            raise ConfigError(f"{key} is {value!r}; accepted: {accepted(hint)}") from None


def typed(hint: Any, value: Any) -> Any:
    """Returns `value` as `hint` says; raises ValueError if it cannot be, or lies outside the hint's Span.

    hint: bool, int, float, str, Path, Path | None, a Literal of texts, a tuple of these, or Annotated with a Span.
    """
    origin = get_origin(hint)
    if origin is Annotated:
        kind, span = get_args(hint)
        number = typed(kind, value)
        if number not in span:
            raise ValueError(value)
        return number
    if origin in UNIONS:
        return None if value is None or value in NULL_TEXTS else typed(_without_none(hint), value)
    if origin is tuple:
        return _typed_items(get_args(hint), value)
    if origin is Literal:
        if value not in get_args(hint):
            raise ValueError(value)
        return value
    return _typed_scalar(hint, value)


def _typed_items(hints: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    items = value.strip("[]() ").split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        raise ValueError(value)
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(items)
    if len(items) != len(hints):
        raise ValueError(value)
    return tuple(typed(hint, item) for hint, item in zip(hints, items, strict=True))


def _typed_scalar(kind: type, value: Any) -> Any:
    if kind is bool and isinstance(value, str):
        value = TRUTHS.get(value.lower(), value)
    if kind in (int, float) and not isinstance(value, bool) and isinstance(value, str | int):
        return kind(value)
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    if not isinstance(value, kind):
        raise ValueError(value)
    return value


def accepted(hint: Any) -> str:
    """Returns in words what `typed` accepts for this hint."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{accepted(arguments[0])} {arguments[1]}"
    if origin in UNIONS:
        return f"{accepted(_without_none(hint))}, or null"
    if origin is tuple:
        count = "one or more" if arguments[-1] is Ellipsis else str(len(arguments))
        return f"{count} {accepted(arguments[0])}, such as [a, b]"
    if origin is Literal:
        return " | ".join(arguments)
    return {bool: "true | false", int: "integers", float: "numbers", str: "text", Path: "a path"}[hint]


def _without_none(hint: Any) -> Any:
    return next(kind for kind in get_args(hint) if kind is not NoneType)

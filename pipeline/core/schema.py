"""Values checked against types: which values a field takes is what its type says.

Library of core/settings.py and core/names.py. `checked` takes plain data, as a config holds it.
"""

from __future__ import annotations

import math
import sys
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pipeline.core.files import UserError


@dataclass(frozen=True)
class Within:
    """The bounds of a number, for Annotated[int, Within(1)]. above: least itself is refused. why: for the message."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    why: str = ""

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        most = f", at most {self.most}" if self.most < math.inf else ""
        return f"{'above' if self.above else 'at least'} {self.least}{most}{self.why and f' ({self.why})'}"


NO_LIMIT = "null and inf stand for no limit, math.inf"
"""For Annotated[float, NO_LIMIT]."""
FILLED = "an empty one is refused"
"""For texts and lists."""
AtLeast0 = Annotated[int, Within(0)]
AtLeast1 = Annotated[int, Within(1)]
NotNegative = Annotated[float, Within(0)]
Positive = Annotated[float, Within(0, above=True)]
Filled = Annotated[str, FILLED]


def checked(value: Any, hint: Any, key: str) -> Any:
    """The value, if it is of the type and within its bounds: an int passes for a float, a list for a tuple, no float is nan or infinite.

    Args:
        hint: a type, a Literal, a tuple[item, ...], list[item] or dict[str, item], any of them Annotated with bounds, or a union of such.

    Raises:
        UserError: it is not; the message names the key and what it takes.
    """
    options = _options(hint)
    for option in options:
        kind, *marks = typing.get_args(option) if typing.get_origin(option) is Annotated else (option,)
        if NO_LIMIT in marks and value in (None, math.inf):
            return math.inf
        if not _is(value, kind):
            continue
        if isinstance(value, float) and not math.isfinite(value) or kind is float and not abs(value) <= sys.float_info.max:
            raise UserError(f"config key '{key}' is {value}; it takes a finite number")
        if isinstance(value, str) and (reason := unwritable(value)):
            raise UserError(f"config key '{key}' is {value!r}, which holds {reason}; take it out")
        value = float(value) if kind is float else value
        if FILLED in marks and not value:
            raise UserError(f"config key '{key}' is {value!r}; write what it is, or null")
        for mark in marks:
            if isinstance(mark, Within) and value not in mark:
                raise UserError(f"config key '{key}' is {value}; it must be {mark}")
        return _items(value, kind, key)
    named = [option for option in options if typing.get_origin(option) is Literal]
    raise UserError(f"config key '{key}' is {value!r}; " + (
        f"choose one of {', '.join(map(str, typing.get_args(named[0])))}" if named else f"it takes {' or '.join(map(_words, options))}"))


def unwritable(text: str) -> str | None:
    """What in a text no file or path of this project can hold; None where there is nothing of the kind."""
    if "\0" in text:
        return "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair, which is no character"
    return None


def _options(hint: Any) -> list[Any]:
    """The members of a union, at any depth of unions."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [option for part in typing.get_args(hint) for option in _options(part)]
    return [hint]


def _items(value: Any, kind: Any, key: str) -> Any:
    """The value of a type that it is of, with its items checked; a tuple for a list where the type is one."""
    origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (tuple, list) and args:
        hints = [args[0]] * len(value) if origin is list or args[1:] in ((), (...,)) else args
        if len(hints) != len(value):
            raise UserError(f"config key '{key}' is {value!r}; it takes {len(hints)} values")
        return origin(checked(item, item_hint, f"{key}[{i}]") for i, (item, item_hint) in enumerate(zip(value, hints, strict=True)))
    if origin is dict and args:
        return {name: checked(item, args[1], f"{key}.{name}") for name, item in value.items()}
    return tuple(value) if origin is tuple else value


def _is(value: Any, kind: Any) -> bool:
    """Whether the value is of a type, bounds and items aside."""
    origin = typing.get_origin(kind) or kind
    if origin is Literal:
        return value in typing.get_args(kind)
    if isinstance(value, bool) or origin is bool:
        return isinstance(value, bool) and origin in (bool, Any)
    return origin is Any or isinstance(value, {float: (int, float), tuple: (list, tuple)}.get(origin, origin))


def _words(option: Any) -> str:
    kind = typing.get_args(option)[0] if typing.get_origin(option) is Annotated else option
    kind = typing.get_origin(kind) or kind
    return {types.NoneType: "null", tuple: "a list", bool: "true or false"}.get(kind, kind.__name__)

"""Lists that a file could hold as text only: what pandas and datasets write into the cell of a CSV.

Lists of texts (`answers`, `candidates`) and of objects (`messages`, SQuAD's answers) come as JSON, as Python writes
them, or as NumPy does, whose items stand side by side without commas. What merely looks like a list stays text; what
begins as one, in a field that may hold one, and cannot be read is a `Fault`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from adhere.row_files import Fault, short

_STRING = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_ITEM = re.compile(rf"({_STRING}|\}})(?:\s+(?=['\"{{]))?|\barray\(|,\s*dtype=\w+", re.DOTALL)
# "[1, 2]" and most objects may be answers themselves; texts in quotes, ranked candidates and SQuAD's object are lists.
_TEXTS = re.compile(
    r"\[\s*(?:['\"]|\]$|\{\s*['\"](?:response|title|text)['\"])"
    r"|\{\s*['\"](?:text|answer_start)['\"]\s*:\s*(?:array\(|\[)"
)
_PAIR = re.compile(r"\(\s*['\"]")
_TURNS = re.compile(r"\[\s*\{\s*['\"](?:role|content)['\"]")


def unpacked(raw: Mapping[str, Any], texts: set[str], turns: set[str]) -> dict[str, Any]:
    """The row with its lists read: of texts (or objects that hold them) in the fields `texts`, of messages in `turns`.

    Raises `Fault` for a field that begins as such a list and is none.
    """
    found = dict(raw)
    for name, value in raw.items():
        if isinstance(value, str) and (name in texts or name in turns):
            opens = _TURNS if name in turns else _TEXTS
            if opens.match(text := value.strip()) and (name in texts or text.endswith("]")):
                found[name] = _read(name, text)
            elif name in texts and _PAIR.match(text):
                found[name] = _tuple(text) or value
    return found


def _tuple(text: str) -> list[Any] | None:
    """The items of a Python tuple; None for a remark in brackets."""
    try:
        value = _literal(text)
    except ValueError:
        return None
    return list(value) if isinstance(value, tuple) else None


def _read(name: str, text: str) -> object:
    try:
        return _literal(text)
    except ValueError:
        raise Fault(f"`{name}` begins as a list and cannot be read as one ({short(text)}); write it as JSON") from None


def _literal(text: str) -> Any:
    """A list as JSON, Python or NumPy writes it. Raises `ValueError`: it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(_ITEM.sub(_separated, text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("neither JSON nor a Python literal") from None


def _separated(found: re.Match[str]) -> str:
    """A comma between items side by side (Python would join two texts into one); of `array(…, dtype=…)`, its items."""
    if found[1] is None:
        return "(" if found[0] == "array(" else ""
    return found[1] + ("," if found[0] != found[1] else "")

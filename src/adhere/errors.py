"""What can go wrong that is the caller's to mend, and nothing else.

Programming errors stay `AssertionError` or whatever Python raises; only what a user can act on becomes a `UserError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input or usage: says where, what is wrong and what to do. The command line turns it into exit code 2.

    >>> print(UserError("no `prompt`", where="rows.jsonl:3", fix="write one"))
    rows.jsonl:3: no `prompt`; write one
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        message = f"{where}: {what}" if where else what
        super().__init__(f"{message}; {fix}" if fix else message)


class UnsupportedModel(UserError):
    """The model cannot do what was asked of it (attention is out of reach, no tokenizer, unsafe weights, …).

    >>> issubclass(UnsupportedModel, UserError)
    True
    """


class TooLong(UserError):
    """A prompt, or prompt and response, exceed the model's context: a row that may be left out where others stay."""


class RunFailed(UserError):
    """Input was fine, the run was not (no room on disk, NaN weights, …): exit code 1.

    >>> RunFailed("loss is nan").exit_code
    1
    """

    exit_code = 1


def unknown_name(kind: str, name: str, known: Iterable[str], *, where: str | None = None) -> UserError:
    """The error for a name that is not one of `known`, with the nearest ones offered."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    fix = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}"
    return UserError(f"unknown {kind} {name!r}", where=where, fix=fix)

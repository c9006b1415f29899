"""Numbers and texts of a run's page, as they are shown."""

from __future__ import annotations

from typing import Any

from adhere.report.curves import number


def value_text(value: float) -> str:
    """A figure: a share with three places, all else with three digits."""
    return f"{value:.3f}".replace("-", "−") if abs(value) < 1 else number(value)


def signed(value: float) -> str:
    """The same with its sign."""
    return f"+{value_text(value)}" if value > 0 else value_text(value)


def p_text(p: float, alone: bool = False) -> str:
    """A p-value, escaped; `alone`: without the sign of equality."""
    text = f"{p:.3f}" if p >= 0.001 else "&lt; 0.001"
    return text if alone or p < 0.001 else f"= {text}"


def text_of(value: Any) -> str:
    """A text, or the messages of a chat one below the other."""
    if isinstance(value, list):
        return "\n".join(
            f"{m.get('role', '')}: {m.get('content', '')}" if isinstance(m, dict) else str(m) for m in value
        )
    return str(value)


def items_of(value: Any) -> list[Any]:
    """A list, or nothing."""
    return value if isinstance(value, list) else []

"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ms(value: float | None) -> str:
    """Milliseconds, as many digits as matter; "-" where nothing was measured."""
    return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"

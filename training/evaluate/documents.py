"""Documents that commands write parts of, and what stands in their tables."""

from collections.abc import Sequence
from pathlib import Path


def between_markers(old: str, name: str, text: str) -> str:
    """A document with what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` replaced.

    Raises:
        ValueError: if it has no such markers, or not in this order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, found, rest = old.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"there are no lines {begin} and {end}")
    return f"{head}{begin}\n{text}\n{end}{tail}"


def write_between_markers(path: Path, name: str, text: str) -> None:
    """Replaces what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` in a file.

    Raises:
        ValueError: if the file has no such markers.
    """
    try:
        written = between_markers(path.read_text(encoding="utf-8"), name, text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    path.write_text(written, encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def points(difference: Sequence[float]) -> str:
    """A difference and its interval, in hundredths."""
    mean, low, high = (100 * value for value in difference)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def share(gap_closed: Sequence[float] | None) -> str:
    """A share of the oracle gap and its interval; a dash where there is no gap."""
    return "-" if gap_closed is None else "{:.2f} [{:.2f}, {:.2f}]".format(*gap_closed)

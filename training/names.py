"""Names that somebody types."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches


def check_names(what: str, given: Iterable[object], accepted: Collection[str]) -> None:
    """Raises ValueError for the first name that is not accepted, with the nearest ones, else with all that are.

    Args:
        what: such as `"method"`.
    """
    for name in given:
        if name in accepted:
            continue
        # low enough that "fog" finds "image:fog"
        near = get_close_matches(str(name), accepted, cutoff=0.5)
        said = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(accepted)}"
        raise ValueError(f"unknown {what} {name!r}, {said}")

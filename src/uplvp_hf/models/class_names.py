"""Which classes of two lists are the same, by their names."""

from collections import Counter
from collections.abc import Sequence


def match_names(wanted: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """For every wanted name its place in `known`, or None.

    Equal names go together. Of the others, those that differ only in case or in spaces around them, where there is one
    such name on either side: `Cat` and `cat` may be two classes.
    """
    places = {name: place for place, name in reversed(list(enumerate(known)))}
    left = [name for name in dict.fromkeys(wanted) if name not in places]
    spare = {name: place for name, place in places.items() if name not in set(wanted)}
    times, own = Counter(map(_folded, spare)), Counter(map(_folded, left))
    folded = {_folded(name): place for name, place in spare.items() if times[_folded(name)] == 1}
    places |= {name: folded[_folded(name)] for name in left if own[_folded(name)] == 1 and _folded(name) in folded}
    return [places.get(name) for name in wanted]


def _folded(name: str) -> str:
    return name.strip().casefold()

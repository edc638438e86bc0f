"""What is wrong with single records: gathered and told together, so that a source is mended once, not once a record."""

from collections.abc import Callable
from typing import Any

from llmtrain.errors import EncodingError, SourceError

Where = Callable[[], str]
"""Says where a record stands, for error messages; a function, because counting lines takes time."""
AT_ONCE = 20
"""Where every record is wrong, more would say nothing new."""
_PLACES = 10
"""Of the same problem."""
_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}


def kind_of(value: Any) -> str:
    """What stands in a record, in JSON's words."""
    return "nothing" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


class Problems:
    """Of the records of one task."""

    def __init__(self) -> None:
        self._errors: list[SourceError | EncodingError] = []
        self._places: dict[str, list[str]] = {}

    def add(self, error: SourceError | EncodingError, where: Where) -> None:
        """Raises all, once there are AT_ONCE of them."""
        place = where()
        self._errors.append(error)
        self._places.setdefault(str(error).removeprefix(f"{place}: "), []).append(place)
        if len(self._errors) >= AT_ONCE:
            self.tell()

    def note(self, what: str, where: Where) -> None:
        """As `add`, of what is wrong with a record of a source."""
        self.add(SourceError(f"{where()}: {what}"), where)

    def tell(self) -> None:
        """Raise what was found: a problem alone as it came."""
        if not self._errors:
            return
        first = self._errors[0]
        if len(self._errors) == 1:
            raise first
        lines = [f"{len(self._errors)} records cannot be used, and perhaps more after these:"]
        for problem, (place, *others) in self._places.items():
            lines.append(f"  - {place}: {problem}")
            if others:
                more = f" and {len(others) - _PLACES} more" if len(others) > _PLACES else ""
                lines.append(f"    The same at {', '.join(others[:_PLACES])}{more}")
        raise type(first)("\n".join(lines))

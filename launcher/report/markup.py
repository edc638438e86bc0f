"""HTML in which text cannot become markup: everything is escaped unless this module made it.

Generated text, prompts, messages and names come from outside. They are shown as they are, and whatever could act on
a page, a terminal or the direction of reading is shown as a sign instead.
"""

import html
import re
from collections.abc import Iterable

_ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\ud800-\udfff]"
)
"""Control characters, marks that turn the direction of text, noncharacters, halves of surrogate pairs."""
_VOID = {"meta", "input", "br"}


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | None | Iterable["Child"]


def visible(text: str) -> str:
    """`text` with characters that act instead of being seen replaced by signs (tabs and line ends stay)."""
    return _ACTIVE.sub(lambda found: _sign(ord(found[0])), text)


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's pictures of control characters
    if 0xD800 <= code < 0xE000:
        return "\ufffd"
    return f"\u27e8U+{code:04X}\u27e9"


def element(name: str, *children: Child, **attributes: str | bool | None) -> Html:
    """An element. Children that are plain text are escaped; None is nothing.

    Attributes: `class_` is class, `aria_label` is aria-label; None and False leave an attribute out.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        attribute = key.rstrip("_").replace("_", "-")
        words.append(attribute if value is True else f'{attribute}="{html.escape(visible(str(value)))}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening if name in _VOID else f"{opening}{join(children)}</{name}>")


def join(children: Child) -> Html:
    """Children one after the other."""
    if children is None:
        return Html()
    if isinstance(children, str):
        return children if isinstance(children, Html) else Html(html.escape(visible(children)))
    return Html("".join(join(child) for child in children))


def badge(text: str, tone: str = "") -> Html:
    return element("span", text, class_=f"badge {tone}".strip())


def table(heads: list[str], rows: list[list[Child]], numeric: set[int], classes: list[str] | None = None) -> Html:
    """A table that scrolls sideways by itself where the page is narrower.

    Args:
        numeric: columns that are set to the right.
        classes: of the rows.
    """

    def cells(kind: str, values: Iterable[Child]) -> list[Html]:
        return [element(kind, value, class_="n" if at in numeric else None) for at, value in enumerate(values)]

    names = classes or [""] * len(rows)
    body = [element("tr", cells("td", row), class_=name or None) for row, name in zip(rows, names, strict=True)]
    whole = element("table", element("thead", element("tr", cells("th", heads))), element("tbody", body))
    return element("div", whole, class_="scroll", tabindex="0", role="region", aria_label="Table")

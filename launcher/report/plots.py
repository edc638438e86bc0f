"""From a matplotlib figure to what a page needs: SVG that follows the page's colours and text, and a PNG beside it."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import EngFormatter, MaxNLocator

from launcher.report.facts import AXES, Axis, Numbers, Series
from launcher.report.markup import Html, element
from launcher.report.theme import LIGHT

Draw = Callable[[Figure, Axis, bool], None]
"""Fills an empty figure, over an axis; True: in a width for phones."""

AXIS_LABELS: dict[Axis, str] = {"steps": "optimizer steps", "epochs": "epochs", "tokens": "tokens learned from"}
MOST_POINTS = 500
"""Of a line: more than a screen can show."""
_MANY = 10_000
"""From here on numbers along an axis are shortened (20k)."""
_WIDE, _NARROW = 1040, 380
"""Units of a drawing, about a pixel each where it is shown."""
_DPI = 72.0
_PNG_DPI = 144.0
_MARGIN, _WHITE = 48, 255
"""Of a PNG, in pixels."""

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # names are not formulas
    "font.size": 13.0,
    "axes.labelsize": 13.0,
    "axes.labelpad": 8.0,
    "xtick.labelsize": 12.5,
    "ytick.labelsize": 12.5,
    "legend.fontsize": 13.0,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": LIGHT["line"],
    "axes.facecolor": "none",
    "axes.labelcolor": LIGHT["muted"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 1.0,
    "xtick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.color": LIGHT["line"],
    "ytick.labelcolor": LIGHT["muted"],
    "ytick.major.size": 0.0,
    "text.color": LIGHT["ink"],
    "figure.facecolor": LIGHT["card"],
}


@dataclass(frozen=True)
class Picture:
    """A figure in all its variants."""

    name: str
    html: Html
    png: bytes


def picture(name: str, alt: str, draw: Draw, heights: tuple[int, int], switchable: bool = True) -> Picture:
    """Draw a figure for each axis, in two widths; the PNG has the first axis.

    Args:
        heights: of the wide and the narrow one.
    """
    variants: list[Html] = []
    png = b""
    for axis in AXES if switchable else AXES[:1]:
        for narrow in (False, True):
            with _settings(f"{name}-{axis}-{narrow}"):
                figure = Figure(
                    figsize=((_NARROW if narrow else _WIDE) / _DPI, heights[narrow] / _DPI),
                    dpi=_DPI,
                    layout="constrained",
                )
                draw(figure, axis, narrow)
                svg = _to_svg(figure, f"{name}-{axis[0]}{int(narrow)}", alt)
                png = png or _to_png(figure)
            place = f" by-{axis}" if switchable else ""
            variants.append(element("div", svg, class_=("narrow" if narrow else "wide") + place))
    return Picture(name, element("div", variants, class_="chart"), png)


@contextmanager
def _settings(salt: str) -> Iterator[None]:
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the PNG's font lacks
        yield


def label_axis(axes: Axes, axis: Axis, narrow: bool, label: bool = True) -> None:
    """Name the horizontal axis, with whole steps and short numbers."""
    if label:
        axes.set_xlabel(AXIS_LABELS[axis])
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(5 if narrow else 10, integer=axis == "steps", steps=[1, 2, 5, 10]))
    if axis == "tokens" or axes.get_xlim()[1] >= _MANY:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def legend_above(figure: Figure, narrow: bool, reverse: bool = False) -> None:
    """Names over all axes, two beside each other on a phone, in the order in which things were drawn (or reversed)."""
    pairs: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            pairs.setdefault(name, handle)
    if reverse:
        pairs = dict(reversed(pairs.items()))
    if pairs:
        figure.legend(
            list(pairs.values()),
            list(pairs),
            loc="outside upper left",
            ncols=2 if narrow else 5,
            handlelength=1.4,
            columnspacing=1.4,
            borderaxespad=0.1,
            borderpad=0.1,
        )


@dataclass(frozen=True)
class Thinned:
    """A series in at most MOST_POINTS points: the mean of neighbours, and how far they reach."""

    steps: Numbers
    mean: Numbers
    low: Numbers
    high: Numbers
    is_whole: bool
    """Nothing had to be drawn together."""


def thin(series: Series) -> Thinned:
    """Neighbours drawn together until a picture can hold them."""
    steps, values = series.steps, series.values
    if len(values) <= 2 * MOST_POINTS:
        return Thinned(steps, values, values, values, is_whole=True)
    starts = np.linspace(0, len(values), MOST_POINTS, endpoint=False).astype(np.int64)
    counts = np.diff([*starts, len(values)])
    return Thinned(
        np.add.reduceat(steps, starts) / counts,
        np.add.reduceat(values, starts) / counts,
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
        is_whole=False,
    )


def _to_png(figure: Figure) -> bytes:
    """With a margin, which on the page is the card's."""
    figure.patch.set_visible(True)
    figure.set_dpi(_PNG_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    margins = ((_MARGIN, _MARGIN), (_MARGIN, _MARGIN), (0, 0))
    pixels = np.pad(np.asarray(canvas.buffer_rgba()), margins, constant_values=_WHITE)
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return buffer.getvalue()


_NUMBER = re.compile(r"-?\d+\.\d+")
_COLOUR = {light.lower(): role for role, light in LIGHT.items()}
_GEOMETRY = ("d", "x", "y", "width", "height", "transform", "points")
_KEPT = ("stroke-width", "stroke-dasharray", "stroke-linecap", "opacity", "fill-opacity", "stroke-opacity", "font-size",
         "font-weight", "text-anchor")  # fmt: skip


def _to_svg(figure: Figure, prefix: str, alt: str) -> Html:
    """SVG for use inside a page: no fixed colours, no style attributes (the page's policy forbids them), no ids that
    clash, coordinates no finer than can be seen."""
    buffer = io.StringIO()
    figure.patch.set_visible(False)
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})  # `savefig` would lay it out twice
    root = ElementTree.fromstring(buffer.getvalue())
    box = root.get("viewBox", "")
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style") or _is_unseen(child):
                parent.remove(child)
    for node in root.iter():
        node.tag = _local(node.tag)
        node.text = node.text if node.tag == "text" else None
        node.tail = None
        _restyle(node, prefix)
    root.attrib = {"viewBox": _rounded(box), "role": "img", "aria-label": alt}
    return Html(ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    """A name without its namespace: inside HTML there is none to be named."""
    return name.rsplit("}", 1)[-1]


def _is_unseen(node: ElementTree.Element) -> bool:
    style = node.get("style", "")
    return _local(node.tag) == "path" and "fill: none" in style and "stroke:" not in style


def _restyle(node: ElementTree.Element, prefix: str) -> None:
    old, new, classes = dict(node.attrib), dict[str, str](), list[str]()
    for declaration in old.pop("style", "").split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        role = _COLOUR.get(value.lower()) if key in ("fill", "stroke") else None
        if role is not None:
            classes.append(f"{key[0]}-{role}")
        elif key in _KEPT or (key in ("fill", "stroke") and value == "none"):
            new[key] = value.removesuffix("px")
        elif key in ("fill", "stroke"):
            raise ValueError(f"a figure has a colour that is not one of the theme's: {declaration.strip()}")
    for name, value in old.items():
        match _local(name):
            case "id":
                if node.tag in ("path", "clipPath"):  # groups are never referred to
                    new["id"] = f"{prefix}-{value}"
            case "href":
                new["href"] = f"#{prefix}-{value[1:]}"
            case "clip-path":
                new["clip-path"] = f"url(#{prefix}-{value[5:-1]})"
            case plain if plain in _GEOMETRY:
                if not value.startswith("rotate(-0 "):
                    new[plain] = _rounded(value)
            case _:
                pass
    if classes:
        new["class"] = " ".join(classes)
    node.attrib = new


def _rounded(text: str) -> str:
    short = _NUMBER.sub(lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), text)
    return " ".join(short.split())

"""The ladder, drawn: SVG whose text is text and whose colours are the page's."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from normkit.conformance.across import DTYPE, Rung
from normkit.conformance.cases import LAYERS
from normkit.conformance.tolerances import UNIT, tolerance

WIDTH, HEIGHT = 4.4, 3.1
#: Matplotlib's markers, and the letters that resemble them.
MARKERS = {
    "normkit": ("o", "●"),
    "textbook": ("s", "■"),
    "torch": ("^", "▲"),
    "keras": ("D", "◆"),
    "tf-nn": ("v", "▼"),
    "flax": ("P", "✚"),
    "other": ("X", "✖"),
}
#: The roles of colours on the page, each with one that stands for it until the drawing is written.
ROLES = {name: f"#fe{i:02x}ef" for i, name in enumerate((*MARKERS, "ink", "faint", "grid"))}
#: A figure below this is drawn there: a log scale has no zero.
LEAST = 0.2


def role(native: str) -> str:
    """The colour of a native module's line."""
    name = native.replace(".", "-")
    return name if name in MARKERS else "other"


def ladder(rungs: Sequence[Rung], labels: Mapping[str, str]) -> list[tuple[str, Any]]:
    """A panel for each layer: its name and the SVG."""
    layers = [layer for layer in LAYERS if any(r.layer == layer for r in rungs)]
    return [(labels.get(layer, layer), _panel(layer, [r for r in rungs if r.layer == layer])) for layer in layers]


def _panel(layer: str, rungs: Sequence[Rung]) -> Any:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": layer, "font.size": 9, "axes.linewidth": 0.8}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        _draw(figure.subplots(), rungs)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _inline(out.getvalue(), layer)


def _draw(ax: Any, rungs: Sequence[Rung]) -> None:
    own: dict[str, dict[float, float]] = {}
    native: dict[str, dict[float, float]] = {}
    for r in rungs:
        own.setdefault(r.library, {})[r.offset] = r.error
        if not math.isnan(r.native_error):
            native.setdefault(r.native, {})[r.offset] = r.native_error
    top = 10 / UNIT[DTYPE]
    limit = tolerance("forward", DTYPE).units
    for level, words in ((limit, f"normkit’s tolerance: {limit:g}"), (1 / UNIT[DTYPE], "no digit left")):
        ax.axhline(level, color=ROLES["faint"], lw=1, ls=(0, (4, 3)), zorder=1)
        ax.annotate(
            words, (1, level), xytext=(-2, 2), textcoords="offset points", ha="right", va="bottom",
            xycoords=ax.get_yaxis_transform(), fontsize=8, color=ROLES["faint"],
        )  # fmt: skip
    for name, points in native.items():
        style = {"lw": 1.4, "marker": MARKERS[role(name)][0], "ms": 4.2, "mew": 0}
        ax.plot(list(points), _clipped(points.values(), top), color=ROLES[role(name)], zorder=2, **style)
    for points in own.values():
        style = {"lw": 2, "marker": MARKERS["normkit"][0], "ms": 3.8}
        ax.plot(list(points), _clipped(points.values(), top), color=ROLES["normkit"], zorder=3, **style)
    ax.set(xscale="log", yscale="log", ylim=(LEAST, top), facecolor="none")
    ax.set_xlabel("mean / spread", color=ROLES["ink"])
    ax.set_ylabel("error, units of 2⁻²³", color=ROLES["ink"])
    ax.set_yticks([10.0**k for k in range(0, 8, 2)])
    ax.minorticks_off()
    ax.tick_params(colors=ROLES["ink"], labelcolor=ROLES["ink"], length=3)
    ax.grid(True, color=ROLES["grid"], lw=0.7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(ROLES["faint"])
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(_power)


def _power(value: float, _: int) -> str:
    """A power of ten in letters that need no markup."""
    digits = str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}"


def _clipped(values: Any, top: float) -> list[float]:
    return [min(max(v, LEAST), top) for v in values]


def _inline(svg: str, layer: str) -> Any:
    """The drawing as a part of the page: no header, ids that no other drawing has, the page's colours and letters."""
    from markupsafe import Markup

    svg = svg[svg.index("<svg") :]
    for name, colour in ROLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r'\bid="', f'id="{layer}-', svg)
    svg = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{layer}-", svg)
    svg = re.sub(r"font: ?([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"\s*font-family:[^;\"]*;?", "", svg)
    said = f'role="img" aria-label="Error against offset, {layer}"'
    svg = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', rf"<svg \1 {said}>", svg, count=1)
    return Markup(re.sub(r"\s*\n\s*", " ", svg))

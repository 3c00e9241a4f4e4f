"""Charts of the report as Vega-Lite, the language of `dvc plots`: one specification a chart, from which the page's drawing, the SVG and the PNG are made.

Library of `python -m pipeline.report`. vl-convert, which brings Vega with it, renders them here, offline; tests hold them against altair's schema.
Specifications have the light colours of templates/report.css; in the page they become its variables, so that drawings follow light and dark mode.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from pipeline.reporting.plot import Scale

CSS = (Path(__file__).with_name("templates") / "report.css").read_text(encoding="utf-8")
COLOUR = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", CSS.partition("@media")[0]))
"""The page's variable -> its colour in light mode."""
FONT = "Liberation Sans, Helvetica Neue, Arial, sans-serif"
VERSION = "5.20"  # of Vega-Lite, as vl-convert bundles it
BASE = "https://vega.github.io/vega-datasets/"
"""Before every link, where vl-convert puts it: links lead to places of the page."""
Spec = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """An axis with its own ticks: where they stand and what they say."""

    title: str
    scale: Scale
    ticks: Mapping[float, str]
    grid: bool = True

    def encoding(self, field_name: str, **more: Any) -> Spec:
        kind: Spec = {"type": "log"} if self.scale.log and self.scale.zero is None else {"type": "symlog", "constant": _constant(self.scale)} \
            if self.scale.log else {"type": "linear"}
        low = 0.0 if self.scale.log and self.scale.zero is not None else self.scale.low
        axis = {"title": self.title or None, "values": list(self.ticks), "grid": self.grid,
                "labelExpr": f"{json.dumps({_js(at): text for at, text in self.ticks.items()})}[datum.value]"}
        return {"field": field_name, "type": "quantitative", "axis": axis, **more,
                "scale": {**kind, "domain": [low, self.scale.high], "nice": False, "zero": False, "clamp": True}}


def _js(value: float) -> str:
    """A number as JavaScript writes it."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _constant(scale: Scale) -> float:
    """Of a symmetric log axis: where it turns linear, below every positive value."""
    return scale.low / 2


@dataclass
class Chart:
    """Layers over one pair of axes, in pixels of the drawing."""

    width: float
    height: float
    x: Axis
    y: Axis
    about: str
    """What a screen reader says of it."""
    layers: list[Spec] = field(default_factory=list)

    def _add(self, mark: Spec, data: Sequence[Spec], **encoding: Any) -> None:
        if data:
            places = {"x": self.x.encoding("x"), "y": self.y.encoding("y")}
            self.layers.append({"data": {"values": list(data)}, "mark": {"aria": False, **mark}, "encoding": {**places, **encoding}})

    def line(self, points: Sequence[tuple[float, float]], colour: str, dash: str | None = None, step: bool = False, thin: bool = False) -> None:
        pattern = {"strokeDash": [float(part) for part in dash.split()]} if dash else {}
        data = [{"x": x, "y": y, "order": i} for i, (x, y) in enumerate(points)]
        self._add({"type": "line", "color": COLOUR[colour], "strokeWidth": 1 if thin else 1.7, "strokeJoin": "round",
                   **({"interpolate": "step-after"} if step else {}), **pattern}, data, order={"field": "order"})

    def band(self, edges: Sequence[tuple[float, float, float]], colour: str) -> None:
        """edges: (x, low, high)."""
        data = [{"x": x, "y": low, "y2": high} for x, low, high in edges]
        self._add({"type": "area", "color": COLOUR[colour], "opacity": 0.13, "line": False}, data, y2={"field": "y2"})

    def bars(self, ends: Sequence[tuple[float, float, float, str]]) -> None:
        """Upright intervals: (x, low, high, colour)."""
        data = [{"x": x, "y": low, "y2": high, "c": COLOUR[colour]} for x, low, high, colour in ends if high > low]
        self._add({"type": "rule", "strokeWidth": 1.6, "opacity": 0.6}, data, y2={"field": "y2"}, color={"field": "c", "scale": None})

    def spans(self, ends: Sequence[tuple[float, float, float, str]]) -> None:
        """Level intervals: (y, from, to, colour)."""
        data = [{"y": y, "x": low, "x2": high, "c": COLOUR[colour]} for y, low, high, colour in ends if low != high]
        self._add({"type": "rule", "strokeWidth": 1.6, "opacity": 0.6}, data, x2={"field": "x2"}, color={"field": "c", "scale": None})

    def dashed(self, one: tuple[float, float], other: tuple[float, float], dash: Sequence[float] = (3, 3)) -> None:
        """A thin line between two points (x, y)."""
        data = [{"x": one[0], "x2": other[0], "y": one[1], "y2": other[1]}]
        self._add({"type": "rule", "color": COLOUR["faint"], "strokeDash": list(dash)}, data, x2={"field": "x2"}, y2={"field": "y2"})

    def leaders(self, lines: Sequence[tuple[tuple[float, float], tuple[float, float]]]) -> None:
        """Thin lines from dots to names that stand away from them: ((x, y), (x, y))."""
        data = [{"x": one[0], "y": one[1], "x2": other[0], "y2": other[1]} for one, other in lines]
        self._add({"type": "rule", "color": COLOUR["faint"], "strokeWidth": 0.7}, data, x2={"field": "x2"}, y2={"field": "y2"})

    def dots(self, points: Sequence[Dot], size: float = 62) -> None:
        data = [{"x": d.x, "y": d.y, "c": COLOUR[d.colour], "fill": COLOUR["page" if d.hollow else d.colour], "tip": d.tip, "href": d.href} for d in points]
        links = {"href": {"field": "href"}} if any(d.href for d in points) else {}
        self._add({"type": "point", "size": size, "strokeWidth": 1.8, "opacity": 1.0, "aria": True}, data, stroke={"field": "c", "scale": None},
                  fill={"field": "fill", "scale": None}, description={"field": "tip"}, **links)

    def seeds(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        """Small dots (x, y) behind the large ones."""
        self._add({"type": "point", "filled": True, "size": 11, "opacity": 0.5, "color": COLOUR[colour]}, [{"x": x, "y": y} for x, y in points])

    def names(self, labels: Sequence[tuple[float, float, str, str]], align: str = "center") -> None:
        """(x, y, text, colour) of texts, in the units of the axes; twice, so that a line behind them stops before them."""
        for around in (True, False):
            data = [{"x": x, "y": y, "text": text, "c": COLOUR[colour]} for x, y, text, colour in labels]
            stroke = {"stroke": COLOUR["page"], "strokeWidth": 3, "strokeJoin": "round"} if around else {}
            self._add({"type": "text", "align": align, "baseline": "middle", "fontSize": 11.5, **stroke}, data,
                      text={"field": "text"}, **({} if around else {"color": {"field": "c", "scale": None}}))

    def spec(self) -> Spec:
        return {"description": self.about, "width": self.width, "height": self.height, "layer": self.layers}


@dataclass(frozen=True)
class Dot:
    """tip: its lines are parted by ` | `; href: where it leads."""

    x: float
    y: float
    colour: str
    tip: str
    href: str = ""
    hollow: bool = False


def linear(title: str, scale: Scale, show: Callable[[float], str], wanted: int = 4, grid: bool = True) -> Axis:
    return Axis(title, scale, {at: show(at) for at in scale.ticks(wanted)}, grid)


def config() -> Spec:
    """What all charts look like."""
    text = {"labelFont": FONT, "titleFont": FONT, "labelFontSize": 10.5, "titleFontSize": 11, "titleFontWeight": "normal", "labelColor": COLOUR["soft"],
            "titleColor": COLOUR["soft"]}
    return {
        "background": "transparent", "font": FONT, "view": {"stroke": None}, "padding": 4,
        "axis": {**text, "gridColor": COLOUR["grid"], "domain": False, "tickColor": COLOUR["faint"], "ticks": False, "labelPadding": 6, "titlePadding": 8,
                 "labelOverlap": True},
        "axisX": {"domain": True, "domainColor": COLOUR["faint"]},
        "header": {**text, "labelFontSize": 12, "titleFontSize": 12, "labelColor": COLOUR["ink"], "labelFontWeight": "bold"},
        "legend": text, "text": {"font": FONT, "color": COLOUR["ink"]},
    }


def whole(spec: Spec) -> Spec:
    """The specification as a file of its own."""
    return {"$schema": "https://vega.github.io/schema/vega-lite/v5.json", **spec, "config": config()}


def inline(spec: Spec) -> Markup:
    """The drawing as it stands in the page: as wide as its place, its colours the page's variables."""
    return Markup(_inlined(json.dumps(whole(spec), sort_keys=True)))  # noqa: S704  (texts were escaped by Vega)


_numbers = itertools.count()


@functools.lru_cache(maxsize=64)
def _svg(text: str) -> str:
    import vl_convert

    drawn: str = vl_convert.vegalite_to_svg(text, vl_version=VERSION)
    return drawn.replace(f'href="{BASE}', 'href="')


def _inlined(text: str) -> str:
    drawn = _svg(text)
    about = json.loads(text).get("description", "")
    width, height = (float(re.search(rf'{side}="([\d.]+)"', drawn)[1]) for side in ("width", "height"))  # type: ignore[index]
    body = drawn[drawn.index(">") + 1 :]
    prefix = f"v{next(_numbers)}-"
    body = re.sub(r'id="(\w+)"', rf'id="{prefix}\1"', body)
    body = re.sub(r"url\(#(\w+)\)", rf"url(#{prefix}\1)", body)
    for name, colour in COLOUR.items():
        body = body.replace(f'"{colour}"', f'"var(--{name})"')
    body = body.replace("xlink:href=", "href=").replace(' target="undefined"', "")
    style = f"max-width:{math.ceil(width * 1.35)}px"
    return f'<svg class="vega" viewBox="0 0 {width:g} {height:g}" style="{style}" role="img" aria-label="{escape(about)}">{body}'


def files(charts: Mapping[str, Spec]) -> dict[str, bytes]:
    """charts/<name>.vl.json and .svg of every chart, and .png of it at twice its size."""
    written: dict[str, bytes] = {}
    for name, spec in charts.items():
        text = json.dumps(whole(spec), sort_keys=True)
        written[f"charts/{name}.vl.json"] = (json.dumps(whole(spec), indent=1) + "\n").encode()
        written[f"charts/{name}.svg"] = _svg(text).encode()
        written[f"charts/{name}.png"] = _png(_svg(text))
    return written


def _png(drawn: str) -> bytes:
    import vl_convert

    picture: bytes = vl_convert.svg_to_png(drawn.replace("<g ", '<rect width="100%" height="100%" fill="white"/><g ', 1), scale=2)
    return picture

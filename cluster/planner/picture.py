"""The picture of a plan's runs: one SVG page, a column for each model, without a library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from cluster.planner.figures import Sample
from cluster.planner.plan import Plan
from cluster.planner.run import Outcome

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 360, 120, 60, 60, 44
_MOST = 4  # models that are drawn
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e")
_DASHES = {"static": "5 3"}
_GIB = 1 << 30
Value = Callable[[Sample], float | None]
_PANELS: tuple[tuple[str, tuple[tuple[str, Value], ...]], ...] = (
    ("load, requests/s", (("load", lambda one: one.load_rps),)),
    (
        "both promises kept, %",
        (("kept", lambda one: None if one.attainment is None else 100 * one.attainment),),
    ),
    (
        "device memory, GiB",
        (
            ("KV live", lambda one: one.kv / _GIB),
            ("KV cached", lambda one: one.cached / _GIB),
            ("activations", lambda one: one.activation / _GIB),
        ),
    ),
    (
        "balloons, GiB",
        (
            ("limit", lambda one: one.balloon_limit / _GIB),
            ("held", lambda one: one.balloon_physical / _GIB),
            ("used", lambda one: one.balloon_used / _GIB),
        ),
    ),
    ("groups", (("groups", lambda one: one.replicas),)),
)


def draw(plan: Plan, outcomes: Mapping[str, Outcome], told: str) -> str:
    """An SVG. Solid lines are the first run's, dashed ones the static split's."""
    models = [model.model_id for model in plan.models[:_MOST]]
    width = len(models) * (_WIDTH + _LEFT) + 20
    height = _TOP + len(_PANELS) * (_HEIGHT + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>',
        _text(
            10,
            18,
            f"{told[:100]}; solid: {', '.join(name for name in outcomes if name != 'static') or 'static'}",
        ),
    ]
    for column, model_id in enumerate(models):
        left = _LEFT + column * (_WIDTH + _LEFT)
        parts.append(_text(left, 40, model_id))
        for row, (title, lines) in enumerate(_PANELS):
            parts += _panel(model_id, outcomes, title, lines, left, _TOP + row * (_HEIGHT + _GAP))
    return "\n".join([*parts, "</svg>\n"])


def _panel(
    model_id: str,
    outcomes: Mapping[str, Outcome],
    title: str,
    lines: Sequence[tuple[str, Value]],
    left: int,
    top: int,
) -> list[str]:
    runs = {
        name: [one for one in outcome.recorder.samples if one.model_id == model_id]
        for name, outcome in outcomes.items()
    }
    every = [one for samples in runs.values() for one in samples]
    values = [value for one in every for _, of in lines if (value := of(one)) is not None]
    most, end_s = max(values, default=0.0) * 1.05 or 1.0, max((one.time_s for one in every), default=1.0)
    unit, unit_s = ("h", 3600.0) if end_s > 7200 else ("min", 60.0)
    parts = [
        f'<rect x="{left}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#999"/>',
        _text(left + 4, top - 5, title),
        _text(left - 4, top + 9, f"{most:.3g}", "end"),
        _text(left - 4, top + _HEIGHT, "0", "end"),
        _text(left + _WIDTH, top + _HEIGHT + 13, f"{end_s / unit_s:.3g} {unit}", "end"),
        _text(left, top + _HEIGHT + 13, "0"),
    ]
    for number, (name, of) in enumerate(lines):
        if len(lines) > 1:
            parts.append(_text(left + 150 + 70 * number, top - 5, name, colour=_COLOURS[number]))
        for run, samples in runs.items():
            points = [
                f"{left + _WIDTH * one.time_s / end_s:.1f},{top + _HEIGHT * (1 - value / most):.1f}"
                for one in samples
                if (value := of(one)) is not None
            ]
            dash = f' stroke-dasharray="{_DASHES[run]}"' if run in _DASHES and len(runs) > 1 else ""
            parts.append(
                f'<polyline points="{" ".join(points)}" fill="none" stroke="{_COLOURS[number]}"{dash}/>'
            )
    return parts


def _text(x: int, y: int, text: str, anchor: str = "start", colour: str = "black") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'

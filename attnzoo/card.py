"""One paper as the command line and the docs show it: row, exhibit, costs, files and measured claim."""

import importlib
import inspect
import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attnzoo import catalog, costs
from attnzoo.paper import Paper

_WIDTH = 100
_CELLS, _BATCH, _HEADS, _KV_HEADS = 24, 2, 4, 2  # examples are drawn at the sizes that the contract tests run them at


def row_dict(row: catalog.Row) -> dict[str, Any]:
    """The row with its status, ready for JSON."""
    return {**asdict(row), "status": row.status}


@dataclass(frozen=True)
class Card:
    """row: of the catalog. paper: what its exhibit says, or None while it is planned.
    values: a number per letter, for the cost formulas.
    """

    row: catalog.Row
    paper: Paper | None
    values: Mapping[str, float]

    @classmethod
    def of(cls, key: str, values: Mapping[str, float]) -> "Card":
        """The card of `key`; imports its exhibit if there is one. Raises ValueError for an unknown key."""
        row = catalog.paper(key)
        return cls(row, catalog.exhibit(key) if row.status == "built" else None, values)

    def equations(self) -> str:
        """The docstring of the exhibit: the paper's method with shapes and sources; "" while planned."""
        return inspect.getdoc(importlib.import_module(self.row.module)) or "" if self.paper else ""

    def builds(self) -> list[str]:
        """Import names of what the exhibit builds."""
        return [_import_name(entry) for entry in (self.paper.builds if self.paper else ())]

    def costs(self) -> dict[str, dict[str, Any]]:
        """What -> {"formula", "value"}; the value is None where a letter of the paper's own is not given."""
        formulas = self.paper.costs if self.paper else {}
        return {
            what: {
                "formula": formula,
                "value": None if self.missing(formula) else costs.evaluate(formula, self.values),
            }
            for what, formula in formulas.items()
        }

    def missing(self, formula: str) -> list[str]:
        """The letters of `formula` that have no value."""
        return sorted(costs.letters(formula) - self.values.keys())

    def files(self) -> dict[str, str]:
        """Where the paper lives, relative to the repository; only what exists."""
        family, key = self.row.family, self.row.key
        rooms = {
            "exhibit": f"attnzoo/zoo/{family}/{key}.py",
            "tests": f"tests/zoo/{family}/test_{key}.py",
            "claim": f"train/claims/{key}.py",
            "result": f"train/claims/results/{key}.json",
        }
        return {room: path for room, path in rooms.items() if (catalog.PACKAGE.parent / path).is_file()}

    def claim(self) -> dict[str, Any] | None:
        """The recorded result of its claim, if one is there."""
        path = self.files().get("result")
        return json.loads((catalog.PACKAGE.parent / path).read_text(encoding="utf-8")) if path else None

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            **row_dict(self.row),
            "equations": self.equations(),
            "builds": self.builds(),
            "sizes": dict(self.values),
            "costs": self.costs(),
            "code": self.paper.code if self.paper else "",
            "parity": self.paper.parity if self.paper else "",
            "notes": self.paper.notes if self.paper else "",
            "files": self.files(),
            "claim": self.claim(),
        }

    def as_text(self) -> str:
        """Everything, to be read in a terminal."""
        row = self.row
        parts = [
            f"{row.number:03d} {row.key} ({row.family}, {row.status})\n{row.title}\n{row.citation}"
            + (f"\nhttps://arxiv.org/abs/{row.arxiv}" if row.arxiv else ""),
            textwrap.fill(row.what, _WIDTH),
        ]
        if self.paper is None:
            parts.append("Planned: there is no exhibit yet. CONTRIBUTING.md says how to add one.")
            return "\n\n".join(parts)
        parts.append(_section("equations", self.equations()))
        parts.append(_section("builds", "\n".join(self.builds())))
        parts.append(_section("costs", self._costs_text()))
        remarks = {"code": self.paper.code, "parity": self.paper.parity, "notes": self.paper.notes}
        parts += [_section(title, textwrap.fill(text, _WIDTH - 2)) for title, text in remarks.items()]
        parts.append(_section("files", _columns(self.files())))
        claim = self.claim()
        parts.append(_section("claim", _plain(claim) if claim else "no result is recorded"))
        return "\n\n".join(part for part in parts if part)

    def _costs_text(self) -> str:
        lines = {}
        for what, cost in self.costs().items():
            value = cost["value"]
            if value is None:
                said = "give " + " ".join(f"--size {name}=..." for name in self.missing(cost["formula"]))
            else:
                said = f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
            lines[what] = f"{cost['formula']}  =  {said}"
        if not lines:
            return ""
        used = frozenset().union(*(costs.letters(cost["formula"]) for cost in self.costs().values()))
        sizes = " ".join(f"{k}={v}" for k, v in self.values.items() if k in used)
        return _columns(lines) + (f"\nfor {sizes}" if sizes else "")

    def picture(self) -> Callable[[Any], None] | None:
        """What draws the idea on matplotlib axes: the paper's own picture, else its first mask, its first score or its
        weight maps; None where it has none of them.
        """
        paper = self.paper
        if paper is None or paper.picture is not None:
            return paper.picture if paper else None
        from attnzoo.core import pictures

        size = _CELLS
        sizes = {"heads": _HEADS, "kv_heads": _KV_HEADS, "batch": _BATCH}
        for name, mask in paper.masks.items():
            return lambda axes: _titled(name, axes, pictures.draw_mask, mask(size, size), size, heads=_HEADS, batch=_BATCH)
        for name, score in paper.scores.items():
            return lambda axes: _titled(name, axes, pictures.draw_score, score(size, size), size, **sizes)
        if not paper.weights:
            return None
        maps = {name: make(size, size) for name, make in paper.weights.items()}
        return lambda axes: pictures.draw_weights(axes, maps, size, **sizes)

    def plot(self, path: Path) -> None:
        """Draws the idea, and the costs that change with sequence length T (doubled from 64 to 1,048,576; S = T), into a file.

        Raises ValueError if there is neither, ModuleNotFoundError without matplotlib.
        """
        over_length = self._plot_costs if self._costs_over_length() else None
        panels = [draw for draw in (self.picture(), over_length) if draw is not None]
        if not panels:
            raise ValueError(f"plot: {self.row.key} has no picture, and states no costs over T that these sizes determine")
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            raise ModuleNotFoundError("plot needs matplotlib, which is not installed: pip install 'attnzoo[train]'") from None
        figure = Figure(figsize=(6.5 * len(panels), 5), layout="constrained")
        for draw, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
            draw(axes)
        figure.suptitle(f"{self.row.key}: {self.row.title}", fontsize=11, wrap=True)
        figure.savefig(path, dpi=150)

    def _costs_over_length(self) -> dict[str, str]:
        """The formulas with T or S in them whose other letters have values."""
        formulas = self.paper.costs if self.paper else {}
        return {what: f for what, f in formulas.items() if costs.letters(f) & {"T", "S"} and not self.missing(f)}

    def _plot_costs(self, axes: Any) -> None:
        """The costs that the sizes determine, over T."""
        lengths = [2**n for n in range(6, 21)]
        for what, formula in self._costs_over_length().items():
            values = [costs.evaluate(formula, {**self.values, "T": t, "S": t}) for t in lengths]
            axes.loglog(lengths, values, label=what)
        axes.set(xlabel="sequence length T", ylabel="how many", title="costs", xscale="log")
        axes.grid(alpha=0.3)
        axes.legend()


def _titled(name: str, axes: Any, draw: Callable[..., None], *args: Any, **sizes: Any) -> None:
    """Draws an example, with its name above the title."""
    draw(axes, *args, **sizes)
    axes.set_title(f"{name}\n{axes.get_title()}", fontsize=9, wrap=True)


def _import_name(entry: Any) -> str:
    if isinstance(entry, str):
        return entry.replace(":", ".")
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', repr(entry))}"


def _section(title: str, body: str) -> str:
    return f"{title}\n{textwrap.indent(body, '  ')}" if body else ""


def _columns(entries: Mapping[str, str]) -> str:
    width = max(map(len, entries), default=0)
    return "\n".join(f"{name:{width}}  {text}" for name, text in entries.items())


def _plain(value: Any) -> str:
    """A JSON value as indented lines; long lists are cut."""
    if isinstance(value, dict):
        lines = []
        for name, inner in value.items():
            text = _plain(inner)
            nested = isinstance(inner, dict) or "\n" in text
            lines.append(f"{name}:\n{textwrap.indent(text, '  ')}" if nested else f"{name}: {text}")
        return "\n".join(lines)
    if isinstance(value, list):
        if any(isinstance(item, dict) for item in value):
            return "\n".join(f"- {_plain(item).replace(chr(10), ', ')}" for item in value[:12])
        shown = ", ".join(_plain(item) for item in value[:12])
        return shown + (f", ... ({len(value)} in all)" if len(value) > 12 else "")
    return f"{value:.6g}" if isinstance(value, float) else str(value)

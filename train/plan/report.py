"""A plan in words, as JSON and as a picture."""

import dataclasses
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train.plan.chips import GIB, Slice
from train.plan.compile import Planned
from train.plan.memory import Memory
from train.plan.search import Search, Try
from train.sharding import describe as mesh_in_words

KINDS = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "activations": "activations kept for the backward pass",
    "workspace": "workspace",
    "other": "batch, padding, program",
}
"""Kinds of memory in words."""


@dataclass(frozen=True)
class Report:
    """A plan with what it was made for. name: of the preset. unit: what a step consumes `units` of."""

    name: str
    pod: Slice
    plan: Planned
    search: Search | None
    unit: str
    units: int
    command: str

    @property
    def best(self) -> Planned:
        """The plan if it fits, else the nearest that does, else the plan."""
        found = self.search.found if self.search else None
        return found.plan if found and found.plan else self.plan

    def as_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; bytes, operations and seconds are per device and step."""
        chip = self.pod.chip
        return {
            "command": self.command,
            "preset": self.name,
            "topology": self.pod.topology,
            "chips": self.pod.chips,
            "devices": len(self.pod.devices),
            "chip": {
                "flops": chip.flops, "hbm": chip.hbm, "hbm_bandwidth": chip.hbm_bandwidth,
                "ici_bandwidth": chip.ici_bandwidth, "devices": chip.devices,
            },
            "unit": self.unit,
            "units_per_step": self.units,
            "plan": _plan(self.plan),
            "search": None if self.search is None else {
                "tries": [_try(t) for t in self.search.tries],
                "found": None if self.search.found is None else self.search.found.change,
                "left": self.search.left,
            },
            "versions": {
                "python": platform.python_version(), **{name: version(name) for name in ("jax", "flax", "optax", "libtpu")},
            },
        }  # fmt: skip

    def write(self, folder: Path) -> None:
        """plan.json and plan.png into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        found = self.search.found if self.search else None
        plans = {"as asked": self.plan, **({found.change: self.best} if found else {})}
        plot_memory(
            folder / "plan.png",
            [(name, plan.memory, plan.needed, plan.usable) for name, plan in plans.items()],
            title=f"{self.name} ({self.plan.config.mixer}) on {self.pod.topology}, {mesh_in_words(self.plan.config.mesh)}",
        )

    def show(self, console: Console) -> None:
        """The plan; where it does not fit also what was tried, and the nearest that does."""
        where = f"{self.pod.chips} chips" + (f", {len(self.pod.devices)} devices" if self.pod.chip.devices > 1 else "")
        _say(console, f"[bold]{self.name}[/] ({self.plan.config.mixer}) on {self.pod.topology}: {where}")
        _say(console, f"{self.plan.parameters / 1e9:.3g} B parameters")
        self._show_plan(console, self.plan)
        if self.search is not None:
            _show_search(console, self.search, self.plan)
            if self.search.found is not None:
                _say(console, f"\n[bold]with {self.search.found.change}[/]")
                self._show_plan(console, self.best)

    def _show_plan(self, console: Console, plan: Planned) -> None:
        config = plan.config
        units = self.units * config.batch // self.plan.config.batch
        _say(console, f"mesh {mesh_in_words(config.mesh)}; batch {config.batch}, {units:,} {self.unit} per step")
        _say(console, f"remat {config.model.remat}, {config.model.dtype}; attention: {', '.join(plan.attention) or 'none'}")
        if plan.kernels:
            _say(console, "kernels: " + ", ".join(f"{name} x {times}" for name, times in sorted(plan.kernels.items())))
        console.print(_memory_table(plan))
        verdict = "[green]fits[/]" if plan.fits else "[red]does not fit[/]"
        asked = f"{plan.needed / GIB:.2f} of {plan.usable / GIB:.2f} GiB per device"
        _say(console, f"{verdict}: {asked} (compiled in {plan.seconds:.0f} s)")
        _say(console, _flops_in_words(plan))
        if plan.roofline is None:
            return
        if plan.loops_of_unknown_length:
            _say(console, f"  {plan.loops_of_unknown_length} loops of unknown length are counted once")
        console.print(_collectives_table(plan))
        roof, model = plan.roofline, plan.flops.model
        compute = "not known" if roof.compute is None else f"{1e3 * roof.compute:.1f}"
        _say(
            console,
            f"a step takes at least {1e3 * roof.seconds:.1f} ms, limited by {roof.limiter or 'what is known'}: "
            f"compute {compute}, memory {1e3 * roof.memory:.1f} ({(plan.traffic or 0) / GIB:.1f} GiB), "
            f"network {1e3 * roof.network:.1f} ms",
        )
        if model is not None:
            share = f"{100 * model / self.pod.per_device.flops / roof.seconds:.0f} % of the peak for the model's own FLOPs"
            _say(console, f"at most {units / roof.seconds:,.0f} {self.unit} per second, {share}")


def _flops_in_words(plan: Planned) -> str:
    flops = plan.flops
    if flops.missing:
        return f"FLOPs: not known, because these do not say theirs: {', '.join(flops.missing)}"
    said = f"FLOPs per device and step: {flops.model:.3g} of the model (3 x its loss), {flops.traced:.3g} as traced"
    if flops.compiled is None:
        return said
    return f"{said}\n  as compiled {flops.compiled:.3g}; by cost_analysis {flops.told or 0:.3g}, which counts loops once"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _memory_table(plan: Planned) -> Table:
    table = Table(title="memory per device", title_justify="left")
    table.add_column("kind")
    table.add_column("MiB", justify="right")
    if plan.memory is None:
        for kind in ("parameters", "optimizer"):
            table.add_row(KINDS[kind], f"{getattr(plan.state, kind) / 2**20:,.1f}")
        rest = plan.needed - plan.state.parameters - plan.state.optimizer
        table.add_row("everything else", f"{rest / 2**20:,.1f}")
        return table
    for kind in Memory.KINDS:
        table.add_row(KINDS[kind], f"{getattr(plan.memory, kind) / 2**20:,.1f}")
    told = plan.memory
    parts = {"arguments": told.arguments, "outputs": told.outputs, "aliased": -told.aliased, "temporaries": told.temporaries}
    table.add_section()
    for name, size in parts.items():
        table.add_row(f"[dim]compiler: {name}[/]", f"[dim]{size / 2**20:,.1f}[/]")
    return table


def _collectives_table(plan: Planned) -> Table:
    table = Table(title="collectives per device and step", title_justify="left")
    for name in ("kind", "devices", "times", "MiB", "MiB received"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for c in plan.collectives:
        sizes = (c.bytes / 2**20, c.received / 2**20)
        table.add_row(c.kind, str(c.group), str(c.count), *(f"{size:,.1f}" for size in sizes))
    return table


def _show_search(console: Console, search: Search, plan: Planned) -> None:
    tried, estimated = search.compiled, [t for t in search.tries if t not in search.compiled]
    table = Table(title="nearest settings", title_justify="left")
    for name in ("change", "GiB per device", ""):
        table.add_column(name, justify="right" if name.startswith("GiB") else "left")
    for t in tried:
        if t.plan is None:
            table.add_row(t.change, f"≥ {t.least / GIB:.2f}", f"the compiler refuses it: {t.refused}")
        else:
            table.add_row(t.change, f"{t.plan.needed / GIB:.2f}", "fits" if t.plan.fits else "does not fit")
    if tried:
        console.print(table)
    if estimated:
        best = min(estimated, key=lambda t: t.least)
        least = f"{best.least / GIB:.2f} GiB ({best.change})"
        _say(console, f"{len(estimated)} others were not compiled: by estimate they need {least} or more")
    if search.found is None:
        left = f"{search.left} further candidates were not tried (--tries, --minutes)"
        said = left if search.left else "there are no further candidates"
        _say(console, f"nothing that was tried fits into {plan.usable / GIB:.2f} GiB; {said}. Take more chips or fewer tokens")


def _plan(plan: Planned) -> dict[str, Any]:
    values = {**dataclasses.asdict(plan), "config": plan.config.as_json()}
    if plan.roofline is not None:
        values["roofline"] |= {"limiter": plan.roofline.limiter, "seconds": plan.roofline.seconds}
    return values


def _try(t: Try) -> dict[str, Any]:
    return {"change": t.change, "least": t.least, "refused": t.refused, "plan": None if t.plan is None else _plan(t.plan)}


Bar = tuple[str, Memory | None, int, int]
"""(name, memory by kind or None if there is no program, bytes needed, bytes usable)."""


def plot_memory(path: Path, bars: Sequence[Bar], *, title: str) -> None:
    """A bar per plan, divided by kind, as a share of a device's memory; what does not fit is one colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.9 + 0.36 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    for kind, words in KINDS.items():
        before = Memory.KINDS[: Memory.KINDS.index(kind)]
        sizes, lefts = (
            [0.0 if memory is None else 100 * sum(getattr(memory, k) for k in kinds) / usable for _, memory, _, usable in bars]
            for kinds in ((kind,), before)
        )
        axes.barh(range(len(bars)), sizes, left=lefts, label=words, height=0.65)
    missing = [100 * needed / usable if memory is None else 0.0 for _, memory, needed, usable in bars]
    if any(missing):
        axes.barh(range(len(bars)), missing, color="0.75", label="does not fit", height=0.65)
    for place, (_, _, needed, usable) in enumerate(bars):
        said = f" {needed / GIB:.1f} of {usable / GIB:.4g} GiB"
        axes.annotate(said, (100 * needed / usable, place), va="center", fontsize=7)
    axes.axvline(100, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("% of a device's memory")
    axes.set_title(title, fontsize=10, loc="left")
    figure.legend(fontsize=7, ncols=4, loc="outside lower center")
    figure.savefig(path, dpi=120)

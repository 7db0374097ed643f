"""The plans of docs/guide/planning.md: which they are, and how they are recorded.

    python -m train.plan.recorded
    python -m train.plan.recorded llm-1b llm-1b-transmla
    python -m train.plan.recorded --list

Needs the TPU compiler (pip install -e ".[train,tpu]"), not a TPU. Each plan is one `attnzoo plan` in a process of its own, one
after the other, a minute to some minutes each. Those that are recorded are left out unless they are named. Writes
benchmarks/results/plan/NAME.json and draws plans.png of all that are there; `python docs/generate.py` writes the table.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from attnzoo.errors import unknown

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "plan"

_1B = "--config llm-1b --topology v6e:8x8"
_GROUPED = "--model.num-kv-heads 4"

PLANS = {
    "llm-100m": "--config llm-100m --topology v5e:4x4",
    "vit-l": "--config vit-l --topology v6e:8x8",
    "llm-1b": f"{_1B} {_GROUPED}",
    # As many parameters as with four heads of keys for sixteen of queries, within one percent, by the feed-forward width.
    "llm-1b-transmla": f"{_1B} --mixer transmla --model.mlp-dim 5120",
    "llm-1b-tpa": f"{_1B} --mixer tpa --model.mlp-dim 6144",
    "llm-1b-cca": f"{_1B} --mixer cca --model.mlp-dim 5888",
    # As many tokens a step, in sequences of 64k that eight chips share.
    "llm-1b-64k": f"{_1B} {_GROUPED} --mesh fsdp=8,context=8 --data.context 65536 --batch 16 --model.remat full",
    "llm-1b-v5e-4x4": f"--config llm-1b --topology v5e:4x4 {_GROUPED}",
    "llm-7b": "--config llm-7b --topology v5e:16x16 --mesh fsdp=64,tensor=4",
    "llm-7b-v5p": "--config llm-7b --topology v5p:4x4x4",
    "llm-7b-v5e-8x8": "--config llm-7b --topology v5e:8x8",
}
"""name -> the options of `attnzoo plan`."""


def plan(line: str) -> dict[str, Any]:
    """What `attnzoo plan` says in JSON, from a process of its own: one at a time holds the compiler.

    Raises RuntimeError where it says nothing.
    """
    command = [sys.executable, "-m", "attnzoo.cli", "plan", *shlex.split(line), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode not in (0, 1):  # 1: it does not fit
        raise RuntimeError(f"attnzoo plan {line} ended with {done.returncode}")
    return json.loads(done.stdout)


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """The plans that are there, in the order of `PLANS`."""
    paths = {name: folder / f"{name}.json" for name in PLANS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def best(made: dict[str, Any]) -> dict[str, Any]:
    """The plan as asked if it fits, else the nearest that does, else as asked."""
    search = made["search"]
    if search is None or search["found"] is None:
        return made["plan"]
    return next(t["plan"] for t in search["tries"] if t["change"] == search["found"])


def draw(plans: dict[str, dict[str, Any]], path: Path) -> None:
    """The memory of every plan, and of the nearest that fits where one does not."""
    from train.plan.memory import Memory
    from train.plan.report import Bar, plot_memory

    bars: list[Bar] = []
    for name, made in plans.items():
        shown = {name: made["plan"]}
        if best(made) is not made["plan"]:
            shown[f"… {made['search']['found']}"] = best(made)
        for label, p in shown.items():
            memory = None if p["memory"] is None else Memory(**p["memory"])
            bars.append((label, memory, p["needed"], p["usable"]))
    plot_memory(path, bars, title="memory per device")


def main(argv: list[str] | None = None) -> int:
    """Compile, write JSON and plot; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m train.plan.recorded", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which (default: all that are not recorded)")
    parser.add_argument("--list", action="store_true", help="print the names and their options")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for results (default benchmarks/results/plan)")
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(f"{name}: attnzoo plan {line}" for name, line in PLANS.items()))
        return 0
    for name in options.names:
        if name not in PLANS:
            parser.error(str(unknown("plan", name, PLANS)))
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or [name for name in PLANS if not (options.out / f"{name}.json").is_file()]:
        print(f"{name}: attnzoo plan {PLANS[name]}", flush=True)
        began = time.monotonic()
        made = plan(PLANS[name])
        (options.out / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {'fits' if best(made)['fits'] else 'does not fit'}, {time.monotonic() - began:.0f} s", flush=True)
    draw(recorded(options.out), options.out / "plans.png")
    print(f"wrote {options.out}; python docs/generate.py writes the page")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

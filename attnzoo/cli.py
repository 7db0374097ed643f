"""The command line: `attnzoo list | show | train | compare | generate | export | claim | plan | bench`.

`list` and `show` live here. The other commands belong to the packages `train` and `benchmarks`, which are
imported only when one of them is asked for: the one place where the library reaches up to what stands on it.
"""

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from attnzoo import card, catalog, costs
from attnzoo.errors import unknown
from attnzoo.host_memory import keep_freed

_DESCRIPTION = """\
Attention for JAX that you can change anywhere, and a zoo of attention papers built on it.

commands:
  list        the papers: what is built and what is planned
  show        one paper: idea, equations, costs for your sizes, files, measured claim
  train       train a small model with any mixer
  compare     train several mixers at equal parameters and tabulate them
  generate    continue a prompt with a trained checkpoint
  export      write a trained model as a safetensors file
  claim       run the experiment that checks a paper's central claim
  plan        compile a training step for a TPU pod that is not there
  bench       measure the library against its peers

examples:
  attnzoo list --family projections
  attnzoo show transformer --dim 1024 --num-heads 16 --num-kv-heads 4
  attnzoo train --mixer value_residual
  attnzoo COMMAND --help
"""

_LIST_EXAMPLES = """\
examples:
  attnzoo list
  attnzoo list --status built
  attnzoo list --family cache --json
"""

_SHOW_EXAMPLES = """\
examples:
  attnzoo show transformer
  attnzoo show transformer --dim 4096 --num-heads 32 --num-kv-heads 8 --length 8192
  attnzoo show adaptive_entmax --json
  attnzoo show mas --plot mas.png
"""

# option -> the letter it sets; the rest follows from these (see attnzoo.costs.sizes)
_SIZES = {
    "batch": "B",
    "length": "T",
    "memory-length": "S",
    "num-heads": "N",
    "num-kv-heads": "K",
    "head-dim": "H",
    "value-dim": "Hv",
    "dim": "D",
    "mlp-dim": "F",
    "vocab-size": "V",
    "num-layers": "L",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or 2 when what the user asked for cannot be done.

    Such an error is one line on stderr; with ATTNZOO_TRACEBACK=1 in the environment it is raised instead.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if not args or args[0] in ("-h", "--help"):
            print("usage: attnzoo COMMAND [options]\n\n" + _DESCRIPTION, end="")
            return 0 if args else 2
        if args[0] == "--version":
            from importlib.metadata import version

            print("attnzoo", version("attnzoo"))
            return 0
        if args[0] not in _COMMANDS:
            raise unknown("command", args[0], _COMMANDS)
        keep_freed()
        return _COMMANDS[args[0]](args[1:]) or 0
    except BrokenPipeError:  # `attnzoo list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("ATTNZOO_TRACEBACK"):
            raise
        print(f"attnzoo: {error}", file=sys.stderr)
        return 2


def _parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"attnzoo {command}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _list(argv: Sequence[str]) -> int:
    parser = _parser("list", "The papers of the zoo.", _LIST_EXAMPLES)
    parser.add_argument("--family", metavar="F", help="only this family: " + ", ".join(catalog.families()))
    parser.add_argument("--status", metavar="S", help="only these: " + ", ".join(catalog.STATUSES))
    parser.add_argument("--json", action="store_true", help="as JSON, one object per paper")
    args = parser.parse_args(argv)
    rows = catalog.papers(args.family, args.status)
    if args.json:
        print(json.dumps([card.row_dict(row) for row in rows], indent=1, ensure_ascii=False))
        return 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize  # pipes get whole lines
    key_width = max((len(row.key) for row in rows), default=0)
    family_width = max((len(row.family) for row in rows), default=0)
    for row in rows:
        name = f"{row.key:{key_width}}  {row.family:{family_width}}"
        line = f"{row.number:03d}  {name}  {row.status:7}  {row.what}"
        print(line if len(line) <= width else line[: width - 1] + "…")
    built = sum(row.status == "built" for row in rows)
    print(f"{len(rows)} papers: {built} built, {len(rows) - built} planned")
    return 0


def _show(argv: Sequence[str]) -> int:
    parser = _parser("show", "One paper: its idea, equations, costs, files and measured claim.", _SHOW_EXAMPLES)
    parser.add_argument("key", metavar="KEY", help="a paper's key, as `attnzoo list` prints it")
    for option, letter in _SIZES.items():
        parser.add_argument(f"--{option}", type=int, dest=letter, metavar=letter, help=costs.LETTERS[letter])
    parser.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a size of the paper's own that its formulas use, e.g. R_k=2 (repeatable)",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw the idea, and the costs over T, into this file")
    args = parser.parse_args(argv)
    given = {letter: getattr(args, letter) for letter in _SIZES.values() if getattr(args, letter) is not None}
    values = {**costs.sizes(**given), **dict(_own_size(text) for text in args.size)}
    shown = card.Card.of(args.key, values)
    print(json.dumps(shown.as_dict(), indent=1, ensure_ascii=False) if args.json else shown.as_text())
    if args.plot is not None:
        shown.plot(args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)
    return 0


def _own_size(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), int(value) if value.strip().lstrip("-").isdigit() else float(value)
    except ValueError:
        raise ValueError(f"--size {text!r}: expected NAME=VALUE with a number, e.g. R_k=2") from None


def _delegate(command: str) -> Callable[[Sequence[str]], int | None]:
    """The command as `train.cli.<command>_main`, imported when it runs."""

    def run(argv: Sequence[str]) -> int | None:
        check_not_shadowed("train")
        module = _import("train.cli", command)
        return getattr(module, f"{command}_main")(list(argv))

    return run


def _bench(argv: Sequence[str]) -> int | None:
    folder = catalog.PACKAGE.parent / "benchmarks"
    if not folder.is_dir():
        raise ValueError(
            f"bench: the benchmarks are part of the repository, not of the installed package ({folder} is "
            "missing); clone the repository and install it with pip install -e ."
        )
    suites = sorted(f.stem for f in folder.glob("*.py") if not f.stem.startswith("_"))
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: attnzoo bench SUITE [options]\n\nsuites: " + ", ".join(suites))
        print("\nexamples:\n  attnzoo bench attention --help")
        return 0 if argv else 2
    if argv[0] not in suites:
        raise unknown("benchmark", argv[0], suites)
    sys.path.insert(0, str(folder.parent))  # an installed checkout has it; a plain one may not
    check_not_shadowed("benchmarks")
    return _import(f"benchmarks.{argv[0]}", "bench").main(list(argv[1:]))


def check_not_shadowed(package: str) -> None:
    """Raises ValueError if `import package` would find something else than the package beside attnzoo.

    Happens to users who have a `train.py` of their own on the import path.
    """
    ours = (catalog.PACKAGE.parent / package).resolve()
    if package in sys.modules:
        found = getattr(sys.modules[package], "__file__", None) or next(iter(sys.modules[package].__path__), "")
    else:
        spec = importlib.util.find_spec(package)
        places = list(spec.submodule_search_locations or []) if spec else []
        found = (spec.origin if spec and spec.origin else next(iter(places), "")) if spec else ""
    if not found:
        raise ValueError(f"the package {package!r} that comes with attnzoo is missing; it belongs at {ours}")
    if ours not in (Path(found).resolve(), Path(found).resolve().parent):
        raise ValueError(
            f"your own {found} hides the package {package!r} that comes with attnzoo ({ours}): "
            "run from another folder, rename yours, or take its folder off PYTHONPATH"
        )


def _import(module: str, command: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = (error.name or "").partition(".")[0]
        if top in ("attnzoo", "train", "benchmarks", "pallas_kernels"):
            raise  # a fault of ours, not an extra that is not installed
        raise ModuleNotFoundError(
            f"{command} needs the module {error.name!r}, which is not installed: pip install 'attnzoo[train]'"
        ) from error


_COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "list": _list,
    "show": _show,
    "bench": _bench,
    **{name: _delegate(name) for name in ("train", "compare", "generate", "export", "claim", "plan")},
}


if __name__ == "__main__":
    sys.exit(main())

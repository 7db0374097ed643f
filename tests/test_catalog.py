"""The catalog tells the truth: 156 rows, and what they say of the exhibits is so."""

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from attnzoo import catalog, costs
from attnzoo.paper import Paper

ROOT = Path(__file__).resolve().parents[1]
BUILT = catalog.papers(status="built")
PLANNED = next(iter(catalog.papers(status="planned")))


def lies(row: catalog.Row, module, root: Path) -> list[str]:
    """What is untrue about a built row, given its exhibit module; [] if all is well."""
    card = module.PAPER
    found = [
        f"{name}: exhibit says {getattr(card, name)!r}, row says {getattr(row, name)!r}"
        for name in ("number", "key", "title", "family")
        if getattr(card, name) != getattr(row, name)
    ]
    if not inspect.getdoc(module):
        found.append("the exhibit has no docstring")
    if not card.builds:
        found.append("builds nothing")
    for entry in card.builds:
        try:
            built = catalog.build(entry)
        except (ImportError, AttributeError) as error:
            found.append(f"builds {entry!r}, which does not resolve: {error}")
            continue
        if not inspect.getdoc(built):
            found.append(f"builds {entry!r}, which has no docstring")
    if card.mixer is not None and card.mixer not in card.builds:
        found.append(f"mixer {card.mixer!r} is not among what it builds")
    for what, formula in card.costs.items():
        try:
            known = {**costs.sizes(), **dict.fromkeys(costs.letters(formula), 2)}
            costs.evaluate(formula, known)
        except ValueError as error:
            found.append(f"cost {what!r}: {error}")
    needed = (f"tests/zoo/{row.family}/test_{row.key}.py", f"train/claims/{row.key}.py")
    found += [f"{path} is missing" for path in needed if not (root / path).is_file()]
    result = root / f"train/claims/results/{row.key}.json"
    if not result.is_file():
        found.append(f"the claim has no recorded result {result.relative_to(root)}")
    elif not isinstance(json.loads(result.read_text(encoding="utf-8")), dict):
        found.append(f"{result.relative_to(root)} is not a JSON object")
    return found


def test_there_are_156():
    rows = catalog.papers()
    assert [row.number for row in rows] == list(range(1, 157))
    assert len({row.key for row in rows}) == len({row.title for row in rows}) == 156
    for row in rows:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", row.key), row
        assert re.fullmatch(r"[a-z]+", row.family), row
        assert re.fullmatch(r"(\d{4}\.\d{5})?", row.arxiv), row
        assert 2014 < row.year < 2030, row
        assert re.fullmatch(r"[A-Z].*[^.]\.", row.what), row
        assert ". " not in row.what, f"one sentence: {row.what}"
        assert len(row.what) <= 130, row
        assert row.status in catalog.STATUSES


def test_the_foundation_is_listed():
    for number, key, family in [
        (41, "transformer", "projections"),
        (76, "value_residual", "projections"),
        (129, "adaptive_entmax", "normalizers"),
        (34, "mas", "patterns"),
    ]:
        row = catalog.paper(key)
        assert (row.number, row.family, row.status) == (number, family, "built")


def test_every_exhibit_file_has_a_row():
    zoo = ROOT / "attnzoo" / "zoo"
    files = {f.relative_to(zoo).as_posix() for f in zoo.glob("*/*.py") if not f.stem.startswith("_")}
    assert files == {f"{row.family}/{row.key}.py" for row in BUILT}
    stray = [f.name for f in zoo.glob("*.py") if f.name != "__init__.py"]
    assert not stray, f"exhibits stand in a family's folder: {stray}"


@pytest.mark.parametrize("row", BUILT, ids=lambda row: row.key)
def test_row_is_true(row):
    catalog.exhibit(row.key)
    assert lies(row, sys.modules[row.module], ROOT) == []


def documented():
    """Something built, with a docstring."""


@pytest.fixture
def fake(tmp_path):
    """A row, its exhibit and its files, all in order."""
    row = catalog.paper("tpa")
    for name in ("tests/zoo/projections/test_tpa.py", "train/claims/tpa.py", "train/claims/results/tpa.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    card = Paper(row.number, row.key, row.title, row.family, builds=(documented,), costs={"cache": "R_k * T"})
    return row, SimpleNamespace(__doc__="Doc.", PAPER=card), tmp_path


def test_a_true_row_passes(fake):
    assert lies(*fake) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"number": 43}, "number: exhibit says 43"),
        ({"title": "Another"}, "title"),
        ({"family": "cache"}, "family"),
        ({"builds": ()}, "builds nothing"),
        ({"builds": ("attnzoo.errors:missing",)}, "does not resolve"),
        ({"builds": ("attnzoo.missing:thing",)}, "does not resolve"),
        ({"builds": (lambda: None,)}, "no docstring"),
        ({"mixer": int}, "not among what it builds"),
        ({"costs": {"cache": "T +"}}, "cost 'cache'"),
    ],
)
def test_a_row_that_lies_fails(fake, change, words):
    row, module, root = fake
    module.PAPER = dataclasses.replace(module.PAPER, **change)
    assert any(words in lie for lie in lies(row, module, root))


@pytest.mark.parametrize("name", ["tests/zoo/projections/test_tpa.py", "train/claims/tpa.py", "train/claims/results/tpa.json"])
def test_a_missing_file_fails(fake, name):
    row, module, root = fake
    (root / name).unlink()
    assert any(name in lie for lie in lies(row, module, root))


def test_an_exhibit_that_contradicts_its_row_is_refused(monkeypatch):
    row = catalog.paper("tpa")
    card = Paper(row.number, row.key, "Another Title", row.family)
    monkeypatch.setattr(catalog.Row, "status", "built")
    monkeypatch.setitem(sys.modules, row.module, SimpleNamespace(PAPER=card))
    with pytest.raises(ValueError, match=r"PAPER\.title is 'Another Title'.*Tensor Product"):
        catalog.exhibit("tpa")


def test_selection():
    cache = catalog.papers(family="cache")
    assert {row.family for row in cache} == {"cache"}
    assert len(cache) + sum(len(catalog.papers(f)) for f in catalog.families() if f != "cache") == 156
    assert len(catalog.papers(status="built")) + len(catalog.papers(status="planned")) == 156


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: catalog.paper("transfromer"), "unknown paper.*'transformer'"),
        (lambda: catalog.papers(family="caches"), "unknown family.*'cache'"),
        (lambda: catalog.papers(status="build"), "unknown status.*'built'"),
        (
            lambda: catalog.exhibit(PLANNED.key),
            f"paper {PLANNED.number} '{PLANNED.key}' is planned.*transformer",
        ),
        (lambda: catalog.mixer("transfromer"), "unknown mixer.*'transformer'"),
        (lambda: catalog.mixer(PLANNED.key), f"paper {PLANNED.number} is planned.*transformer"),
        (lambda: catalog.mixer("mas"), "not a drop-in mixer.*transformer"),
    ],
)
def test_wrong_names(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_mixers():
    for key, cls in catalog.mixers().items():
        assert catalog.mixer(key) is cls
    assert {"transformer", "value_residual"} <= catalog.mixers().keys()


@pytest.mark.parametrize("change", [{"number": 0}, {"number": 157}, {"key": "two words"}, {"family": "a/b"}])
def test_paper_checks_its_fields(change):
    fields = {"number": 1, "key": "a", "title": "t", "family": "cache", **change}
    with pytest.raises(ValueError, match=next(iter(change))):
        Paper(**fields)

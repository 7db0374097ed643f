"""Unknown names are answered with the nearest known ones."""

import pytest

from attnzoo.errors import nearest, unknown


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("transfromer", "transformer"),
        ("TPA", "tpa"),
        ("Causal", "causal"),
        ("entmax", "adaptive_entmax"),
        ("value_residual_learning", "value_residual"),
    ],
)
def test_nearest(name, best):
    known = ["adaptive_entmax", "causal", "transformer", "tpa", "value_residual", "miras"]
    assert nearest(name, known)[0] == best


def test_nothing_is_near():
    assert nearest("zzzz", ["transformer", "tpa"]) == []
    assert nearest("", ["transformer"]) == []


def test_few_names_are_listed():
    error = unknown("mixer", "tqa", ["tpa", "mas"])
    assert isinstance(error, ValueError)
    assert str(error) == "unknown mixer 'tqa': did you mean 'tpa'? Known: mas, tpa."


def test_many_names_are_counted():
    assert str(unknown("key", "zz", (f"name_{i}" for i in range(30)))).endswith("none of the 30 known names is near.")
    assert "Known" not in str(unknown("key", "name_1", (f"name_{i}" for i in range(30))))


def test_no_names():
    assert str(unknown("suite", "x", [])) == "unknown suite 'x': there is no suite to choose from."

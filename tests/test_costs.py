"""Cost formulas: what they mean, and what they refuse."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from attnzoo import costs


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("2 * K * H", 256),
        ("(R_k + R_v) * (N + H)", (2 + 3) * (8 + 64)),
        ("T ** 2 / 3", 100**2 / 3),
        ("T // 3 % 7 - -1", 100 // 3 % 7 + 1),
        ("ceil(T / 64) * 64", 128),
        ("min(T, 32) + max(N, K, 3) + floor(H / 3)", 32 + 8 + 21),
        ("sqrt(H) * log2(N)", 24),
        (" 7 ", 7),
    ],
)
def test_value(formula, expected):
    value = costs.evaluate(formula, {"K": 2, "H": 64, "N": 8, "T": 100, "R_k": 2, "R_v": 3})
    assert value == pytest.approx(expected)
    assert isinstance(value, int) == (expected == int(expected))


def test_letters_are_names_but_not_functions():
    assert costs.letters("ceil(T / R) * max(N, Hv)") == {"T", "R", "N", "Hv"}
    assert costs.letters("max * max(1, 2)") == {"max"}


@pytest.mark.parametrize(
    "formula",
    [
        "__import__('os')",
        "T.real",
        "T[0]",
        "[T]",
        "lambda: 1",
        "T if N else K",
        "T < N",
        "'text'",
        "True",
        "1j",
        "T = 2",
        "2 *",
        "",
        "abs(T)",
        "max()",
        "ceil(1, 2)",
        "max(*T)",
        "min(T, key=N)",
        "~T",
        "(T := 3)",
        "T @ N",
    ],
)
def test_refused(formula):
    with pytest.raises(ValueError, match="formula"):
        costs.evaluate(formula, {"T": 1, "N": 2, "K": 3})


@pytest.mark.parametrize(
    "formula",
    ["1 / (N - N)", "9 ** 9 ** 9", "sqrt(0 - N)", "log2(0)", "(0 - 1) ** 0.5", "1e308 * 10", "7 % 0"],
)
def test_no_result(formula):
    with pytest.raises(ValueError, match="formula"):
        costs.evaluate(formula, {"N": 2})


def test_missing_letters_are_named():
    with pytest.raises(ValueError, match=r"'R \* S \* T': no value for R, S"):
        costs.evaluate("R * S * T", {"T": 1})


def test_sizes_follow_from_each_other():
    heads = {"N": 4, "K": 4, "G": 1, "H": 64, "Hv": 64}
    widths = {"D": 256, "F": 1024, "V": 32_000, "L": 6}
    assert costs.sizes(D=256, N=4, T=10) == {"B": 1, "T": 10, "S": 10} | heads | widths
    values = costs.sizes(N=8, K=2, H=16, S=5, Hv=3, F=7)
    assert [values[name] for name in ("G", "H", "Hv", "S", "F")] == [4, 16, 3, 5, 7]
    assert values.keys() == costs.LETTERS.keys()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"D": 100, "N": 7}, "D=100.*N=7"),
        ({"N": 8, "K": 3}, "K=3.*N=8"),
        ({"T": 0}, r"T \(queries.*positive integer, got 0"),
        ({"N": 0}, "N .*positive"),
        ({"H": -1}, "H .*positive"),
        ({"L": 2.5}, "L .*2.5"),
        ({"B": True}, "B .*True"),
    ],
)
def test_bad_sizes(given, words):
    with pytest.raises(ValueError, match=words):
        costs.sizes(**given)


numbers = st.integers(0, 9).map(str)
formulas = st.recursive(
    numbers | st.sampled_from(["T", "N"]),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda abc: f"({' '.join(abc)})"),
    max_leaves=12,
)


@given(formulas, st.integers(1, 99), st.integers(1, 99))
def test_agrees_with_python(formula, t, n):
    assert costs.evaluate(formula, {"T": t, "N": n}) == eval(formula, {"T": t, "N": n})

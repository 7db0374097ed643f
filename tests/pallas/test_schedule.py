"""Reading the compiler's table of unit use."""

import argparse

from benchmarks.kernels import role, table
from pallas_kernels.schedule import parse

TEXT = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    2     2     4     2     1     3     3     2     2     2
== UTILIZATION:
    0     0     1     0     0     1     0     0     0     1
    2     1     4     1     1     0     1     1     0     0
    0     2     2     0     1     3     0     0     2     0
    1     0     0     0     0     0     0     0     0     0
    0     0     0     0     0     0     0     2     0     0
"""


def test_the_hot_stretch_is_between_the_matrix_products():
    found = parse("attnzoo_flash_forward", TEXT, vmem=2048)
    assert (found.bundles, found.hot, found.matmuls, found.bound) == (5, 3, 3, 2)
    assert found.use == {"MXU": 0.5, "XLU": 0.5, "VALU": 0.5, "EUP": 0.667, "VLOAD": 0.333, "VSTORE": 0.167}
    assert (found.spills, found.vmem) == (3, 2048)


def test_a_program_without_products_is_none():
    head, _, rows = TEXT.partition("== UTILIZATION:\n")
    assert parse("iota", head + "== UTILIZATION:\n" + rows.splitlines()[0] + "\n") is None


def test_the_table_puts_like_beside_like():
    row = {"bound": 1, "use": dict.fromkeys(("MXU", "VALU", "EUP", "XLU"), 0.5), "spills": 0, "vmem": 1024}
    kernels = ("splash_mha_dkv", "attnzoo_flash_dkv", "attnzoo_flash_forward", "splash_mha_dq")
    rows = [{"generation": "v5e", "problem": k[:6], "pass": role(k), "hot": n, **row} for n, k in enumerate(kernels)]
    lines = table(rows, argparse.Namespace(block_q=512, block_k=512, width=128)).splitlines()[4:]
    assert [line.split("|")[3].strip() for line in lines] == ["forward", "dq", "dk, dv", "dk, dv"]
    assert [line.split("|")[4].strip() for line in lines] == ["2", "3", "1", "0"]

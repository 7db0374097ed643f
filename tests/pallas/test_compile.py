"""The fused TPU kernels through the real TPU compiler, for devices that are only described. Simulation proves no lowering."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from attnzoo.core import masks, scores, weights
from attnzoo.core.attention import attention
from pallas_kernels import schedule

def shapes(t, n, k, h, hv=None, dtype="bfloat16", b=1, s=None):
    of = lambda *x: jax.ShapeDtypeStruct(x, dtype)
    return [of(b, t, n, h), of(b, s or t, k, h), of(b, s or t, k, hv or h)]

def both(**arguments):
    def loss(q, k, v, *captured):
        made = [name for name in arguments if name in ("score", "mask") and captured]
        given = arguments | {name: arguments[name](*captured) for name in made}
        return (attention(q, k, v, backend="pallas", **given).astype(jnp.float32) ** 2).sum()
    return loss

def forward(**arguments):
    return lambda q, k, v: attention(q, k, v, backend="pallas", **arguments)

TABLE = jax.ShapeDtypeStruct((4, 2048), "float32")
causal = jax.grad(both(mask=masks.Causal()), (0, 1, 2))
CASES = {
    **{f"head width {h}": (causal, shapes(1024, 4, 2, h)) for h in (64, 80, 96, 128, 192, 256)},
    "float32, other value width": (causal, shapes(640, 4, 2, 128, 64, "float32", s=1000)),
    "128k tokens": (causal, shapes(2**17, 8, 2, 128)),
    "256k tokens, in two turns": (causal, shapes(2**18, 8, 2, 128)),
    "score by distance, query and key": (
        jax.grad(both(score=lambda t: lambda s, b, h, q, k: s + t[h, q - k + 1024] + t[h, q] * t[h, k]), (0, 1, 2, 3)),
        [*shapes(1024, 4, 2, 128), TABLE],
    ),
    "soft cap, dropout": (
        jax.grad(both(score=scores.SoftCap(30.0), dropout_rate=0.1, dropout_rng=jax.random.key(0)), (0, 1, 2)),
        shapes(1024, 4, 4, 128),
    ),
    "sigmoid weights": (jax.grad(both(weights=weights.Sigmoid(), mask=masks.Causal()), (0, 1, 2)), shapes(1024, 4, 4, 128)),
    "signs and remainders": (
        jax.grad(both(score=lambda s, b, h, q, k: s * jnp.sign(s) + jnp.sign(q - k) * (s % 2.0)), (0, 1, 2)),
        shapes(512, 2, 2, 128),
    ),
    "an array of cells": (
        jax.grad(both(mask=lambda m: m > 0), (0, 1, 2)),
        [*shapes(1024, 4, 4, 128), jax.ShapeDtypeStruct((1, 1, 1024, 1024), "float32")],
    ),
    "blocks chosen while running": (
        jax.grad(both(mask=lambda t: masks.Blocks(t > 0, 512, 512) & masks.Causal()), (0, 1, 2)),
        [*shapes(4096, 4, 2, 128), jax.ShapeDtypeStruct((1, 4, 8, 8), "float32")],
    ),
    "positions, segments": (
        jax.grad(
            both(mask=lambda t: masks.Causal() & masks.Segments((t[0] > 0).astype("int32")), q_positions=np.arange(2048)),
            (0, 1, 2),
        ),
        [*shapes(2048, 4, 2, 128), TABLE],
    ),
}

generation, *names = sys.argv[1:]
for name in names or CASES:
    f, arguments = CASES[name]
    text = schedule.compiled(generation, f, arguments).as_text()
    found = [kernel for kernel in ("forward", "backward", "dq", "dkv") if f"attnzoo_flash_{kernel}" in text]
    print(json.dumps([name, found]), flush=True)
"""


def run(program: str, *arguments: str) -> list:
    """The lines a program prints, each JSON; a process of its own holds the compiler."""
    pytest.importorskip("libtpu")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    root = Path(__file__).parents[2]
    env["PYTHONPATH"] = str(root)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=root, env=env, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_every_feature_compiles(generation):
    lines = run(PROGRAM, generation)
    assert len(lines) >= 14
    expected = {
        "128k tokens": ["forward", "dq", "dkv"],  # no room for dq on the chip
        "256k tokens, in two turns": ["forward", "backward", "dq", "dkv"],  # the second is short
        "score by distance, query and key": ["forward", "dq", "dkv"],  # gradients of a walk by rows
    }
    for name, kernels in lines:
        assert kernels == expected.get(name, ["forward", "backward"]), name


@pytest.mark.parametrize("generation", ["v4", "v5p", "7x"])
def test_other_generations_compile(generation):
    names = [*(f"head width {h}" for h in (64, 80, 96, 128, 192, 256)), "128k tokens", "soft cap, dropout"]
    if generation != "v4":  # refused there
        names.append("score by distance, query and key")
    assert [name for name, _ in run(PROGRAM, generation, *names)] == names


PAGES = """
import json, sys
import jax, jax.numpy as jnp
from attnzoo.core import masks
from attnzoo.core.attention import attention
from pallas_kernels import schedule

def decode(q, k, v, table, seen):
    slots = jnp.arange(table.shape[1] * k.shape[1])
    where = {"q_positions": seen - 1, "kv_positions": jnp.where(slots < seen, slots, -1), "mask": masks.Causal()}
    return attention(q, k, v, pages=table, backend="pallas", **where)

of = jax.ShapeDtypeStruct
pool = of((300, 256, 2, 128), "bfloat16")
arguments = [of((4, 1, 8, 128), "bfloat16"), pool, pool, of((4, 64), "int32"), of((4, 1), "int32")]
program = schedule.compiled(sys.argv[1], decode, arguments)
memory = program.memory_analysis()
print(json.dumps([memory.argument_size_in_bytes, memory.temp_size_in_bytes]))
"""


def test_pages_are_read_where_they_lie():
    ((arguments, temporaries),) = run(PAGES, "v5e")
    assert arguments > 2 * 300 * 256 * 2 * 128 * 2
    assert temporaries < arguments / 50


NARROW = """
import json, sys
import jax, jax.numpy as jnp
from attnzoo.core import masks
from attnzoo.core.attention import attention
from attnzoo.core.entmax import Entmax
from attnzoo.core.neighborhood import neighborhood_attention
from attnzoo.core.quantized import Quantized
from pallas_kernels import schedule

generation = sys.argv[1]
of = jax.ShapeDtypeStruct
S = 32768

def latents(q, cache):  # in a cache's order; widths that are no multiples of 128 lie packed between programs, and are copied
    c = jnp.swapaxes(cache, 1, 2)
    return attention(q, c, c, backend="pallas", mask=masks.Causal(S - 1))

def narrow(q, k, k_scale, v, v_scale):
    return attention(q, Quantized(k, k_scale), Quantized(v, v_scale), backend="pallas", mask=masks.Causal(S - 1))

def decode(dtype):
    return [of((4, 1, 8, 128), "bfloat16"), of((4, S, 2, 128), dtype), of((4, 1, 2, 128), "float32"), of((4, S, 2, 128), dtype),
            of((4, S, 2, 1), "float32")]

def entmax(q, k, v):
    return (attention(q, k, v, backend="pallas", weights=Entmax(1.5), mask=masks.Causal()).astype(jnp.float32) ** 2).sum()

def boxes(q, k, v):
    return neighborhood_attention(q, k, v, masks.Neighborhood((64, 64), 7), box=(8, 32), backend="pallas")

train = [of((1, 1024, 4, 128), "bfloat16"), *(of((1, 1024, 2, 128), "bfloat16"),) * 2]
grid = [of((1, 4096, 4, 128), "bfloat16")] * 3
CASES = {
    "latents": (latents, [of((4, 1, 16, 640), "bfloat16"), of((4, 1, S, 640), "bfloat16")]),
    "int8": (narrow, decode("int8")),
    "float8": (narrow, decode("float8_e4m3fn")),
    "entmax": (jax.grad(entmax, (0, 1, 2)), train),
    "boxes": (boxes, grid),
}
for name in sys.argv[2:] or CASES:
    f, arguments = CASES[name]
    memory = schedule.compiled(generation, f, arguments).memory_analysis()
    print(json.dumps([name, memory.argument_size_in_bytes, memory.temp_size_in_bytes]), flush=True)
"""


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_caches_and_searches_compile(generation):
    lines = run(NARROW, generation)
    assert [name for name, *_ in lines] == ["latents", "int8", "float8", "entmax", "boxes"]
    for _, arguments, temporaries in lines[:3]:  # what a step of decoding reads is not copied
        assert temporaries < arguments / 50


THRESHOLDS = """
import json, sys
import jax, jax.numpy as jnp
from attnzoo.core import masks, scores
from attnzoo.core.attention import attention
from attnzoo.core.entmax import Entmax
from pallas_kernels import schedule
from pallas_kernels.tpu.choice import held_bytes
from pallas_kernels.tpu.launch import compiling_for

generation = sys.argv[1]
of = jax.ShapeDtypeStruct

def shapes(t, s=None, dtype="bfloat16", heads=4):
    return [of((1, t, heads, 128), dtype), *(of((1, s or t, 2, 128), dtype),) * 2, of((heads,), "float32"),
            of((1, 4, 8, 8), "float32")]

def entmax(fixed=None, **arguments):
    def run(q, k, v, alpha, table):
        given = {name: f(table) if name == "mask" else f for name, f in arguments.items()}
        return attention(q, k, v, backend="pallas", weights=Entmax(alpha if fixed is None else fixed), **given)
    return run

with compiling_for(generation):
    longest = held_bytes() // (4 * 512)  # of which a row of 512 queries finds room
CASES = {
    "alpha per head, causal": (entmax(mask=lambda _: masks.Causal()), shapes(2048)),
    "alpha 1.5, odd lengths, float32": (entmax(1.5), shapes(640, 1000, "float32")),
    "alpha 2, score, tiles chosen while running": (
        entmax(2, mask=lambda t: masks.Blocks(t > 0, 512, 512), score=scores.SoftCap(30.0) >> scores.ALiBi.for_heads(4)),
        shapes(4096),
    ),
    "as long as there is room": (entmax(1.5), shapes(longest)),
    "longer, fewer queries at a time": (entmax(), shapes(4 * longest)),
    "decoding": (entmax(), shapes(1, longest, heads=8)),
    "too long": (entmax(1.5), shapes(4 * longest + 512)),
}
for name, (f, arguments) in CASES.items():
    text = schedule.compiled(generation, f, arguments).as_text()
    print(json.dumps([name, "attnzoo_thresholds" in text]), flush=True)
"""


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_searches_on_the_chip_compile(generation):
    lines = run(THRESHOLDS, generation)
    assert len(lines) == 7
    for name, held in lines:
        assert held == (name != "too long"), name


SHARDED = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from attnzoo.core import masks
from attnzoo.core.attention import attention
from attnzoo.core.recurrence import gated_linear_attention
from attnzoo.core.sharding import attention_axes
from pallas_kernels import schedule
from pallas_kernels.tpu.launch import compiling_for

generation, topology, data, tensor = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
devices = np.array(schedule.devices(generation, topology)).reshape(data, tensor)
mesh = Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
where = NamedSharding(mesh, P("data", None, "tensor"))
q, k, v = (jax.ShapeDtypeStruct((data, 2048, n * tensor, 128), "bfloat16", sharding=where) for n in (2, 1, 1))

def attended(q, k, v):
    return (attention(q, k, v, mask=masks.Causal(), backend="pallas").astype(jnp.float32) ** 2).sum()

def carried(q, k, v):
    return (gated_linear_attention(q, q, q, backend="tpu")[0].astype(jnp.float32) ** 2).sum() + k.sum() + v.sum()

for kernel, loss in (("attnzoo_flash_backward", attended), ("attnzoo_scan_backward", carried)):
    with jax.set_mesh(mesh), attention_axes(batch="data", heads="tensor"), compiling_for(generation):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("tpu",)).compile().as_text()
    print(json.dumps([kernel, [kernel in text, "all-gather" in text, "all-to-all" in text]]), flush=True)
"""


@pytest.mark.parametrize(
    ("generation", "topology", "data", "tensor"),
    [("v5e", "v5e:2x2", 2, 2), ("v6e", "v6e:2x2", 1, 4), ("v5e", "v5e:16x16", 32, 8)],
)
def test_divided_over_a_mesh(generation, topology, data, tensor):
    """Kernels run on each device's rows and heads, and no keys or values move."""
    lines = run(SHARDED, generation, topology, str(data), str(tensor))
    assert len(lines) == 2  # attention, and a recurrence
    for name, (kernels, gathered, exchanged) in lines:
        assert kernels, name
        assert not gathered, name
        assert not exchanged, name


RING = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from attnzoo.core import masks, scores
from attnzoo.core.attention import attention, explain
from attnzoo.core.sharding import attention_axes
from pallas_kernels import schedule
from pallas_kernels.tpu.launch import compiling_for

mesh = Mesh(np.array(schedule.devices("v5e", "v5e:2x4")), ("context",), axis_types=(AxisType.Auto,))
where = NamedSharding(mesh, P(None, "context"))
CASES = {
    "ring": ({}, dict(mask=masks.Causal()), 4, 2),
    "window, score, dropout": (
        {}, dict(mask=masks.Causal() & masks.SlidingWindow(2048), score=scores.ALiBi.for_heads(4) >> scores.SoftCap(30.0),
                 dropout_rate=0.1, dropout_rng=jax.random.key(0)), 4, 2),
    "all_to_all": ({"exchange": "all_to_all"}, dict(mask=masks.Causal()), 16, 8),
}
for name, (axes, arguments, heads, kv_heads) in CASES.items():
    shapes = [jax.ShapeDtypeStruct((1, 16384, n, 128), "bfloat16", sharding=where) for n in (heads, kv_heads, kv_heads)]

    def loss(q, k, v):
        return (attention(q, k, v, backend="pallas", **arguments).astype(jnp.float32) ** 2).sum()

    with jax.set_mesh(mesh), attention_axes(context="context", **axes), compiling_for("v5e"):
        traced = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=(where,) * 3).trace(*shapes)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    kernels = [kernel for kernel in ("forward", "backward", "dq", "dkv") if f"attnzoo_flash_{kernel}" in text]
    moves = [kind for kind in ("collective-permute", "all-gather", "all-to-all") if re.search(rf" {kind}(-start)?\\(", text)]
    print(json.dumps([name, kernels, moves]), flush=True)
"""


def test_tokens_divided_over_a_mesh():
    """Context parallel on 2×4 chips: the same kernels, and keys and values move from neighbour to neighbour alone."""
    lines = run(RING)
    assert [name for name, *_ in lines] == ["ring", "window, score, dropout", "all_to_all"]
    for name, kernels, moves in lines:
        assert kernels == ["forward", "backward"], name
        assert moves == (["all-to-all"] if name == "all_to_all" else ["collective-permute"]), name


LISTED = """
import json, sys
import jax, jax.numpy as jnp
from attnzoo.core.gathered import gathered_attention
from pallas_kernels import schedule

def shapes(t, s, n, k, h, hv, lists, blocks, most, dtype="bfloat16", b=1):
    of = lambda *x: jax.ShapeDtypeStruct(x, dtype)
    return [of(b, t, n, h), of(b, s, k, h), of(b, s, k, hv), jax.ShapeDtypeStruct((b, lists, blocks, most), "int32")]

def forward(q, k, v, positions):
    return gathered_attention(q, k, v, positions, backend="pallas", return_lse=True)

def gradient(q, k, v, positions):
    return jax.grad(lambda *x: (gathered_attention(
        *x, positions, backend="pallas", block_q=2048, q_positions=jnp.arange(q.shape[1])).astype(jnp.float32) ** 2).sum(),
        (0, 1, 2))(q, k, v)

def decode(q, k, v, positions):  # k, v: a cache [B, K, S, H]
    return gathered_attention(q, jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), positions, backend="pallas")

cache = jax.ShapeDtypeStruct((4, 2, 32768, 128), "bfloat16")
CASES = {
    "stripes": (forward, shapes(16384, 16384, 8, 2, 128, 128, 8, 8, 4096)),
    "stripes, gradient": (gradient, shapes(4000, 4000, 4, 2, 128, 128, 4, 2, 1000)),
    "float32, padded widths, gradient": (gradient, shapes(4000, 4000, 4, 2, 80, 64, 2, 2, 500, "float32")),
    "wide heads": (forward, shapes(2048, 8192, 4, 2, 256, 256, 4, 1, 65536, "float32")),
    "decoding": (decode, [jax.ShapeDtypeStruct((4, 1, 8, 128), "bfloat16"), cache, cache,
                          jax.ShapeDtypeStruct((4, 2, 1, 2048), "int32")]),
}
generation, *names = sys.argv[1:]
for name in names or CASES:
    f, arguments = CASES[name]
    program = schedule.compiled(generation, f, arguments)
    text, memory = program.as_text(), program.memory_analysis()
    kernels = [kernel for kernel in ("forward", "dq") if f"attnzoo_gather_{kernel}" in text]
    print(json.dumps([name, kernels, memory.argument_size_in_bytes, memory.temp_size_in_bytes]), flush=True)
"""


@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e", "7x"])
def test_listed_keys_compile(generation):
    """And a cache is read where it lies: decoding makes no copy of it."""
    found = {name: rest for name, *rest in run(LISTED, generation)}
    assert len(found) == 5
    for name, (kernels, arguments, temporaries) in found.items():
        assert kernels == (["forward", "dq"] if "gradient" in name else ["forward"]), name
        if name == "decoding":
            assert temporaries < arguments / 50

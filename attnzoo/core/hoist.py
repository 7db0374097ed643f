"""Masks and scores as a fused kernel wants them: elementwise functions of a tile, whose arrays are cut like the logits.

A kernel cannot look an array up by an index it computes. But most look-ups in a mask or a score use the query alone
(``segment[b, q]``), the key alone, or their distance (``table[h, q - k]``). Such values are found in the traced function,
computed outside the kernel for all queries, keys or distances ("hoisted"), and handed to the kernel as operands; what
remains inside is elementwise. Since hoisting is ordinary JAX, gradients flow through it to the captured arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array

from attnzoo.core.cells import Bound, Cells, Geometry, Operand

#: Primitives that run inside a kernel on floats, integers and bools, elementwise.
INSIDE = frozenset({
    "abs", "add", "and", "ceil", "clamp", "convert_element_type", "copy", "cos", "eq", "exp", "exp2", "floor", "ge", "gt",
    "integer_pow", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rsqrt",
    "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sqrt", "square", "sub",
    "tanh", "xor",
})  # fmt: skip
_RESHAPES = frozenset(("broadcast_in_dim", "reshape", "squeeze", "expand_dims"))
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}
_AXES = ("b", "h", "t", "s")


class NotElementwise(TypeError):
    """A mask or score needs more in a kernel than elementwise arithmetic."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Node:
    """A value of the traced function: a leaf with a name, or output number ``index`` of a primitive."""

    deps: frozenset[str]
    aval: Any
    name: Any = None  # of leaves: "x", "b", "h", "t", "s", ("part", i), ("whole", i), or a Literal's value
    eqn: Any = None
    inputs: tuple[_Node, ...] = ()
    index: int = 0

    @property
    def single(self) -> bool:
        return self.aval.size == 1

    @property
    def light(self) -> bool:
        """Whether a kernel can compute it, given its inputs."""
        if self.eqn is None:
            return self.single and not (isinstance(self.name, tuple) and isinstance(self.name[1], jax.core.Tracer))
        if not self.single or not all(n.single for n in self.inputs):
            return False
        name = self.eqn.primitive.name
        if name == "div" or name == "rem":  # whole numbers: not without asking for a device
            return jnp.issubdtype(self.aval.dtype, jnp.floating)
        return name in INSIDE or name in _RESHAPES


def hoist(bound: Bound, g: Geometry, what: str, *, score: bool = False) -> Bound:
    """``bound`` without operands of kind "whole", and with an elementwise function.

    The new ``apply`` takes ``(b, h, t, s, *parts)`` for masks and ``(x, b, h, t, s, *parts)`` for scores: values that
    broadcast against each other, with two axes or none. Positions have become operands.

    Raises NotElementwise, naming the primitive, where something depends on query and key and is not elementwise.
    """
    operands = list(bound.operands)
    if score and any(op.kind == "blocks" for op in operands):
        raise NotElementwise("the score carries an array by blocks, which only masks may; give it by query and key")
    count = len(operands)
    if g.q_positions is not None:
        operands.append(Operand(jnp.asarray(g.q_positions)[:, None, :, None], "aligned"))
    if g.kv_positions is not None:
        k = jnp.asarray(g.kv_positions)
        k = jnp.repeat(k, g.heads // g.kv_heads, axis=1) if k.shape[1] > 1 else k
        operands.append(Operand(k[:, :, None, :], "aligned"))

    def scalar(x: Any, b: Any, h: Any, t: Any, s: Any, *parts: Any) -> Any:
        extra = list(parts[count:])
        q = extra.pop(0) if g.q_positions is not None else t
        k = extra.pop(0) if g.kv_positions is not None else s
        cells = Cells(b, h, t, s, q, k)
        out = bound.apply(x, cells, *parts[:count]) if score else bound.apply(cells, *parts[:count])
        return jnp.asarray(out).reshape(())

    def shape(op: Operand) -> jax.ShapeDtypeStruct:
        whole = op.kind == "whole"
        return jax.ShapeDtypeStruct(jnp.shape(op.x) if whole else (), jnp.result_type(op.x))

    index = jax.ShapeDtypeStruct((), "int32")
    x = jax.ShapeDtypeStruct((), "float32")
    closed = jax.make_jaxpr(scalar)(x, *(index,) * 4, *map(shape, operands))
    leaves = [_Node(frozenset("xts"), x, "x"), *(_Node(frozenset(a), index, a) for a in _AXES)]
    for i, op in enumerate(operands):
        name = ("whole" if op.kind == "whole" else "part", i)
        leaves.append(_Node(_deps_of(op), shape(op), name))
    (out,) = _trace(closed, leaves)
    borders: list[_Node] = []
    _choose_borders(out, borders, what)
    hoisted = [_compute(node, operands, g) for node in borders]
    kept = [i for i in _parts_used(out, borders) if i is not None]
    place = {i: n for n, i in enumerate(kept)}
    at_border = {id(node): len(kept) + n for n, node in enumerate(borders)}

    def apply(*arguments: Any) -> Array:
        x, (b, h, t, s, *parts) = (arguments[0], arguments[1:]) if score else (None, arguments)
        return _evaluate(out, {"x": x, "b": b, "h": h, "t": t, "s": s}, parts, place, at_border)

    return Bound((*(operands[i] for i in kept), *hoisted), apply, bound.ahead, bound.behind)


def outside(f: Callable[..., Any], count: int = 1) -> str | None:
    """The first primitive of an elementwise ``f`` of ``count`` arrays that does not run inside a kernel (None: all do)."""
    x = jax.ShapeDtypeStruct((), "float32")
    (out,) = _trace(jax.make_jaxpr(f)(*(x,) * count), [_Node(frozenset("xts"), x, "x")] * count)
    stack = [out]
    while stack:
        node = stack.pop()
        if not node.light:
            return "an array" if node.eqn is None else node.eqn.primitive.name
        stack.extend(node.inputs)
    return None


def _deps_of(op: Operand) -> frozenset[str]:
    if op.kind == "aligned":
        return frozenset(a for a, n in zip(_AXES, op.x.shape, strict=True) if n > 1)
    if op.kind == "distance":
        return frozenset("hd") if op.x.shape[0] > 1 else frozenset("d")
    if op.kind == "blocks":
        return frozenset("ts").union(a for a, n in zip("bh", op.x.shape, strict=False) if n > 1)
    return frozenset()


def _trace(closed: ClosedJaxpr, inputs: Sequence[_Node]) -> list[_Node]:
    """The outputs of a jaxpr as nodes; calls are looked into."""
    jaxpr = closed.jaxpr
    env: dict[Any, _Node] = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, const in zip(jaxpr.constvars, closed.consts, strict=True):
        env[var] = _Node(frozenset(), var.aval, ("const", const))

    def read(v: Any) -> _Node:
        return _Node(frozenset(), v.aval, ("const", v.val)) if isinstance(v, Literal) else env[v]

    for eqn in jaxpr.eqns:
        ins = tuple(map(read, eqn.invars))
        if eqn.primitive.name in _CALLS:
            inner = eqn.params[_CALLS[eqn.primitive.name]]
            inner = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
            outs = _trace(inner, ins)
        else:
            deps = _distance(eqn, ins) or frozenset().union(*(n.deps for n in ins))
            outs = [_Node(deps, v.aval, eqn=eqn, inputs=ins, index=i) for i, v in enumerate(eqn.outvars)]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _distance(eqn: Any, ins: tuple[_Node, ...]) -> frozenset[str] | None:
    """``t - s`` and ``s - t`` depend on the distance only."""
    if eqn.primitive.name == "sub" and {n.name for n in ins if isinstance(n.name, str)} == {"t", "s"}:
        return frozenset("d")
    return None


def _borderable(node: _Node) -> bool:
    if "x" in node.deps or not node.single:
        return False
    return not {"t", "s"} <= node.deps and ("d" not in node.deps or node.deps <= {"h", "d"})


def _choose_borders(out: _Node, borders: list[_Node], what: str) -> None:
    heavy: dict[int, bool] = {}

    def has_heavy(node: _Node) -> bool:
        if id(node) not in heavy:
            heavy[id(node)] = not node.light or any(map(has_heavy, node.inputs))
        return heavy[id(node)]

    seen: set[int] = set()

    def visit(node: _Node) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        if not has_heavy(node):
            for n in node.inputs:
                visit(n)
        elif _borderable(node):
            borders.append(node)
        elif node.light:
            for n in node.inputs:
                visit(n)
        else:
            primitive = node.eqn.primitive.name if node.eqn is not None else "an array"
            raise NotElementwise(
                f"the {what} uses {primitive!r} on values that depend on query and key at once, which a fused kernel cannot "
                "do; look arrays up by the query, the key or their difference alone, or give a bias or a mask array"
            )

    visit(out)


def _parts_used(out: _Node, borders: list[_Node]) -> list[int]:
    """Operands that are still read inside."""
    stop, seen, used = {id(n) for n in borders}, set(), set()
    stack = [out]
    while stack:
        node = stack.pop()
        if id(node) in stop or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node.name, tuple) and node.name[0] == "part":
            used.add(node.name[1])
        stack.extend(node.inputs)
    return sorted(used)


def _compute(node: _Node, operands: Sequence[Operand], g: Geometry) -> Operand:
    """The value of a border for all its queries, keys or distances."""
    by_distance = "d" in node.deps
    axes: list[str] = [a for a in (("h", "d") if by_distance else _AXES) if a in node.deps]
    d = np.arange(1 - g.keys, g.queries)
    ranges: dict[str, np.ndarray] = {a: np.arange(n) for a, n in zip(_AXES, (g.batch, g.heads, g.queries, g.keys), strict=True)}
    ranges["d"] = d

    def value(coordinates: dict[str, Any], arrays: list[Any]) -> Any:
        memo: dict[int, Any] = {}

        def of(n: _Node) -> Any:
            if id(n) not in memo:
                memo[id(n)] = leaf(n) if n.eqn is None else bind(n)
            return memo[id(n)]

        def leaf(n: _Node) -> Any:
            if isinstance(n.name, tuple):
                kind, x = n.name
                return x if kind == "const" else arrays[x]
            return coordinates[n.name]

        def bind(n: _Node) -> Any:
            if n.deps == {"d"} and n.eqn.primitive.name == "sub" and n.inputs[0].name in ("t", "s"):
                return coordinates["d"] if n.inputs[0].name == "t" else -coordinates["d"]
            return _bind(n.eqn, [of(i) for i in n.inputs])[n.index]

        return jnp.asarray(of(node)).reshape(())

    arrays = [_squeezed(op) for op in operands]

    def mapped(axis: str, op: Operand) -> int | None:
        return 0 if axis in _deps_of(op) else None

    def over(left: list[str]) -> Callable[..., Any]:
        if not left:
            return value
        axis = left[0]

        def inner(coordinates: dict[str, Any], arrays: list[Any]) -> Any:
            return jax.vmap(
                lambda i, xs: over(left[1:])({**coordinates, axis: i}, xs),
                in_axes=(0, [mapped(axis, op) for op in operands]),
            )(jnp.asarray(ranges[axis], jnp.int32), arrays)

        return inner

    # Axes in order: each vmap strips the leading axis of the operands that have it.
    out = over(axes)({a: jnp.int32(0) for a in ranges}, arrays)
    if by_distance:
        return Operand(out.reshape(-1, len(d)), "distance")
    return Operand(out.reshape([len(ranges[a]) if a in axes else 1 for a in _AXES]), "aligned")


def _squeezed(op: Operand) -> Any:
    """Aligned operands without their axes of size 1; those of axes that a border does not have are never read."""
    x = jnp.asarray(op.x)
    if op.kind == "aligned":
        return x.reshape([n for n in x.shape if n > 1])
    if op.kind == "distance":
        return x[0] if x.shape[0] == 1 else x
    return x


def _bind(eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return out if eqn.primitive.multiple_results else [out]


def _evaluate(out: _Node, scalars: dict[str, Any], parts: Sequence[Any], place: dict[int, int], at: dict[int, int]) -> Any:
    """The elementwise rest on a tile."""
    memo: dict[int, Any] = {}

    def given(x: Any, dtype: Any) -> Any:
        if dtype == jnp.bool_ and x.dtype != jnp.bool_:
            return x.astype(jnp.int32) != 0
        return x

    def of(n: _Node) -> Any:
        if id(n) not in memo:
            memo[id(n)] = compute(n)
        return memo[id(n)]

    def compute(n: _Node) -> Any:
        if id(n) in at:
            return given(parts[at[id(n)]], n.aval.dtype)
        if n.eqn is None:
            if isinstance(n.name, tuple):
                kind, x = n.name
                return np.asarray(x, n.aval.dtype).reshape(()) if kind == "const" else given(parts[place[x]], n.aval.dtype)
            return scalars[n.name]
        values = [of(i) for i in n.inputs]
        if n.eqn.primitive.name in _RESHAPES:
            return values[0]
        if n.eqn.primitive.name == "sign":  # whose lowering asks which device there is, when compiling for one that is not
            return (values[0] > 0).astype(n.aval.dtype) - (values[0] < 0).astype(n.aval.dtype)
        shape = np.broadcast_shapes(*(jnp.shape(v) for v in values))
        return _bind(n.eqn, [v if jnp.shape(v) == shape else jnp.broadcast_to(v, shape) for v in values])[n.index]

    return of(out)

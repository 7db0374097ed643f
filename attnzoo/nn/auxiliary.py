"""Losses that parts of a model add to the objective while it trains: load balance of routers and the like.

A part calls `auxiliary_loss` where it has what the loss is made of. Nothing happens unless someone listens:

    with collecting() as found:
        logits = model(tokens)
    loss = cross_entropy(logits) + objective(found)

Layers under `lax.scan` and `jax.checkpoint` hand their losses out as results (`kept_apart`, `pass_on`), so the same code
works there; `nn.stack.Stack` does this for all models.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AuxiliaryLoss:
    """One loss, as every layer that has it reported it.

    values: [L], one per layer, in float32.
    coefficient: what it counts in the objective. average: over layers, rather than their sum.
    """

    values: Float[Array, "L"]
    coefficient: float = dataclasses.field(metadata={"static": True})
    average: bool = dataclasses.field(metadata={"static": True})

    @property
    def value(self) -> Float[Array, ""]:
        """Over all layers, without the coefficient."""
        return self.values.mean() if self.average else self.values.sum()


Found = dict[str, AuxiliaryLoss]

_COUNTED: contextvars.ContextVar[Bool[Array, "..."] | None] = contextvars.ContextVar("counted_tokens", default=None)
_FOUND: contextvars.ContextVar[Found | None] = contextvars.ContextVar("auxiliary_losses", default=None)


@contextlib.contextmanager
def collecting(where: Bool[Array, "..."] | None = None) -> Iterator[Found]:
    """Within it, what parts report is kept in the dict that it gives, by name.

    where: True at the tokens that losses over tokens count; all by default.
    """
    found: Found = {}
    tokens = _FOUND.set(found), _COUNTED.set(where)
    try:
        yield found
    finally:
        _FOUND.reset(tokens[0])
        _COUNTED.reset(tokens[1])


def counted_tokens(shape: tuple[int, ...]) -> Bool[Array, "n"] | None:
    """Which of the tokens, [*shape] read row by row, count in losses over tokens; None: all, or nobody said.

    Tokens of another shape (patches, a memory) count all.
    """
    where = _COUNTED.get()
    return None if where is None or where.shape != shape else where.astype(bool).reshape(-1)


def objective(found: Mapping[str, AuxiliaryLoss]) -> Float[Array, ""]:
    """Σ coefficient · value: what is added to the loss; 0 where nothing was reported."""
    return sum((loss.coefficient * loss.value for loss in found.values()), start=jnp.zeros(()))


def auxiliary_loss(name: str, value: Callable[[], Array], coefficient: float, *, average: bool = False) -> None:
    """Reports one layer's loss, a scalar, to whoever collects; `value` is only called if someone does.

    coefficient, average: as in `AuxiliaryLoss`.
    Raises ValueError when the same name was reported with others.
    """
    if _FOUND.get() is not None:
        pass_on({name: AuxiliaryLoss(value().astype(jnp.float32).reshape(1), coefficient, average)})


@contextlib.contextmanager
def kept_apart() -> Iterator[Found]:
    """`collecting` if someone does already, else nothing: for a function that is traced on its own and returns them."""
    if _FOUND.get() is None:
        yield {}
    else:
        with collecting(_COUNTED.get()) as found:
            yield found


def pass_on(found: Mapping[str, AuxiliaryLoss]) -> None:
    """Reports what was kept apart; values of scanned layers [L, ...] are those of L layers."""
    known = _FOUND.get()
    if known is None:
        return
    for name, loss in found.items():
        values = loss.values.reshape(-1)
        before = known.get(name)
        if before is not None:
            if (before.coefficient, before.average) != (loss.coefficient, loss.average):
                raise ValueError(
                    f"auxiliary loss {name!r}: reported with coefficient {before.coefficient} and average {before.average}, "
                    f"then with {loss.coefficient} and {loss.average}; layers that share a name share these"
                )
            values = jnp.concatenate([before.values, values])
        known[name] = AuxiliaryLoss(values, loss.coefficient, loss.average)

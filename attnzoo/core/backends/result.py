"""What a backend hands back."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Result(NamedTuple):
    """``out [B, T, N, Hv]`` float32; ``lse [B, N, T]`` for maps that have one; ``weights [B, N, T, S]`` if computed at all."""

    out: Float[Array, "B T N Hv"]
    lse: Float[Array, "B N T"] | None
    weights: Float[Array, "B N T S"] | None = None

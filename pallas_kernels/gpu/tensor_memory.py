"""Tensor memory and the products that run on it (tcgen05, Blackwell), on the chip or simulated.

Products are asynchronous: they read shared or tensor memory and add to tensor memory, and :func:`signal` makes a barrier say
when all of them so far are done. Simulators of JAX that know tensor memory check that; where they do not (JAX 0.10),
shared memory and plain products take its place, and a product is done when it has been issued.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.launch import simulated
from pallas_kernels.gpu.warpgroup import TCGEN05, laid, plain_product


def _plain() -> bool:
    """Whether simulation has to do without tensor memory."""
    if not simulated():
        return False
    return not hasattr(importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks"), "tcgen05_mma")


def logits_or_weights(columns: int, dtype: Any) -> Any:
    """Memory for a tile of 128 rows, as scratch: a pair of references to the same memory, in float32 and in 16 bits. A write
    through one spoils all that the other refers to."""
    shape = TCGEN05.rows, columns
    if _plain():
        return [plgpu.SMEM(shape, jnp.float32), plgpu.SMEM(shape, dtype)]
    return plgpu.RefUnion(plgpu.TMEM(shape, jnp.float32), plgpu.TMEM(shape, dtype, packed=True))


def sums(columns: int) -> Any:
    """Memory for 128 rows of float32, as scratch."""
    return (plgpu.SMEM if _plain() else plgpu.TMEM)((TCGEN05.rows, columns), jnp.float32)


def multiply(to: Any, a: Any, b: Any, *, add: bool, transposed: bool = False) -> None:
    """Issue ``to = a · b``, or ``a · bᵀ``, or with ``add`` the same added to what is there: ``to [128, n]`` in tensor memory,
    ``a`` in tensor or shared memory, ``b`` in shared memory."""
    if _plain():
        result = plain_product(a[...], b[...].T if transposed else b[...])
        to[...] = to[...] + result if add else result
    else:
        plgpu.tcgen05_mma(to, a, plgpu.transpose_ref(b, (1, 0)) if transposed else b, accumulate=add)


def signal(barrier: Any) -> None:
    """Make a barrier, which orders the tensor core, arrive when all products that this warpgroup issued so far are done."""
    (plgpu.barrier_arrive if _plain() else plgpu.tcgen05_commit_arrive)(barrier)


def load(ref: Any) -> Any:
    """``[128, n]``; what comes next may not overwrite it before :func:`loaded`."""
    return ref[...] if _plain() else plgpu.async_load_tmem(ref, layout=TCGEN05.tile)


def loaded() -> None:
    """Wait until all that this warpgroup loads has come."""
    if not _plain():
        plgpu.wait_load_tmem()


def store(ref: Any, x: Any) -> None:
    """Write ``[128, n]``; see :func:`written`."""
    if _plain():
        ref[...] = x
    else:
        plgpu.async_store_tmem(ref, laid(x, TCGEN05.tile))


def written() -> None:
    """Wait until all that this warpgroup stored can be read, by products too."""
    if not _plain():
        plgpu.commit_tmem()

"""What every test shares: eight host devices on the CPU, fixed seeds, no windows."""

import os
from importlib.metadata import version

# Before jax is imported, here or by a test module. JAX_PLATFORMS may be set from outside, for the tests
# marked `accelerator`.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# Tests compile much and run little: what optimising takes is more than it gives, and of the two ways in which XLA up to
# jaxlib 0.10 writes fused loops for the CPU the newer takes three times as long. Processes that tests start do the same.
# Of what is computed it changes at most the rounding.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jaxlib").startswith("0.10.") and "xla_cpu_use_fusion_emitters" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import random

import hypothesis
import numpy as np
import pytest

from attnzoo.host_memory import keep_freed

keep_freed()

# Compilation makes the first example slow, so no deadlines; the same examples on every run and machine.
hypothesis.settings.register_profile(
    "attnzoo",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("attnzoo")


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (for code under test that draws from the global state)


@pytest.fixture
def rng() -> np.random.Generator:
    """A numpy generator, the same for every test."""
    return np.random.default_rng(0)

"""The engine: one attention operation and what composes with it. Pure functions and pytrees, no Flax."""

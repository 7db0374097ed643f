"""Configurations of known sizes, from a workstation's to a pod's."""

from dataclasses import replace

from attnzoo.errors import unknown
from train.config import Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig
from train.tasks.digits import Digits


def _lm(layers: int, dim: int, heads: int, mlp_dim: int, context: int, batch: int, rate: float, remat: str) -> Config:
    return Config(
        data=DataConfig(context=context),
        model=ModelConfig(
            dim=dim, num_layers=layers, num_heads=heads, mlp_dim=mlp_dim, scan_layers=True,
            remat=remat, dtype="bfloat16",  # type: ignore[arg-type]
        ),
        optimizer=OptimizerConfig(learning_rate=rate, final_fraction=0.1, warmup=0.02, b2=0.95),
        eval=EvalConfig(every=1000),
        steps=100_000,
        batch=batch,
    )  # fmt: skip


_DIGITS = Digits.defaults()

PRESETS: dict[str, Config] = {
    # 110 million parameters with 32k tokens: the sizes of GPT-2 small, with the parts of Llama.
    "llm-100m": _lm(12, 768, 12, 2048, context=2048, batch=256, rate=6e-4, remat="dots"),
    # 1.1 billion.
    "llm-1b": _lm(20, 2048, 16, 5632, context=2048, batch=512, rate=4e-4, remat="dots"),
    # 6.6 billion: the sizes of Llama 2 7B (Touvron et al., 2023, arXiv 2307.09288) with tied embeddings.
    "llm-7b": _lm(32, 4096, 32, 11008, context=4096, batch=512, rate=3e-4, remat="full"),
    # 304 million: ViT-L/16 (Dosovitskiy et al., 2021, arXiv 2010.11929) that averages its patches.
    "vit-l": replace(
        _DIGITS,
        data=DataConfig(name="imagenet2012"),
        model=replace(
            _DIGITS.model, dim=1024, num_layers=24, num_heads=16, mlp_dim=4096, patch_size=16, dropout_rate=0.0,
            scan_layers=True, remat="dots", dtype="bfloat16",
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, warmup=0.1, b2=0.999),
        eval=EvalConfig(every=1000),
        steps=90_000,
        batch=4096,
    ),
}  # fmt: skip
"""By name. Computation in bfloat16, one compiled layer scanned over; parameters and optimizer state in float32."""


def preset(name: str) -> Config:
    """The configuration called `name`; raises ValueError, with the nearest names, if there is none."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]

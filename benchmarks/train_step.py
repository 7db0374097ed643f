"""The training step of `attnzoo train` against a minimal hand-written JAX loop of the same model.

    attnzoo bench train_step

Both train the same model with the same optimizer on the same batches, each through everything that a step of
theirs costs: data to the device, dispatch, and metrics every ten steps. Rounds of both are interleaved in one
process; reported are medians of the seconds per step, and their ratio. Writes results/train_step.json.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attnzoo.models.lm import DecoderLM, LMConfig
from benchmarks._measure import arguments, environment, parsed, save
from train.config import Config
from train.sharding import make_mesh
from train.tasks import make_task
from train.tasks.base import Batch
from train.trainer import Trainer

TARGET = 1.05


def hand_written(config: Config) -> Callable[[Sequence[Batch]], float]:
    """What one would write for this model alone: a jitted step on a dict of arrays."""
    model = config.model
    lm = LMConfig(
        vocab_size=256,
        max_length=config.data.context,
        dim=model.dim,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        mlp=model.mlp,
        norm=model.norm,
        positions=model.positions,
    )
    graphdef, params = nnx.split(DecoderLM(lm, rngs=nnx.Rngs(config.seed)))
    options = config.optimizer
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, round(options.warmup * config.steps), config.steps, options.final_fraction
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(options.clip),
        optax.adamw(schedule, b1=options.b1, b2=options.b2, weight_decay=options.weight_decay),
    )

    def step(state, batch):
        params, opt_state = state

        def loss(params):
            logits = nnx.merge(graphdef, params)(batch["tokens"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    step = jax.jit(step, donate_argnums=0)
    state = (params, optimizer.init(params))

    def run(batches: Sequence[Batch]) -> float:
        nonlocal state
        losses = []
        for batch in batches:
            state, loss = step(state, {name: jnp.asarray(value) for name, value in batch.items()})
            losses.append(loss)
        return float(np.mean(jax.device_get(losses)))

    return run


def attnzoo_loop(config: Config) -> Callable[[Sequence[Batch]], float]:
    """The step, the mesh and the fetching of metrics of `attnzoo train`."""
    mesh = make_mesh(config.mesh)
    trainer = Trainer(make_task(config), config, mesh)
    state = trainer.init()

    def run(batches: Sequence[Batch]) -> float:
        nonlocal state
        pending = []
        with jax.set_mesh(mesh):
            for batch in batches:
                state, metrics = trainer.train_step(state, trainer.put(batch))
                pending.append(metrics)
            return float(np.mean([values["loss"] for values in jax.device_get(pending)]))

    return run


def measure(config: Config, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step of every round; the order within a round alternates."""
    data: Iterator[Batch] = iter(make_task(config).batches())
    contenders = {"hand_written": hand_written(config), "attnzoo": attnzoo_loop(config)}
    warm = [next(data) for _ in range(2)]
    first = {name: run(warm) for name, run in contenders.items()}
    if not math.isclose(*first.values(), rel_tol=0.02):
        raise ValueError(f"the two are not the same model: first losses {first}")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        batches = [next(data) for _ in range(steps)]
        for name in sorted(contenders, reverse=bool(number % 2)):
            began = time.perf_counter()
            contenders[name](batches)
            seconds[name].append((time.perf_counter() - began) / steps)
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, compare and write; returns the exit code."""
    parser = arguments("train_step", __doc__)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of each (default 15)")
    parser.add_argument("--steps", type=int, default=10, help="steps per round (default 10)")
    options = parsed(parser, argv)
    before = environment()
    seconds = measure(Config(), options.rounds, options.steps)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = statistics.median(a / b for a, b in zip(seconds["attnzoo"], seconds["hand_written"], strict=True))
    measured = {
        "median_seconds_per_step": medians,
        "ratio_of_medians": medians["attnzoo"] / medians["hand_written"],
        "median_of_ratios": ratio,
        "best_ratio": min(seconds["attnzoo"]) / min(seconds["hand_written"]),
        "target": TARGET,
        "rounds": options.rounds,
        "steps_per_round": options.steps,
        "seconds_per_step": seconds,
    }
    print(
        f"attnzoo {1000 * medians['attnzoo']:.1f} ms, hand-written {1000 * medians['hand_written']:.1f} ms per step; "
        f"ratio {measured['ratio_of_medians']:.3f} (median of rounds {ratio:.3f}, best of each "
        f"{measured['best_ratio']:.3f}; target {TARGET})"
    )
    save("train_step", options, before, measured)
    return 0

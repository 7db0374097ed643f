"""Nonparametric Variational Regularisation of Pretrained Transformers (Fehr & Henderson, 2024, arXiv 2312.00662).

The vectors x [B, S, P] that keys and values come from are read as the posterior of a Dirichlet process: a mixture of
Gaussians, one per token, and one more for the prior (component 0), with pseudo-counts alpha. L = S + 1.

    mu_i = W_mu x_i + b_mu     log var_i = W_s x_i + b_s     log alpha_i = w_2·x_i² + w_1·x_i + b_a      (nonparametric VIB)

Attention is then denoising: the query is a noisy sample of the mixture, with noise variance sqrt(d) in each of P dimensions
(d is the head's width), and what it attends to is the expectation of what it was before. In evaluation, per head,

    u_m      = W_kᵀ (W_q x_m + b_q)  in R^P         V_i = var_i + sqrt(d)
    score_mi = u_m·(mu_i / V_i) + log pi_i - ½ |mu_i / sqrt(V_i)|² - ½ Σ_p log V_ip
    zhat_m   = Σ_i softmax_i(score)_i [ (var_i / V_i) u_m + (sqrt(d) / V_i) mu_i ]          o_m = W_v zhat_m + b_v

with pi the normalised alpha, alpha <= 0.1 taken as 0. In training z_i ~ N(mu_i, var_i) and pi ~ Dirichlet(alpha):

    score_mi = q_m·(W_k z_i + b_k) / sqrt(d) + log pi_i - |z_i|² / (2 sqrt(d))              o_m = Σ_i a_mi (W_v z_i + b_v)

With mu = x, var = 0 and log alpha = |x|² / (2 sqrt(d)) + b_a the penalties cancel, and for large b_a the prior vanishes:
standard attention. So any Transformer is one of these, and with an empirical prior and temperatures

    W_mu = tau_mu I,  b_mu = (1 - tau_mu) mu_p,  b_s = log (tau_sigma² var_p),  w_2 = 1 / (2 sqrt(d)),  b_a = tau_alpha sd_p

it is regularised without training: a lower tau_alpha gives the prior more weight, tau_sigma > 0 interpolates towards u.

Costs: in R^P instead of R^d, scores and values take 3 P multiply-adds per cell and head instead of 2 d. It is attention with
one key and value head, [mu / V] and [var / V, sqrt(d) mu / V]. The cache holds mu, log var and log alpha: 2 P + 1.

Equations follow idiap/nvib (tag v3).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from attnzoo.core.attention import attention
from attnzoo.core.cache import LayerCache, append, weigh_slots
from attnzoo.core.merge import merge_all, merge_lse
from attnzoo.nn.nvib import (
    Components,
    NVIBLayer,
    Prior,
    nv_empirical_prior,
    nv_identity_init,
    nvib_kl_dirichlet,
    nvib_kl_gaussian,
    sample_components,
)
from attnzoo.paper import Paper
from attnzoo.zoo.projections.transformer import GroupedQueryAttention

LEAST_ALPHA = 0.1
"""In evaluation, components with this pseudo-count or less are left out."""


class _Keys(NamedTuple):
    """What is attended to: k [B, L, K, H], v [B, L, K, Hv], and what is added to their scores [B, L]."""

    k: Array
    v: Array
    bias: Array


def _attend(
    q: Array, prior: _Keys, tokens: _Keys, scale: float, mask: Any, return_weights: bool, **options: Any
) -> tuple[Array, Array, Array | None]:
    """(out, lse, weights) of q over the prior (L = 1), which all see, and the tokens, which the mask is about."""
    group = q.shape[2] // tokens.k.shape[2]
    k_p, v_p = (jnp.repeat(x[:, 0], group, axis=1) for x in (prior.k, prior.v))  # [B, N, ...]
    s_p = scale * jnp.einsum("btnh,bnh->btn", q, k_p) + prior.bias[..., None]
    rest = attention(
        q, tokens.k, tokens.v, mask=mask, bias=tokens.bias[:, None, None], scale=scale, return_lse=True,
        return_weights=return_weights, **options,
    )  # fmt: skip
    out, lse = merge_lse(jnp.broadcast_to(v_p[:, None], rest[0].shape), s_p, *rest[:2])
    if not return_weights:
        return out, lse, None
    total = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
    shares = (jnp.moveaxis(jnp.exp(x - total), 2, 1)[..., None] for x in (s_p, rest[1]))
    return out, lse, jnp.concatenate([next(shares), rest[2] * next(shares)], -1)


def _projected(z: Array, kernel: Array, bias: Array | None) -> Array:
    y = jnp.einsum("...p,pkh->...kh", z, kernel)
    return y if bias is None else y + bias


class Projection(NamedTuple):
    """W [P, K, d] and b [K, d] (or None) of keys, and of values."""

    w_k: Float[Array, "P K H"]
    b_k: Float[Array, "K H"] | None
    w_v: Float[Array, "P K H"]
    b_v: Float[Array, "K H"] | None


def denoising_attention_train(
    q: Float[Array, "B T N H"],
    z: Float[Array, "B L P"],
    log_pi: Float[Array, "B L"],
    projection: Projection,
    *,
    mask: Any = None,
    return_weights: bool = False,
    **options: Any,
) -> Any:
    """(out [B, T, N, H], lse [B, T, N]) and weights [B, N, T, L] if asked for: attention over samples z, the prior's first.

    mask: who sees which of the components after the first, T × (L - 1), as `core.attention` takes it.
    options: of `core.attention`; positions are of these components, too.
    """
    _check(q, z, log_pi, projection)
    root = math.sqrt(q.shape[-1])
    k, v = _projected(z, projection.w_k, projection.b_k), _projected(z, projection.w_v, projection.b_v)
    keys = _Keys(k, v, log_pi - (z**2).sum(-1) / (2 * root))
    out, lse, weights = _attend(q.astype(k.dtype), *_split(keys), 1 / root, mask, return_weights, **options)
    return (out, lse, weights) if return_weights else (out, lse)


def denoising_attention_eval(
    q: Float[Array, "B T N H"],
    components: Components,
    projection: Projection,
    *,
    mask: Any = None,
    return_weights: bool = False,
    **options: Any,
) -> Any:
    """As `denoising_attention_train`, in closed form over the Gaussians themselves; alpha need not be normalised.

    The bias of the keys adds the same to every score of a row, so it is left out (it moves the lse alone).
    """
    _check(q, components.mu, components.log_alpha, projection)
    return _evaluate(q, *_split(components), projection, mask=mask, return_weights=return_weights, **options)


def _evaluate(
    q: Array, prior: Components, tokens: Components, projection: Projection, *, mask: Any, return_weights: bool = False,
    **options: Any,
) -> Any:  # fmt: skip
    """`denoising_attention_eval` with the prior and the tokens apart."""
    batch, length, heads, width = q.shape
    kv_heads, dim, root = projection.w_k.shape[1], tokens.mu.shape[-1], math.sqrt(width)
    by_group = q.astype(tokens.mu.dtype).reshape(batch, length, kv_heads, -1, width)
    u = jnp.einsum("btkgh,pkh->btkgp", by_group, projection.w_k).reshape(batch, length, heads, dim)

    def keys(mu: Array, logvar: Array, log_alpha: Array) -> _Keys:
        var = jnp.exp(logvar)
        noisy = var + root
        log_pi = jnp.where(log_alpha > math.log(LEAST_ALPHA), log_alpha, -jnp.inf)
        bias = log_pi - 0.5 * (mu**2 / noisy + jnp.log(noisy)).sum(-1)
        return _Keys((mu / noisy)[:, :, None], jnp.concatenate([var / noisy, root * mu / noisy], -1)[:, :, None], bias)

    mixed, lse, weights = _attend(u, keys(*prior), keys(*tokens), 1.0, mask, return_weights, **options)
    zhat = (mixed[..., :dim] * u + mixed[..., dim:]).reshape(batch, length, kv_heads, -1, dim)
    out = jnp.einsum("btkgp,pkh->btkgh", zhat, projection.w_v)
    if projection.b_v is not None:
        out = out + projection.b_v[:, None]
    out = jnp.where(jnp.isneginf(lse)[..., None], 0, out.reshape(q.shape))
    return (out, lse, weights) if return_weights else (out, lse)


def _split(components: Any) -> tuple[Any, Any]:
    """The first component and the others, of any tuple of arrays [B, L, ...]."""
    return type(components)(*(x[:, :1] for x in components)), type(components)(*(x[:, 1:] for x in components))


def _check(q: Array, z: Array, log_pi: Array, projection: Projection) -> None:
    if z.ndim != 3 or z.shape[0] != q.shape[0] or log_pi.shape != z.shape[:2] or z.shape[1] < 2:
        raise ValueError(
            f"components: q {q.shape} needs them [B, L, P] with B = {q.shape[0]}, L - 1 tokens after the prior (at least one), "
            f"and their log pi or log alpha [B, L], got {z.shape} and {log_pi.shape}"
        )
    want = (z.shape[-1], projection.w_k.shape[1], q.shape[-1])
    if projection.w_k.shape != want or projection.w_v.shape != want or q.shape[2] % want[1]:
        raise ValueError(
            f"projection: q {q.shape} and components {z.shape} need w_k and w_v [P, K, H] with P = {want[0]}, "
            f"H = {want[2]} and K a divisor of {q.shape[2]}, got {projection.w_k.shape} and {projection.w_v.shape}"
        )


class NVAttention(GroupedQueryAttention):
    """Denoising attention as a drop-in; x [B, T, D] -> [B, T, D]. As it starts, it is nearly standard attention.

    tau_mu, tau_sigma, tau_alpha, prior: as in `NVIBLayer`.
    sample: in training mode, sample z and pi (`model.eval()`, or a view, ends it as it ends dropout); otherwise, and when
        decoding, the closed form is used.
    kappa: samples per component.
    positions: None only; rotated keys are no longer linear in the Gaussians. Add positions to x instead.
    options: as in `GroupedQueryAttention`. Dropout never hits the prior.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        positions: None = None,
        tau_mu: float = 1.0,
        tau_sigma: float = 0.0,
        tau_alpha: float = 10.0,
        prior: Prior | None = None,
        sample: bool = False,
        kappa: int = 1,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if positions is not None:
            raise ValueError(
                f"positions: denoising attention cannot rotate keys, got {positions}; give None, and add positions to x "
                "(a model's positions='learned' or 'sinusoidal')"
            )
        if kappa < 1:
            raise ValueError(f"kappa: at least one sample per component is needed, got {kappa}")
        super().__init__(dim, num_heads, param_dtype=param_dtype, rngs=rngs, **options)
        temperatures = {"tau_mu": tau_mu, "tau_sigma": tau_sigma, "tau_alpha": tau_alpha}
        self.nvib = NVIBLayer(dim, self.qkv.head_dim, prior=prior, param_dtype=param_dtype, **temperatures)
        self.kappa, self.deterministic = kappa, False
        self.rngs = rngs.dropout.fork() if sample else nnx.data(None)

    @property
    def projection(self) -> Projection:
        """The maps to keys and values."""
        key, value = self.qkv.key, self.qkv.value

        def bias(of: nnx.LinearGeneral) -> Array | None:
            return None if of.bias is None else of.bias[...]

        return Projection(key.kernel[...], bias(key), value.kernel[...], bias(value))

    def kl(
        self, source: Float[Array, "B S D"], where: Bool[Array, "B S"] | None = None
    ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """(Gaussian, Dirichlet) divergence of each row's mixture from the prior. source: what keys and values come from."""
        real = jnp.ones(source.shape[:2], bool) if where is None else where
        real = jnp.pad(real, ((0, 0), (1, 0)), constant_values=True)
        components, prior = self.nvib(source), self.nvib.prior
        return (
            nvib_kl_gaussian(components, prior, where=real, kappa=self.kappa),
            nvib_kl_dirichlet(components.log_alpha, prior.log_alpha, where=real, kappa=self.kappa),
        )

    def _attend(self, x: Array, mask: Any, positions: Any, memory: Any, **options: Any) -> Any:
        if memory is not None:
            self._check_memory()
        q, source = self.qkv.query(x), x if memory is None else memory
        options |= {"mask": self._mask(mask), "q_positions": positions, **self.attention_arguments()}
        options["kv_positions"] = positions if memory is None else None
        if self.rngs is None or self.deterministic or "return_weights" in options:
            mixture = self.nvib.first(x.shape[0]), self.nvib.tokens(source)
            out, _, *weights = _evaluate(q, *mixture, self.projection, **options)
            return (out.astype(x.dtype), *weights) if weights else out.astype(x.dtype)
        z, log_pi = sample_components(self.rngs(), self.nvib(source), self.kappa)
        # The samples of a component are seen by the same queries: one part per sample, merged.
        parts, key = [], options.pop("dropout_rng", None)
        for i in range(self.kappa):
            own: dict[str, Any] = {} if key is None else {"dropout_rng": jax.random.fold_in(key, i)}
            parts.append(denoising_attention_train(q, z[i], log_pi[i], self.projection, **options, **own))
        return merge_all(*(jnp.stack(each) for each in zip(*parts, strict=True)))[0].astype(x.dtype)

    def attention_weights(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Any = None,
        positions: Int[Array, "..."] | None = None,
        memory: Float[Array, "B S D"] | None = None,
    ) -> Float[Array, "B N T 1+S"]:
        """The prior's share, then the weights of the S tokens, in float32 and before dropout.

        Always of the closed form, whether training samples or not.
        """
        return super().attention_weights(x, mask=mask, positions=positions, memory=memory)

    def cache_spec(self) -> dict[str, Any]:
        dim = self.nvib.mu_p.size
        return {"mu": (1, dim), "logvar": (1, dim), "log_alpha": jax.ShapeDtypeStruct((1, 1), jnp.float32)}

    def cache_entries(self, x: Float[Array, "B T D"], positions: Any = None) -> dict[str, Array]:
        mu, logvar, log_alpha = self.nvib.tokens(x)
        return {"mu": mu[:, :, None], "logvar": logvar[:, :, None], "log_alpha": log_alpha[:, :, None, None]}

    def prefill(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache,
        *,
        mask: Any = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        positions = cache.next_positions(x.shape[1])
        if self.causal:
            cache = append(cache, self.cache_entries(x), lengths)
        view = cache.view()
        held, slots = {name: leaf[:, 0] for name, leaf in view.payload.items()}, view.pos
        tokens = Components(held["mu"], held["logvar"], held["log_alpha"][..., 0])
        if view.weighted:  # w tokens in one have w times the pseudo-count
            log_w, slots = weigh_slots(slots, view.w)
            tokens = tokens._replace(log_alpha=tokens.log_alpha + log_w[:, 0])
        out, _ = _evaluate(
            self.qkv.query(x),
            self.nvib.first(x.shape[0]),
            tokens,
            self.projection,
            mask=self._mask(mask),
            q_positions=positions,
            kv_positions=slots,
            **self.attention_arguments(),
        )
        return self.out(out.astype(x.dtype)), cache


def nv_reinterpret(params: nnx.State, priors: Prior | Sequence[Prior], **temperatures: float) -> nnx.State:
    """Parameters of a Transformer -> those of the same network with mixer "nvib_attention", by `nv_identity_init`.

    params: of a mixer or a model whose mixers are `GroupedQueryAttention`. priors: one for every attention, in the order of
    their paths (layer by layer). Put the result into the other network by `nnx.update`.

    Raises ValueError for another number of priors, or stacked layers (build with scan_layers=False).
    """
    flat = list(nnx.to_flat_state(params))
    found = [(path[:-3], leaf.shape) for path, leaf in flat if path[-3:] == ("qkv", "query", "kernel")]
    given = [priors] if isinstance(priors, Prior) else list(priors)
    if len(given) != len(found):
        raise ValueError(f"priors: {len(found)} attention layers need a prior each, got {len(given)}")
    for (path, shape), prior in zip(found, given, strict=True):
        if len(shape) != 3:
            raise ValueError(f"params: {path} holds stacked layers, {shape}; build the model with scan_layers=False")
        state = nnx.state(NVIBLayer(shape[0], shape[-1], prior=prior, param_dtype=prior.mu.dtype, **temperatures))
        flat += [((*path, "nvib", *rest), leaf) for rest, leaf in nnx.to_flat_state(state)]
    return nnx.from_flat_state(flat)


def _picture(axes: Any) -> None:
    """One dimension, three tokens: what a query u is denoised to."""
    tokens, u = jnp.array([-2.0, 0.5, 2.0])[None, :, None], jnp.linspace(-4, 4, 161)
    one = Projection(*(jnp.ones((1, 1, 1)), None) * 2)
    denoise = jax.jit(lambda u, components: denoising_attention_eval(u, components, one)[0])
    for tau_alpha, tau_sigma in ((20.0, 0.0), (2.0, 0.0), (20.0, 0.7)):
        layer = NVIBLayer(1, 1, prior=nv_empirical_prior(tokens, 1), tau_alpha=tau_alpha, tau_sigma=tau_sigma)
        axes.plot(
            u, denoise(u[None, :, None, None], layer(tokens)).ravel(), label=f"tau_alpha {tau_alpha:g}, tau_sigma {tau_sigma:g}"
        )
    axes.plot(tokens.ravel(), tokens.ravel(), "ko", label="tokens")
    axes.set(xlabel="query u", ylabel="denoised query")
    axes.legend(fontsize=8)


PAPER = Paper(
    144,
    "nvib_attention",
    "Nonparametric Variational Regularisation of Pretrained Transformers",
    "normalizers",
    builds=(
        NVIBLayer,
        denoising_attention_train,
        denoising_attention_eval,
        NVAttention,
        nv_identity_init,
        nv_empirical_prior,
        nvib_kl_gaussian,
        nvib_kl_dirichlet,
        nv_reinterpret,
        sample_components,
    ),
    mixer=NVAttention,
    picture=_picture,
    costs={
        "cache numbers per token": "2 * D + 1",
        "parameters": "2 * D * N * H + 2 * D * K * H + 2 * D * D + 4 * D + 1",
        "multiply-adds of scores and values": "3 * T * (S + 1) * N * D",
    },
    code="idiap/nvib",
    notes=(
        "The prior's component is attended to apart and merged by its log-sum-exp, so that masks are about tokens alone and "
        "caches hold tokens alone; samples are merged likewise. pi is not normalised over unmasked components: its sum "
        "cancels within a row. The README of the code describes the temperatures of mu and alpha the other way round; this "
        "is what the code does. Its Dirichlet term reads a prior that is never set; here it is exp(la_p). The layer's maps "
        "are parameters, whatever sample says; without calibration the prior is that of N(0, I) vectors. Rotary positions "
        "are refused."
    ),
)

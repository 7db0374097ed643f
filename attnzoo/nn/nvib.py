"""Vectors as a Dirichlet-process posterior: a mixture of Gaussians with pseudo-counts (Fehr & Henderson, arXiv 2312.00662).

    mu_i = W_mu x_i + b_mu     log var_i = W_s x_i + b_s     log alpha_i = w_2·x_i² + w_1·x_i + b_a

for every token, and a component of the prior in front of them. `attnzoo.zoo.normalizers.nvib_attention` attends to it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.scipy.special import digamma, gammaln, logsumexp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from attnzoo.core.cells import concrete
from attnzoo.nn.linear import named

LARGE = 5.0
"""log alpha above which a gamma variable is drawn by the cube of a normal one, whose derivative is exact."""


class Components(NamedTuple):
    """A mixture of L Gaussians with pseudo-counts."""

    mu: Float[Array, "B L P"]
    logvar: Float[Array, "B L P"]
    log_alpha: Float[Array, "B L"]


class Prior(NamedTuple):
    """mu_p and var_p [P]; la_p, the log pseudo-count, and sd_p, by how much that of tokens varies."""

    mu: Float[Array, " P"]
    var: Float[Array, " P"]
    log_alpha: Float[Array, ""]
    log_alpha_sd: Float[Array, ""]


def nv_empirical_prior(x: Float[Array, "*B P"], head_dim: int, where: Bool[Array, "*B"] | None = None) -> Prior:
    """The prior of an attention layer from the vectors that it is given: moments of x, and of |x|² / (2 sqrt(d)).

    where: True at real tokens. Variances are at least the float type's epsilon times their mean, so that features that do not
    vary have a logarithm too.

    Raises ValueError when no token is real, where that is known.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    where = jnp.ones(x.shape[:-1], bool) if where is None else where
    known = concrete(where)
    if known is not None and not known.any():
        raise ValueError(f"where: at least one of the {known.size} tokens of x {x.shape} must be real, all are False")
    tokens = tuple(range(x.ndim - 1))
    size = (x**2).sum(-1) / (2 * math.sqrt(head_dim))
    var, least = x.var(tokens, where=where[..., None]), jnp.finfo(x.dtype)
    return Prior(
        x.mean(tokens, where=where[..., None]),
        jnp.maximum(var, least.eps * var.mean() + least.tiny),
        size.mean(where=where),
        size.std(where=where),
    )


def nv_identity_init(
    prior: Prior, head_dim: int, *, tau_mu: float = 1.0, tau_sigma: float = 0.0, tau_alpha: float = 10.0
) -> dict[str, Array]:
    """Parameters of an `NVIBLayer` by name. (1, 0, large) is standard attention.

    tau_alpha counts in standard deviations of |x|² / (2 sqrt(d)): about 10 is large, but more is after a norm, which leaves
    tokens of nearly one length (of exactly one if its gains are all equal; tau_alpha then does nothing).
    """
    mu, var = prior.mu, prior.var
    tiny = jnp.finfo(var.dtype).tiny
    return {
        "W_mu": tau_mu * jnp.eye(mu.size, dtype=mu.dtype),
        "b_mu": (1 - tau_mu) * mu,
        "W_s": jnp.zeros((mu.size, mu.size), mu.dtype),
        "b_s": jnp.log(tau_sigma**2 * var + tiny),
        "w_2": jnp.full_like(mu, 1 / (2 * math.sqrt(head_dim))),
        "w_1": jnp.zeros_like(mu),
        "b_a": tau_alpha * prior.log_alpha_sd,
    }


class NVIBLayer(nnx.Module):
    """x [B, S, P] -> the mixture over its tokens and the prior, `Components` with L = S + 1, the prior first.

    head_dim: d. prior: of the layer's input, by `nv_empirical_prior`; by default that of N(0, I) vectors. It is not trained.
    tau_mu, tau_sigma, tau_alpha: as in `nv_identity_init`.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        *,
        prior: Prior | None = None,
        param_dtype: DTypeLike = jnp.float32,
        **temperatures: float,
    ):
        if prior is None:
            size = math.sqrt(head_dim)
            moments = jnp.zeros(dim), jnp.ones(dim), jnp.asarray(dim / (2 * size)), jnp.asarray(math.sqrt(dim / 2) / size)
            prior = Prior(*moments)
        prior = Prior(*(jnp.asarray(leaf, param_dtype) for leaf in prior))
        if prior.mu.shape != (dim,) or prior.var.shape != (dim,):
            raise ValueError(f"prior: a layer of dim={dim} needs mu and var [{dim}], got {prior.mu.shape}, {prior.var.shape}")
        # Not parameters: the prior is given.
        self.mu_p, self.var_p, self.la_p, self.sd_p = (nnx.Variable(leaf) for leaf in prior)
        found = nv_identity_init(prior, head_dim, **temperatures)
        self.W_mu, self.W_s = (nnx.Param(found[name], **named("embed", None)) for name in ("W_mu", "W_s"))
        self.b_mu, self.b_s, self.w_2, self.w_1 = (
            nnx.Param(found[name], **named("embed")) for name in ("b_mu", "b_s", "w_2", "w_1")
        )
        self.b_a = nnx.Param(found["b_a"], **named())

    @property
    def prior(self) -> Prior:
        """The prior as it was given."""
        return Prior(self.mu_p[...], self.var_p[...], self.la_p[...], self.sd_p[...])

    def tokens(self, x: Float[Array, "B S P"]) -> Components:
        """The posterior of the tokens alone (L = S), in float32 or wider."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return Components(
            x @ self.W_mu[...] + self.b_mu[...],
            x @ self.W_s[...] + self.b_s[...],
            x**2 @ self.w_2[...] + x @ self.w_1[...] + self.b_a[...],
        )

    def first(self, batch: int) -> Components:
        """The prior as a component of every row (L = 1), in float32 or wider."""
        p = self.prior
        wide = jnp.promote_types(p.mu.dtype, jnp.float32)
        leaves = (leaf.astype(wide) for leaf in (p.mu, p.var, p.log_alpha))
        mu, var, log_alpha = (jnp.broadcast_to(leaf, (batch, 1, *leaf.shape)) for leaf in leaves)
        return Components(mu, jnp.log(var), log_alpha)

    def __call__(self, x: Float[Array, "B S P"]) -> Components:
        pairs = zip(self.first(x.shape[0]), self.tokens(x), strict=True)
        return Components(*(jnp.concatenate([a.astype(b.dtype), b], 1) for a, b in pairs))


def sample_components(
    key: Array, components: Components, kappa: int = 1
) -> tuple[Float[Array, "kappa B L P"], Float[Array, "kappa B L"]]:
    """(z, log pi): kappa samples of every component, and their shares, which sum to 1 over both.

    rho ~ Dirichlet(alpha) over components, shared out among the samples of each by Dirichlet(alpha / kappa); differentiable
    by reparameterisation, whatever the size of alpha. Components that are masked later leave the others' shares in proportion.
    """
    of_z, of_rho, of_share = jax.random.split(key, 3)
    mu, logvar, log_alpha = components
    z = mu + jnp.exp(logvar / 2) * jax.random.normal(of_z, (kappa, *mu.shape), mu.dtype)
    log_rho = jax.nn.log_softmax(_log_gamma(of_rho, log_alpha))
    share = _log_gamma(of_share, jnp.broadcast_to(log_alpha - math.log(kappa), (kappa, *log_alpha.shape)))
    return z, log_rho + jax.nn.log_softmax(share, axis=0)


def _log_gamma(key: Array, log_alpha: Array) -> Array:
    """The logarithm of a Gamma(alpha) variable for each log alpha.

    Large ones by Wilson and Hilferty's cube: alpha (1 - 1 / (9 alpha) + eps / (3 sqrt(alpha)))³ with eps ~ N(0, 1). There the
    implicit derivative of the exact variable is a long series in float32, and alpha itself may be beyond its range.
    """
    of_small, of_large = jax.random.split(key)
    large = log_alpha > LARGE
    small = jax.random.loggamma(of_small, jnp.exp(jnp.where(large, 0, log_alpha)))
    spread = jnp.exp(-jnp.maximum(log_alpha, LARGE) / 2)  # of log G, nearly
    eps = jax.random.normal(of_large, log_alpha.shape, log_alpha.dtype)
    return jnp.where(large, log_alpha + 3 * jnp.log1p(eps * spread / 3 - spread**2 / 9), small)


def nvib_kl_gaussian(
    components: Components, prior: Prior, *, where: Bool[Array, "B L"] | None = None, kappa: int = 1
) -> Float[Array, " B"]:
    """KL of the components' Gaussians from the prior's, weighted by alpha: kappa / 2 · Σ_i (alpha_i / alpha_0) mean_p [..].

    where: True at components that count, the prior's among them.
    """
    mu, logvar, log_alpha = components
    share = jax.nn.softmax(log_alpha, where=where)
    log_ratio = logvar - jnp.log(prior.var)
    each = (jnp.exp(log_ratio) + (mu - prior.mu) ** 2 / prior.var - 1 - log_ratio).mean(-1)
    return kappa / 2 * jnp.where(share > 0, share * each, 0).sum(-1)


def nvib_kl_dirichlet(
    log_alpha: Float[Array, "B L"],
    prior_log_alpha: float | Float[Array, ""],
    *,
    where: Bool[Array, "B L"] | None = None,
    kappa: int = 1,
    delta: float = 1.0,
) -> Float[Array, " B"]:
    """KL of Dirichlet(alpha_0 / L, ...) from Dirichlet(alpha_0^p / L, ...) over the number of components n; never negative.

    alpha_0 = Σ alpha_i;  alpha_0^p = exp(prior_log_alpha) + delta (n - 1);  L = kappa n.  where: as in `nvib_kl_gaussian`.

    With F(a) = log Γ(a) - L log Γ(a / L), which is concave, it is F(a_0) - F(a_0^p) - F'(a_0) (a_0 - a_0^p). Stirling's
    formula leaves in F, but for a line, (L - 1) / 2 · log a and a small rest; without the line no digits are lost.
    """
    real = jnp.ones(log_alpha.shape, bool) if where is None else where
    n = real.sum(-1).astype(log_alpha.dtype)
    count = kappa * n
    log_q = logsumexp(jnp.where(real, log_alpha, -jnp.inf), -1)
    log_p = jnp.logaddexp(prior_log_alpha, jnp.log(delta * (n - 1)))
    log_each = jnp.log(count)

    def bent(log_a: Array) -> Array:
        return (count - 1) / 2 * log_a + _rest(log_a)[0] - count * _rest(log_a - log_each)[0]

    slope = (count - 1) / 2 + _rest(log_q)[1] - count * _rest(log_q - log_each)[1]  # a F'(a)
    return (bent(log_q) - bent(log_p) + slope * jnp.expm1(log_p - log_q)) / n


def _rest(log_x: Array) -> tuple[Array, Array]:
    """What Stirling's formula leaves of log Γ(x), r(x), and x r'(x)."""
    x = jnp.exp(jnp.minimum(log_x, 80))
    large = jnp.maximum(x, 8)
    small = jnp.minimum(x, 8)
    log_small, y = jnp.log(small), 1 / large
    r = gammaln(small) - (small - 0.5) * log_small + small - 0.5 * math.log(2 * math.pi)
    slope = small * (digamma(small) - log_small) + 0.5
    series = y / 12 - y**3 / 360 + y**5 / 1260 - y**7 / 1680
    slope_series = -y / 12 + y**3 / 120 - y**5 / 252 + y**7 / 240
    return jnp.where(x < 8, r, series), jnp.where(x < 8, slope, slope_series)

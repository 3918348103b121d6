"""The theory of local entropy as exact numerics in one and two dimensions.

Every smoothing takes a function as an array of its values on a regular grid of spacing ``dx``, 1-D or 2-D by the
same call, and returns u(., t) from u(., 0) = f:

    heat(f, t, dx)                u_t = 1/2 Lap u                            G_t * f
    cole_hopf(f, t, dx, beta)     u_t = -1/2 |grad u|^2 + 1/(2 beta) Lap u   -1/beta log(G_{t/beta} * exp(-beta f))
    hopf_lax(f, t, dx)            u_t = -1/2 |grad u|^2                      min over y of f(y) + |x - y|^2 / 2t
    viscous_hj(f, t, dx, beta)    the last two, by finite differences

`fokker_planck` evolves the density of a population of noisy descents on u, `controlled_sde` measures what it costs to
steer one, and `DoubleWell` adds a circulating current. t is a time and a variance: 1/gamma of the optimizers. Needs
scipy.
"""

from lightning_entropy.pde.control import Controlled, controlled_sde
from lightning_entropy.pde.density import fokker_planck, gibbs
from lightning_entropy.pde.double_well import DoubleWell
from lightning_entropy.pde.envelope import gradient_hopf_lax, hopf_lax
from lightning_entropy.pde.finite_difference import viscous_hj
from lightning_entropy.pde.gaussian import cole_hopf, heat
from lightning_entropy.pde.grid import local_minima

__all__ = [
    "Controlled",
    "DoubleWell",
    "cole_hopf",
    "controlled_sde",
    "fokker_planck",
    "gibbs",
    "gradient_hopf_lax",
    "heat",
    "hopf_lax",
    "local_minima",
    "viscous_hj",
]

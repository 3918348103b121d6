"""The methods of the family: each preset returns a :class:`Relaxation`, documented where it comes from."""

from typing import Literal

from lightning_entropy.methods.arguments import preset
from lightning_entropy.methods.pull import Pull
from lightning_entropy.methods.relaxation import Gamma, Number, Relaxation, Scale
from lightning_entropy.methods.schedules import Scoping
from lightning_entropy.methods.validation import check_number

ENTROPY_SCOPING = Scoping(0.03, 1e-3)
PARLE_GAMMA = Scoping(0.01, 1e-3, limit=1.0)
HEAT_GAMMA = 1e4
RELATIVE_WIDTH = 0.1
HALF_PULL = Pull(0.5)


@preset
def lookahead(inner_steps: int = 5, outer_lr: Number = 0.5) -> Relaxation:
    """Step toward where k steps of the optimizer lead: x <- x + outer_lr (y_k - x).

    Defaults: k = 5 of the authors' code and outer_lr = 0.5, the paper's other recommended value (the code has 0.8).
    Also known as: Reptile with one task; with momentum in the outer step it is :func:`snoo`.

    Args:
        inner_steps: k, int >= 1.
        outer_lr: alpha of the paper, > 0.

    References:
        Zhang, Lucas, Hinton and Ba, Lookahead optimizer, NeurIPS 2019, arXiv:1907.08610.
    """
    return Relaxation(inner_steps=inner_steps, outer_lr=outer_lr)


@preset
def entropy_sgd(
    inner_steps: int = 20,
    gamma: Gamma = ENTROPY_SCOPING,
    noise: Number = 1e-4,
    average: Number = 0.75,
    *,
    coupled: bool = False,
    reset_momentum: bool = False,
    outer_lr: Number = 1.0,
    outer_momentum: float = 0.0,
) -> Relaxation:
    r"""Follow the gradient of local entropy, gamma (x - <y>), estimated by L Langevin steps.

    <.> is the mean over exp(-f(y) - gamma/2 |y - x|^2); minus the log of that integral solves the viscous
    Hamilton-Jacobi equation. Algorithm 1: y descends f with a spring to x and noise, z averages y,
    x <- x - outer_lr (x - z). The factor gamma of the gradient is dropped (section 4.3).

    Defaults: the paper's All-CNN-BN on CIFAR-10 (table 1): L = 20, gamma from 0.03 growing by 1e-3 per outer step,
    noise 1e-4, alpha = 0.75. For MNIST it has gamma from 1e-4 and noise 1e-3.

    Args:
        inner_steps: L, int >= 1; the paper advises 5 to 20.
        gamma: scope of the paper, loss / weight^2, >= 0.
        noise: epsilon of the paper, >= 0.
        average: alpha of the paper, in (0, 1].
        coupled: the spring inside the inner optimizer, as the paper writes it.
        reset_momentum: zero the inner momentum at outer steps, as the released code does.
        outer_lr: eta of the paper, > 0.
        outer_momentum: Nesterov momentum of the outer step, in [0, 1).

    References:
        Chaudhari, Choromanska, Soatto, LeCun, Baldassi, Borgs, Chayes, Sagun and Zecchina, Entropy-SGD: biasing
        gradient descent into wide valleys, ICLR 2017, arXiv:1611.01838.
    """
    return Relaxation(
        inner_steps=inner_steps,
        gamma=gamma,
        noise=noise,
        average=average,
        coupled=coupled,
        reset_momentum=reset_momentum,
        outer_lr=outer_lr,
        outer_momentum=outer_momentum,
    )


@preset
def hamilton_jacobi(
    inner_steps: int = 20,
    gamma: Gamma = ENTROPY_SCOPING,
    *,
    coupled: bool = False,
    reset_momentum: bool = False,
    outer_lr: Number = 1.0,
    outer_momentum: float = 0.0,
) -> Relaxation:
    r"""Step to the proximal point: y -> argmin_y f(y) + gamma/2 |y - x|^2, x <- x - outer_lr (x - y).

    The non-viscous Hamilton-Jacobi equation at time t = 1/gamma (Hopf-Lax formula, Moreau envelope); the spring's
    force gamma (x - y) tends to p* = grad f(x - t p*). Entropy-SGD without noise and without average. With
    ``coupled=True`` and inner SGD of step lr, the loop is the damped fixed point p <- (1 - d) p + d grad f(x - t p),
    p = gamma (x - y), d = lr gamma.

    Defaults: those of :func:`entropy_sgd`; the authors' code calls this H-ESGD.

    Args:
        inner_steps: L, int >= 1.
        gamma: 1/t, loss / weight^2, >= 0.
        coupled: the spring inside the inner optimizer.
        reset_momentum: zero the inner momentum at outer steps.
        outer_lr: 1 steps to the proximal point, less relaxes toward it, > 0.
        outer_momentum: Nesterov momentum of the outer step, in [0, 1).

    References:
        Chaudhari, Oberman, Osher, Soatto and Carlier, Deep relaxation, 2018, arXiv:1704.04932.
    """
    return Relaxation(
        inner_steps=inner_steps,
        gamma=gamma,
        coupled=coupled,
        reset_momentum=reset_momentum,
        outer_lr=outer_lr,
        outer_momentum=outer_momentum,
    )


@preset
def heat(
    inner_steps: int = 1, gamma: Number | None = None, *, width: Number | None = None, scale: Scale | None = None
) -> Relaxation:
    r"""Descend the Gaussian-smoothed loss (G * f)(x): the mean of grad f(x + n), n ~ N(0, I / gamma).

    The heat equation at time 1/gamma. Every one of the L gradients has its own n and its own mini-batch; the user's
    optimizer steps once along their mean.

    Defaults: one gradient a step, noise of a tenth of each filter's norm, which means the same in every net. With
    ``gamma`` it is the heat equation itself. For ``scale="filter"`` LPF-SGD's CIFAR setting is a width of 0.002 per
    weight of a filter's norm, gamma = 2.5e5; its growth over training is :class:`Widening`. On a ResNet-18 that is
    noise of 5 to 14 % of a filter's norm, on a LeNet of 1 to 4 %.
    Also known as: SmoothOut, random weight perturbation, randomized smoothing, LPF-SGD (``"filter"``).

    Args:
        inner_steps: L, gradients averaged per step, int >= 1.
        gamma: 1 / variance, > 0, in the unit of ``scale``; None: what ``width`` says.
        width: gamma^(-1/2), >= 0, in the place of gamma; a schedule such as :class:`Warmup` is one of the width. None
            without a gamma: 0.1, and 0.01 for the scales ``"absolute"`` and ``"filter"``.
        scale: ``"relative"``: the norm of the noise over the norm of what it perturbs, filter by filter;
            ``"absolute"``, or ``"filter"``. None: ``"absolute"`` for a gamma, else ``"relative"``.

    References:
        Chaudhari et al., Deep relaxation, arXiv:1704.04932, section on the heat equation; Bisla, Wang and
        Choromanska, Low-pass filtering SGD, AISTATS 2022, arXiv:2201.08025.
    """
    if gamma is not None and width is not None:
        raise ValueError(f"gamma and width exclude each other: width is gamma^(-1/2), got {gamma!r} and {width!r}")
    if gamma is None and width is None:
        if scale is None or scale == "relative":
            width = RELATIVE_WIDTH
        else:
            gamma = HEAT_GAMMA
    if width is None:
        assert gamma is not None
        return Relaxation(inner_steps=inner_steps, gamma=gamma, perturb=True, scale=scale or "absolute")
    return Relaxation(inner_steps=inner_steps, width=width, perturb=True, scale=scale or "relative")


@preset
def smoothed_lookahead(
    inner_steps: int = 20, outer_lr: Number = 0.6, width: Number = 0.2, *, scale: Scale = "relative"
) -> Relaxation:
    r"""Take slow outer steps through the smoothed loss: :func:`lookahead` whose gradients are :func:`heat`'s.

    y <- optimizer(y, grad f(y + n; new batch)) L times, the norm of n a share ``width`` of each filter's; then
    x <- x + outer_lr (y - x). The noise makes the gradient that of G * f, and the slow x averages over the noise that
    comes with it. One gradient a step.

    Defaults: chosen on a LeNet, an MLP and a narrow ResNet-18, on 4,000 images of Fashion-MNIST or CIFAR-10, with right
    labels and with two fifths of them wrong. A slower x (0.3) costs the ResNet two points of error in a short training;
    more noise helps where labels are wrong, and costs where they are right.

    Args:
        inner_steps: L, int >= 1.
        outer_lr: of the way from x to y that x goes, > 0; 1: y is never taken back.
        width: of the noise, >= 0, in the unit of ``scale``.
        scale: see :class:`Relaxation`.

    References:
        Zhang, Lucas, Hinton and Ba, Lookahead optimizer, NeurIPS 2019, arXiv:1907.08610; Bisla, Wang and Choromanska,
        Low-pass filtering SGD, AISTATS 2022, arXiv:2201.08025.
    """
    return Relaxation(inner_steps=inner_steps, outer_lr=outer_lr, width=width, scale=scale)


@preset
def two_timescale(gamma: Gamma = 1.0, noise: Number = 0.0, outer_lr: Number = 0.1) -> Relaxation:
    """Let x follow y slowly while y keeps moving: dx = gamma (y - x) ds, y fast and never reset.

    The homogenised dynamics of the talk: as outer_lr -> 0, x follows the gradient of local entropy. With noise it
    has the shape of Entropy-MCMC, where x and y are sampled together.

    Defaults: a stiff spring and a time scale ten times slower; untuned.

    Args:
        gamma: stiffness, loss / weight^2, >= 0.
        noise: thermal noise of y, >= 0.
        outer_lr: x <- x + outer_lr (y - x) per step, > 0, << 1.

    References:
        Chaudhari et al., Deep relaxation, arXiv:1704.04932; Li and Zhang, Entropy-MCMC, ICLR 2024, arXiv:2310.05401.
    """
    return Relaxation(inner_steps=1, gamma=gamma, noise=noise, reset=False, outer_lr=outer_lr)


@preset
def elastic_sgd(inner_steps: int = 10, rho: Number = 0.5) -> Relaxation:
    """Train replicas apart and pull each to their mean: x <- y - rho (x - mean x) every L steps.

    Elastic averaging SGD with the centre at the mean of the replicas. rho = eta rho' of the paper with its
    rho'; rho = 1 forgets all but the last loop's differences.

    Defaults: tau = 10 of the published code, rho = 0.5; untuned.
    Also known as: EASGD.

    Args:
        inner_steps: tau, communication period, int >= 1.
        rho: elasticity, >= 0; stable below 2.

    References:
        Zhang, Choromanska and LeCun, Deep learning with elastic averaging SGD, NeurIPS 2015, arXiv:1412.6651.
    """
    return Relaxation(inner_steps=inner_steps, rho=rho)


@preset
def local_sgd(inner_steps: int = 10) -> Relaxation:
    """Average the replicas' weights every H steps: x <- mean of y over replicas.

    Args:
        inner_steps: H, int >= 1.

    References:
        Stich, Local SGD converges fast and communicates little, ICLR 2019, arXiv:1805.09767.
    """
    return Relaxation(inner_steps=inner_steps, elastic_target="pseudo_gradient")


@preset
def diloco(inner_steps: int = 500, outer_lr: Number = 0.7, outer_momentum: float = 0.9) -> Relaxation:
    """Feed the replicas' mean pseudo-gradient x - y_H to Nesterov SGD.

    Defaults: the paper's (H = 500 inner AdamW steps, outer lr 0.7, Nesterov 0.9). Where the training's length is known,
    let the outer lr fall, as ``outer_lr=Warmup(0.1, 0.9, start=0.7)`` does: on a small language model it ended at
    a loss of 1.383, with the best constant rate at 1.408 and DDP at 1.362, one seed; over 3 seeds it is 2.1 % behind
    DDP (``recipes/README.md``).
    Also known as: FedOpt / SlowMo with Nesterov. For one replica the constants are other ones: :func:`snoo`.

    Args:
        inner_steps: H, int >= 1.
        outer_lr: > 0.
        outer_momentum: Nesterov momentum, in [0, 1).

    References:
        Douillard et al., DiLoCo, 2023, arXiv:2311.08105; SNOO, 2025, arXiv:2510.15830.
    """
    return Relaxation(
        inner_steps=inner_steps,
        elastic_target="pseudo_gradient",
        outer_lr=outer_lr,
        outer_momentum=outer_momentum,
    )


@preset
def streaming_diloco(
    inner_steps: int = 100,
    fragments: int = 4,
    delay: int = 4,
    mixing: float = 0.5,
    *,
    outer_lr: Number = 0.7,
    outer_momentum: float = 0.9,
) -> Relaxation:
    r"""Run DiLoCo part by part of the weights, and train on while a part's exchange is under way.

    Streaming DiLoCo, Algorithm 2. Each of P parts has its turn once in H steps, H / P after the one before. With tau
    the delay and alpha the mixing, for the part whose turn is at step n,

        n - tau:  D <- mean over replicas of x - y, which is begun here and not waited for;
        n:        x <- x - Nesterov(D);  y <- x + alpha (y - x).

    So the largest exchange is of about a P-th of the weights, and is waited for only if it takes longer than tau steps.
    x is the same on all replicas, is what is validated and saved, and is where the next x - y is measured from: what y
    keeps of its own way is in it. P = 1, tau = 0 and alpha = 0 is :func:`diloco`.

    Parts are of neighbours in the module, the largest as small as that allows; the paper's are of every n-th layer,
    three each, which it found a little better. H need not be a multiple of P, nor tau below H / P: only below H. Where
    an exchange would have begun before the first step, that turn is left out.

    As there is no step after which all parameters hold x, a constraint that is put back after a step (weights that are
    clamped, say) holds for y, and for x at the end of training alone.

    ``mixing`` is torchft's ``fragment_update_alpha``, and ``delay`` its ``fragment_sync_delay``: the same turns, the
    same numbers. Other optimizers of the module have parts of their own.

    Defaults: alpha = 0.5 is the paper's with tau > 1, and it found the loss hardly changed for tau < 5; the outer step
    is :func:`diloco`'s. P is untuned.

    Args:
        inner_steps: H, int >= 1.
        fragments: P, int >= 1.
        delay: tau, in [0, H).
        mixing: alpha, in [0, 1]: the share of the local weights that is kept.
        outer_lr: > 0.
        outer_momentum: Nesterov momentum, in [0, 1).

    References:
        Douillard et al., Streaming DiLoCo with overlapping communication, 2025, arXiv:2501.18512; Kale et al., Eager
        updates for overlapped communication and computation in DiLoCo, 2025, arXiv:2502.12996.
    """
    return Relaxation(
        inner_steps=inner_steps,
        elastic_target="pseudo_gradient",
        outer_lr=outer_lr,
        outer_momentum=outer_momentum,
        fragments=fragments,
        delay=delay,
        mixing=mixing,
    )


@preset
def snoo(inner_steps: int = 30, outer_lr: Number = 0.7, outer_momentum: float = 0.6) -> Relaxation:
    """Take a Nesterov step along x - y every H steps of one worker: step-K Nesterov outer optimizer.

    :func:`diloco` with the constants that are used with one replica, where nothing is saved by a long loop.

    Defaults: H = 30, outer lr 0.7 and momentum 0.6, with which Muon was trained (0.5 to 0.6 there). With AdamW a
    momentum of 0.9 is usual; H from 16 to 64 works alike. What to expect on an inner optimizer that is well tuned:
    a few per cent fewer steps.

    Args:
        inner_steps: H, int >= 1.
        outer_lr: > 0.
        outer_momentum: Nesterov momentum, in [0, 1).

    References:
        SNOO: step-K Nesterov outer optimizer, 2025, arXiv:2510.15830; Therien et al., MuLoCo, 2025, arXiv:2505.23725.
    """
    return diloco(inner_steps, outer_lr, outer_momentum)


@preset
def palsgd(
    inner_steps: int = 500, gamma: Gamma = HALF_PULL, outer_lr: Number = 0.7, outer_momentum: float = 0.9
) -> Relaxation:
    """Run DiLoCo with a spring to the last global x, so that replicas drift less and may meet less often.

    Pseudo-asynchronous local SGD pulls y to x with a small probability at every step; here the pull of every step is
    the mean of theirs, k = lr gamma, which needs no random number and has no noise of its own. :func:`diloco` with
    gamma > 0.

    Defaults: :func:`diloco`'s, and a spring that takes back half of a loop's path; untuned.

    Args:
        inner_steps: H, int >= 1.
        gamma: stiffness, >= 0; a :class:`Pull` says it by the share of the path that it takes back.
        outer_lr: > 0.
        outer_momentum: Nesterov momentum, in [0, 1).

    References:
        Naganuma, Zhang, Yue, Mitliagkas, Witte, Hewett and Lee, Pseudo-asynchronous local SGD, 2025, arXiv:2504.18454.
    """
    return Relaxation(
        inner_steps=inner_steps,
        gamma=gamma,
        elastic_target="pseudo_gradient",
        outer_lr=outer_lr,
        outer_momentum=outer_momentum,
    )


@preset
def gpa(averaging: float = 0.9) -> Relaxation:
    r"""Average the primal iterates at every step: generalized primal averaging with one coefficient m.

    Its three sequences, for an optimizer that steps by lr s along the gradient at Y, are

        Z <- Z - lr s(grad f(Y)),    X <- m X + (1 - m) Z,    Y <- m X + (1 - m) Z.

    With u = lr s and the buffer b <- m b + u, induction gives Z - X = -m b, so that a step of Y is
    -(1 - m) (u + m b): Nesterov's, of step size 1 - m and momentum m, along u. So this is :func:`diloco` with H = 1,
    outer lr 1 - m and momentum m, its x is Y, and the lr is theirs. In general ``diloco(1, eta, m)`` is GPA with the
    step eta lr / (1 - m) and both of its coefficients m; two different ones are not in this family.

    m = 0.9^(1/H) averages over as many steps as DiLoCo with H of them: 0.9, 0.974, 0.9869, 0.9934, 0.9967, 0.9984 and
    0.9992 for H = 1, 4, 8, 16, 32, 64 and 128. The authors evaluate X, and say that Y does as well; here it is Y.

    Defaults: m = 0.9; untuned. The mean is a momentum: set AdamW's beta1 to 0 beside it. With beta1 = 0.9 a small
    language model ended at a loss of 2.87, with 0 at 2.15, and AdamW alone at 2.25; in a training twenty times as long
    they were level (``recipes/README.md``).

    Args:
        averaging: m, in [0, 1); 0 is the user's optimizer.

    References:
        Defazio, Mishchenko, Raman, Shi and Xiao, Smoothing DiLoCo with primal averaging for faster training of LLMs,
        2025, arXiv:2512.17131.
    """
    m = check_number("averaging", averaging, ("in [0, 1)", lambda v: 0 <= v < 1))
    return diloco(1, 1 - m, m)


@preset
def parle(
    inner_steps: int = 25,
    gamma: Gamma = PARLE_GAMMA,
    rho: Number = 1.0,
    average: Number = 0.25,
    *,
    elastic_target: Literal["anchor", "average"] = "anchor",
    coupled: bool = False,
    outer_lr: Number = 1.0,
    outer_momentum: float = 0.0,
) -> Relaxation:
    r"""Entropy-SGD on every replica, the anchors pulled together: x <- x - outer_lr ((x - z) + rho (x - mean x)).

    Equation 8. Here gamma and rho are stiffnesses: 1/gamma and 1/rho of the paper.

    Defaults: L = 25 and alpha of the paper (0.75 on the old z); gamma's scoping of the research code (from 0.01 to 1,
    growing by 1/(2 nb) per outer step for nb batches an epoch; 1e-3 here). It feeds an outer Nesterov SGD of lr
    0.1, momentum 0.9, with its 1/rho from 1 to 10; the default here is that outer step without momentum, so its
    effective size lr / (1 - momentum) = 1 is ``outer_lr``, and lr / rho, 0.1 to 1, reaches ``rho`` = 1 after two
    thousand outer steps. Here rho is 1 from the start: every outer step leaves of the replicas' differences those of
    the last loop. In a training of a few hundred steps, replicas that were tied less had not come together at its end
    (recipes/README.md).

    Args:
        inner_steps: L, int >= 1.
        gamma: stiffness of the spring, >= 0.
        rho: elasticity, >= 0; stable below 2.
        average: weight of the newest y, in (0, 1].
        elastic_target: ``"anchor"`` (the paper) or ``"average"`` (the research code), with which the mean of the
            replicas itself takes 1 + rho times the step.
        coupled: the spring inside the inner optimizer, as in the research code.
        outer_lr: eta, > 0.
        outer_momentum: Nesterov momentum of the outer step, in [0, 1).

    References:
        Chaudhari, Baldassi, Zecchina, Soatto, Talwalkar and Oberman, Parle: parallelizing stochastic gradient
        descent, 2017, arXiv:1707.00424.
    """
    return Relaxation(
        inner_steps=inner_steps,
        gamma=gamma,
        average=average,
        rho=rho,
        elastic_target=elastic_target,
        coupled=coupled,
        outer_lr=outer_lr,
        outer_momentum=outer_momentum,
    )

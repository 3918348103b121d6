r"""The papers' algorithms written out line by line: slow, obvious, and independent of the package.

An oracle: whatever the engine does must equal one of these functions on the same gradients, the same batches and the
same Gaussian draws. Nothing here imports the package or ``torch.optim``.

Conventions shared by every function:

* Parameters come in as a list of float64 tensors of any shapes and are never written to. Inside, a model is one flat
  vector, so that a line of code reads as the line of the paper.
* ``grad(params, batch)`` returns the gradients as a list. It is called once per gradient evaluation of the algorithm,
  in the algorithm's order, each time with the next batch of ``batches``.
* ``gaussian(outer_step, inner_step)`` returns standard normal draws shaped as the parameters. Both indices count from
  zero within the call. It is not called where the noise is zero. The draw is *added*: y <- y + (scale) * draw.
* ``gamma`` and ``rho`` are stiffnesses: larger pulls harder (Deep Relaxation and Parle write 1/gamma, 1/rho). They are
  numbers or callables of the scoping counter t, which is ``start`` at the first outer step.
* Learning rates are numbers or callables of the outer step counted from zero, whatever ``start`` is.
* ``average`` is the weight of the newest y in the running mean (1 keeps the last iterate), in every function.
* A zero momentum buffer at the first step and no dampening: m <- momentum m + g, then g + momentum m (Nesterov) or m.

Notation: x anchor, y inner iterate, z (or mu) running mean of y, L inner steps, eta outer and eta' inner learning rate.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Params = list[Tensor]
Grad = Callable[[Params, Any], Params]
Gaussian = Callable[[int, int], Params]
Number = float | Callable[[int], float]


class Path(NamedTuple):
    """What one model went through.

    Attributes:
        anchors: x after every outer step, without the initial one; one entry per outer step.
        iterates: y after every inner step, before anything resets it to x; ``iterates[outer_step][inner_step]``.
    """

    anchors: list[Params]
    iterates: list[list[Params]]


def scoping(start: float, rate: float, limit: float = math.inf) -> Callable[[int], float]:
    """Return t -> min(start (1 + rate)^t, limit).

    Entropy-SGD, Sec. 4.3: gamma_0 (1 + gamma_1)^t. Parle's code: min(0.01 (1 + 0.5/nb)^t, 1) for the stiffness gamma
    and min((1 + 0.5/nb)^t, 10) for the elasticity rho, with nb mini-batches in an epoch.

    Args:
        start: the value at t = 0.
        rate: the growth per outer step; 0 is constant.
        limit: the value is clipped here.

    Returns:
        A callable of the scoping counter t.

    Example:
        >>> [scoping(1.0, 1.0, limit=5.0)(t) for t in range(4)]
        [1.0, 2.0, 4.0, 5.0]
    """
    return lambda t: min(start * (1 + rate) ** t, limit)


def consensus(paths: list[Path]) -> list[Params]:
    """Return the mean of the replicas' anchors after every outer step: mean_a x_a."""
    return [
        [sum(tensors[1:], tensors[0]) / len(tensors) for tensors in zip(*anchors, strict=True)]
        for anchors in zip(*(path.anchors for path in paths), strict=True)
    ]


def flatten_iterates(path: Path) -> list[Params]:
    """Return y after every inner step in one list, the outer steps joined."""
    return list(itertools.chain.from_iterable(path.iterates))


# One flat vector per model.


def _flat(tensors: Params) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _shaped(vector: Tensor, like: Params) -> Params:
    pieces = vector.split([tensor.numel() for tensor in like])
    return [piece.clone().reshape(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


def _at(number: Number, step: int) -> float:
    return number(step) if callable(number) else number


def _mean(vectors: list[Tensor]) -> Tensor:
    return sum(vectors[1:], vectors[0]) / len(vectors)


def _momentum(buffer: Tensor, force: Tensor, momentum: float, nesterov: bool) -> tuple[Tensor, Tensor]:
    """Return (m, direction): m <- momentum m + g; direction g + momentum m (Nesterov) or m (heavy ball)."""
    buffer = momentum * buffer + force
    return buffer, force + momentum * buffer if nesterov else buffer


@dataclass
class SGD:
    """Gradient descent with momentum, by hand, on one flat vector.

    g <- g + weight_decay y;  m <- momentum m + g;  y <- y - lr (g + momentum m)  or  y - lr m  without Nesterov.

    Attributes:
        lr: eta', > 0.
        momentum: in [0, 1).
        nesterov: look ahead, or heavy ball.
        weight_decay: added to the gradient before the momentum.
        buffer: m; None is zero.
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    buffer: Tensor | None = field(default=None, repr=False)

    def step(self, y: Tensor, g: Tensor) -> Tensor:
        """Return the next y and remember m."""
        if self.buffer is None:
            self.buffer = torch.zeros_like(y)
        g = g + self.weight_decay * y
        self.buffer, direction = _momentum(self.buffer, g, self.momentum, self.nesterov)
        return y - self.lr * direction

    def reset(self) -> None:
        """Forget m."""
        self.buffer = None


@dataclass
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019), by hand, on one flat vector.

    y <- (1 - lr weight_decay) y;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;
    y <- y - lr (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps),  k = 1, 2, ...

    Attributes:
        lr: eta', > 0.
        betas: b1 and b2.
        eps: outside the square root, after the bias correction.
        weight_decay: decoupled, or added to the gradient (Adam).
        decoupled: False gives Adam with an L2 term: g <- g + weight_decay y.
        first: m; None is zero.
        second: v; None is zero.
        count: k, steps taken since the last reset.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    decoupled: bool = True
    first: Tensor | None = field(default=None, repr=False)
    second: Tensor | None = field(default=None, repr=False)
    count: int = 0

    def step(self, y: Tensor, g: Tensor) -> Tensor:
        """Return the next y and remember m, v and k."""
        if self.first is None or self.second is None:
            self.first, self.second = torch.zeros_like(y), torch.zeros_like(y)
        b1, b2 = self.betas
        self.count += 1
        if self.decoupled:
            y = y - self.lr * self.weight_decay * y
        else:
            g = g + self.weight_decay * y
        self.first = b1 * self.first + (1 - b1) * g
        self.second = b2 * self.second + (1 - b2) * g * g
        m = self.first / (1 - b1**self.count)
        v = self.second / (1 - b2**self.count)
        return y - self.lr * m / (v.sqrt() + self.eps)

    def reset(self) -> None:
        """Forget m, v and k."""
        self.first, self.second, self.count = None, None, 0


Optimizer = SGD | AdamW


def entropy_sgd(
    params: Params,
    grad: Grad,
    *,
    batches: Iterable[Any],
    outer_steps: int,
    inner_steps: int,
    inner_lr: Number,
    outer_lr: Number = 1.0,
    gamma: Number = 0.0,
    noise: float = 0.0,
    gaussian: Gaussian | None = None,
    average: float = 0.75,
    momentum: float = 0.0,
    nesterov: bool = True,
    reset_momentum: bool = True,
    outer_momentum: float = 0.0,
    outer_nesterov: bool = True,
    weight_decay: float = 0.0,
    scale_by_gamma: bool = False,
    start: int = 0,
) -> Path:
    r"""Run Algorithm 1 of Entropy-SGD: SGLD around the anchor, then a step of the anchor to the chain's mean.

        y, mu <- x
        repeat L:  dy <- grad f(y; new batch) - gamma (x - y)
                   y  <- y - eta' dy + sqrt(eta') noise N(0, I)
                   mu <- (1 - alpha) mu + alpha y
        x <- x - eta (x - mu)                       Sec. 4.3; Algorithm 1 itself has eta gamma (x - mu)

    Chosen where the paper is silent: the momentum of the inner loop takes the whole dy (spring and weight decay
    inside); the noise stays outside it and is added after the step; mu takes the y that has its noise; weight decay
    acts on y in the inner loop only; t is 0 at the first outer step.

    Args:
        params: the initial x. Not written to.
        grad: the mini-batch gradient.
        batches: L per outer step, in order.
        outer_steps: how many times x moves.
        inner_steps: L >= 1.
        inner_lr: eta'.
        outer_lr: eta.
        gamma: stiffness of the spring, inside the gradient ("coupled"), taken at the y before the step.
        noise: epsilon.
        gaussian: standard normal draws; needed if ``noise`` is not zero.
        average: alpha, the weight of the newest y (0.75 in the paper).
        momentum: of the inner loop.
        nesterov: of the inner loop; False is heavy ball.
        reset_momentum: zero the inner buffer at every outer step, or keep it.
        outer_momentum: of the outer loop, its buffer kept.
        outer_nesterov: of the outer loop; False is heavy ball.
        weight_decay: times y, added to the gradient.
        scale_by_gamma: x <- x - eta gamma (x - mu), Algorithm 1 to the letter.
        start: t at the first outer step.

    Returns:
        The path; one anchor per outer step, L iterates in each.

    Example:
        A constant slope of 1, no spring, half a step to the last iterate: 3 -> 2 -> 1 -> 2 (outer) -> 1 -> 0 -> 1.

        >>> one = [torch.ones((), dtype=torch.float64)]
        >>> path = entropy_sgd([3 * one[0]], lambda y, b: one, batches=range(4), outer_steps=2, inner_steps=2,
        ...                    inner_lr=1.0, outer_lr=0.5, average=1.0)
        >>> [x[0].item() for x in path.anchors], [[y[0].item() for y in ys] for ys in path.iterates]
        ([2.0, 1.0], [[2.0, 1.0], [1.0, 0.0]])

    References:
        Chaudhari et al., Entropy-SGD, ICLR 2017, arXiv:1611.01838, Algorithm 1 and Sec. 4.2-4.3.
    """
    stream = iter(batches)
    path = Path([], [])
    x = _flat(params)
    inner_buffer = torch.zeros_like(x)
    outer_buffer = torch.zeros_like(x)
    for outer_step in range(outer_steps):
        g_t = _at(gamma, start + outer_step)
        eta, eta_in = _at(outer_lr, outer_step), _at(inner_lr, outer_step)
        if reset_momentum:
            inner_buffer = torch.zeros_like(x)
        y = x.clone()
        mu = x.clone()
        path.iterates.append([])
        for inner_step in range(inner_steps):
            dy = _flat(grad(_shaped(y, params), next(stream))) + weight_decay * y - g_t * (x - y)
            inner_buffer, direction = _momentum(inner_buffer, dy, momentum, nesterov)
            y = y - eta_in * direction
            if noise != 0:
                y = y + math.sqrt(eta_in) * noise * _flat(gaussian(outer_step, inner_step))
            mu = (1 - average) * mu + average * y
            path.iterates[-1].append(_shaped(y, params))
        force = g_t * (x - mu) if scale_by_gamma else x - mu
        outer_buffer, direction = _momentum(outer_buffer, force, outer_momentum, outer_nesterov)
        x = x - eta * direction
        path.anchors.append(_shaped(x, params))
    return path


def entropy_sgd_released(
    params: Params,
    grad: Grad,
    *,
    batches: Iterable[Any],
    outer_steps: int,
    inner_steps: int,
    inner_lr: Number = 0.1,
    outer_lr: Number = 0.1,
    gamma: Number = 0.03,
    noise: float = 1e-4,
    gaussian: Gaussian | None = None,
    average: float = 0.25,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    lua: bool = False,
) -> Path:
    r"""Run the arithmetic of the released Entropy-SGD optimizers, PyTorch or Lua.

        grad f(x; new batch), discarded             it fed the printed loss only: L + 1 evaluations per outer step
        y, mu <- x;  m <- 0
        repeat L:  g <- grad f(y; new batch)  + weight_decay y        (PyTorch: decay before the momentum)
                   m <- momentum m + g;  d <- g + momentum m          (Nesterov)
                   d <- d + weight_decay y                            (Lua: decay after the momentum)
                   y <- y - eta' (d + gamma (y - x)) + sqrt(2 eta') noise N(0, I)
                   mu <- 0.75 mu + 0.25 y
        PyTorch:   g <- (x - mu) + weight_decay x;  Nesterov with the same momentum;  x <- x - eta (...)
        Lua:       x <- x - eta (x - mu)

    The spring is explicit, at the y before the step, and like the noise it never enters the momentum. In the PyTorch
    port the scoping counter never advances, so gamma is gamma(0) for ever; in Lua it is gamma(1), gamma(2), ...

    Chosen: the draw is added to y (the codes add it to the descent direction: the other sign, the same law); the outer
    momentum buffer is kept for the whole run; the decay and the spring both read the y before the step.

    Args:
        params: the initial x. Not written to.
        grad: the mini-batch gradient; called L + 1 times per outer step.
        batches: L + 1 per outer step, the first of them for the discarded evaluation.
        outer_steps: how many times x moves.
        inner_steps: L >= 1.
        inner_lr: eta'.
        outer_lr: eta (the port's default is 0.1; the Lua runs began at 1).
        gamma: stiffness of the spring.
        noise: epsilon.
        gaussian: standard normal draws; needed if ``noise`` is not zero.
        average: the weight of the newest y: 0.25 in both codes, against 0.75 in the paper.
        momentum: of the inner loop, and in the PyTorch port of the outer one.
        weight_decay: see the equations.
        lua: the Lua release, which produced the printed results, and not the PyTorch port.

    Returns:
        The path; one anchor per outer step, L iterates in each (the discarded evaluation leaves none).

    References:
        Code accompanying arXiv:1611.01838.
    """
    stream = iter(batches)
    path = Path([], [])
    x = _flat(params)
    outer_buffer = torch.zeros_like(x)
    for outer_step in range(outer_steps):
        g_t = _at(gamma, outer_step + 1 if lua else 0)
        eta, eta_in = _at(outer_lr, outer_step), _at(inner_lr, outer_step)
        grad(_shaped(x, params), next(stream))
        y = x.clone()
        mu = x.clone()
        m = torch.zeros_like(x)
        path.iterates.append([])
        for inner_step in range(inner_steps):
            g = _flat(grad(_shaped(y, params), next(stream)))
            if not lua:
                g = g + weight_decay * y
            m = momentum * m + g
            d = g + momentum * m
            if lua:
                d = d + weight_decay * y
            d = d + g_t * (y - x)
            y = y - eta_in * d
            if noise != 0:
                y = y + math.sqrt(2 * eta_in) * noise * _flat(gaussian(outer_step, inner_step))
            mu = (1 - average) * mu + average * y
            path.iterates[-1].append(_shaped(y, params))
        if lua:
            x = x - eta * (x - mu)
        else:
            g = (x - mu) + weight_decay * x
            outer_buffer = momentum * outer_buffer + g
            x = x - eta * (g + momentum * outer_buffer)
        path.anchors.append(_shaped(x, params))
    return path


def hamilton_jacobi_fixed_point(
    params: Params,
    grad: Grad,
    *,
    batches: Iterable[Any],
    outer_steps: int,
    inner_steps: int,
    outer_lr: Number,
    gamma: Number,
    damping: float = 0.25,
    outer_momentum: float = 0.0,
    outer_nesterov: bool = True,
    weight_decay: float = 0.0,
    start: int = 0,
) -> Path:
    r"""Run Deep Relaxation's non-viscous HJ: the damped fixed point of  p = grad f(x - p / gamma).

        p <- grad f(x; new batch)
        repeat L:  p <- (1 - damping) p + damping grad f(x - p / gamma; new batch)
        x <- x - eta Nesterov(p)

    The fixed point is the gradient of the Moreau envelope (Hopf-Lax) with time 1/gamma. With y = x - p / gamma it is
    y <- y - (damping / gamma) (grad f(y) + gamma (y - x)): gradient descent on f plus the coupled spring.

    Chosen: L + 1 evaluations (the code's further one after the step only measures); y is recorded after the first
    evaluation, where it is x - grad f(x) / gamma, and after each of the L others; weight decay is part of f; eta
    multiplies p itself, not x - y = p / gamma; the outer buffer is kept; t is 0 at the first outer step.

    Args:
        params: the initial x. Not written to.
        grad: the mini-batch gradient.
        batches: L + 1 per outer step.
        outer_steps: how many times x moves.
        inner_steps: L >= 0.
        outer_lr: eta.
        gamma: the stiffness 1/t of the Hopf-Lax formula, > 0.
        damping: the weight of the new gradient; 0.25 in the code, 1 is the plain fixed-point iteration.
        outer_momentum: applied to p.
        outer_nesterov: False is heavy ball.
        weight_decay: grad f(w) + weight_decay w at every evaluation.
        start: t at the first outer step.

    Returns:
        The path; one anchor per outer step, L + 1 iterates y = x - p / gamma in each.

    References:
        Chaudhari et al., Deep Relaxation, Res. Math. Sci. 2018, arXiv:1704.04932; research code.
    """
    stream = iter(batches)
    path = Path([], [])
    x = _flat(params)
    outer_buffer = torch.zeros_like(x)
    for outer_step in range(outer_steps):
        time = 1 / _at(gamma, start + outer_step)
        p = _flat(grad(_shaped(x, params), next(stream))) + weight_decay * x
        path.iterates.append([_shaped(x - time * p, params)])
        for _ in range(inner_steps):
            w = x - time * p
            p = (1 - damping) * p + damping * (_flat(grad(_shaped(w, params), next(stream))) + weight_decay * w)
            path.iterates[-1].append(_shaped(x - time * p, params))
        outer_buffer, direction = _momentum(outer_buffer, p, outer_momentum, outer_nesterov)
        x = x - _at(outer_lr, outer_step) * direction
        path.anchors.append(_shaped(x, params))
    return path


def parle(
    replicas: list[Params],
    grad: Grad,
    *,
    batches: list[Iterable[Any]],
    outer_steps: int,
    inner_steps: int,
    inner_lr: Number,
    outer_lr: Number,
    gamma: Number,
    rho: Number,
    form: Literal["paper", "code"] = "paper",
    average: float = 0.25,
    momentum: float = 0.9,
    nesterov: bool = True,
    outer_momentum: float = 0.9,
    outer_nesterov: bool = True,
    weight_decay: float = 0.0,
    start: int | None = None,
) -> list[Path]:
    r"""Run Parle: Entropy-SGD on every replica, with the anchors pulled together.

        every replica a:  y_a, z_a <- x_a
        repeat L:  y_a <- y_a - eta' [grad f(y_a; own new batch) + gamma (y_a - x_a)]          (Nesterov on the bracket)
                   z_a <- (1 - average) z_a + average y_a
        paper, Eq. 8:  x_a <- x_a - eta [(x_a - z_a) + rho (x_a - mean_b x_b)]      x_b before any of them has moved
        code:          x_a <- x_a - eta [(x_a - z_a) + rho (x_a - mean_b z_b)]      (Nesterov on the bracket, optional)

    Averaged over the replicas, the paper's form moves the mean by eta times its distance to mean z, the code's form by
    eta (1 + rho) times that.

    Chosen: the inner spring is coupled (inside the momentum) in both forms, as Eq. 8 puts it in one bracket with the
    gradient; weight decay is added to the gradient before the spring and not in the outer step; the inner buffer is
    never zeroed; outer momentum takes the elastic force too; no Langevin noise; all replicas move at once. The scoping
    counter is 0 at the paper form's first outer step and 1 at the code's, which counts before use.

    Args:
        replicas: the initial x_a, one list per replica (the authors started from independent initialisations).
        grad: the mini-batch gradient, the same function for every replica.
        batches: for each replica its own, L per outer step.
        outer_steps: how many times the anchors move.
        inner_steps: L >= 1.
        inner_lr: eta'; the authors kept it at the initial outer rate.
        outer_lr: eta.
        gamma: stiffness, the paper's 1/gamma.
        rho: elasticity, the paper's 1/rho.
        form: whom the elastic force pulls to: the mean of the old anchors, or the mean of z.
        average: the weight of the newest y in z: 0.25 in paper and code (the paper's alpha = 0.75 is on the old z).
        momentum: of the inner loop.
        nesterov: of the inner loop; False is heavy ball.
        outer_momentum: of the outer loop.
        outer_nesterov: of the outer loop; False is heavy ball.
        weight_decay: times y, added to the gradient.
        start: t at the first outer step; None: 0 for the paper's form, 1 for the code's.

    Returns:
        One path per replica. ``consensus`` of them is the master.

    References:
        Chaudhari et al., Parle, arXiv:1707.00424, Eq. 8; research code.
    """
    if start is None:
        start = 1 if form == "code" else 0
    streams = [iter(own) for own in batches]
    paths = [Path([], []) for _ in replicas]
    xs = [_flat(params) for params in replicas]
    inner_buffers = [torch.zeros_like(x) for x in xs]
    outer_buffers = [torch.zeros_like(x) for x in xs]
    for outer_step in range(outer_steps):
        g_t, r_t = _at(gamma, start + outer_step), _at(rho, start + outer_step)
        eta, eta_in = _at(outer_lr, outer_step), _at(inner_lr, outer_step)
        zs = []
        for a, params in enumerate(replicas):
            y = xs[a].clone()
            z = xs[a].clone()
            paths[a].iterates.append([])
            for _ in range(inner_steps):
                g = _flat(grad(_shaped(y, params), next(streams[a]))) + weight_decay * y
                g = g + g_t * (y - xs[a])
                inner_buffers[a], direction = _momentum(inner_buffers[a], g, momentum, nesterov)
                y = y - eta_in * direction
                z = (1 - average) * z + average * y
                paths[a].iterates[-1].append(_shaped(y, params))
            zs.append(z)
        target = _mean(zs) if form == "code" else _mean(xs)
        for a, params in enumerate(replicas):
            d = (xs[a] - zs[a]) + r_t * (xs[a] - target)
            outer_buffers[a], direction = _momentum(outer_buffers[a], d, outer_momentum, outer_nesterov)
            xs[a] = xs[a] - eta * direction
            paths[a].anchors.append(_shaped(xs[a], params))
    return paths


def elastic_sgd(
    replicas: list[Params],
    grad: Grad,
    *,
    batches: list[Iterable[Any]],
    outer_steps: int,
    inner_steps: int,
    optimizer: Optimizer,
    rho: Number,
    outer_lr: Number = 1.0,
    start: int | None = None,
) -> list[Path]:
    r"""Run synchronous elastic averaging: the replicas meet every tau steps, or feel the force in every gradient.

        tau = inner_steps >= 1:   y_a <- x_a;  tau steps of the optimizer on y_a, each with its own new batch
                                  x_a <- x_a - eta [(x_a - y_a) + rho (x_a - mean_b x_b)]
        inner_steps = 0:          x_a <- optimizer(x_a, grad f(x_a; own new batch) + rho (x_a - mean_b x_b))

    where mean_b x_b is taken before any anchor moves. The second form is the L = 0 branch of Parle's research code
    (there with Nesterov momentum, which takes the elastic force too); with one replica it is the optimizer itself.

    Chosen: no centre variable; the centre is the mean of the replicas, as in Parle (the EASGD paper keeps a moving
    average of that mean; its alpha = eta rho is our rho). In the first form the elastic force is computed from the old
    anchors and applied after the local steps, outside the optimizer, whose state is kept. The scoping counter is 0 at
    the first outer step, but 1 where inner_steps = 0, as in that code.

    Args:
        replicas: the initial x_a, one list per replica.
        grad: the mini-batch gradient.
        batches: for each replica its own; max(inner_steps, 1) per outer step.
        outer_steps: how many times the anchors move.
        inner_steps: tau, or 0 for the other form.
        optimizer: of the inner steps. Copied for every replica, not written to.
        rho: elasticity, dimensionless for tau >= 1; in units of the gradient for inner_steps = 0.
        outer_lr: eta; not used where inner_steps = 0.
        start: t at the first outer step; None: 0, or 1 where inner_steps = 0.

    Returns:
        One path per replica, without iterates where inner_steps = 0.

    References:
        Zhang, Choromanska & LeCun, NIPS 2015, arXiv:1412.6651; Parle, arXiv:1707.00424, research code.
    """
    if start is None:
        start = 1 if inner_steps == 0 else 0
    streams = [iter(own) for own in batches]
    paths = [Path([], []) for _ in replicas]
    xs = [_flat(params) for params in replicas]
    optimizers = [copy.deepcopy(optimizer) for _ in replicas]
    for outer_step in range(outer_steps):
        r_t = _at(rho, start + outer_step)
        centre = _mean(xs)
        for a, params in enumerate(replicas):
            x = xs[a]
            paths[a].iterates.append([])
            if inner_steps == 0:
                g = _flat(grad(_shaped(x, params), next(streams[a])))
                xs[a] = optimizers[a].step(x, g + r_t * (x - centre))
            else:
                y = x.clone()
                for _ in range(inner_steps):
                    y = optimizers[a].step(y, _flat(grad(_shaped(y, params), next(streams[a]))))
                    paths[a].iterates[-1].append(_shaped(y, params))
                xs[a] = x - _at(outer_lr, outer_step) * ((x - y) + r_t * (x - centre))
            paths[a].anchors.append(_shaped(xs[a], params))
    return paths


def two_timescale(
    params: Params,
    grad: Grad,
    *,
    batches: Iterable[Any],
    steps: int,
    optimizer: SGD,
    gamma: Number,
    slow_lr: Number,
    noise: Number = 0.0,
    gaussian: Gaussian | None = None,
) -> Path:
    r"""Run the homogenised dynamics: y fast and never reset, x slow.

        dy = (-grad f(y) + gamma (x - y)) ds / eps + sqrt(2 / beta / eps) dB;  dx = gamma (y - x) ds

    with a step lr = ds / eps of y, so that x moves by the fraction slow_lr = gamma eps lr of the way, and
    2 / beta = noise^2. One term of dy after the other (Lie and Trotter's splitting), the spring's exactly implicit:

        y <- y - lr (direction of grad f);  y <- y + lr gamma (x - y_new);  y <- y + sqrt(lr) noise N(0, I);
        x <- x + slow_lr (y - x)

    Args:
        params: the initial x and y. Not written to.
        grad: the mini-batch gradient.
        batches: one per step.
        steps: of both.
        optimizer: y's; its lr is that of the spring and the noise too. Copied, not written to.
        gamma: stiffness, a number or a callable of the step.
        slow_lr: of x, in (0, 1].
        noise: >= 0.
        gaussian: the draws, ``gaussian(step, 0)``; needed where the noise is not zero.

    Returns:
        The path, one iterate per anchor.

    References:
        Chaudhari et al., Deep relaxation, arXiv:1704.04932, homogenisation of SDEs.
    """
    stream = iter(batches)
    path = Path([], [])
    x = y = _flat(params)
    optimizer = copy.deepcopy(optimizer)
    for step in range(steps):
        y = optimizer.step(y, _flat(grad(_shaped(y, params), next(stream))))
        k = optimizer.lr * _at(gamma, step)
        y = (y + k * x) / (1 + k)
        if _at(noise, step):
            assert gaussian is not None
            y = y + math.sqrt(optimizer.lr) * _at(noise, step) * _flat(gaussian(step, 0))
        x = x + _at(slow_lr, step) * (y - x)
        path.iterates.append([_shaped(y, params)])
        path.anchors.append(_shaped(x, params))
    return path


def lookahead(
    params: Params,
    grad: Grad,
    *,
    batches: Iterable[Any],
    outer_steps: int,
    inner_steps: int,
    optimizer: Optimizer,
    alpha: Number = 0.5,
    reset_optimizer: bool = False,
) -> Path:
    r"""Run Lookahead: k fast steps forward, one slow step of length alpha along them.

        theta <- phi;  k steps of the optimizer on theta;  phi <- phi + alpha (theta - phi)

    Chosen: the fast optimizer keeps its state over the slow step, unless told to forget it ("pullback" is not here).

    Args:
        params: the initial slow weights phi. Not written to.
        grad: the mini-batch gradient.
        batches: k per outer step.
        outer_steps: slow steps.
        inner_steps: k >= 1.
        optimizer: the fast one. Copied, not written to.
        alpha: the slow step size, (0, 1].
        reset_optimizer: forget momentum (and Adam's moments and count) at every slow step.

    Returns:
        The path; slow weights as anchors, fast weights as iterates.

    References:
        Zhang et al., Lookahead Optimizer, NeurIPS 2019, arXiv:1907.08610, Algorithm 1.
    """
    stream = iter(batches)
    path = Path([], [])
    slow = _flat(params)
    optimizer = copy.deepcopy(optimizer)
    for outer_step in range(outer_steps):
        if reset_optimizer:
            optimizer.reset()
        fast = slow.clone()
        path.iterates.append([])
        for _ in range(inner_steps):
            fast = optimizer.step(fast, _flat(grad(_shaped(fast, params), next(stream))))
            path.iterates[-1].append(_shaped(fast, params))
        slow = slow + _at(alpha, outer_step) * (fast - slow)
        path.anchors.append(_shaped(slow, params))
    return path


def local_sgd(
    params: Params,
    grad: Grad,
    *,
    batches: list[Iterable[Any]],
    outer_steps: int,
    inner_steps: int,
    optimizer: Optimizer,
) -> list[Path]:
    r"""Run local SGD: H steps on every worker, then all of them take the mean of the weights.

        y_a <- x;  H steps of worker a's optimizer on y_a with its own batches;  x <- mean_a y_a

    Chosen: all workers start from one x; every worker's optimizer keeps its own state over the averaging.

    Args:
        params: the initial x of all workers. Not written to.
        grad: the mini-batch gradient.
        batches: for each worker its own, H per outer step; its length is the number of workers.
        outer_steps: how often the workers average.
        inner_steps: H >= 1.
        optimizer: of the workers. Copied for each, not written to.

    Returns:
        One path per worker; the anchors are the same in all.

    References:
        Stich, Local SGD Converges Fast and Communicates Little, ICLR 2019, arXiv:1805.09767.
    """
    streams = [iter(own) for own in batches]
    paths = [Path([], []) for _ in batches]
    optimizers = [copy.deepcopy(optimizer) for _ in batches]
    x = _flat(params)
    for _ in range(outer_steps):
        ys = []
        for a, stream in enumerate(streams):
            y = x.clone()
            paths[a].iterates.append([])
            for _ in range(inner_steps):
                y = optimizers[a].step(y, _flat(grad(_shaped(y, params), next(stream))))
                paths[a].iterates[-1].append(_shaped(y, params))
            ys.append(y)
        x = _mean(ys)
        for path in paths:
            path.anchors.append(_shaped(x, params))
    return paths


def diloco(
    params: Params,
    grad: Grad,
    *,
    batches: list[Iterable[Any]],
    outer_steps: int,
    inner_steps: int,
    optimizer: Optimizer,
    outer_lr: Number = 0.7,
    outer_momentum: float = 0.9,
    outer_nesterov: bool = True,
    stiffness: float = 0.0,
) -> list[Path]:
    r"""Run DiLoCo: H inner steps on every worker, then Nesterov SGD on the mean pseudo-gradient.

        y_a <- x;  H steps of worker a's optimizer (AdamW) on y_a with its own batches
        delta <- mean_a (x - y_a);  m <- momentum m + delta;  x <- x - eta (delta + momentum m)

    One worker is SNOO (arXiv:2510.15830). Chosen: all workers start from one x; every worker's optimizer keeps its own
    state; the outer momentum buffer is that of x alone.

    Args:
        params: the initial x of all workers. Not written to.
        grad: the mini-batch gradient.
        batches: for each worker its own, H per outer step; its length is the number of workers.
        outer_steps: how many times x moves.
        inner_steps: H >= 1.
        optimizer: of the workers, AdamW in the paper. Copied for each, not written to.
        outer_lr: eta.
        outer_momentum: of the outer step.
        outer_nesterov: False is heavy ball.
        stiffness: k of a pull y_a <- (y_a + k x) / (1 + k) to the last global x after every inner step: the mean of
            PALSGD's, which comes at random.

    Returns:
        One path per worker; the anchors are the same in all.

    References:
        Douillard et al., DiLoCo, arXiv:2311.08105, Algorithm 1; Naganuma et al., PALSGD, arXiv:2504.18454.
    """
    streams = [iter(own) for own in batches]
    paths = [Path([], []) for _ in batches]
    optimizers = [copy.deepcopy(optimizer) for _ in batches]
    x = _flat(params)
    outer_buffer = torch.zeros_like(x)
    for outer_step in range(outer_steps):
        deltas = []
        for a, stream in enumerate(streams):
            y = x.clone()
            paths[a].iterates.append([])
            for _ in range(inner_steps):
                y = optimizers[a].step(y, _flat(grad(_shaped(y, params), next(stream))))
                y = (y + stiffness * x) / (1 + stiffness)
                paths[a].iterates[-1].append(_shaped(y, params))
            deltas.append(x - y)
        outer_buffer, direction = _momentum(outer_buffer, _mean(deltas), outer_momentum, outer_nesterov)
        x = x - _at(outer_lr, outer_step) * direction
        for path in paths:
            path.anchors.append(_shaped(x, params))
    return paths


def streaming_diloco(
    params: Params,
    grad: Grad,
    *,
    batches: list[Iterable[Any]],
    steps: int,
    inner_steps: int,
    fragments: list[list[int]],
    delay: int,
    mixing: float,
    optimizer: Optimizer,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
) -> list[Path]:
    r"""Run Streaming DiLoCo: every fragment of the weights takes DiLoCo's outer step in its turn, late.

    Fragment p of P has its turn after the steps n with n = t_p mod H, t_p = ceil(H p / P), p = 1, ..., P:

        after step n - tau:  delta_a <- x - y_a, sent;
        after step n:        delta <- mean_a delta_a;  m <- momentum m + delta;  x <- x - eta (delta + momentum m)
                             y_a <- (1 - alpha) x + alpha y_a

    Chosen: what would have been sent before the first step is not sent, and that turn is left out; turns are counted as
    torchft does, by the use (the paper by the start); x - y_a is measured from the x that the last turn left, whatever
    y_a was mixed to.

    Args:
        params: the initial x of all workers. Not written to.
        grad: the mini-batch gradient.
        batches: for each worker its own, one per step; its length is the number of workers.
        steps: of every worker.
        inner_steps: H >= 1.
        fragments: indices of the parameters of each.
        delay: tau, in [0, H).
        mixing: alpha, in [0, 1].
        optimizer: of the workers. Copied for each, not written to.
        outer_lr: eta.
        outer_momentum: of the outer step, Nesterov's.

    Returns:
        One path per worker. Its anchors are those after every step, the same in all; its iterates those after every
        step and what follows it, in a single list.

    References:
        Douillard et al., Streaming DiLoCo, arXiv:2501.18512, Algorithm 2.
    """
    streams = [iter(own) for own in batches]
    paths = [Path([], [[]]) for _ in batches]
    optimizers = [copy.deepcopy(optimizer) for _ in batches]
    x = [p.clone() for p in params]
    ys = [[p.clone() for p in params] for _ in batches]
    buffers = [torch.zeros_like(p) for p in params]
    sent: dict[int, list[Tensor]] = {}  # by parameter: of each worker
    turns = [math.ceil(inner_steps * p / len(fragments)) for p in range(1, len(fragments) + 1)]
    for n in range(1, steps + 1):
        for a, stream in enumerate(streams):
            gradient = _flat(grad(ys[a], next(stream)))
            ys[a] = _shaped(optimizers[a].step(_flat(ys[a]), gradient), params)
        for fragment, turn in zip(fragments, turns, strict=True):
            if (n + delay - turn) % inner_steps == 0:
                for i in fragment:
                    sent[i] = [x[i] - y[i] for y in ys]
        for fragment, turn in zip(fragments, turns, strict=True):
            if (n - turn) % inner_steps == 0:
                for i in fragment:
                    if i in sent:
                        buffers[i], direction = _momentum(buffers[i], _mean(sent.pop(i)), outer_momentum, True)
                        x[i] = x[i] - outer_lr * direction
                        for y in ys:
                            y[i] = (1 - mixing) * x[i] + mixing * y[i]
        for path, y in zip(paths, ys, strict=True):
            path.anchors.append([p.clone() for p in x])
            path.iterates[0].append([p.clone() for p in y])
    return paths


def gpa_adamw(
    params: Params,
    grad: Grad,
    *,
    batches: Iterable[Any],
    steps: int,
    lr: float,
    train_averaging: float,
    averaging: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Path:
    r"""Run AdamW with generalized primal averaging, its three sequences kept apart.

        y <- mu_y x + (1 - mu_y) z;  g <- grad f(y)
        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        z <- z - lr [(m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps) + weight_decay y]
        x <- mu_x x + (1 - mu_x) z

    Args:
        params: the initial x, y and z. Not written to.
        grad: the mini-batch gradient.
        batches: one per step.
        steps: how many.
        lr: of AdamW.
        train_averaging: mu_y.
        averaging: mu_x.
        betas: b1 and b2.
        eps: outside the square root.
        weight_decay: at y.

    Returns:
        The path; y after every step as the anchors, x as the iterates.

    References:
        Defazio et al., Smoothing DiLoCo with primal averaging, arXiv:2512.17131, and its authors' optimizer.
    """
    stream = iter(batches)
    path = Path([], [])
    x = y = z = _flat(params)
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for k in range(1, steps + 1):
        g = _flat(grad(_shaped(y, params), next(stream)))
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        direction = (m / (1 - betas[0] ** k)) / ((v / (1 - betas[1] ** k)).sqrt() + eps)
        z = z - lr * (direction + weight_decay * y)
        x = averaging * x + (1 - averaging) * z
        y = train_averaging * x + (1 - train_averaging) * z
        path.iterates.append([_shaped(x, params)])
        path.anchors.append(_shaped(y, params))
    return path


def smoothed_chain(
    replicas: list[Params],
    grad: Grad,
    *,
    batches: list[Iterable[Any]],
    outer_steps: int,
    inner_steps: int,
    optimizer: Optimizer,
    width: Number,
    perturbations: list[Gaussian],
    filter_normalized: bool = False,
    relative: bool = False,
    gamma: Number = 0.0,
    noise: float = 0.0,
    gaussians: list[Gaussian] | None = None,
    average: float = 1.0,
    rho: Number = 0.0,
    target: Literal["anchor", "average", "pseudo_gradient"] = "anchor",
    outer_lr: Number = 1.0,
    outer_momentum: float = 0.0,
) -> list[Path]:
    r"""Run a chain whose gradients are those of the smoothed loss: every one is taken at a perturbed y.

        every replica a:  y_a, z_a <- x_a
        repeat L:  g   <- grad f(y_a + width s n; own new batch),   n ~ N(0, I),  s = 1, or the filter norms of y_a
                   y_a <- optimizer(y_a, g)                         at y_a, which is not perturbed
                   y_a <- (y_a + k x_a) / (1 + k),  k = eta' gamma
                   y_a <- y_a + sqrt(eta') noise N(0, I)            other draws than n
                   z_a <- (1 - average) z_a + average y_a
        "anchor":           x_a <- x_a - eta [(x_a - z_a) + rho (x_a - mean_b x_b)]   x_b before any of them has moved
        "average":          x_a <- x_a - eta [(x_a - z_a) + rho (x_a - mean_b z_b)]
        "pseudo_gradient":  x_a <- x_a - eta mean_b (x_b - z_b)                       (Nesterov on the bracket)

    Chosen: the optimizer's momentum, weight decay and moments see g and y_a alone; the norms are those of the y_a that
    is perturbed, taken anew in every inner step; the inner optimizer's state is never reset.

    Args:
        replicas: the initial x_a, one list per replica.
        grad: the mini-batch gradient, the same function for every replica.
        batches: for each replica its own, L per outer step.
        outer_steps: how many times the anchors move.
        inner_steps: L >= 1.
        optimizer: of the inner loop; its ``lr`` is eta'. Copied for each replica, not written to.
        width: standard deviation of the perturbation, of the outer step.
        perturbations: n, for each replica its own.
        filter_normalized: scale the perturbation by the filters' norms.
        relative: scale it by :func:`relative_scales`.
        gamma: stiffness of the implicit spring.
        noise: epsilon.
        gaussians: the chain's draws, for each replica its own; needed if ``noise`` is not zero.
        average: the weight of the newest y in z.
        rho: elasticity.
        target: whom the elastic force pulls to, or what all replicas step along.
        outer_lr: eta.
        outer_momentum: Nesterov momentum of the outer step, its buffer kept.

    Returns:
        One path per replica; the iterates are the y that are not perturbed.

    Example:
        f = y^2 / 2, no spring: 4, perturbed by 2 to 6, goes down by half of that, to 1; 1, perturbed to 3, to -1/2.

        >>> two = lambda outer_step, inner_step: [torch.tensor(2.0, dtype=torch.float64)]
        >>> (path,) = smoothed_chain([[torch.tensor(4.0, dtype=torch.float64)]], lambda y, b: y, batches=[range(2)],
        ...                          outer_steps=1, inner_steps=2, optimizer=SGD(0.5), width=1.0, perturbations=[two])
        >>> [y[0].item() for y in path.iterates[0]], path.anchors[0][0].item()
        ([1.0, -0.5], -0.5)
    """
    streams = [iter(own) for own in batches]
    paths = [Path([], []) for _ in replicas]
    optimizers = [copy.deepcopy(optimizer) for _ in replicas]
    xs = [_flat(params) for params in replicas]
    outer_buffers = [torch.zeros_like(x) for x in xs]
    for t in range(outer_steps):
        k = optimizer.lr * _at(gamma, t)
        zs = []
        for a, params in enumerate(replicas):
            y = xs[a].clone()
            z = xs[a].clone()
            paths[a].iterates.append([])
            for inner_step in range(inner_steps):
                s = _flat(_scales(_shaped(y, params), filter_normalized, relative))
                perturbed = y + _at(width, t) * s * _flat(perturbations[a](t, inner_step))
                g = _flat(grad(_shaped(perturbed, params), next(streams[a])))
                y = optimizers[a].step(y, g)
                y = (y + k * xs[a]) / (1 + k)
                if noise != 0:
                    y = y + math.sqrt(optimizer.lr) * noise * _flat(gaussians[a](t, inner_step))
                z = (1 - average) * z + average * y
                paths[a].iterates[-1].append(_shaped(y, params))
            zs.append(z)
        steps = [x - z for x, z in zip(xs, zs, strict=True)]
        if target == "pseudo_gradient":
            forces = [_mean(steps)] * len(xs)
        else:
            centre = _mean(xs if target == "anchor" else zs)
            forces = [step + _at(rho, t) * (x - centre) for step, x in zip(steps, xs, strict=True)]
        for a, params in enumerate(replicas):
            outer_buffers[a], direction = _momentum(outer_buffers[a], forces[a], outer_momentum, True)
            xs[a] = xs[a] - _at(outer_lr, t) * direction
            paths[a].anchors.append(_shaped(xs[a], params))
    return paths


def filter_norms(params: Params) -> Params:
    """Return LPF-SGD's noise scale of every weight: the norm of the filter it belongs to.

    A tensor of two or more dimensions holds one filter per index of its first: W[i] is scaled by |W[i]|. Anything else
    (bias, BatchNorm's weight, scalar) is one filter and is scaled by its whole norm.

    Args:
        params: the weights, any shapes.

    Returns:
        Tensors shaped as ``params``.

    Example:
        >>> filter_norms([torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([5.0, 12.0])])
        [tensor([[5., 5.],
                [2., 2.]]), tensor([13., 13.])]

    References:
        Bisla, Wang & Choromanska, LPF-SGD, AISTATS 2022, arXiv:2201.08025.
    """
    scales = []
    for tensor in params:
        scale = torch.empty_like(tensor)
        if tensor.dim() >= 2:
            for i in range(tensor.shape[0]):
                scale[i] = tensor[i].square().sum().sqrt()
        else:
            scale.fill_(tensor.square().sum().sqrt())
        scales.append(scale)
    return scales


def relative_scales(params: Params) -> Params:
    """Return the scale of every weight with which noise has the norm of the weight's filter, in the mean of its square.

    Noise s N(0, I) on the n weights of a filter has the mean square norm s^2 n: that is |filter|^2 for
    s = |filter| / sqrt(n). Vectors and scalars are not perturbed: s = 0.

    Args:
        params: the weights, any shapes.

    Returns:
        Tensors shaped as ``params``.

    Example:
        >>> relative_scales([torch.tensor([[3.0, 3.0], [0.0, 0.0]]), torch.tensor([5.0, 12.0])])
        [tensor([[3., 3.],
                [0., 0.]]), tensor([0., 0.])]
    """
    scales = []
    for tensor in params:
        scale = torch.zeros_like(tensor)
        if tensor.dim() >= 2:
            for i in range(tensor.shape[0]):
                scale[i] = math.sqrt(tensor[i].square().sum() / tensor[i].numel())
        scales.append(scale)
    return scales


def _scales(params: Params, filter_normalized: bool, relative: bool) -> Params:
    if filter_normalized:
        return filter_norms(params)
    return relative_scales(params) if relative else [torch.ones_like(p) for p in params]


def heat(
    params: Params,
    grad: Grad,
    *,
    batches: Iterable[Any],
    outer_steps: int,
    inner_steps: int,
    optimizer: Optimizer,
    gamma: Number,
    gaussian: Gaussian,
    filter_normalized: bool = False,
    relative: bool = False,
    start: int = 0,
) -> Path:
    r"""Descend the Gaussian smoothing of f: the gradient averaged over L perturbed points, one step at x.

        g <- (1/L) sum_l grad f(x + sqrt(1/gamma) s N_l(0, I); new batch),    s = 1, or the filter norms of x (LPF-SGD)
        x <- optimizer(x, g)

    This is grad (G_{1/gamma} * f), the textbook heat equation, and not Deep Relaxation's HEAT, which averages a chain.
    LPF-SGD's own gamma is a standard deviation: its gamma^2 is 1/gamma here; its M is L.

    Chosen: weight decay and momentum are the optimizer's, at the unperturbed x; the norms are those of the unperturbed
    x, taken anew at every outer step; each of the L draws has a whole batch of its own (LPF-SGD splits one batch in M).

    Args:
        params: the initial x. Not written to.
        grad: the mini-batch gradient.
        batches: L per outer step.
        outer_steps: how many times x moves.
        inner_steps: L >= 1, the draws per step.
        optimizer: takes the averaged gradient. Copied, not written to.
        gamma: inverse variance of the kernel, > 0.
        gaussian: standard normal draws.
        filter_normalized: scale the noise by the filters' norms.
        relative: scale it by :func:`relative_scales`.
        start: t at the first outer step.

    Returns:
        The path; the perturbed points as iterates.

    References:
        García Trillos, Kaplan & Sanz-Alonso, arXiv:1901.10082; Bisla, Wang & Choromanska, LPF-SGD, arXiv:2201.08025.
    """
    stream = iter(batches)
    path = Path([], [])
    x = _flat(params)
    optimizer = copy.deepcopy(optimizer)
    for outer_step in range(outer_steps):
        sigma = math.sqrt(1 / _at(gamma, start + outer_step))
        scale = _flat(_scales(_shaped(x, params), filter_normalized, relative))
        total = torch.zeros_like(x)
        path.iterates.append([])
        for inner_step in range(inner_steps):
            y = x + sigma * scale * _flat(gaussian(outer_step, inner_step))
            total = total + _flat(grad(_shaped(y, params), next(stream)))
            path.iterates[-1].append(_shaped(y, params))
        x = optimizer.step(x, total / inner_steps)
        path.anchors.append(_shaped(x, params))
    return path

"""A method of this family is a value: what happens in the inner loop, and what the outer step does with it."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning_entropy.methods.arguments import named
from lightning_entropy.methods.pull import Pull
from lightning_entropy.methods.schedules import Scoping, Starting, Warmup, Widening, check_ends, in_outer_steps
from lightning_entropy.methods.targets import OUTER_TARGETS, OuterTarget
from lightning_entropy.methods.validation import NON_NEGATIVE, POSITIVE, Rule, check_bool, check_integer, check_number

# Our schedules are named before Callable, or LightningCLI takes a default of theirs for a dict that it cannot read.
Number = float | Scoping | Widening | Warmup | Starting | Callable[[int], float]
Gamma = float | Pull | Scoping | Widening | Warmup | Starting | Callable[[int], float]
Scale = Literal["absolute", "filter", "relative"]

_NO_CALLBACK = (
    "a Relaxation is a method and no callback: write callbacks=[InnerOuterCallback(relaxation)], or EntropySGD(...), "
    "HamiltonJacobi(...), HeatSmoothing(...)"
)

# The numbers that may vary with the outer step t, and their ranges.
_VARYING: dict[str, Rule] = {
    "gamma": NON_NEGATIVE,
    "noise": NON_NEGATIVE,
    "average": ("in (0, 1]", lambda v: 0 < v <= 1),
    "rho": NON_NEGATIVE,
    "outer_lr": POSITIVE,
    "width": NON_NEGATIVE,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of a :class:`Relaxation` at one outer step t. Same names, units and ranges.

    Where gamma is a :class:`Pull`, ``stiffness`` is its k, the same at every learning rate, and ``gamma`` is 0.
    """

    gamma: float
    noise: float
    average: float
    rho: float
    outer_lr: float
    width: float
    stiffness: float = 0.0


@dataclass(frozen=True, kw_only=True, repr=False)
class Relaxation:
    r"""L inner steps on y by the user's own optimizer, then one outer step on the anchor x.

    ::

        y, z <- x                                         every outer step starts at the anchor
        repeat L:   y <- inner(y, grad f(y; new batch))    the user's torch optimizer
                    y <- (y + k x) / (1 + k), k = lr gamma  spring to the anchor
                    y <- y + sqrt(lr) noise N(0, I)        Langevin noise
                    z <- z + average (y - z)               running mean of y
        x <- outer(x, x - z  +  rho (x - mean over replicas of x))

    A number may be a callable of the outer step t = 0, 1, 2, ... (:class:`Scoping` is one); it is read and
    checked when the loop of step t begins.

    Attributes:
        inner_steps: L, int >= 1.
        gamma: stiffness of the spring y -> x, loss / weight^2, >= 0; larger is narrower. It is 1/gamma in
            *Deep Relaxation* and in the *Parle* paper, where gamma is a time (the variance of the smoothing kernel).
            :class:`Pull` says the spring by what it does: the share of a loop's path that it takes back.
        noise: thermal noise, loss^(1/2), >= 0; the temperature is noise^2 / 2.
        average: weight of the newest y in the running mean z, in (0, 1]; 1: z is the last iterate.
        rho: elasticity of x toward the mean of the replicas, dimensionless, >= 0. One replica is its own mean.
        reset: y restarts at x after every outer step; False leaves y where it is (two time scales).
        reset_momentum: the inner optimizer's first moments (``momentum_buffer``, ``exp_avg``) are zeroed there too.
        coupled: the spring's force gamma (y - x) is added to the gradient, so it goes through the inner
            optimizer's momentum and scaling: the papers' literal form, stable for lr (curvature + gamma) < 2.
            The default spring is decoupled, as AdamW's decay is, and stable for every lr and gamma.
        explicit: a decoupled spring taken before the optimizer's update, y <- y - k (y - x), stable for
            k < 2: the released code's form.
        elastic_target: what ``rho`` pulls to. ``"anchor"``: the mean of the anchors as the last outer step left
            them, which can be communicated while the inner steps run. ``"average"``: the mean of z (the
            research code of Parle). ``"pseudo_gradient"``: every replica steps along the mean of x - z
            (local SGD, DiLoCo), and rho is not used.
        perturb: instead of a chain, the gradient at x + N(0, 1/gamma), averaged over the L inner steps, is what the
            user's optimizer steps along at x: Gaussian smoothing, the heat equation. Its size is either ``gamma`` or
            ``width`` = gamma^(-1/2).
        width: size of the noise at which gradients are taken, in the unit of ``scale``, >= 0. Inside a chain, every
            gradient is taken at y + width N(0, I) and stepped along at y: the chain descends the smoothed loss, in its
            spring, average and outer step as ever.
        scale: the unit of either perturbation. ``"absolute"``: the noise's standard deviation is the width, the same
            for every weight. ``"filter"``: it is the width times the norm of the weight's output filter (of the whole
            tensor for vectors), as in LPF-SGD. ``"relative"``: it is the width times the root mean square of the
            filter, so that the norm of the noise is that share of the norm of the filter, whatever its size: the one
            that transfers between nets. It leaves vectors (biases, the scale and bias of norm layers) alone: a filter
            before a norm layer may be rescaled without a change of the net, so that its own norm is its unit, and a
            vector has no such unit. A filter of zeros is not perturbed.
        outer_lr: step size of the outer optimizer, > 0; 1 jumps to z.
        outer_momentum: its Nesterov momentum, in [0, 1).
        fragments: P, int >= 1. The weights in P parts, in the module's order and as equal in size as that allows; part
            p = 1, ..., P takes its outer steps at the inner steps ceil(L p / P) of the loop, and sends when it is its
            turn. With ``elastic_target="pseudo_gradient"``, as the next two.
        delay: tau, inner steps from the start of a part's exchange to its outer step, in [0, L). Below L, so that x has
            moved before the next pseudo-gradient is measured from it.
        mixing: alpha, the share of y that an outer step keeps, y <- x + alpha (y - x), in [0, 1]. 0: y restarts at x;
            1 is ``reset=False``.

    Raises:
        ValueError: a value outside its range, or two options that exclude each other.
        TypeError: a value of the wrong type.

    Where the sources disagree (papers, Lua, PyTorch port, MPI script), each choice is made once, in the presets:

    ===================  =========================  ==========================  ===============================
    what                 paper                      released code               here
    ===================  =========================  ==========================  ===============================
    weight of newest y   0.75 (Entropy-SGD)         0.25                        ``average``: 0.75; Parle 0.25
    noise per step       sqrt(lr) noise             sqrt(2 lr) noise            the paper's
    spring               in the gradient            explicit, outside momentum  implicit, outside momentum
    inner momentum       not said                   zeroed (Parle: kept)        kept; ``reset_momentum``
    scoping counter      outer steps                stuck at 0 (PyTorch port)   outer steps, from 0
    gamma in outer step  dropped                    dropped                     dropped
    outer step from      x                          x (MPI script: y)           x
    elastic target       mean of the old anchors    mean of z                   ``elastic_target``
    evaluations          L                          L + 1, one discarded        L
    ===================  =========================  ==========================  ===============================

    Example:
        >>> Relaxation(inner_steps=5, outer_lr=0.5).at(0)
        Settings(gamma=0.0, noise=0.0, average=1.0, rho=0.0, outer_lr=0.5, width=0.0, stiffness=0.0)

    References:
        Chaudhari et al., Entropy-SGD, ICLR 2017, arXiv:1611.01838; Deep Relaxation, 2018, arXiv:1704.04932;
        Parle, 2017, arXiv:1707.00424.
    """

    inner_steps: int = 1
    gamma: Gamma = 0.0
    noise: Number = 0.0
    average: Number = 1.0
    rho: Number = 0.0
    reset: bool = True
    reset_momentum: bool = False
    coupled: bool = False
    explicit: bool = False
    elastic_target: Literal["anchor", "average", "pseudo_gradient"] = "anchor"
    perturb: bool = False
    width: Number = 0.0
    scale: Scale = "absolute"
    outer_lr: Number = 1.0
    outer_momentum: float = 0.0
    fragments: int = 1
    delay: int = 0
    mixing: float = 0.0

    def __post_init__(self) -> None:
        check_integer("inner_steps", self.inner_steps, 1)
        check_integer("fragments", self.fragments, 1)
        check_integer("delay", self.delay, 0)
        for name in ("reset", "reset_momentum", "coupled", "explicit", "perturb"):
            check_bool(name, getattr(self, name))
        for name, choices in (
            ("elastic_target", tuple(OUTER_TARGETS)),
            ("scale", ("absolute", "filter", "relative")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        momentum = check_number("outer_momentum", self.outer_momentum, ("in [0, 1)", lambda v: 0 <= v < 1))
        object.__setattr__(self, "outer_momentum", momentum)  # a float, which any checkpoint can hold
        mixing = check_number("mixing", self.mixing, ("in [0, 1]", lambda v: 0 <= v <= 1))
        object.__setattr__(self, "mixing", mixing)
        self.at(0)
        for name in _VARYING:
            check_ends(name, getattr(self, name), self._rule(name))
        self._check_combinations()

    if not TYPE_CHECKING:  # or type checkers would allow any attribute

        def __getattr__(self, name: str) -> Any:
            # Called for what there is not; Lightning looks up its hooks on whatever it was given as a callback. It has
            # failed by then to set an attribute of it, which says nothing.
            if name.startswith("on_") or name in ("setup", "teardown", "state_key"):
                raise AttributeError(_NO_CALLBACK) from None
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

        def __iter__(self) -> Any:
            # Trainer(callbacks=relaxation) takes it for a list of them.
            raise TypeError(_NO_CALLBACK)

    def __repr__(self) -> str:
        """Return the arguments that are not the defaults, ``inner_steps`` always.

        Example:
            >>> Relaxation(inner_steps=5, outer_lr=0.5)
            Relaxation(inner_steps=5, outer_lr=0.5)
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        said = {f.name for f in fields(self) if f.name == "inner_steps" or given[f.name] != f.default}
        return f"{type(self).__name__}({', '.join(f'{name}={given[name]!r}' for name in given if name in said)})"

    def _check_combinations(self) -> None:
        if self.coupled and self.explicit:
            raise ValueError("coupled and explicit exclude each other: they are two forms of the same spring")
        if self.scale != "absolute" and not self.perturb and self.width == 0:
            raise ValueError(f"scale={self.scale!r} needs perturb=True or a width: it scales the perturbation")
        if isinstance(self.gamma, Pull) and (self.spring != "implicit" or not self.reset):
            raise ValueError(
                "gamma must be a number with coupled, explicit or reset=False, got a Pull: its formula is "
                "that of the default spring, in loops that start at x"
            )
        if self.outer_target.common and self.rho != 0:
            raise ValueError(f"rho must be 0 with elastic_target={self.elastic_target!r}, got {self.rho!r}")
        if self.streams:
            self._check_streaming()
        if not self.perturb:
            return
        if self.width != 0 and self.gamma != 0:
            raise ValueError(
                f"gamma and width exclude each other with perturb=True, where width is gamma^(-1/2), got {self.gamma!r}"
                f" and {self.width!r}"
            )
        off, of_heat = Relaxation(), ("inner_steps", "gamma", "perturb", "width", "scale")
        for name in self.__dataclass_fields__:
            if name not in of_heat and getattr(self, name) != getattr(off, name):
                raise ValueError(f"{name} has no meaning with perturb=True, got {getattr(self, name)!r}")

    def _check_streaming(self) -> None:
        off = Relaxation()
        asked = next(n for n in ("fragments", "delay", "mixing") if getattr(self, n) != getattr(off, n))
        with_it = f"with {asked} = {getattr(self, asked)}"
        if not self.outer_target.common:
            raise ValueError(f"elastic_target must be 'pseudo_gradient' {with_it}, got {self.elastic_target!r}")
        if self.delay >= self.inner_steps:
            raise ValueError(
                f"delay must be below inner_steps = {self.inner_steps}, got {self.delay}: an exchange would begin "
                "before the last one is used, and send the same steps again"
            )
        for name in ("average", "reset", "reset_momentum"):  # of a loop that begins and ends for all weights together
            if getattr(self, name) != getattr(off, name):
                raise ValueError(f"{name} must be {getattr(off, name)!r} {with_it}, got {getattr(self, name)!r}")
        if isinstance(self.gamma, Pull) and self.mixing:
            raise ValueError(f"gamma must be a number {with_it}, got {self.gamma!r}: it is of loops that begin at x")

    def describe(self) -> dict[str, Any]:
        """Return the fields as plain values that any checkpoint can hold: schedules by their repr or name.

        Example:
            >>> Relaxation(inner_steps=5).describe()["inner_steps"]
            5
        """
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: _plain(value) for name, value in values.items()}

    @property
    def share(self) -> str | None:
        """The first setting that is a share of the training, which :meth:`over` turns into outer steps; None: none is.

        Example:
            >>> Relaxation(inner_steps=5, outer_lr=Starting(0.5, at=0.9, before=1.0)).share
            'outer_lr'
        """
        known = self.over(1.0)
        return next((n for n in self.__dataclass_fields__ if getattr(known, n) is not getattr(self, n)), None)

    def over(self, steps: float) -> "Relaxation":
        """Return the method in which shares of the training, as schedules may have, are outer steps.

        Args:
            steps: the training's length in steps of the optimizer, > 0.
        """
        return in_outer_steps(self, steps / self.inner_steps)  # type: ignore[no-any-return]

    @property
    def spring(self) -> Literal["implicit", "coupled", "explicit"]:
        """The form of the spring."""
        return "coupled" if self.coupled else "explicit" if self.explicit else "implicit"

    @property
    def has_anchor(self) -> bool:
        """Whether x is apart from y and moved by outer steps; with ``perturb`` the user's optimizer moves x itself."""
        return not self.perturb

    @property
    def outer_target(self) -> OuterTarget:
        """What the outer step asks the replicas for."""
        return OUTER_TARGETS[self.elastic_target]

    @property
    def streams(self) -> bool:
        """Whether outer steps are taken part by part, later than their exchange, or keep a share of y."""
        return self.fragments > 1 or self.delay > 0 or self.mixing > 0

    def at(self, t: int) -> Settings:
        """Read and check every number at outer step t.

        Args:
            t: outer step, >= 0.

        Returns:
            The numbers of this step.

        Raises:
            ValueError: a number outside its range: its name, the rule, the value, and t where it varies.
            TypeError: something that is not a number.
        """
        numbers = {name: self._at(name, t) for name in _VARYING}
        if isinstance(self.gamma, Pull):
            numbers["stiffness"] = self.gamma.stiffness(t, inner_steps=self.inner_steps)
        if self.perturb and self.width == 0:
            numbers["width"] = numbers["gamma"] ** -0.5
        return Settings(**numbers)

    def _rule(self, name: str) -> Rule:
        if name == "gamma" and self.perturb and self.width == 0:
            return ("a finite number > 0 with perturb=True (its variance is 1/gamma)", POSITIVE[1])
        return _VARYING[name]

    def _at(self, name: str, t: int) -> float:
        value: Any = getattr(self, name)
        if name == "gamma" and isinstance(value, Pull):
            value = 0.0
        if name == "gamma" and isinstance(value, str):
            raise TypeError(f"gamma must be a number >= 0, Pull(share) or a schedule such as Scoping, got {value!r}")
        rule = self._rule(name)
        if callable(value):
            value = value(t)
            name = f"{name}(t={t})"
        return check_number(name, value, rule)


# A dataclass writes its own.
Relaxation.__init__ = named(Relaxation.__init__)  # type: ignore[method-assign]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if is_dataclass(value):
        return repr(value)
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def check_relaxation(value: Any) -> Relaxation:
    """Return ``value`` if it is a :class:`Relaxation`.

    Raises:
        TypeError: it is not; the message says what to write where it is a callback or a preset that was not called.
    """
    if isinstance(value, Relaxation):
        return value
    name, hint = getattr(value, "__name__", type(value).__name__), ""
    if isinstance(value, str):
        name, hint = repr(value), ": a method is a value and no name, as lookahead() is"
    elif isinstance(getattr(value, "relaxation", None), Relaxation):
        hint = f": {name} has one, at its attribute relaxation"
    elif callable(value):
        hint = f": call the preset, as in {name}()"
    raise TypeError(
        f"relaxation must be a Relaxation, as le.entropy_sgd() and the other presets return, got {name}{hint}"
    )

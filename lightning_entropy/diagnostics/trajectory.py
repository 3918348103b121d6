"""Does SGD walk in circles: the spectrum, the memory and the circulation of a path of weights."""

import math
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_entropy.diagnostics.current import autocorrelation, probability_current
from lightning_entropy.diagnostics.data import Batch
from lightning_entropy.diagnostics.diagnostic import Diagnostic
from lightning_entropy.diagnostics.trajectory_result import TrajectoryResult

_LEAST = 64


def analyse_trajectory(
    snapshots: Tensor | np.ndarray,
    *,
    interval: int = 1,
    components: int = 4,
    gradient_norms: Iterable[float] = (),
    seed: int = 0,
) -> TrajectoryResult:
    r"""Analyse a path of weights: is it equilibrium noise, or does it circulate?

    The Fourier spectrum of the increments x(t+1) - x(t) and the autocorrelation of the weights are those of Chaudhari &
    Soatto 2018 (arXiv:1710.11029), figure 3, each weight scaled to increments of unit variance. Low frequencies and
    long memory do not tell SGD from a slow reversible process, so both are set beside a control: every weight's own
    Ornstein-Uhlenbeck process, fitted by its first autocorrelation, simulated over as many steps. What does tell is
    the probability current (:func:`~lightning_entropy.diagnostics.current.probability_current`) in the planes of the
    leading principal components. All of it supposes a stationary path: discard the descent.

    Args:
        snapshots: Shape (n, d), n >= 64 snapshots at even intervals of d >= 2 weights.
        interval: Steps between snapshots, >= 1.
        components: Principal components in whose planes to look for a current, >= 2; cut to d.
        gradient_norms: One for each snapshot, kept for the plot.
        seed: Of the control and of the test.

    Returns:
        Spectra, autocorrelations and currents of path and control.

    Raises:
        ValueError: If the path is too small or not finite.

    Example:
        >>> turn = np.arange(1000)[:, None] * np.pi / 8
        >>> noise = np.random.default_rng(0).normal(size=(1000, 3)) / 10
        >>> found = analyse_trajectory(np.hstack([np.cos(turn), np.sin(turn), 0 * turn]) + noise)
        >>> found.current.p_value < 0.01, found.control_current.p_value > 0.01
        (True, True)
    """
    path = np.asarray(snapshots.cpu() if isinstance(snapshots, Tensor) else snapshots, dtype=float)
    if path.ndim != 2 or len(path) < _LEAST or path.shape[1] < 2:
        raise ValueError(f"snapshots must be at least {_LEAST} of at least 2 weights, got shape {path.shape}")
    if not np.isfinite(path).all():
        raise ValueError("snapshots must be finite, got a NaN or an infinity")
    if interval < 1:
        raise ValueError(f"interval must be at least 1, got {interval}")
    if components < 2:
        raise ValueError(f"components must be at least 2, got {components}")

    n = len(path)
    rng = np.random.default_rng(seed)
    control = ou_control(path, rng)
    amplitudes, spread = _spectrum(path)
    memory, memory_spread = _memory(path)
    scores, explained = _principal(path, components)
    # The scores' own controls: reversible, with each component's size and memory.
    turned = probability_current(ou_control(scores, rng), seed=seed)
    return TrajectoryResult(
        weights=path.shape[1],
        snapshots=n,
        interval=interval,
        frequencies=np.fft.rfftfreq(n - 1)[1:] / interval,
        amplitudes=amplitudes,
        amplitude_stds=spread,
        control_amplitudes=_spectrum(control)[0],
        lags=np.arange(n // 2) * interval,
        autocorrelations=memory,
        autocorrelation_stds=memory_spread,
        control_autocorrelations=_memory(control)[0],
        components=scores,
        explained=explained,
        current=probability_current(scores, seed=seed),
        control_current=turned,
        gradient_norms=np.asarray(list(gradient_norms), dtype=float),
    )


def ou_control(path: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""Simulate, for every column, the Ornstein-Uhlenbeck process of its variance and first autocorrelation.

    x(t+1) = phi x(t) + sqrt(1 - phi^2) s N(0, 1), from its stationary state: independent columns, no current.

    Args:
        path: Shape (n, d).
        rng: Draws the noise.

    Returns:
        Shape (n, d).

    Example:
        >>> ou_control(np.zeros((3, 1)), np.random.default_rng(0)).tolist()        # a constant stays one
        [[0.0], [0.0], [0.0]]
    """
    x = path - path.mean(0)
    variance = (x**2).mean(0)
    phi = np.divide((x[1:] * x[:-1]).mean(0), variance, out=np.zeros_like(variance), where=variance > 0)
    phi = np.clip(phi, -0.999999, 0.999999)
    noise = rng.normal(size=x.shape) * np.sqrt(variance)
    noise[1:] *= np.sqrt(1 - phi**2)
    for t in range(1, len(noise)):
        noise[t] += phi * noise[t - 1]
    return noise


def _spectrum(path: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    steps = np.diff(path, axis=0)
    steps = steps - steps.mean(0)
    scale = steps.std(0)
    steps = steps[:, scale > 0] / scale[scale > 0]
    if steps.shape[1] == 0:
        raise ValueError("snapshots must move, got a path that stands still")
    amplitude = np.abs(np.fft.rfft(steps, axis=0))[1:] / math.sqrt(len(steps))
    return amplitude.mean(1), amplitude.std(1)


def _memory(path: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rho = autocorrelation(path)
    return np.nanmean(rho, 1), np.nanstd(rho, 1)


def _principal(path: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Project on the leading components; each one's largest loading is positive, which fixes the sense of a turn."""
    x = path - path.mean(0)
    left, sizes, right = np.linalg.svd(x, full_matrices=False)
    count = min(count, x.shape[1])
    signs = np.sign(right[range(count), np.abs(right[:count]).argmax(1)])
    return left[:, :count] * sizes[:count] * signs, sizes[:count] ** 2 / (sizes**2).sum()


class Trajectory(Diagnostic):
    """Record the path of the weights and analyse it: :func:`analyse_trajectory` as a callback.

    What is recorded is what the optimizer walks: while training runs that is the inner iterate y of an inner-outer
    method, and the weights themselves otherwise. ``anchor=True`` records the anchor x instead. When the memory is full,
    every other snapshot is dropped and the interval doubled, so snapshots stay evenly spaced and take at most
    ``snapshots * weights`` numbers on the model's device. Recording resumes with a checkpoint.

    Logged: ``trajectory/current_significance`` and ``current_p_value``, ``control_significance``,
    ``correlation_time``, ``low_frequency_excess`` and ``gradient_norm`` (of mini-batches, after unscaling and before
    clipping, over sqrt(P)).

    Args:
        every_n_steps: Optimizer steps between snapshots, >= 1.
        start_step: Optimizer step of the first: discard the descent.
        weights: How many weights to watch, a fixed random choice, >= 2. None: all.
        snapshots: The most kept, >= 128.
        components: Principal components in whose planes to look for a current.
        anchor: Record x rather than y.
        **when: When to analyse; see :class:`~lightning_entropy.diagnostics.diagnostic.Diagnostic`. No data is read.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> Trajectory(every_n_steps=10, weights=100).name
        'trajectory'
    """

    default_name = "trajectory"

    def __init__(
        self,
        *,
        every_n_steps: int = 1,
        start_step: int = 0,
        weights: int | None = 1000,
        snapshots: int = 2000,
        components: int = 4,
        anchor: bool = False,
        **when: Any,
    ) -> None:
        super().__init__(**when)
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if weights is not None and weights < 2:
            raise ValueError(f"weights must be None or at least 2, got {weights}")
        if snapshots < 2 * _LEAST:  # Half remain when the memory was full.
            raise ValueError(f"snapshots must be at least {2 * _LEAST}, got {snapshots}")
        self.every_n_steps, self.start_step, self.weights = every_n_steps, start_step, weights
        self.snapshots, self.components, self.anchor = snapshots, components, anchor
        self._interval = every_n_steps
        self._steps: list[int] = []
        self._path: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._norm: Tensor | None = None
        self._chosen: dict[str, Tensor] = {}

    @property
    def state_key(self) -> str:
        """Two of them may share a trainer under two names."""
        return f"Trajectory{{'name': {self.name!r}}}"

    @property
    def path(self) -> Tensor:
        """The snapshots so far, shape (n, d)."""
        return torch.stack(self._path) if self._path else torch.empty(0, 0)

    def state_dict(self) -> dict[str, Any]:
        """Hold the recording, so that it goes on after a resume."""
        norms = torch.stack(self._norms).cpu() if self._norms else torch.empty(0)
        return {"interval": self._interval, "steps": list(self._steps), "path": self.path.cpu(), "norms": norms}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a recording."""
        self._interval, self._steps = state_dict["interval"], list(state_dict["steps"])
        self._path, self._norms = list(state_dict["path"]), list(state_dict["norms"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the weights to watch."""
        named = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("module must have a trainable weight (requires_grad=True), got none")
        sizes = [p.numel() for p in named.values()]
        total = sum(sizes)
        if self.weights is None or self.weights >= total:
            indices = torch.arange(total)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            indices = torch.randperm(total, generator=generator)[: self.weights].sort().values
        self._chosen, offset = {}, 0
        for (name, p), size in zip(named.items(), sizes, strict=True):
            mine = indices[(indices >= offset) & (indices < offset + size)] - offset
            if len(mine):
                self._chosen[name] = mine.to(p.device)
            offset += size
        device = next(iter(named.values())).device
        self._path, self._norms = [p.to(device) for p in self._path], [n.to(device) for n in self._norms]

    def _due(self, trainer: pl.Trainer, step: int) -> bool:
        after = step - self.start_step
        return trainer.is_global_zero and after >= 0 and after % self._interval == 0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the mini-batch gradient's norm where a snapshot follows."""
        if self._due(trainer, trainer.global_step + 1):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            count = sum(g.numel() for g in gradients)
            if count:
                norms = torch.stack([g.detach().float().norm() for g in gradients])
                self._norm = norms.norm() / math.sqrt(count)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a snapshot if one is due."""
        step = trainer.global_step
        if not self._due(trainer, step) or (self._steps and self._steps[-1] >= step):
            return
        source = pl_module.state_dict() if self.anchor else dict(pl_module.named_parameters())
        parts = [source[name].detach().flatten()[chosen].float() for name, chosen in self._chosen.items()]
        self._steps.append(step)
        self._path.append(torch.cat(parts))
        self._norms.append(self._norm if self._norm is not None else self._path[-1].new_tensor(math.nan))
        if len(self._steps) >= self.snapshots:
            self._interval *= 2
            kept = [i for i, s in enumerate(self._steps) if (s - self.start_step) % self._interval == 0]
            self._steps = [self._steps[i] for i in kept]
            self._path, self._norms = [self._path[i] for i in kept], [self._norms[i] for i in kept]

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._once(trainer, lambda: self.measure(pl_module, ()))

    def measure(self, module: nn.Module, data: Iterable[Batch], **settings: Any) -> TrajectoryResult | None:
        """Analyse the recording; warn and return None while it is too short."""
        if len(self._path) < _LEAST:
            rank_zero_warn(
                f"Trajectory needs at least {_LEAST} snapshots, got {len(self._path)}: nothing to analyse yet"
            )
            return None
        norms = torch.stack(self._norms).cpu().numpy()
        return analyse_trajectory(
            self.path,
            interval=self._interval,
            components=self.components,
            gradient_norms=() if np.isnan(norms).any() else norms,
            seed=self.seed,
        )

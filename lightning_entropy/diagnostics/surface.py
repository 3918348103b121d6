"""The loss over some examples as a function of one flat vector of weights."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import TypeVar

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_entropy.diagnostics.activation_checkpointing import not_reentrant
from lightning_entropy.diagnostics.batches import take_batches
from lightning_entropy.diagnostics.examples import Batch, BatchDim, Examples, Layout, checked_examples, map_batch
from lightning_entropy.diagnostics.loss import Loss, cross_entropy, kind_of
from lightning_entropy.diagnostics.module_copy import ModuleCopy

_T = TypeVar("_T")


class LossSurface:
    """f(w): the loss averaged over examples, each weighing the same, as a function of a flat vector w.

    w holds the trainable parameters in ``module.named_parameters()`` order; frozen ones and buffers are constants.
    A copy of the module is called whose weights are views of w, so that the module's own weights, gradients and
    buffers are neither read again nor written, and activation checkpointing, which runs a part again in the backward
    pass, finds the same w there. Use it within ``untouched``. Half-precision weights are promoted to float32:
    second differences of a loss are lost in 8 bits of mantissa; complex ones are pairs of real weights. Embeddings have
    dense gradients, and where they have a ``max_norm`` their rows are within it from the start and then free.

    In train mode BatchNorm normalises by the batch, so f depends on how the examples are batched, and dropout
    draws the same mask each time that a batch is evaluated: f is a fixed function in both modes.

    Where there is no memory for the largest batches, they are cut in half, with a warning, until there is: in eval
    mode, where that changes nothing but rounding. So a batch is what bounds the memory.

    Args:
        module: Any module; with a LightningModule, ``state`` makes it the anchor's surface.
        data: A loader or an iterable of batches.
        loss: ``(module, batch) -> scalar``, a mean over the batch. None: :func:`cross_entropy`.
        examples: How many examples of ``data``, >= 1; or a callable from a batch to its number of them, and all are
            taken. None: all, counted by the tensors' sizes.
        batch_dim: Dimension of the tensors that counts examples, or a callable from a batch to it. None: that of the
            one size that all of them share; see :class:`~lightning_entropy.diagnostics.examples.Layout`.
        mode: "eval" or "train"; must be the mode given to ``untouched``.
        seed: Of the choice of examples and of dropout.
        state: Values by name, e.g. ``module.state_dict()``, in place of the module's own parameters and buffers.
        transfer: Moves a batch to the module's device. None: a plain copy.

    Raises:
        ValueError: If nothing is trainable, the data is empty, a batch does not say how many examples it has, the loss
            is not a finite, differentiable scalar, or a part runs under reentrant activation checkpointing.

    Example:
        >>> class Square(nn.Module):                         # f(w) = mean of (w x)^2 / 2, at w = 3
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = nn.Parameter(torch.tensor([3.0]))
        >>> surface = LossSurface(Square(), [torch.tensor([1.0]), torch.tensor([2.0, 2.0])],
        ...                       loss=lambda m, x: (m.w * x).square().mean() / 2)
        >>> surface.value, surface.gradient(surface.weights)      # mean of x^2 is 3
        (13.5, tensor([9.]))
        >>> surface.hessian_products(surface.weights, torch.ones(1, 1))
        tensor([[3.]])
    """

    def __init__(
        self,
        module: nn.Module,
        data: Iterable[Batch],
        *,
        loss: Loss | None = None,
        examples: Examples = None,
        batch_dim: BatchDim = None,
        mode: str = "eval",
        seed: int = 0,
        state: Mapping[str, Tensor] | None = None,
        transfer: Callable[[Batch], Batch] | None = None,
    ) -> None:
        state = state or {}
        named = dict(module.named_parameters())
        trainable = {name: p for name, p in named.items() if p.requires_grad}
        if not trainable:
            raise ValueError("module must have a trainable weight (requires_grad=True), got none")
        self.mode, self.seed, self.device = mode, seed, next(iter(trainable.values())).device
        double = all(p.dtype == torch.float64 for p in trainable.values())
        self.dtype = torch.float64 if double else torch.float32

        def constant(name: str, tensor: Tensor) -> Tensor:
            return self._cast(state.get(name, tensor).detach().clone().to(self.device))

        self._loss = loss or cross_entropy
        self._module = ModuleCopy(module)
        self.names = list(trainable)
        self._shapes = [torch.view_as_real(p).shape if p.is_complex() else p.shape for p in trainable.values()]
        self._numels = [shape.numel() for shape in self._shapes]
        self._complex = [p.is_complex() for p in trainable.values()]
        values = {name: self._module.within(name, constant(name, p)) for name, p in trainable.items()}
        pairs = [torch.view_as_real(v) if v.is_complex() else v for v in values.values()]
        self.weights = torch.cat([v.flatten().to(self.dtype) for v in pairs])
        self._frozen = {n: constant(n, p) for n, p in named.items() if not p.requires_grad}
        self._buffers = {n: constant(n, b) for n, b in module.named_buffers()}
        transfer = transfer or (lambda batch: move_data_to_device(batch, self.device))
        counted = callable(checked_examples(examples))
        self.layout = Layout(batch_dim, examples if counted else None)  # type: ignore[arg-type]
        taken = take_batches(data, None if counted else examples, layout=self.layout, seed=seed)  # type: ignore[arg-type]
        self.batches = [map_batch(transfer(batch), self._cast) for batch in taken]
        sizes = [self.layout.size(batch) for batch in self.batches]
        self.examples = sum(sizes)
        self.shares = [size / self.examples for size in sizes]
        self._watched = False
        self._graph: tuple[Tensor, Tensor, Tensor] | None = None  # (the caller's w, its leaf, the gradient)

        self.value = self.loss(self.weights, check=True)

    def _cast(self, tensor: Tensor) -> Tensor:
        tensor = tensor.clone() if tensor.is_inference() else tensor  # Autograd refuses the others.
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def __len__(self) -> int:
        """Count the weights, P."""
        return len(self.weights)

    def batch_loss(self, weights: Tensor, batch: Batch, seed: int | None = None) -> Tensor:
        """Evaluate the loss of one batch at ``weights``, shape (P,), as a scalar tensor with its graph."""
        return self.apply(self._loss, weights, batch, seed)

    def apply(self, function: Callable[[nn.Module, Batch], _T], weights: Tensor, batch: Batch, seed: int | None) -> _T:
        """Call a function of a module and a batch with the module at ``weights``, shape (P,)."""
        self._bind(weights)
        if self.mode == "train" and seed is not None:
            torch.manual_seed(self.seed + seed)
        return function(self._module.module, batch)

    def _bind(self, weights: Tensor) -> None:
        """Set views of ``weights`` as the weights of the module's copy; its buffers are what they were."""
        parts = [part.view(shape) for part, shape in zip(weights.split(self._numels), self._shapes, strict=True)]
        parts = [torch.view_as_complex(v) if pair else v for v, pair in zip(parts, self._complex, strict=True)]
        buffers = self._buffers
        if self.mode == "train":
            buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        self._module.set({**dict(zip(self.names, parts, strict=True)), **self._frozen, **buffers})

    def loss(self, weights: Tensor, *, check: bool = False) -> float:
        """Evaluate f at ``weights``, shape (P,); with ``check``, raise ValueError unless losses are finite scalars."""
        return self.evaluate(weights, check=check).item()

    @torch.no_grad()
    def evaluate(self, weights: Tensor, *, check: bool = False) -> Tensor:
        """Evaluate f as :meth:`loss`, as a float64 scalar tensor: without ``check`` no device is waited for."""
        return self._within_memory(lambda: self._evaluate(weights, check))

    def _evaluate(self, weights: Tensor, check: bool) -> Tensor:
        values = []
        for i, batch in enumerate(self.batches):
            values.append(self.batch_loss(weights, batch, i))
            if check and not (isinstance(values[-1], Tensor) and values[-1].ndim == 0):
                raise ValueError(f"loss must be a scalar tensor, got {kind_of(values[-1])}")
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for value, share in zip(values, self.shares, strict=True):
            total += share * value
        if check and not total.isfinite():
            i, value = next((i, v) for i, v in enumerate(values) if not v.isfinite())
            raise ValueError(f"loss must be finite, got {value.item()} on batch {i}")
        return total

    def gradient(self, weights: Tensor) -> Tensor:
        """Evaluate the gradient of f at ``weights``, shape (P,), in (P,)."""
        return self.value_and_gradient(weights)[1]

    def value_and_gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate f, a float64 scalar tensor, and its gradient, shape (P,), at ``weights``, shape (P,)."""
        return self._within_memory(lambda: self._value_and_gradient(weights))

    def _value_and_gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        w = weights.detach().requires_grad_()
        value = torch.zeros((), dtype=torch.float64, device=self.device)
        gradient = torch.zeros_like(weights)
        for i, (batch, share) in enumerate(zip(self.batches, self.shares, strict=True)):
            loss, part = self._differentiated(w, batch, i)
            value += share * loss.detach()
            gradient.add_(part, alpha=share)
        return value, gradient

    def hessian_products(self, weights: Tensor, vectors: Tensor) -> Tensor:
        """Multiply vectors by the Hessian of f at ``weights``: backward through the gradient (Pearlmutter 1994).

        Each batch's gradient graph is built once for all ``vectors``; with a single batch it is kept for the next
        call, which saves the forward and first backward pass of every product but the first.

        Args:
            weights: Shape (P,). The kept graph belongs to this very tensor.
            vectors: Shape (k, P).

        Returns:
            Shape (k, P).
        """
        return self._within_memory(lambda: self._hessian_products(weights, vectors))

    def _hessian_products(self, weights: Tensor, vectors: Tensor) -> Tensor:
        products = torch.zeros_like(vectors)
        for i, (batch, share) in enumerate(zip(self.batches, self.shares, strict=True)):
            for k, product in enumerate(self.batch_products(weights, vectors, batch, i, keep=len(self.batches) == 1)):
                products[k].add_(product, alpha=share)
        return products

    def batch_products(
        self, weights: Tensor, vectors: Tensor, batch: Batch, index: int, *, keep: bool = False
    ) -> Iterator[Tensor]:
        """Multiply each vector, shape (k, P), by the Hessian of one batch's loss; with ``keep`` its graph stays."""
        w, gradient = self._gradient_graph(weights, batch, index, keep)
        for k, vector in enumerate(vectors):
            last = not keep and k == len(vectors) - 1
            if gradient.requires_grad:
                yield torch.autograd.grad(gradient, w, vector, retain_graph=not last, materialize_grads=True)[0]
            else:  # A loss linear in w has no curvature.
                yield torch.zeros_like(vector)

    def _gradient_graph(self, weights: Tensor, batch: Batch, index: int, keep: bool) -> tuple[Tensor, Tensor]:
        if keep and self._graph is not None and self._graph[0] is weights:
            self._bind(self._graph[1])  # a checkpointed part is run again
            return self._graph[1:]
        w = weights.detach().requires_grad_()
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            _, gradient = self._differentiated(w, batch, index, create_graph=True)
        if keep:
            self._graph = weights, w, gradient
        return w, gradient

    def _differentiated(
        self, w: Tensor, batch: Batch, index: int, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch and its gradient, the first time under watch for what cannot be differentiated."""
        with nullcontext() if self._watched else not_reentrant(self._module.module):
            loss = self.batch_loss(w, batch, index)
            if not loss.requires_grad:
                raise ValueError("loss must depend on the trainable weights, got a constant")
            (gradient,) = torch.autograd.grad(loss, w, create_graph=create_graph)
        self._watched = True
        return loss, gradient

    def _within_memory(self, evaluate: Callable[[], _T]) -> _T:
        """Evaluate, with batches cut in half each time that there is no memory for the largest."""
        while True:
            try:
                return evaluate()
            except torch.OutOfMemoryError as error:  # noqa: PERF203 - a turn is a whole evaluation
                self._graph = None
                if not self._can_go_on(error):
                    raise

    def _can_go_on(self, error: torch.OutOfMemoryError) -> bool:
        try:
            return self._halve()
        except ValueError as reason:  # a batch that cannot be cut
            raise error from reason

    def _halve(self) -> bool:
        """Cut the largest batches in half; False where there is none with two examples, or where they are not alone.

        Raises:
            ValueError: A batch does not say how to cut it.
        """
        sizes = [self.layout.size(batch) for batch in self.batches]
        largest = max(sizes)
        half = -(-largest // 2)
        if self.mode == "train" or largest < 2:  # BatchNorm normalises by the batch
            return False
        parts: list[tuple[Batch, int]] = []
        for batch, size in zip(self.batches, sizes, strict=True):
            for start in range(0, size, half):
                stop = min(start + half, size)
                parts.append((self.layout.cut(batch, start, stop), stop - start))
        if any(self.layout.size(batch) != size for batch, size in parts):
            raise ValueError("the parts of a batch must say how many examples they have: say it with batch_dim=")
        warnings.warn(
            f"no memory for a batch of {largest} examples: batches are cut to {half} from here on, which changes "
            "rounding alone",
            stacklevel=2,
        )
        self.batches = [batch for batch, _ in parts]
        self.shares = [size / self.examples for _, size in parts]
        return True

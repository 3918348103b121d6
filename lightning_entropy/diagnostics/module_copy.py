"""A copy of a module whose weights can be set to any tensors."""

import copy
from collections.abc import Mapping

from torch import Tensor, nn


class ModuleCopy:
    """A copy of a module whose parameters and buffers are plain tensors that can be set.

    Args:
        module: copied without its weights; the copy of a LightningModule belongs to no Trainer.

    Attributes:
        module: the copy.
    """

    def __init__(self, module: nn.Module) -> None:
        shared = [*module.parameters(), *module.buffers()]
        self.module = copy.deepcopy(module, {id(value): value for value in shared})
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}  # by the name of its first place, as torch names it
        self._limits: dict[str, tuple[float, float]] = {}  # max_norm and norm_type of an embedding's weight
        names: dict[int, str] = {}
        for prefix, part in self.module.named_modules():
            if isinstance(part, nn.Embedding | nn.EmbeddingBag):
                part.sparse = False
            for attribute, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                name = names.setdefault(id(tensor), f"{prefix}.{attribute}" if prefix else attribute)
                self._places.setdefault(name, []).append((part, attribute))
                if getattr(part, "max_norm", None) is not None and attribute == "weight":
                    self._limits[name] = part.max_norm, part.norm_type  # type: ignore[assignment]
            if getattr(part, "max_norm", None) is not None:
                part.max_norm = None  # type: ignore[assignment]
        for places in self._places.values():
            for part, attribute in places:
                delattr(part, attribute)

    def within(self, name: str, value: Tensor) -> Tensor:
        """Return the weight of an embedding with ``max_norm`` as its forward pass makes it; any other as it is."""
        if name not in self._limits:
            return value
        limit, kind = self._limits[name]
        return value.renorm(kind, 0, limit)

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Set the tensors of every name, in all the places that share it."""
        for name, value in values.items():
            for part, attribute in self._places[name]:
                setattr(part, attribute, value)

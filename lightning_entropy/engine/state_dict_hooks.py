"""A module's state dict holds x and takes x, whatever its parameters hold."""

import weakref
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakSet

from torch import Tensor
from torch.jit import ScriptModule
from torch.nn import Module

Owner = TypeVar("Owner")


class AnchorSource(Protocol):
    """An object that can put the anchor x into the parameters and take it out again."""

    def begin_loading(self) -> None:
        """Put x into the parameters while a state dict is loaded; calls nest."""

    def end_loading(self) -> None:
        """Put back what they held, where nothing was loaded."""

    def tracks(self, p: Tensor) -> bool:
        """Whether p has an x of its own."""
        ...

    def anchor_of(self, p: Tensor) -> Tensor | None:
        """Return x of one parameter where something else is in it, else None."""


class StateDictHooks:
    """Make a module's ``state_dict()`` hold x, and what is loaded into it the new x; its submodules' too.

    Args:
        module: the whole one: before its state dict is made, submodules that have come since get their hooks.
        source: of x.
    """

    def __init__(self, module: Module, source: AnchorSource) -> None:
        self._source, self._module = weakref.ref(source), weakref.ref(module)
        self._having = WeakSet[Module]()
        self._handles = [Module.register_state_dict_pre_hook(module, Install(self))]
        self.install()

    def install(self) -> None:
        """Register the hooks with every submodule that has parameters and lacks them."""
        module, source = self._module(), self._source()
        if module is None or source is None:
            return
        for submodule in module.modules():
            if submodule in self._having or next(submodule.parameters(), None) is None:
                continue
            self._having.add(submodule)
            # The method of Module: a scripted module refuses its own, and takes no hook of loading.
            self._handles.append(Module.register_state_dict_post_hook(submodule, PutAnchor(source)))
            if not isinstance(submodule, ScriptModule):
                load = LoadAnchor(source)
                self._handles += [
                    submodule.register_load_state_dict_pre_hook(load.before),
                    submodule.register_load_state_dict_post_hook(load.after),
                ]

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()


class Hook(Generic[Owner]):
    """A hook that refers to its owner weakly.

    Copying or pickling the module makes a hook without an owner, which does nothing.
    """

    def __init__(self, owner: Owner | None = None) -> None:
        self._reference = None if owner is None else weakref.ref(owner)

    @property
    def owner(self) -> Owner | None:
        """Who made it; None in a copy."""
        return None if self._reference is None else self._reference()

    def __reduce__(self) -> tuple[type["Hook[Owner]"], tuple[()]]:
        return type(self), ()


class Install(Hook[StateDictHooks]):
    """Before a state dict is made, look for new submodules."""

    def __call__(self, module: Module, prefix: str, keep_vars: bool) -> None:
        """Register their hooks."""
        if self.owner is not None:
            self.owner.install()


class PutAnchor(Hook[AnchorSource]):
    """Put x in the place of y in a module's state dict."""

    def __call__(self, module: Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        """Replace the module's own parameters; submodules have this hook themselves."""
        source = self.owner
        if source is None:
            return
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            anchor, key = source.anchor_of(p), prefix + name
            # Whoever asks for the parameters themselves (keep_vars=True) gets them.
            if anchor is not None and key in state_dict and state_dict[key] is not p:
                state_dict[key] = anchor.detach().to(p.dtype)


class LoadAnchor(Hook[AnchorSource]):
    """Show x while a module's weights are loaded, so that they are the new x."""

    def before(self, module: Module, *_: Any) -> None:
        """Put x into the parameters, where any of the module's is tracked."""
        source = self._concerned(module)
        if source is not None:
            source.begin_loading()

    def after(self, module: Module, *_: Any) -> None:
        """Put y back where nothing was loaded."""
        source = self._concerned(module)
        if source is not None:
            source.end_loading()

    def _concerned(self, module: Module) -> AnchorSource | None:
        source = self.owner
        return source if source is not None and any(source.tracks(p) for p in module.parameters()) else None

"""A module's state dict gives x and takes x, whatever its parameters hold."""

import weakref
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakSet

from torch import Tensor
from torch.jit import ScriptModule
from torch.nn import Module

Owner = TypeVar("Owner")


class Shower(Protocol):
    """Who knows x: :class:`lightning_entropy.engine.module_loops.Loops`."""

    shown: bool

    def show(self) -> None:
        """Put x into the parameters."""

    def hide(self) -> None:
        """Put y back."""

    def holds(self, p: Tensor) -> bool:
        """Tell whether p has an x of its own."""

    def anchor_of(self, p: Tensor) -> Tensor | None:
        """Give x of one parameter where something else is in it now, else None."""


class ModuleHooks:
    """Make a module's ``state_dict()`` give x, and what is loaded into it the new x; its submodules' too.

    Args:
        module: the whole one: before its state dict is made, submodules that have come since get their hooks.
        shower: who knows x.
    """

    def __init__(self, module: Module, shower: Shower) -> None:
        self._shower, self._module = weakref.ref(shower), weakref.ref(module)
        self._having = WeakSet[Module]()
        self._handles = [Module.register_state_dict_pre_hook(module, Install(self))]
        self.install()

    def install(self) -> None:
        """Give every submodule that has parameters its hooks."""
        module, shower = self._module(), self._shower()
        if module is None or shower is None:
            return
        for submodule in module.modules():
            if submodule in self._having or next(submodule.parameters(), None) is None:
                continue
            self._having.add(submodule)
            # The method of Module: a scripted module refuses its own, and takes no hook of loading.
            self._handles.append(Module.register_state_dict_post_hook(submodule, ShowAnchor(shower)))
            if not isinstance(submodule, ScriptModule):
                load = LoadAnchor(shower)
                self._handles += [
                    submodule.register_load_state_dict_pre_hook(load.before),
                    submodule.register_load_state_dict_post_hook(load.after),
                ]

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()


class Hook(Generic[Owner]):
    """A hook that does not keep its owner alive, and a copy of which (of a copied or pickled module) has none."""

    def __init__(self, owner: Owner | None = None) -> None:
        self._reference = None if owner is None else weakref.ref(owner)

    @property
    def owner(self) -> Owner | None:
        """Who made it; None in a copy."""
        return None if self._reference is None else self._reference()

    def __reduce__(self) -> tuple[type["Hook[Owner]"], tuple[()]]:
        return type(self), ()


class Install(Hook[ModuleHooks]):
    """Before a state dict is made, look for new submodules."""

    def __call__(self, module: Module, prefix: str, keep_vars: bool) -> None:
        """Do so."""
        if self.owner is not None:
            self.owner.install()


class ShowAnchor(Hook[Shower]):
    """Put x in the place of y in a module's state dict."""

    def __call__(self, module: Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        """Replace the module's own parameters; submodules have this hook themselves."""
        shower = self.owner
        if shower is None or shower.shown:
            return
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            anchor, key = shower.anchor_of(p), prefix + name
            # Whoever asks for the parameters themselves (keep_vars=True) gets them.
            if anchor is not None and key in state_dict and state_dict[key] is not p:
                state_dict[key] = anchor.detach().to(p.dtype)


class LoadAnchor(Hook[Shower]):
    """Show x while a module's weights are loaded, so that they are the new x."""

    _shows = False

    def before(self, module: Module, *_: Any) -> None:
        """Show x, unless it is shown: by the hook of the module around this one, say; or there is none in here."""
        shower = self.owner
        self._shows = shower is not None and not shower.shown and any(shower.holds(p) for p in module.parameters())
        if shower is not None and self._shows:
            shower.show()

    def after(self, *_: Any) -> None:
        """Put y back where nothing was loaded."""
        shower = self.owner
        if shower is not None and self._shows:
            shower.hide()
        self._shows = False

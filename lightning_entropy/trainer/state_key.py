"""The name under which Lightning keeps a callback's state, and what a class says that stands in a callback's place."""

from lightning.pytorch import Callback


class StateKey:
    """The state key, which Lightning asks every callback for first; a class in the place of one says what to write."""

    def __get__(self, callback: Callback | None, owner: type) -> str:
        """Return the class's name, as Lightning's own does."""
        if callback is None:
            name = owner.__name__
            raise AttributeError(f"{name} is a class and no callback yet: write callbacks=[{name}(...)]") from None
        return owner.__qualname__

"""A progress bar that shows itself only when there is something to wait for, and someone to see it."""

from tqdm import tqdm


def progress_bar(what: str, total: int, show: bool) -> tqdm:
    """Return a bar on stderr, quiet unless that is a terminal.

    Args:
        what: Stands before the bar.
        total: Ticks.
        show: Whether to show it: after five seconds, and nothing is left behind.

    Returns:
        The bar, to be updated within a ``with``.
    """
    return tqdm(desc=what, total=total, delay=5.0, disable=None if show else True, leave=False, dynamic_ncols=True)

"""A progress bar that shows itself only when there is something to wait for."""

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


def progress_bar(what: str, total: int, show: bool) -> Tqdm:
    """Make a bar of ``total`` ticks that appears after five seconds, if ``show``, and leaves nothing behind."""
    return Tqdm(desc=what, total=total, delay=5.0, disable=not show, leave=False, dynamic_ncols=True)

"""What results look like: numbers with names, and pictures drawn, logged or shown."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Pictures side by side in an overview.
_ABREAST = 4


class Result(Protocol):
    """What an estimator returns: numbers to log and a picture."""

    def scalars(self) -> dict[str, float]:
        """Return the numbers worth a line in a log, by name."""
        ...

    def plot(self, ax: "Axes | None" = None) -> Any:
        """Draw on ``ax``, or on a new figure; return the figure and the axes."""


def draw(result: Result) -> "Figure":
    """Draw a result on a figure of its own, its ``panels`` side by side where it has several; pyplot stays unused."""
    from matplotlib.figure import Figure

    panels = getattr(result, "panels", (result.plot,))
    figure = Figure(figsize=(7.0, 4.2) if len(panels) == 1 else (5.0 * len(panels), 4.0), layout="constrained")
    for panel, ax in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        panel(ax)
    return figure


def overview(results: "Mapping[str, Sequence[Result]]") -> "Figure":
    """Draw several results on one figure, as an image for a logger or a slide.

    Args:
        results: What was measured, by the title that stands above its pictures.

    Returns:
        The figure; ``logger.experiment.add_figure(name, figure, step)`` logs it to TensorBoard.

    Raises:
        ValueError: If there is nothing to draw.
    """
    from matplotlib.figure import Figure

    panels = {title: [p for r in row for p in getattr(r, "panels", (r.plot,))] for title, row in results.items()}
    width = min(_ABREAST, max((len(row) for row in panels.values()), default=0))
    if not width:
        raise ValueError("results must hold something to draw, got none")
    heights = [max(1, -(-len(row) // width)) for row in panels.values()]
    figure = Figure(figsize=(6.0 * width, 4.4 * sum(heights) + 0.4 * len(heights)), layout="constrained")
    parts = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, height, (title, row) in zip(parts, heights, panels.items(), strict=True):
        part.suptitle(title)
        axes = part.subplots(height, width, squeeze=False).flatten()
        for ax, panel in zip(axes, row, strict=False):
            panel(ax)
        for ax in axes[len(row) :]:
            ax.set_axis_off()
    return figure


def axes_for(ax: "Axes | None") -> "Axes":
    """Return ``ax``, or the axes of a new pyplot figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7.0, 4.2), layout="constrained")[1]


def log_figure(logger: Any, name: str, figure: Any, step: int) -> bool:
    """Log a figure in the logger's own way; return whether it has one."""
    experiment = logger.experiment
    if hasattr(experiment, "add_figure"):  # TensorBoard
        experiment.add_figure(name, figure, step)
    elif hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(name, [figure], step=step)
    elif hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):  # MLflow
        experiment.log_figure(logger.run_id, figure, f"{name}-step{step:08d}.png")
    elif hasattr(experiment, "log_figure"):  # Comet
        experiment.log_figure(figure_name=name, figure=figure, step=step)
    else:
        return False
    return True

"""Animate the picture's first panel."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib import animation
from tqdm import tqdm

from recipes.smoothing.colours import GREY
from recipes.smoothing.talk import Setup, descend


def animate(talk: Setup, path: Path, frames: int) -> None:
    """Write a GIF or an MP4 of u and of the populations on it as time runs.

    Raises:
        ValueError: on another suffix, or for MP4 where there is no ffmpeg.
    """
    check_animation(path)
    descents = descend(talk, frames)
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5.6), sharex=True, layout="constrained")
        above.plot(talk.x, talk.f, color=GREY, lw=1, label="f")
        below.fill_between(talk.x, talk.rho0, color=GREY, alpha=0.5, lw=0, label="start")
        curves = []
        for descent in descents:
            (u,) = above.plot(talk.x, descent.potentials[0], color=descent.colour, lw=2)
            (rho,) = below.plot(talk.x, talk.rho0, color=descent.colour, lw=2, label=descent.name)
            u.set_visible(len(descent.potentials) > 1)
            curves.append((u, rho))
        below.set_ylim(0, 1.05 * max(talk.rho0.max(), *(d.densities[-1].max() for d in descents)))
        below.set_xlim(talk.x[0], talk.x[-1])
        below.set_xlabel("x")
        below.set_ylabel("density")
        above.set_ylabel("loss")
        below.legend(loc="upper left", frameon=False)
        title = above.set_title("", loc="left")

        def update(frame: int) -> list[Any]:
            now = frame / frames * talk.duration
            for (u, rho), descent in zip(curves, descents, strict=True):
                u.set_ydata(descent.potential(now))
                rho.set_ydata(descent.densities[frame - 1] if frame else talk.rho0)
            title.set_text(f"u(., t) as t runs back to 0; time {now:.1f} of {talk.duration:g}")
            return [title, *(curve for pair in curves for curve in pair)]

        film = animation.FuncAnimation(figure, update, frames=frames + 1)
        writer = "pillow" if path.suffix == ".gif" else "ffmpeg"
        with tqdm(total=frames + 1, desc=str(path), unit="frame", disable=None) as bar:
            film.save(path, writer=writer, fps=12, dpi=90, progress_callback=lambda frame, total: bar.update())
        plt.close(figure)


def check_animation(path: Path) -> None:
    """Refuse a path that ``animate`` cannot write, before anything is computed."""
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"animate must end in .gif or .mp4, got {path}")
    if path.suffix == ".mp4" and not animation.writers.is_available("ffmpeg"):
        raise ValueError(f"animate to .mp4 needs ffmpeg on the PATH; .gif does not, got {path}")

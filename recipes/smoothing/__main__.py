"""``python -m recipes.smoothing --out smoothing.png``."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from tqdm import tqdm

import recipes.smoothing
from lightning_entropy.pde import local_minima
from recipes.messages import Parser, run
from recipes.smoothing.expression import parse
from recipes.smoothing.film import animate, check_animation
from recipes.smoothing.picture import draw
from recipes.smoothing.talk import descend, numbers, setup

FRAMES = 60


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, draw, and print the numbers of the picture."""
    parser = Parser(prog="python -m recipes.smoothing", description=(recipes.smoothing.__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("smoothing.png"), help="picture to write (png, pdf, svg)")
    parser.add_argument("--f", metavar="EXPR", help='your own landscape, such as "x**2 + 1.5*sin(2*pi*x)"')
    ends = "LEFT", "RIGHT"
    parser.add_argument("--domain", type=float, nargs=2, default=(-3.0, 3.0), metavar=ends, help="where it is drawn")
    parser.add_argument("--animate", type=Path, metavar="FILE", help="also write a GIF or MP4 of u and the densities")
    options = parser.parse_args(arguments)
    try:
        if options.animate:
            check_animation(options.animate)
        talk = setup(None if options.f is None else parse(options.f), tuple(options.domain))
    except ValueError as error:
        parser.error(str(error))

    with tqdm(total=7, desc=str(options.out), unit="panel", disable=None) as bar:
        descents = descend(talk)
        bar.update()
        figure = draw(talk, descents, bar)
        figure.savefig(options.out, dpi=90)
        plt.close(figure)
    if options.animate:
        animate(talk, options.animate, FRAMES)

    print(f"f: {len(local_minima(talk.f))} local minima, lowest {talk.f.min():.3f} at {talk.x[talk.f.argmin()]:.3f}")
    for row in numbers(talk, descents):
        print(
            f"{row['name']:<12} starts on {row['minima']} minima (argmin {row['argmin']:.3f}); ends at mean "
            f"{row['mean']:.3f}, sd {row['sd']:.3f}, mode {row['mode']:.3f}, E f {row['loss']:.3f}, "
            f"{row['near_minimum']:.1%} within 0.25 of the minimum"
        )


if __name__ == "__main__":
    run(main)

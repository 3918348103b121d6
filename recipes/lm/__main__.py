"""``python -m recipes.lm fit``."""

from recipes.lm.cli import main
from recipes.messages import run

if __name__ == "__main__":
    run(main)

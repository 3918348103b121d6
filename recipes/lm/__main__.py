"""``python -m recipes.lm fit``."""

from recipes.lm.cli import main

if __name__ == "__main__":
    main()

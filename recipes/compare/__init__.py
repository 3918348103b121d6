"""A fair comparison: the same gradient evaluations, schedule, learning-rate search and evaluation for every method.

The rooms: `methods` says what a method adds to SGD, `budget` how many steps it may take, `measure` how weights are
judged, `judge` when, `run` trains once and leaves a file, `study` chooses learning rates and repeats over seeds,
`report` writes tables and the picture.
"""

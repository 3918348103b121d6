"""A fair comparison: the same gradient evaluations, schedule, learning-rate search and evaluation for every method.

The rooms: `methods` says what a method adds to SGD, `budget` how many steps it may take, `measure` how weights are
judged, `judge` when, `run` trains once and leaves a file, `study` chooses learning rates and repeats over seeds,
`trainings` runs them side by side, `report` writes tables and the picture. `lm` is the same house for the language
model, whose methods are compared by what they send; `strength` asks of many methods on several tasks whether they help.
"""

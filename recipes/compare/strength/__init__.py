"""Do these methods help? Every method with its own search over rate and weight decay, on several tasks, with intervals.

``python -m recipes.compare strength``. The rooms: `tasks` are the nets, data and settings to try, `report` compares by
pairs of seeds and writes the tables, `command` is the command line. Trainings are those of `recipes.compare`.
"""

"""A comparison small enough for a test."""

import json
from pathlib import Path

from recipes.compare.run import Run, Task, execute

TASK = Task(
    net="lenet",
    data={"source": "random_grey", "n_train": 192, "n_val": 64, "batch_size": 32, "eval_batch_size": 256},
    epochs=3,
    weight_decay=0.0,
    points=2,
    accelerator="cpu",
    eval_images=128,
)


def record_of(method, folder, lr=0.05, seed=0, budget="compute", task=TASK):
    return json.loads(execute(Run(task, method, lr, seed, budget), Path(folder)).read_text())

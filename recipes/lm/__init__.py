"""A small language model: a GPT over bytes, its text, its optimizers and its command line.

``python -m recipes.lm fit`` trains one on the sources of Python's standard library and writes Python of its own. The
rooms: `gpt` is the net, `data` the text, `module` what a Trainer needs of both, `muon` and `schedule` what AdamW and
the cosine do not cover, `traffic` what a training has seen and sent, `cli` the command line.
"""

"""Low-communication training of the language model: the loss of every method beside the bytes that it sends.

``python -m recipes.compare lm``. The rooms: `methods` says what is trained, `run` trains once and leaves a file,
`speed` turns step times and bytes into tokens per second on a link, `study` chooses settings and lists trainings,
`report` writes tables and the picture, `command` is the command line.
"""

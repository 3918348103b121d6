"""One process under the Trainer: the callbacks, BatchNorm statistics, and who drives a Trainer's loops."""

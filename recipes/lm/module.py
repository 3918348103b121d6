"""The LightningModule of the language model: the loss of the next token, its metrics, and a sample of text."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from recipes.limits import check
from recipes.lm.gpt import GPT


class LanguageModel(L.LightningModule):
    """Train a GPT to predict the next token.

    Logs ``train_loss``, ``val_loss`` and ``test_loss`` (cross entropy in nats per token), ``val_perplexity`` and, for
    bytes, ``val_bits_per_byte``. After each validation rank 0 prints a sample of the text that the weights write.

    Args:
        net: maps tokens to logits.
        optimizer: makes the optimizer from ``net.parameter_groups()``.
        schedule: scales its learning rate, from the share of training done in [0, 1]; None keeps it constant.
        prompt: what a sample begins with; at least one byte.
        sample: bytes of a sample, >= 0; 0 is none. Only a net of 256 tokens, which are bytes, writes one.
        temperature: of the sample, >= 0.
        compile: compile the net with ``torch.compile``.

    Raises:
        ValueError: if a number is out of its range, or there is no prompt.
    """

    def __init__(
        self,
        net: GPT,
        optimizer: OptimizerCallable,
        *,
        schedule: Callable[[float], float] | None = None,
        prompt: str = "def ",
        sample: int = 300,
        temperature: float = 0.8,
        compile: bool = False,
    ) -> None:
        super().__init__()
        check("sample", sample, 0, 10**6)
        check("temperature", temperature, 0, 100)
        if not prompt:
            raise ValueError("prompt must have a byte, got none")
        self.net = net
        self.optimizer = optimizer
        self.schedule = schedule
        self.prompt = prompt
        self.sample = sample
        self.temperature = temperature
        self.compile_net = compile

    @property
    def of_bytes(self) -> bool:
        """Whether the tokens are bytes."""
        return self.net.vocab_size == 256

    def setup(self, stage: str) -> None:
        """Check the text against the net, and compile.

        Raises:
            ValueError: if the text's windows are longer than the net's context, or its tokens are not the net's.
        """
        data = self.trainer.datamodule
        block_size = getattr(data, "block_size", 0)
        if block_size > self.net.block_size:
            raise ValueError(f"data.block_size must be at most the net's {self.net.block_size}, got {block_size}")
        tokens = getattr(data, "tokens", None)
        if tokens is not None and (tokens == "bytes") != self.of_bytes:
            raise ValueError(f"data.tokens must be bytes for a vocab_size of 256 alone, got {self.net.vocab_size}")
        largest = max((int(text.max()) for text in (data.train_text, data.val_text)) if tokens else (0,))
        if largest >= self.net.vocab_size:
            raise ValueError(f"data.files must hold tokens below vocab_size = {self.net.vocab_size}, got {largest}")
        if self.compile_net:
            # In place: the names in the state_dict stay.
            self.net.compile()
            self.compile_net = False

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [n, t] to logits [n, t, vocab_size]."""
        return self.net(tokens)

    def configure_optimizers(self) -> dict[str, Any]:
        """Make the optimizer and its schedule by the step."""
        optimizer = self.optimizer(self.net.parameter_groups())
        if self.schedule is None:
            return {"optimizer": optimizer}
        steps = self.trainer.estimated_stepping_batches
        scheduler = LambdaLR(optimizer, partial(_scale, self.schedule, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of windows [n, t + 1]."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the loss."""
        self.log("val_loss", self._loss(batch), batch_size=len(batch), sync_dist=True, prog_bar=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the loss."""
        self.log("test_loss", self._loss(batch), batch_size=len(batch), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log what follows from the loss, and write a sample."""
        loss = float(self.trainer.callback_metrics["val_loss"])
        self.log("val_perplexity", math.exp(min(loss, 700.0)))
        if self.of_bytes:
            self.log("val_bits_per_byte", loss / math.log(2))
        if self.sample and self.of_bytes and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            self._write(loss)

    def write_text(self, n: int, *, seed: int = 0) -> str:
        """Return the prompt and ``n`` bytes that follow it, the same for the same weights and seed.

        Bytes that are no UTF-8 are shown as �.
        """
        device = next(self.net.parameters()).device
        start = torch.tensor([list(self.prompt.encode())], device=device)
        generator = torch.Generator(device).manual_seed(seed)
        training = self.net.training
        self.net.eval()
        tokens = self.net.generate(start, n, temperature=self.temperature, generator=generator)
        self.net.train(training)
        return bytes(tokens[0].tolist()).decode(errors="replace")

    def _loss(self, batch: Tensor) -> Tensor:
        logits = self(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def _write(self, loss: float) -> None:
        text = self.write_text(self.sample)
        step = self.trainer.global_step
        print(f"\nstep {step}: val_loss {loss:.3f}, {loss / math.log(2):.3f} bits per byte. A sample:\n{text}\n")
        for logger in self.trainer.loggers:
            if hasattr(logger.experiment, "add_text"):
                logger.experiment.add_text("sample", f"```python\n{text}\n```", step)


def _scale(schedule: Callable[[float], float], steps: float, step: int) -> float:
    return schedule(step / steps)

"""A GPT: pre-norm, rotary positions, no biases."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.limits import check


class GPT(nn.Module):
    """A decoder-only transformer: tokens [n, t] to the logits of each next token, [n, t, vocab_size].

    Every layer adds attention and then an MLP of four times the width with GELU, each of the normalised stream. There
    are no biases. Weights start from N(0, 0.02^2), and those that write into the stream from 1 / sqrt(2 n_layer) of
    it, as GPT-2's do.

    Args:
        vocab_size: tokens; 256 are bytes.
        block_size: the longest context.
        n_layer: layers.
        n_head: heads of a layer; they share ``n_embd`` evenly, and each gets an even number.
        n_embd: width of the stream.
        norm: ``rms`` or ``layer``, neither with a bias.
        tie_embeddings: use the embeddings as the weights of the last layer, too.
        rope_base: the longest wavelength of the rotary positions is 2 pi times about this.

    Raises:
        ValueError: if a number is out of its range, or the heads do not fit.

    Example:
        >>> net = GPT(vocab_size=256, block_size=8, n_layer=2, n_head=2, n_embd=16)
        >>> sum(p.numel() for p in net.parameters())  # 256 * 16 + 2 * (12 * 16^2 + 2 * 16) + 16
        10320
        >>> net(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 256])
    """

    def __init__(
        self,
        *,
        vocab_size: int = 256,
        block_size: int = 128,
        n_layer: int = 5,
        n_head: int = 4,
        n_embd: int = 128,
        norm: Literal["rms", "layer"] = "rms",
        tie_embeddings: bool = True,
        rope_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        for name, value, most in (
            ("vocab_size", vocab_size, 10**6),
            ("block_size", block_size, 10**6),
            ("n_layer", n_layer, 1000),
            ("n_head", n_head, 1000),
            ("n_embd", n_embd, 10**5),
        ):
            check(name, value, 1, most)
        check("rope_base", rope_base, 1, 1e12)
        if n_embd % (2 * n_head):
            raise ValueError(f"n_embd must be a multiple of 2 n_head = {2 * n_head}, got {n_embd}")
        if norm not in ("rms", "layer"):
            raise ValueError(f"norm must be rms or layer, got {norm}")
        self.vocab_size, self.block_size = vocab_size, block_size
        self.embed = nn.Embedding(vocab_size, n_embd)
        self.layers = nn.ModuleList(Layer(n_head, n_embd, norm) for _ in range(n_layer))
        self.norm = _norm(norm, n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                writes = name.endswith(("attention.out.weight", "mlp.out.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * n_layer) if writes else 0.02)
        if tie_embeddings:
            self.head.weight = self.embed.weight
        self.register_buffer("angles", rotary_angles(block_size, n_embd // n_head, rope_base), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map int64 tokens [n, t], t <= block_size, to logits [n, t, vocab_size].

        Raises:
            ValueError: if there are more tokens than ``block_size``.
        """
        length = tokens.shape[1]
        if length > self.block_size:
            raise ValueError(f"tokens must be at most block_size = {self.block_size} a row, got {length}")
        stream = self.embed(tokens)
        for layer in self.layers:
            stream = layer(stream, self.angles[:length])
        return self.head(self.norm(stream))

    def parameter_groups(self) -> list[dict]:
        """Return groups for an optimizer: the layers' matrices, the embeddings, and the norms without weight decay.

        ``use_muon`` is for :class:`recipes.lm.muon.Muon`: true for the first alone. Others ignore it.
        """
        matrices = [p for p in self.layers.parameters() if p.ndim == 2]
        norms = [p for p in self.parameters() if p.ndim == 1]
        known = {id(p) for p in matrices + norms}
        embeddings = [p for p in self.parameters() if id(p) not in known]
        return [
            {"params": matrices, "use_muon": True},
            {"params": embeddings, "use_muon": False},
            {"params": norms, "use_muon": False, "weight_decay": 0.0},
        ]

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue tokens [n_rows, t >= 1] by ``n`` tokens, each drawn given the ``block_size`` before it.

        Args:
            tokens: int64.
            n: how many more, >= 0.
            temperature: of the softmax, >= 0; 0 takes the likeliest token.
            generator: of the draws; None: the global one.

        Returns:
            int64 [n_rows, t + n].
        """
        for _ in range(n):
            logits = self(tokens[:, -self.block_size :])[:, -1].float()
            if temperature == 0:
                drawn = logits.argmax(-1, keepdim=True)
            else:
                drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, drawn], 1)
        return tokens


class Layer(nn.Module):
    """stream + attention(norm(stream)), then the same with the MLP."""

    def __init__(self, n_head: int, n_embd: int, norm: str) -> None:
        super().__init__()
        self.attention_norm, self.attention = _norm(norm, n_embd), Attention(n_head, n_embd)
        self.mlp_norm, self.mlp = _norm(norm, n_embd), MLP(n_embd)

    def forward(self, stream: Tensor, angles: Tensor) -> Tensor:
        """Map [n, t, n_embd] to the same shape; ``angles`` are those of the t positions."""
        stream = stream + self.attention(self.attention_norm(stream), angles)
        return stream + self.mlp(self.mlp_norm(stream))


class Attention(nn.Module):
    """Causal attention of ``n_head`` heads with rotary positions."""

    def __init__(self, n_head: int, n_embd: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.out = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, stream: Tensor, angles: Tensor) -> Tensor:
        """Map [n, t, n_embd] to the same shape."""
        rows, length, _ = stream.shape
        heads = self.qkv(stream).view(rows, length, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind()
        q, k = rotate(q, angles), rotate(k, angles)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(rows, length, -1))


class MLP(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.up = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.out = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        """Map [n, t, n_embd] to the same shape."""
        return self.out(F.gelu(self.up(stream)))


def rotary_angles(length: int, width: int, base: float) -> Tensor:
    """Return the angles m base^(-2 i / width) of positions m < length and pairs i < width / 2, float32.

    Su et al., RoFormer, arXiv:2104.09864, section 3.2.2.

    Example:
        >>> rotary_angles(3, 4, 100.0)
        tensor([[0.0000, 0.0000],
                [1.0000, 0.1000],
                [2.0000, 0.2000]])
    """
    speeds = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.outer(torch.arange(length, dtype=torch.float64), speeds).float()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + width / 2}) of [..., t, width] by angles [t, width / 2].

    So the product of a query at position m and a key at n depends on m - n alone.

    Example:
        >>> rotate(torch.tensor([[3.0, 1.0]]), torch.tensor([[torch.pi / 2]])).round()
        tensor([[-1.,  3.]])
    """
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def _norm(kind: str, width: int) -> nn.Module:
    return nn.RMSNorm(width, eps=1e-6) if kind == "rms" else nn.LayerNorm(width, bias=False)

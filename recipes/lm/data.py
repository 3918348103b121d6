"""Text as one row of tokens, and the windows of it that make a batch."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from recipes.data.plan import PlanLoader
from recipes.limits import check

# Folders of the standard library that are left out: other packages, and tests, which not every distribution ships.
ELSEWHERE = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}

TOKENS = {"bytes": np.uint8, "uint16": np.dtype("<u2")}


class TextData(L.LightningDataModule):
    """Windows of ``block_size`` tokens, and the tokens after them, of the files of a text.

    Without ``files`` the text is Python: the sources of the running interpreter's standard library, without its tests.
    There, a file is for validation or for training as the hash of its bytes says. Of ``files``, the end of each is for
    validation. The size of the text and its SHA-256 digest are logged.

    An epoch cuts the training text into windows from a place drawn anew, and takes each once, in a new order. The same
    ``seed`` makes the same batches, whatever else draws random numbers; ranks of a strategy share each epoch as its
    ``distributed_sampler_kwargs`` say, and a run resumed in the middle of an epoch draws the windows that were left.

    Args:
        files: to read; None: the standard library.
        tokens: ``bytes``: every byte is one, of 256. ``uint16``: the files hold tokens of 16 bits, little-endian, as
            nanoGPT's ``train.bin`` does.
        block_size: tokens of a window.
        batch_size: windows in a batch of one rank.
        val_share: share of the library's files, or of each file, that is for validation, in (0, 1).
        val_windows: the most windows to validate on, evenly spread.
        seed: names the order.

    Raises:
        ValueError: if a number is out of its range, or ``tokens`` is unknown.
    """

    def __init__(
        self,
        files: list[str] | None = None,
        *,
        tokens: Literal["bytes", "uint16"] = "bytes",
        block_size: int = 128,
        batch_size: int = 32,
        val_share: float = 0.05,
        val_windows: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if tokens not in TOKENS:
            raise ValueError(f"tokens must be bytes or uint16, got {tokens}")
        for name, value, least, most in (
            ("block_size", block_size, 1, 10**6),
            ("batch_size", batch_size, 1, 10**6),
            ("val_share", val_share, 1e-6, 1 - 1e-6),
            ("val_windows", val_windows, 1, 10**7),
            ("seed", seed, 0, 2**63 - 1),
        ):
            check(name, value, least, most)
        if files is not None and not files:
            raise ValueError("files must name a file, got none; leave it out for the standard library")
        self.files = files
        self.tokens = tokens
        self.block_size = block_size
        self.batch_size = batch_size
        self.val_share = val_share
        self.val_windows = val_windows
        self.seed = seed
        self.digest = ""
        self._text: tuple[Tensor, Tensor] | None = None
        self._on: dict[tuple[torch.device, bool], Tensor] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the text and split it.

        Raises:
            FileNotFoundError: if a file is not there.
            ValueError: if training or validation has not one window.
        """
        if self._text is not None:
            return
        parts = [path.read_bytes() for path in (map(Path, self.files) if self.files else standard_library())]
        self.digest = digest(parts)
        width = np.dtype(TOKENS[self.tokens]).itemsize
        train, val = split_ends(parts, self.val_share, width) if self.files else split_by_file(parts, self.val_share)
        for name, text in (("training", train), ("validation", val)):
            if len(text) // width <= 2 * self.block_size:
                raise ValueError(
                    f"files must leave more than 2 block_size = {2 * self.block_size} tokens for {name}, got "
                    f"{len(text)} bytes of {len(parts)} files with val_share = {self.val_share:g}"
                )
        self._text = (self._read(train), self._read(val))
        what = "the standard library" if self.files is None else f"{len(parts)} files"
        rank_zero_info(
            f"text: {what}, {len(train):,} bytes to train and {len(val):,} to validate, sha256 {self.digest}"
        )

    @property
    def train_text(self) -> Tensor:
        """All training tokens, uint8 or int32; known after ``setup``."""
        assert self._text is not None
        return self._text[0]

    @property
    def val_text(self) -> Tensor:
        """All validation tokens; known after ``setup``."""
        assert self._text is not None
        return self._text[1]

    def train_dataloader(self) -> PlanLoader:
        """Return the loader of training windows' first places."""
        shared = self._sampler_kwargs()
        plan = TrainingWindows(
            len(self.train_text),
            block_size=self.block_size,
            batch_size=self.batch_size,
            seed=(self.seed, shared.pop("seed", 0)),
            **shared,
        )
        return PlanLoader(plan)

    def val_dataloader(self) -> PlanLoader:
        """Return the loader of validation windows' first places."""
        shared = self._sampler_kwargs()
        shared.pop("seed", None)
        windows = (len(self.val_text) - 1) // self.block_size
        chosen = torch.linspace(0, windows - 1, min(windows, self.val_windows)).round().long() * self.block_size
        ranks = shared.get("num_replicas", 1)
        mine = chosen[: len(chosen) // ranks * ranks][shared.get("rank", 0) :: ranks]
        if not len(mine):
            raise ValueError(f"val_windows must leave one for each of {ranks} ranks, got {len(chosen)}")
        return PlanLoader(ValidationWindows(mine, self.batch_size))

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int = 0) -> Tensor:
        """Turn windows' first places [n] into their tokens [n, block_size + 1], int64, on the same device."""
        assert self.trainer is not None
        if not isinstance(batch, Tensor) or batch.ndim != 1:  # already tokens: a callback's own batch
            return batch
        return self.windows(batch, training=self.trainer.training)

    def windows(self, starts: Tensor, *, training: bool) -> Tensor:
        """Return the tokens [n, block_size + 1], int64, of the windows that start at ``starts``."""
        key = (starts.device, training)
        if key not in self._on:
            self._on[key] = (self.train_text if training else self.val_text).to(starts.device)
        places = starts[:, None] + torch.arange(self.block_size + 1, device=starts.device)
        return self._on[key][places].long()

    def _read(self, text: bytes) -> Tensor:
        tokens = np.frombuffer(text, dtype=TOKENS[self.tokens])
        return torch.from_numpy(tokens.astype(np.uint8 if self.tokens == "bytes" else np.int32))

    def _sampler_kwargs(self) -> dict[str, int]:
        # What a Trainer would give to the DistributedSampler it makes for other loaders.
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return {name: kwargs[name] for name in ("num_replicas", "rank", "seed") if name in kwargs} if kwargs else {}


class TrainingWindows(Dataset):
    """The batches of one epoch: item b is int64 [batch_size], where windows start.

    A function of (seed, epoch, rank, b) and of nothing else. The windows of all ranks together are one plan, of which
    each rank takes its share of every global batch; windows that do not fill a last batch wait for another epoch.

    Args:
        length: tokens of the text.
        block_size: tokens of a window, which needs one more.
        batch_size: windows in a batch of one rank.
        seed: integers that name the plan.
        num_replicas: ranks that share an epoch.
        rank: ours, in [0, num_replicas).

    Raises:
        ValueError: if an epoch has no batch for every rank.

    Example:
        >>> plan = TrainingWindows(12, block_size=2, batch_size=2, seed=(0,))
        >>> starts = torch.cat([plan[0], plan[1]]).sort().values
        >>> (starts - starts[0]).tolist()  # windows next to each other
        [0, 2, 4, 6]
    """

    def __init__(
        self,
        length: int,
        *,
        block_size: int,
        batch_size: int,
        seed: tuple[int, ...],
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        # One window less than fit, as an epoch begins up to a window late.
        self.n_windows = (length - 1) // block_size - 1
        if self.n_windows < batch_size * num_replicas:
            raise ValueError(
                f"batch_size must be at most the windows per rank, {self.n_windows // num_replicas}, got {batch_size}"
            )
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0
        self._drawn: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return self.n_windows // (self.batch_size * self.num_replicas)

    def __getitem__(self, batch: int) -> Tensor:
        if self._drawn is None or self._drawn[0] != self.epoch:
            # A generator of our own: neither reads nor moves the global one.
            rng = np.random.default_rng([*self.seed, self.epoch])
            starts = rng.permutation(self.n_windows) * self.block_size + rng.integers(self.block_size)
            self._drawn = (self.epoch, torch.from_numpy(starts))
        first = (batch * self.num_replicas + self.rank) * self.batch_size
        return self._drawn[1][first : first + self.batch_size]


class ValidationWindows(Dataset):
    """The same windows in every epoch, in order: item b is int64 [at most batch_size].

    Args:
        starts: where the windows start, int64.
        batch_size: the most windows in a batch.
    """

    def __init__(self, starts: Tensor, batch_size: int) -> None:
        self.batches = starts.split(batch_size)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, batch: int) -> Tensor:
        return self.batches[batch]


def standard_library() -> list[Path]:
    """Return the running Python's own sources, without tests and without other packages, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [path for path in root.rglob("*.py") if ELSEWHERE.isdisjoint(path.relative_to(root).parts)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def split_by_file(parts: Sequence[bytes], share: float) -> tuple[bytes, bytes]:
    """Split files into training and validation, each by the hash of its bytes, about ``share`` of them to validation.

    Example:
        >>> [hashlib.sha256(part).hexdigest()[:2] for part in (b"a", b"b", b"c")]  # 0.79, 0.24 and 0.18 of 256
        ['ca', '3e', '2e']
        >>> split_by_file([b"a", b"b", b"c"], 0.2)
        (b'ab', b'c')
    """
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for part in parts:
        place = int.from_bytes(hashlib.sha256(part).digest()[:8], "big") / 2**64  # in [0, 1)
        sides[place < share].append(part)
    return b"".join(sides[0]), b"".join(sides[1])


def split_ends(parts: Sequence[bytes], share: float, width: int = 1) -> tuple[bytes, bytes]:
    """Split every file, its last ``share`` to validation, between tokens of ``width`` bytes.

    Example:
        >>> split_ends([b"abcdefghij", b"ABCDE"], 0.2)
        (b'abcdefghABCD', b'ijE')
    """
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for part in parts:
        tokens = len(part) // width
        cut = (tokens - round(tokens * share)) * width
        sides[0].append(part[:cut])
        sides[1].append(part[cut : tokens * width])
    return b"".join(sides[0]), b"".join(sides[1])


def digest(parts: Sequence[bytes]) -> str:
    """Return the SHA-256 digest of all files' bytes in order, as hexadecimal digits.

    Example:
        >>> digest([b"a", b"bc"])[:8], hashlib.sha256(b"abc").hexdigest()[:8]
        ('ba7816bf', 'ba7816bf')
    """
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()

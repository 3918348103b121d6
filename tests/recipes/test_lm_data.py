"""The text: its split, its digest, and windows that are a function of the seed."""

import hashlib

import lightning as L
import numpy as np
import pytest
import torch

from recipes.lm import data as data_module
from recipes.lm.data import TextData, TrainingWindows, split_by_file, split_ends, standard_library


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(250)) * 8)
    return str(path)


def test_the_library_is_python_without_tests_and_other_packages():
    paths = standard_library()
    names = {path.name for path in paths}
    assert {"argparse.py", "dataclasses.py", "decimal.py"} <= names
    assert not [path for path in paths if {"site-packages", "test", "tests"} & set(path.parts)]
    assert paths == standard_library()


def test_a_files_side_depends_on_its_bytes_alone():
    parts = [str(i).encode() * 3 for i in range(2000)]
    train, val = split_by_file(parts, 0.2)
    assert sorted(split_by_file(parts[::-1], 0.2)[1]) == sorted(val)
    share = sum(int(hashlib.sha256(part).hexdigest()[:16], 16) < 0.2 * 2**64 for part in parts) / 2000
    assert len(val) / len(train + val) == pytest.approx(share, abs=0.01)
    assert share == pytest.approx(0.2, abs=0.03)


def test_split_ends_cut_between_tokens():
    parts = [bytes(range(20)), bytes(range(7))]
    train, val = split_ends(parts, 0.25, 2)
    assert (train, val) == (bytes(range(16)) + bytes(range(4)), bytes(range(16, 20)) + bytes(range(4, 6)))


def test_size_and_digest_of_the_text_are_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(data_module, "rank_zero_info", said.append)
    files = []
    for name, content in (("a.txt", b"x" * 1000), ("b.txt", b"y" * 3000)):
        (tmp_path / name).write_bytes(content)
        files.append(str(tmp_path / name))
    data = TextData(files, block_size=8, val_share=0.1)
    data.setup()
    digest = hashlib.sha256(b"x" * 1000 + b"y" * 3000).hexdigest()
    assert data.digest == digest
    assert said == [f"text: 2 files, 3,600 bytes to train and 400 to validate, sha256 {digest}"]
    assert bytes(data.train_text.tolist()) == b"x" * 900 + b"y" * 2700
    assert bytes(data.val_text.tolist()) == b"x" * 100 + b"y" * 300


def test_an_epoch_takes_every_window_once_and_the_next_begins_elsewhere():
    plans = [TrainingWindows(1001, block_size=10, batch_size=4, seed=(3,), num_replicas=3, rank=r) for r in range(3)]
    seen = []
    for epoch in range(6):
        for plan in plans:
            plan.epoch = epoch
        starts = torch.cat([plan[b] for b in range(len(plans[0])) for plan in plans])
        assert len(set(starts.tolist())) == len(starts) == 99 // 12 * 12
        assert len(set((starts % 10).tolist())) == 1
        assert starts.min() >= 0 and starts.max() + 10 < 1001
        seen.append(starts)
    assert len({tuple(starts.tolist()) for starts in seen}) == 6
    assert len({int(starts[0] % 10) for starts in seen}) > 1


def test_windows_are_a_function_of_the_seed():
    def first(seed):
        torch.manual_seed(int(torch.randint(1000, ())))
        return TrainingWindows(1000, block_size=10, batch_size=4, seed=seed)[2]

    assert torch.equal(first((1, 0)), first((1, 0)))
    assert not torch.equal(first((1, 0)), first((2, 0)))
    assert not torch.equal(first((1, 0)), first((1, 1)))


def test_a_window_has_the_token_after_it(text):
    data = TextData([text], block_size=4, batch_size=2, val_share=0.5)
    data.setup()
    tokens = data.windows(torch.tensor([0, 248]), training=True)
    assert tokens.tolist() == [[0, 1, 2, 3, 4], [248, 249, 0, 1, 2]]
    assert tokens.dtype == torch.int64


def test_validation_windows_are_the_same_spread_over_the_text_and_shared_by_ranks(text):
    class Rank:
        training = False

        def __init__(self, rank):
            self.distributed_sampler_kwargs = {"num_replicas": 2, "rank": rank}

    data = TextData([text], block_size=10, batch_size=3, val_share=0.5, val_windows=9)
    data.setup()
    whole = torch.cat(list(data.val_dataloader()))
    assert whole.tolist() == [round(i * 98 / 8) * 10 for i in range(9)]
    parts = []
    for rank in range(2):
        data.trainer = Rank(rank)
        parts.append(torch.cat(list(data.val_dataloader())))
    assert [len(part) for part in parts] == [4, 4]
    assert sorted(torch.cat(parts).tolist()) == whole[:8].tolist()


def test_tokens_of_sixteen_bits(tmp_path):
    path = tmp_path / "train.bin"
    np.arange(50_000, 50_400, dtype="<u2").tofile(path)
    data = TextData([str(path)], tokens="uint16", block_size=8, val_share=0.25)
    data.setup()
    assert data.train_text.tolist() == list(range(50_000, 50_300))
    assert data.windows(torch.tensor([3]), training=False).tolist() == [list(range(50_303, 50_312))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": "words"}, "tokens must be bytes or uint16, got words"),
        ({"files": []}, "files must name a file, got none"),
        ({"val_share": 1.0}, "val_share must be in"),
        ({"batch_size": 0}, r"batch_size must be in \[1, 1000000\], got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TextData(**settings)


def test_a_text_too_short_or_missing_is_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(b"0123456789" * 10)
    with pytest.raises(
        ValueError, match=r"files must leave more than 2 block_size = 16 tokens for validation, got 5 byt"
    ):
        TextData([str(path)], block_size=8).setup()
    with pytest.raises(FileNotFoundError):
        TextData([str(tmp_path / "nowhere")]).setup()
    data = TextData([str(path)], block_size=8, batch_size=64, val_share=0.3)
    data.setup()
    with pytest.raises(ValueError, match="batch_size must be at most the windows per rank, 7, got 64"):
        data.train_dataloader()


def test_the_default_text_is_split_the_same_way_every_time():
    texts = []
    for _ in range(2):
        data = TextData()
        data.setup()
        texts.append((data.digest, len(data.train_text), data.val_text[:1000].tolist()))
    assert texts[0] == texts[1]
    assert len(data.train_text) > 10 * len(data.val_text) > 10 * 2 * 128
    assert isinstance(data, L.LightningDataModule)

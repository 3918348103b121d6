"""The data module: what a batch holds, who draws it, and what happens when files are not as they should be."""

import copy
import errno
import os
import resource
import stat
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch.nn import functional as F

from recipes.data import ImageData
from recipes.data import module as data_module
from recipes.data import sources as data_sources
from recipes.data.augment import draw
from recipes.data.cache import cached
from recipes.data.normalise import MeanStd, Whiten
from recipes.data.plan import FLIP, INDEX, LEFT, TOP, EvaluationPlan, PlanLoader, TrainingPlan
from recipes.data.sources import Images


def make_tree(root, shape=(8, 8, 3), per_class=3, suffix="png"):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                image = rng.integers(256, size=shape).astype(np.uint8)
                Image.fromarray(image.squeeze()).save(folder / f"{i}.{suffix}")
    return root


def plan_of(n=12, **changes):
    arguments = {"batch_size": 4, "flip": True, "crop": 2, "replacement": False, "seed": (0,)} | changes
    return TrainingPlan(torch.arange(n), **arguments)


# The plan


def test_an_epoch_holds_every_image_once():
    plan = plan_of()
    drawn = torch.cat([plan[b] for b in range(len(plan))])[:, INDEX]
    assert sorted(drawn.tolist()) == list(range(12))
    assert drawn.tolist() != list(range(12))


def test_with_replacement_images_repeat_uniformly():
    plan = plan_of(n=8, batch_size=8, replacement=True)
    counts = torch.zeros(8)
    for plan.epoch in range(500):
        counts += torch.bincount(plan[0][:, INDEX], minlength=8)
    assert plan[0][:, INDEX].unique().numel() < 8
    # binomial, standard deviation sqrt(4000 * 1/8 * 7/8) = 21
    assert (counts - 500).abs().max() < 5 * 21


def test_every_flip_and_offset_is_equally_likely():
    plan = plan_of(n=4000, batch_size=4000, crop=2)
    rows = torch.cat([plan[0] for plan.epoch in range(5)])
    n = len(rows)
    cells = torch.bincount((rows[:, FLIP] * 5 + rows[:, TOP]) * 5 + rows[:, LEFT], minlength=50)
    expected = n / 50
    # chi-squared with 49 degrees of freedom: above 94 once in 10^4
    assert ((cells - expected) ** 2 / expected).sum() < 94
    assert len(cells) == 50


def test_the_same_seed_draws_the_same_batch_whatever_the_global_generators_do():
    first = plan_of()[1]
    torch.manual_seed(123)
    np.random.seed(123)
    torch.rand(5)
    before = torch.get_rng_state()
    assert torch.equal(plan_of()[1], first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(plan_of(seed=(1,))[1], first)


def test_epochs_differ():
    plan = plan_of()
    first = plan[0]
    plan.epoch = 1
    assert not torch.equal(plan[0], first)


def test_ranks_share_one_plan():
    whole = plan_of(batch_size=4)
    parts = [plan_of(batch_size=2, num_replicas=2, rank=rank) for rank in (0, 1)]
    for b in range(len(whole)):
        assert torch.equal(torch.cat([part[b] for part in parts]), whole[b])


def test_a_batch_larger_than_a_ranks_share_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at most the images per rank, 6, got 8"):
        plan_of(batch_size=8, num_replicas=2)


@pytest.mark.parametrize("n", [5, 6, 7, 16, 17])
def test_evaluation_sees_every_image_once_in_as_many_batches_on_every_rank(n):
    plans = [EvaluationPlan(torch.arange(n), batch_size=2, num_replicas=3, rank=rank) for rank in range(3)]
    seen = [row for plan in plans for b in range(len(plan)) for row in plan[b][:, INDEX].tolist()]
    assert sorted(seen) == list(range(n))
    assert len({len(plan) for plan in plans}) == 1
    assert max(len(plan[b]) for plan in plans for b in range(len(plan))) <= 2


def test_a_loader_goes_on_where_it_was_saved():
    loader = PlanLoader(plan_of())
    loader.sampler.set_epoch(3)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    rest = list(batches)
    resumed = PlanLoader(plan_of())
    iterator = iter(resumed)  # a Trainer makes the iterator before it restores the state
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(3)
    assert [b.tolist() for b in iterator] == [b.tolist() for b in rest]
    assert len(list(resumed)) == 3, "the place in the epoch is used once"


def test_who_looks_at_the_batches_beside_the_training_does_not_move_its_place():
    loader = PlanLoader(plan_of())
    loader.sampler.set_epoch(2)
    batches = iter(loader)
    next(batches)
    beside = copy.copy(loader)
    assert [b.tolist() for b in beside] == [b.tolist() for b in PlanLoader(loader.dataset)]
    assert loader.state_dict() == {"epoch": 2, "drawn": 1}
    assert len(list(batches)) == 2


# Augmentation


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize(("top", "left"), [(0, 0), (0, 4), (2, 2), (3, 1), (4, 4)])
def test_draw_is_a_window_of_the_reflected_image(flip, top, left):
    image = torch.rand(1, 3, 6, 5)
    padded = F.pad(image, (2, 2, 2, 2), mode="reflect")
    window = padded[:, :, top : top + 6, left : left + 5]
    plan = torch.tensor([[0, flip, top, left]])
    assert torch.equal(draw(image, plan, crop=2), window.flip(3) if flip else window)


def test_images_of_a_batch_do_not_mix():
    images = torch.arange(6.0)[:, None, None, None].expand(6, 3, 8, 8).contiguous()
    plan = torch.stack([torch.arange(6), torch.arange(6) % 2, torch.arange(6) % 5, torch.arange(6) % 3], 1)
    assert torch.equal(draw(images, plan, crop=2), images)


def test_a_crop_as_large_as_the_image_is_refused():
    with pytest.raises(ValueError, match=r"crop must be in \[0, 4\), got 4"):
        draw(torch.rand(1, 1, 4, 6), torch.zeros(1, 4, dtype=torch.int64), crop=4)


# Normalisation


def test_mean_and_std_are_those_of_the_channels():
    images = torch.randint(256, (50, 3, 4, 4), dtype=torch.uint8)
    scaled = MeanStd.fit(images)(images)
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_whitening_makes_the_covariance_the_identity():
    rng = torch.Generator().manual_seed(0)
    mixing = torch.eye(12) + 0.3 * torch.rand(12, 12, generator=rng)
    images = (128 + 18 * torch.randn(4000, 12, generator=rng) @ mixing).clamp(0, 255).to(torch.uint8).view(-1, 3, 2, 2)
    whitened = Whiten.fit(images)(images).flatten(1).double()
    covariance = whitened.T @ whitened / len(whitened)
    # Contrast normalisation takes one direction, the constant image, out of every image.
    constant = torch.full((12, 12), 1 / 12, dtype=torch.float64)
    assert (covariance - (torch.eye(12) - constant)).abs().max() < 1e-3
    assert whitened.mean(0).abs().max() < 1e-3


def test_whitening_follows_the_training_images_under_bfloat16():
    images = torch.randint(256, (200, 1, 4, 4), dtype=torch.uint8)
    whiten = Whiten.fit(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(whiten(images), whiten(images.clone()))
        assert whiten(images).dtype == torch.float32


# The data module


def tree_data(tmp_path, **changes):
    root = tmp_path / "tree"
    if not root.exists():
        make_tree(root)
    return ImageData("folder", str(root), **{"batch_size": 2, "cache": str(tmp_path / "cache")} | changes)


def test_a_folder_becomes_images_and_labels(tmp_path):
    data = tree_data(tmp_path)
    data.prepare_data()
    data.setup()
    assert data.classes == ["cat", "dog"]
    assert (len(data.train_dataloader()), len(data.test_dataloader())) == (3, 1)
    images, labels = data.on_after_batch_transfer(next(iter(data.test_dataloader())))
    assert images.shape == (6, 3, 8, 8)
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    first = torch.from_numpy(np.array(Image.open(tmp_path / "tree/test/cat/0.png"))).permute(2, 0, 1)
    assert torch.equal((images[0] * data._normaliser.std + data._normaliser.mean).round().to(torch.uint8), first)


def test_evaluation_is_not_augmented(tmp_path):
    plain, augmented = tree_data(tmp_path), tree_data(tmp_path, flip=True, crop=3)
    batches = []
    for data in (plain, augmented):
        data.setup()
        batches.append(data.on_after_batch_transfer(next(iter(data.val_dataloader())))[0])
    assert torch.equal(*batches)


def test_a_grey_folder_has_one_channel(tmp_path):
    data = ImageData("folder", str(make_tree(tmp_path / "t", shape=(8, 8, 1))), cache=str(tmp_path / "c"), batch_size=2)
    data.setup()
    assert data.on_after_batch_transfer(next(iter(data.train_dataloader())))[0].shape == (2, 1, 8, 8)


def test_images_are_decoded_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(data_module, "read", lambda *a: decoded.append(a) or data_sources.read(*a))
    for _ in range(2):
        tree_data(tmp_path).setup()
    assert len(decoded) == 1
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "tree/train/cat/0.png")
    tree_data(tmp_path).setup()
    assert len(decoded) == 2


def test_validation_is_held_out_of_training_and_the_same_for_every_seed():
    def sums(data, loader):
        return {int(image.long().sum()) for rows in loader for image in data._data.images[rows[:, INDEX]]}

    parts = []
    for seed in (0, 1):
        data = ImageData("random", n_train=100, n_val=50, seed=seed, batch_size=10)
        data.setup()
        parts.append([sums(data, loader()) for loader in (data.train_dataloader, data.val_dataloader)])
    assert parts[0] == parts[1]
    train, val = parts[0]
    # The sum of its pixels names an image, but for a few.
    assert (len(train) > 95, len(val) > 47, len(train & val) < 3) == (True, True, True)
    assert len(train & sums(data, data.test_dataloader())) < 10


def test_without_held_out_images_validation_is_the_test_set():
    data = ImageData("random")
    data.setup()
    assert torch.equal(next(iter(data.val_dataloader())), next(iter(data.test_dataloader())))


def test_more_images_than_there_are_is_refused():
    with pytest.raises(
        ValueError, match=r"n_train \+ n_val must be at most the 512 training images of random, got 500 \+ 50"
    ):
        ImageData("random", n_train=500, n_val=50).setup()


@pytest.mark.parametrize(
    "bad",
    [{"source": "svhn"}, {"normalise": "none"}, {"batch_size": 0}, {"crop": -1}, {"n_train": 0}, {"n_val": -1}],
)
def test_arguments_are_checked(bad):
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        ImageData(**bad)


def test_whitening_is_cached_and_used(tmp_path):
    data = tree_data(tmp_path, normalise="gcn_zca")
    data.setup()
    assert len(list((tmp_path / "cache").glob("zca-*.pt"))) == 1
    again = tree_data(tmp_path, normalise="gcn_zca")
    again.setup()
    plan = next(iter(data.train_dataloader()))
    assert torch.equal(again.on_after_batch_transfer(plan)[0], data.on_after_batch_transfer(plan)[0])


# Files that are not as they should be


def test_a_corrupt_image_is_named_and_leaves_no_cache(tmp_path):
    data = tree_data(tmp_path)
    bad = tmp_path / "tree/train/dog/1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"every image must be readable, got .*train/dog/1\.png"):
        data.prepare_data()
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True


def test_an_empty_class_folder_is_named(tmp_path):
    data = tree_data(tmp_path)
    for path in (tmp_path / "tree/test/dog").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"every class must have an image, got none in .*test/dog"):
        data.prepare_data()


def test_a_class_that_is_in_one_split_only_is_refused(tmp_path):
    data = tree_data(tmp_path)
    (tmp_path / "tree/train/bird").mkdir()
    with pytest.raises(ValueError, match="must hold the same classes"):
        data.prepare_data()


def test_an_image_of_another_size_is_named(tmp_path):
    data = tree_data(tmp_path)
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(tmp_path / "tree/train/dog/2.png")
    with pytest.raises(ValueError, match=r"got \(9, 8, 3\) in .*train/dog/2\.png"):
        data.prepare_data()


def test_a_wrong_root_says_what_it_must_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"root must hold train/ and test/.*got {tmp_path}/nowhere"):
        ImageData("folder", str(tmp_path / "nowhere"), cache=str(tmp_path)).prepare_data()


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_without_a_network_the_error_says_what_to_put_where(tmp_path, source, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    needed = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}.get(source, "MNIST/raw")
    with pytest.raises(FileNotFoundError, match=f"its download failed.*put .*{needed}.* into {tmp_path}"):
        ImageData(source, str(tmp_path), cache=str(tmp_path / "cache")).prepare_data()
    with pytest.raises(FileNotFoundError, match="download is off"):
        ImageData(source, str(tmp_path), cache=str(tmp_path / "cache"), download=False).prepare_data()


def test_a_full_disk_leaves_no_cache(tmp_path):
    # A limit on the size of a file stands in for the disk: the write itself fails, in the middle.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"cache must be writable, got .*images\.pt.*no part of it was kept"):
            cached(tmp_path / "images.pt", lambda: torch.zeros(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_while_writing_leaves_no_cache(tmp_path, monkeypatch):
    def half(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "images.pt", lambda: torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_called_one(tmp_path, monkeypatch):
    def full(content, file):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 960 vs 854")  # noqa: B904  as torch's writer does

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"images\.pt .*No space left on device"):
        cached(tmp_path / "images.pt", lambda: torch.zeros(1))


def test_what_a_killed_process_left_is_swept_away_and_others_may_read(tmp_path):
    left, other, fresh = tmp_path / ".images.pt.x1", tmp_path / ".other.pt.x1", tmp_path / ".images.pt.x2"
    for path in (left, other, fresh):
        path.write_bytes(b"half")
    for path in (left, other):
        os.utime(path, (0, 0))
    mask = os.umask(0o022)
    try:
        cached(tmp_path / "images.pt", lambda: torch.zeros(1))
    finally:
        os.umask(mask)
    assert {path.name for path in tmp_path.iterdir()} == {"images.pt", other.name, fresh.name}
    assert stat.S_IMODE((tmp_path / "images.pt").stat().st_mode) == 0o644


@pytest.mark.parametrize("size", [0, 1000])
@pytest.mark.parametrize("source", ["fashion_mnist", "cifar10"])
def test_damaged_files_of_torchvision_are_named(tmp_path, source, size, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    if source == "cifar10":
        folder = tmp_path / "cifar-10-batches-py"
        names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
    else:
        folder = tmp_path / "FashionMNIST"
        names = [f"raw/{s}-{k}" for s in ("train", "t10k") for k in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\0\x08\x01\0\0\0\x09"[:size])
    with pytest.raises(ValueError, match=f"the files of {source} in {folder} must be whole"):
        ImageData(source, str(tmp_path), cache=str(tmp_path / "cache")).prepare_data()


def test_an_image_of_more_than_8_bits_is_refused(tmp_path):
    data = tree_data(tmp_path)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "tree/train/dog/2.png")
    with pytest.raises(ValueError, match=r"train/dog/2\.png \(its numbers have more than 8 bits, mode I"):
        data.prepare_data()


def test_a_damaged_cache_is_named(tmp_path):
    (tmp_path / "images.pt").write_bytes(b"not a cache")
    with pytest.raises(OSError, match=r"cache must be readable, got .*images\.pt.*delete it"):
        cached(tmp_path / "images.pt", lambda: None)


def test_torchvision_data_become_channels_first(monkeypatch, tmp_path):
    class Fake:
        classes = ("a", "b")

        def __init__(self, root, train, download):
            self.n = 3 if train else 2
            self.data = np.full((self.n, 4, 4, 3), self.n, np.uint8)
            self.targets = [0, 1, 0][: self.n]

        def __len__(self):
            return self.n

    monkeypatch.setitem(data_sources.TORCHVISION, "cifar10", (Fake, ""))
    images = data_sources.read("cifar10", str(tmp_path))
    assert isinstance(images, Images)
    assert images.images.shape == (5, 3, 4, 4)
    assert (images.n_train, images.labels.tolist(), images.classes) == (3, [0, 1, 0, 0, 1], ["a", "b"])


# Under a Trainer


class Seen(L.LightningModule):
    """Write down the labels' images and the pixels' sum of every training batch."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.sums = []

    def training_step(self, batch, batch_idx):
        images, _ = batch
        self.sums.append(images.double().sum().item())
        return self.weight.sum() * images.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(seen, data, **changes):
    arguments = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    trainer = L.Trainer(**arguments | {k: v for k, v in changes.items() if k != "ckpt_path"})
    trainer.fit(seen, datamodule=data, ckpt_path=changes.get("ckpt_path"))
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_a_run_resumed_in_the_middle_of_an_epoch_draws_what_was_left(tmp_path):
    def data():
        return ImageData("random_grey", batch_size=128, flip=True, crop=2, seed=3)

    every_step = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = Seen()
    fit(whole, data(), max_epochs=3, enable_checkpointing=True, callbacks=[every_step])
    assert len(set(whole.sums)) == 12
    for step in (2, 4, 7):
        rest = Seen()
        fit(rest, data(), max_epochs=3, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert rest.sums == whole.sums[step:], step


@pytest.mark.filterwarnings("ignore")
def test_replicas_share_an_epoch_as_the_strategy_says():
    data = ImageData("random_grey", batch_size=64)
    data.setup()

    def share(**kwargs):
        data.trainer = SimpleNamespace(distributed_sampler_kwargs=kwargs)

    whole = next(iter(data.train_dataloader()))
    data.batch_size = 16
    share(num_replicas=4, rank=1)
    part = next(iter(data.train_dataloader()))
    assert torch.equal(part, whole[16:32])
    assert len(data.val_dataloader()) == 1
    assert len(next(iter(data.val_dataloader()))) == 64
    share(num_replicas=1, rank=0, seed=7)
    own = next(iter(data.train_dataloader()))
    assert not torch.equal(own, whole[:16])


@pytest.mark.filterwarnings("ignore")
def test_two_processes_draw_different_images(tmp_path):
    data = ImageData("random_grey", batch_size=32)
    fit(Drawn(str(tmp_path)), data, max_epochs=1, strategy="ddp_fork", devices=2)
    drawn = [np.load(tmp_path / f"{rank}.npy") for rank in (0, 1)]
    assert all(len(rows) == 256 for rows in drawn)
    assert len(np.union1d(*drawn)) == 512, "no image is drawn by both"


class Drawn(Seen):
    """Write down a number for every image that this rank drew, another one for every image."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.rows = []

    def on_train_batch_start(self, batch, batch_idx):
        self.rows.append(batch[0].double().flatten(1) @ torch.arange(784.0, dtype=torch.float64))

    def on_train_end(self):
        np.save(f"{self.folder}/{self.global_rank}.npy", torch.cat(self.rows).numpy())

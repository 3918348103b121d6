"""The language model under a Trainer: metrics, samples, optimizers, schedules, and an exact resume."""

import copy
import math
import pickle
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_entropy as le
from recipes.classifier import Cosine
from recipes.lm.data import TextData
from recipes.lm.gpt import GPT
from recipes.lm.module import LanguageModel
from recipes.lm.muon import Muon
from recipes.lm.schedule import WarmupStableDecay
from recipes.lm.traffic import Traffic

pytestmark = pytest.mark.filterwarnings("ignore")

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 200)
    return partial(TextData, [str(path)], block_size=16, batch_size=8, val_share=0.2, val_windows=32)


def module(optimizer=None, **settings):
    torch.manual_seed(0)
    net = GPT(block_size=16, n_layer=1, n_head=2, n_embd=16)
    return LanguageModel(net, optimizer or partial(torch.optim.AdamW, lr=3e-3), **{"sample": 0} | settings)


def trainer(tmp_path, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    quiet |= {"accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0, "default_root_dir": tmp_path}
    return L.Trainer(**quiet | settings)


def test_metrics_are_one_loss_said_in_three_ways(data, tmp_path):
    t, m = trainer(tmp_path, max_epochs=1), module()
    t.fit(m, datamodule=data())
    loss = t.callback_metrics["val_loss"].item()
    assert loss < math.log(256) - 0.5
    assert t.callback_metrics["val_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert t.callback_metrics["val_bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-5)
    windows = torch.cat([t.datamodule.windows(starts, training=False) for starts in t.datamodule.val_dataloader()])
    with torch.no_grad():
        chances = m.net(windows[:, :-1]).softmax(-1).gather(-1, windows[:, 1:, None])
    assert -chances.log().mean().item() == pytest.approx(loss, rel=1e-4)


def test_tokens_passes_and_bytes_are_logged(data, tmp_path):
    t = trainer(tmp_path, max_steps=5, callbacks=[Traffic()])
    t.fit(module(), datamodule=data())
    assert t.callback_metrics["tokens"] == 5 * 8 * 16
    assert t.callback_metrics["effective_passes"] == pytest.approx(5 * 8 * 16 / (0.8 * 9000), rel=1e-3)
    assert t.callback_metrics["bytes_sent"] == 0


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["ddp", "elastic"])
def test_bytes_that_replicas_send(kind, data, tmp_path):
    own = le.ElasticEntropyStrategy(le.local_sgd(2), start_method="fork")
    t = trainer(
        tmp_path,
        max_steps=4,
        devices=2,
        strategy=own if kind == "elastic" else "ddp_fork",
        callbacks=[Traffic()],
        logger=CSVLogger(tmp_path, name="", version=""),
        log_every_n_steps=1,
    )
    m = module()
    t.fit(m, datamodule=data())
    weights = sum(p.numel() for p in m.parameters())
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("bytes_sent")
    sent = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    # Half of the payload to the other and half back: at each of four steps, or of two loops with a header.
    expected = (4 if kind == "ddp" else 2) * 4 * weights
    assert expected <= sent[-1] <= expected + (0 if kind == "ddp" else 2 * 64)


def test_a_sample_is_printed_and_logged_at_validation_and_is_the_same_again(data, tmp_path, capsys):
    t = trainer(tmp_path, max_steps=4, val_check_interval=2)
    m = module(sample=20, prompt="the")
    t.fit(m, datamodule=data())
    said = capsys.readouterr().out
    assert said.count("bits per byte. A sample:\nthe") == 2
    assert f"step 4: val_loss {t.callback_metrics['val_loss']:.3f}" in said
    assert m.write_text(20) in said
    assert m.write_text(20) == m.write_text(20) != m.write_text(20, seed=1)
    assert m.write_text(0) == "the"


def test_a_resume_in_the_middle_of_an_epoch_is_exact(data, tmp_path):
    settings = {"schedule": Cosine(warmup=0.2)}
    whole = module(**settings)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7)
    trainer(tmp_path, max_steps=12, enable_checkpointing=True, callbacks=[saving]).fit(whole, datamodule=data())
    again = module(**settings)
    t = trainer(tmp_path, max_steps=12)
    t.fit(again, datamodule=data(), ckpt_path=tmp_path / "step=7.ckpt", weights_only=False)
    assert t.fit_loop.epoch_loop.total_batch_idx == 11
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@needs_muon
def test_muon_steps_matrices_and_adamw_the_rest():
    net = GPT(block_size=8, n_layer=1, n_head=2, n_embd=8)
    reference = copy.deepcopy(net)
    optimizer = Muon(net.parameter_groups(), lr=0.01, weight_decay=0.1)
    matrices, embeddings, norms = reference.parameter_groups()
    theirs = [
        torch.optim.Muon(matrices["params"], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(embeddings["params"], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95)),
        torch.optim.AdamW(norms["params"], lr=0.01, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    for step in range(5):
        tokens = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(step))
        for model, optimizers in ((net, [optimizer]), (reference, theirs)):
            model.zero_grad()
            model(tokens).square().mean().backward()
            for one in optimizers:
                one.step()
        if step == 1:  # what a load leaves must go on
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step == 2:
            for group in optimizer.param_groups:
                group["lr"] = 0.002
            for one in theirs:
                one.param_groups[0]["lr"] = 0.002
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), reference.parameters(), strict=True))
    copied = pickle.loads(pickle.dumps(optimizer))
    for p in (p for group in copied.param_groups for p in group["params"]):
        p.grad = torch.ones_like(p)
    assert copied.step(lambda: 3.0) == 3.0


@needs_muon
def test_a_loop_runs_on_muon(data, tmp_path):
    m = module(partial(Muon, lr=3e-3))
    t = trainer(tmp_path, max_steps=8, callbacks=[le.InnerOuterCallback(le.diloco(4, 0.7, 0.5))])
    t.fit(m, datamodule=data())
    assert all(p.isfinite().all() for p in m.parameters())
    assert isinstance(t.optimizers[0], Muon)


def test_muon_is_missed_with_a_word_on_what_to_do(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ImportError, match=r"Muon needs torch >= 2\.9, got .*: take torch\.optim\.AdamW"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))])


@needs_muon
def test_groups_that_do_not_say_are_refused():
    with pytest.raises(ValueError, match="must say use_muon"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))])


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
def test_the_plateau_is_between_two_lines(decay):
    schedule = WarmupStableDecay(warmup=0.1, decay=decay, final=0.2)
    assert schedule(0.05) == pytest.approx(0.5)
    assert schedule(0.1) == pytest.approx(1.0)
    if decay:
        assert schedule(1 - decay / 4) == pytest.approx(0.2 + 0.8 / 4)
        assert schedule(1.0) == schedule(1.1) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\), got 1.0"),
        ({"warmup": 0.3, "decay": 0.8}, r"decay must be in \[0, 0.7\], what the warm-up leaves, got 0.8"),
        ({"final": 2}, r"final must be in \[0, 1\], got 2"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        WarmupStableDecay(**values)


@pytest.mark.parametrize(
    ("net", "text", "message"),
    [
        ({"block_size": 8}, {}, "data.block_size must be at most the net's 8, got 16"),
        ({"vocab_size": 500}, {}, "data.tokens must be bytes for a vocab_size of 256 alone, got 500"),
    ],
)
def test_a_text_that_does_not_fit_the_net_is_refused(net, text, message, data, tmp_path):
    m = LanguageModel(GPT(**{"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16} | net), torch.optim.AdamW)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=1).fit(m, datamodule=data(**text))


def test_tokens_that_the_net_does_not_know_are_refused(tmp_path):
    path = tmp_path / "train.bin"
    torch.arange(100, 500, dtype=torch.int16).numpy().tofile(path)
    m = LanguageModel(GPT(vocab_size=499, block_size=8, n_layer=1, n_head=2, n_embd=16), torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"data.files must hold tokens below vocab_size = 499, got 499"):
        trainer(tmp_path, max_steps=1).fit(m, datamodule=TextData([str(path)], tokens="uint16", block_size=8))


def test_a_module_without_a_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt must have a byte"):
        module(prompt="")

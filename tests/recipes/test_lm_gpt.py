"""The GPT: sizes, causality, positions that are relative, tied weights, and a start at chance."""

import math

import pytest
import torch
from torch.nn import functional as F

from recipes.lm.gpt import GPT, rotary_angles, rotate


def small(**changes):
    settings = {"vocab_size": 256, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
    return GPT(**settings | changes)


def parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 256 * 128 + 5 * (12 * 128**2 + 2 * 128) + 128),
        ({"tie_embeddings": False}, 2 * 256 * 128 + 5 * (12 * 128**2 + 2 * 128) + 128),
        ({"norm": "layer"}, 1_017_216),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50_304}, 123_587_328),
    ],
)
def test_parameter_counts(settings, expected):
    with torch.device("meta"):
        net = GPT(**settings)
    assert parameters(net) == expected


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("changed", [1, 7, 15])
def test_a_token_changes_no_logit_before_it_and_all_after(norm, changed):
    net = small(norm=norm).double()
    tokens = torch.randint(256, (3, 16))
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % 256
    difference = (net(tokens) - net(other)).abs().amax((0, 2))
    assert (difference[:changed] == 0).all()
    assert (difference[changed:] > 0).all()


def test_rotation_is_multiplication_of_complex_numbers_by_unit_ones():
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    speeds = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angles = torch.arange(5, dtype=torch.float64)[:, None] * speeds
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angles)
    assert torch.allclose(rotate(x, angles), torch.cat([turned.real, turned.imag], -1))
    assert torch.allclose(rotary_angles(5, 8, 10_000.0).double(), angles)


def test_a_product_of_query_and_key_depends_on_their_distance_alone():
    angles = rotary_angles(64, 16, 10_000.0).double()
    q, k = torch.randn(2, 16, dtype=torch.float64)
    products = rotate(q.expand(64, 16), angles) @ rotate(k.expand(64, 16), angles).T
    for distance in (-9, 0, 5):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-5)
    assert products.diagonal(1)[0] != pytest.approx(products.diagonal(2)[0])


def test_attention_is_the_sum_over_all_earlier_positions_written_out():
    layer = small().double().layers[0].attention
    stream, angles = torch.randn(1, 6, 32, dtype=torch.float64), rotary_angles(6, 16, 10_000.0).double()
    q, k, v = (part.view(6, 2, 16) for part in layer.qkv(stream)[0].split(32, -1))
    rows = []
    for m in range(6):
        heads = []
        for h in range(2):
            turned = rotate(q[m, h][None], angles[m : m + 1])[0]
            scores = [turned @ rotate(k[n, h][None], angles[n : n + 1])[0] / 4 for n in range(m + 1)]
            shares = torch.stack(scores).softmax(0)
            heads.append(sum(share * v[n, h] for n, share in enumerate(shares)))
        rows.append(torch.cat(heads))
    assert torch.allclose(layer(stream, angles)[0], layer.out(torch.stack(rows)))


def test_tied_embeddings_are_one_tensor():
    tied, untied = small(), small(tie_embeddings=False)
    assert tied.head.weight.data_ptr() == tied.embed.weight.data_ptr()
    assert untied.head.weight.data_ptr() != untied.embed.weight.data_ptr()
    assert parameters(untied) - parameters(tied) == 256 * 32


@pytest.mark.parametrize("settings", [{}, {"tie_embeddings": False}, {"norm": "layer"}, {"n_layer": 6, "n_embd": 256}])
def test_the_loss_at_the_start_is_that_of_chance(settings):
    tokens = torch.randint(256, (32, 17))
    with torch.no_grad():
        loss = F.cross_entropy(small(**settings)(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(256), abs=0.15)


def test_groups_hold_every_weight_once_and_muon_only_the_layers_matrices():
    for net in (small(), small(tie_embeddings=False), small(norm="layer")):
        matrices, embeddings, norms = net.parameter_groups()
        held = [id(p) for group in (matrices, embeddings, norms) for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in net.parameters())
        assert len(matrices["params"]) == 2 * 4
        assert {p.ndim for p in matrices["params"] + embeddings["params"]} == {2}
        assert norms["weight_decay"] == 0
        assert [group["use_muon"] for group in (matrices, embeddings, norms)] == [True, False, False]


def test_generation_goes_on_from_the_last_block():
    net = small()
    tokens = torch.randint(256, (2, 20))
    greedy = net.generate(tokens, 3, temperature=0)
    assert torch.equal(greedy[:, :20], tokens)
    for i in range(20, 23):
        assert torch.equal(greedy[:, i], net(greedy[:, i - 16 : i])[:, -1].argmax(-1))
    draws = [net.generate(tokens, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(net.generate(tokens, 0), tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layer": 0}, r"n_layer must be in \[1, 1000\], got 0"),
        ({"n_embd": 30}, "n_embd must be a multiple of 2 n_head = 4, got 30"),
        ({"norm": "batch"}, "norm must be rms or layer, got batch"),
    ],
)
def test_a_net_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_a_longer_context_than_the_nets_is_refused():
    with pytest.raises(ValueError, match="tokens must be at most block_size = 16 a row, got 17"):
        small()(torch.zeros(1, 17, dtype=torch.long))

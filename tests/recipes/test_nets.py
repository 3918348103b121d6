"""Parameter counts and shapes of the nets, and every example in the recipes' docstrings."""

import doctest
import importlib
import pkgutil

import pytest
import torch

from recipes import compare, data, lm
from recipes.allcnn import AllCNN
from recipes.lenet import LeNet
from recipes.mlp import MLP
from recipes.resnet import ResNet18
from recipes.wide_resnet import WideResNet


def _parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("net", "parameters"),
    [
        (AllCNN(), 1_667_166),
        (WideResNet(16, 4), 2_748_890),
        (WideResNet(28, 10), 36_479_194),
        (WideResNet(28, 10, num_classes=100), 36_536_884),
        (ResNet18(), 11_173_962),
        (LeNet(), 131_220),
        (MLP(), 269_322),
    ],
    ids=["allcnn", "wrn-16-4", "wrn-28-10", "wrn-28-10-cifar100", "resnet", "lenet", "mlp"],
)
def test_parameter_counts(net, parameters):
    assert _parameters(net) == parameters


@pytest.mark.parametrize(
    ("net", "image"),
    [
        (AllCNN(num_classes=7, width=4), (3, 32, 32)),
        (WideResNet(10, 1, dropout=0.3, num_classes=7), (3, 32, 32)),
        (ResNet18(4, num_classes=7), (3, 32, 32)),
        (LeNet(num_classes=7), (1, 28, 28)),
        (MLP(num_classes=7, channels=3, size=32, width=8), (3, 32, 32)),
    ],
    ids=["allcnn", "wide_resnet", "resnet", "lenet", "mlp"],
)
def test_logits_have_one_row_an_image(net, image):
    assert net(torch.randn(2, *image)).shape == (2, 7)


def test_allcnn_pools_over_a_map_of_eight_by_eight_and_has_no_negative_logit():
    net = AllCNN(width=4).eval()
    images = torch.randn(2, 3, 32, 32)
    assert net.layers(images).shape == (2, 10, 8, 8)
    assert net(images).min() >= 0


def test_wide_resnet_is_initialised_by_fan_out():
    # the first convolution of the third group: fan-out 9 * 256, fan-in 9 * 128
    convolution = WideResNet(16, 4).layers[5].conv1.weight
    assert convolution.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)


def test_wide_resnet_adds_the_input_itself_where_the_width_stays():
    block = WideResNet(16, 4).layers[2].eval()
    assert block.shortcut is None
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize("depth", [9, 12, 4])
def test_wide_resnet_refuses_a_depth_without_whole_blocks(depth):
    with pytest.raises(ValueError, match="depth must be 6 n"):
        WideResNet(depth)


@pytest.mark.parametrize(
    "name",
    ["recipes.allcnn", "recipes.wide_resnet", "recipes.resnet", "recipes.lenet", "recipes.mlp", "recipes.classifier"]
    + [m.name for p in (data, compare, lm) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")],
)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0

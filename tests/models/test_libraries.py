"""Models of libraries by name; the libraries themselves are stand-ins, since none is installed."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from onsphere.models.load import load
from onsphere.models.target import TargetError


class _Net(nn.Sequential):
    pretrained_cfg = {"input_size": (3, 20, 24)}  # noqa: RUF012


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    asked: list[Any] = []

    def create_model(name: str, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        return _Net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    made: Any = ModuleType("timm")
    made.create_model, made.asked = create_model, asked
    made.list_models = lambda: ["resnet18", "resnet34", "vit_tiny_patch16_224"]
    monkeypatch.setitem(sys.modules, "timm", made)
    return made


def test_a_name_of_timm_is_built_at_its_own_input_size_and_nothing_is_downloaded(
    timm: Any,
) -> None:
    target = load("timm:resnet18")
    assert target.args[0].shape == (2, 3, 20, 24)
    assert target.note == "random weights"
    assert not any(pretrained for _, pretrained in timm.asked)
    assert not any(p.is_meta for p in target.model.parameters())
    again = load("timm:resnet18", shape=(1, 3, 9, 9))
    assert again.args[0].shape == (1, 3, 9, 9)
    pairs = zip(target.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_full_size_needs_no_memory(timm: Any) -> None:
    assert all(p.is_meta for p in load("timm:resnet18", size="full").model.parameters())


def test_a_model_that_reads_numbers_while_it_is_built_loses_its_memory_afterwards(
    timm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_model(name: str, pretrained: bool) -> nn.Module:
        widths = (torch.arange(2) * 3 + 1).tolist()  # as RegNet's are computed
        return _Net(nn.Conv2d(3, widths[1], 3))

    monkeypatch.setattr(timm, "create_model", create_model)
    model = load("timm:resnet18", size="full").model
    assert [tuple(p.shape) for p in model.parameters()] == [(4, 3, 3, 3), (4,)]
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("text", "size", "words"),
    [
        ("timm:resnet19", "auto", "timm has no model 'resnet19'; there are resnet18, resnet34"),
        ("timm:qqq", "auto", "timm has no model 'qqq' among its 3"),
        ("timm:resnet18", "shrink", "--shrink is for config files"),
    ],
)
def test_what_is_wrong_is_one_line(timm: Any, text: str, size: Any, words: str) -> None:
    with pytest.raises(TargetError) as raised:
        load(text, size=size)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(TargetError, match="timm:resnet18 needs timm: pip install timm"):
        load("timm:resnet18")


def test_torchvision_is_asked_for_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def segmenter(*, weights: Any = 1, weights_backbone: Any = 1) -> nn.Module:
        asked.update(weights=weights, weights_backbone=weights_backbone)
        return nn.Conv2d(3, 4, 3)

    published = [SimpleNamespace(transforms=lambda: SimpleNamespace(crop_size=[32]))]
    models: Any = ModuleType("torchvision.models")
    models.list_models = lambda: ["segmenter"]
    models.get_model_builder = lambda name: segmenter
    models.get_model_weights = lambda name: published
    made: Any = ModuleType("torchvision")
    made.models = models
    monkeypatch.setitem(sys.modules, "torchvision", made)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    target = load("torchvision:segmenter")
    assert asked == {"weights": None, "weights_backbone": None}
    assert target.args[0].shape == (2, 3, 32, 32)


def test_hf_says_that_it_downloads_nothing() -> None:
    with pytest.raises(TargetError, match="downloads nothing"):
        load("hf:meta-llama/Llama-2-7b")

"""The larger networks: as published, with the study's methods in place, and scale-invariant."""

from dataclasses import asdict, replace

import pytest
import torch

from onsphere.errors import OnsphereError
from onsphere.studies.claims.plan import Plan
from onsphere.studies.engine.job import Inputs
from onsphere.studies.setup.architectures import ARCHITECTURES, architecture
from onsphere.studies.setup.data import Images
from onsphere.studies.setup.resnet import ResNet20
from onsphere.studies.setup.training import Training, network_for, optimizer_for, train
from onsphere.studies.setup.vit import TinyViT
from onsphere.studies.study import claims

LARGER = [(name, m) for name, a in ARCHITECTURES.items() if name != "small" for m in a.methods]
INVARIANT = [(name, method) for name, method in LARGER if method != "none"]
SHORT = Training("digits", "bn", network="resnet20", width=4, steps=8, batch=32, seed=1)


def settings(name, method, **changes):
    width = {"resnet20": 4, "vit-tiny": 8}[name]
    return replace(SHORT, network=name, method=method, width=width, **changes)


@pytest.fixture(scope="module")
def images(digits):
    test = digits.test_x[:40], digits.test_y[:40]
    return Images("digits", digits.train_x[:300], digits.train_y[:300], *test)


@pytest.fixture(scope="module")
def colour():
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 9, 1, 2, 3, 4])
    return Images("colour", x, y, x, y)


def test_resnet20_is_the_published_one(colour):
    model = ResNet20("bn", colour)
    assert sum(p.numel() for p in model.parameters()) == 269_722  # 0.27 million, table 6
    assert (len(model.convs), len(model.norms)) == (19, 19)
    shapes = []
    for conv in model.convs:
        conv.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    assert model(colour.train_x).shape == (6, 10)
    assert shapes == [(16, 32, 32)] * 7 + [(32, 16, 16)] * 6 + [(64, 8, 8)] * 6


def test_a_block_without_weights_is_its_shortcut(colour):
    model = ResNet20("none", colour, width=4)
    seen = {}
    for number in (0, 7):
        model.convs[number].register_forward_hook(
            lambda _, args, out, number=number: seen.update({number: (args[0], out)})
        )
    with torch.no_grad():
        for conv in model.convs[1:]:
            conv.weight.zero_(), conv.bias.zero_()
    model(colour.train_x)
    first = torch.relu(seen[0][1])
    assert torch.equal(seen[7][0], first)  # three blocks later
    last = model.head(torch.nn.functional.pad(first[:, :, ::4, ::4], [0] * 4 + [6, 6]).mean((2, 3)))
    torch.testing.assert_close(model(colour.train_x), last)


@pytest.mark.parametrize(("name", "method"), INVARIANT)
def test_rescaling_the_hidden_weights_keeps_the_function(images, name, method):
    net = network_for(settings(name, method), images, eps=1e-30).double()
    net.train(net.in_activation)  # the power iteration stands still
    x = images.train_x[:8].double()
    before = net(x).detach()
    torch.testing.assert_close(net.rescale_hidden_(8.0)(x), before, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        net.head.weight.mul_(8.0)
    assert (net(x) - before).norm() > before.norm(), "the control shows nothing"


@pytest.mark.parametrize("space", ["plain", "sphere"])
@pytest.mark.parametrize(("name", "method"), LARGER)
def test_every_weight_is_trained_and_decays_but_those_on_spheres(images, name, method, space):
    model = network_for(settings(name, method), images)
    way = settings(name, method, space=space, weight_decay=0.1)
    groups = optimizer_for(model, way).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    hidden = model.hidden_weights()
    for key, parameter in model.named_parameters():
        learned = "norms" in key or "bias" in key or key.endswith("original0")
        free = not learned and not (key in hidden and space == "sphere")
        assert (decays[id(parameter)] > 0) == free, key


@pytest.mark.parametrize(
    ("name", "method", "changes"),
    [("resnet20", "bn", {"steps": 25}), ("vit-tiny", "ln", {"steps": 60, "width": 16})],
)
def test_training_learns(images, name, method, changes):
    way = replace(settings(name, method, schedule="cosine"), **changes)
    assert train(asdict(way), Inputs(images)).result["train_loss"] < 2.1  # of chance: 2.30


@pytest.mark.parametrize(("name", "method"), [("resnet20", "gn"), ("vit-tiny", "ln")])
def test_on_the_sphere_lengths_stay(images, name, method):
    way = settings(name, method, space="sphere", lr=0.5)
    start = network_for(way, images)
    trained = train(asdict(way), Inputs(images)).tensors
    squares = []
    for key, (weight, axes) in start.hidden_weights().items():
        end = trained[f"model.{key}"]
        assert not torch.allclose(end, weight, rtol=1e-3)
        squares.append((weight.detach().square().sum(), end.square().sum()))
        if not start.joint:
            torch.testing.assert_close(axes.norms(end), axes.norms(weight), rtol=1e-5, atol=0)
    before, after = (float(sum(side)) for side in zip(*squares, strict=True))
    assert after == pytest.approx(before, rel=1e-5)


def test_a_method_that_makes_no_sense_on_tokens_is_refused(images):
    with pytest.raises(OnsphereError, match="vit-tiny has no place for BN, which takes statistics"):
        TinyViT("bn", images)
    assert "bn" not in Plan(network="vit-tiny").methods


def test_an_unknown_network_is_refused_with_the_nearest():
    with pytest.raises(OnsphereError, match="unknown network 'resnet'; did you mean 'resnet20'"):
        architecture("resnet")


def test_claims_of_single_spheres_are_not_asked_of_a_transformer():
    asked = {claim.name for claim in claims([], "vit-tiny")}
    assert asked == {"sphere", "stability", "robustness"}
    assert {claim.name for claim in claims([], "resnet20")} == {c.name for c in claims([])}
    with pytest.raises(OnsphereError, match="'growth' speaks of weights with spheres of their own"):
        claims(["growth"], "vit-tiny")


def test_the_plan_trains_the_network_it_names():
    plan = Plan(network="resnet20", size="quick")
    assert (plan.training("gn", 0).network, plan.training("gn", 0).width) == ("resnet20", 16)
    assert plan.training("gn", 0).cell().key != Plan(size="quick").training("gn", 0).cell().key

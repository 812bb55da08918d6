import pytest
import torch

from onsphere.studies.setup.network import LABELS, STUDIED, SmallConvNet


@pytest.fixture(params=[m for m in STUDIED if m != "none"])
def net(request, digits):
    return SmallConvNet(request.param, digits, width=4, eps=1e-30).double()


def logits(net, digits):
    """In the mode in which the method is exactly invariant; the power iteration stands still."""
    net.train(net.method.normalizes == "activation")
    return net(digits.train_x[:16].double()).detach()


def test_rescaling_the_hidden_weights_keeps_a_normalized_network(net, digits):
    before = logits(net, digits)
    after = logits(net.rescale_hidden_(8.0), digits)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_rescaling_moves_the_running_statistics_along(digits):
    net = SmallConvNet("bn", digits, width=4, eps=1e-30).double()
    net.train()(digits.train_x[:64].double())
    x = digits.test_x[:16].double()
    before = net.eval()(x)
    torch.testing.assert_close(net.rescale_hidden_(8.0)(x), before, rtol=1e-9, atol=1e-9)
    for norm in net.norms:
        norm.running_var.div_(64.0)
    assert not torch.allclose(net(x), before, rtol=1e-2), "the control shows nothing"


def test_without_a_method_rescaling_changes_the_function(digits):
    net = SmallConvNet("none", digits, width=4)
    x = digits.train_x[:16]
    before = net(x).detach()
    assert (net.rescale_hidden_(8.0)(x) - before).norm() > before.norm()


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone(digits):
    state = torch.get_rng_state()
    one, same, other = (SmallConvNet("gn", digits, width=4, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [net.convs[0].weight for net in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_every_studied_method_has_a_label():
    assert set(LABELS) == set(STUDIED)

"""A single patch, token or key was given: what holds for it alone is not claimed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import onsphere as osp
from onsphere.symmetry import ModelError, rescaled


class Pooled(nn.Module):
    """Patches, averaged with weights that they make themselves."""

    def __init__(self, weigh):
        super().__init__()
        self.embed, self.key, self.head = nn.Conv2d(1, 4, 8, 8), nn.Linear(4, 1), nn.Linear(4, 2)
        self.weigh = weigh

    def forward(self, x):
        tokens = self.embed(x).flatten(2).mT
        share = self.weigh(self.key(tokens))
        return self.head((share * tokens).sum(1) / share.sum(1))


class Attention(nn.Module):
    """One head over patches of a sequence."""

    def __init__(self, length=None):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, 3) for _ in range(3))
        self.patches, self.length = nn.Conv1d(2, 3, 4, 4), length

    def forward(self, x):
        if self.length is not None and x.shape[-1] != self.length:
            raise ValueError("of another length")
        t = self.patches(x).mT
        return (self.q(t) @ self.k(t).mT).softmax(-1) @ self.v(t)


@torch.no_grad()
def change(model, audit, *inputs):
    """How much a copy that is moved along every claim differs, relative to the output."""
    out, other = model(*inputs), rescaled(model, audit)(*inputs)
    return float((out - other).norm() / out.norm())


@pytest.mark.parametrize(
    ("weigh", "joint"),
    [(Tensor.square, [{"key.weight": 1, "key.bias": 1}]), (Tensor.exp, [])],
    ids=["squares", "exponentials"],
)
def test_what_holds_for_one_patch_alone_is_not_claimed(weigh, joint):
    torch.manual_seed(0)
    model = Pooled(weigh).double()
    audit = osp.audit(model, torch.randn(3, 1, 8, 8).double())
    assert [dict(s.exponents) for s in audit.spheres] == joint
    assert "key.weight" not in audit.inert
    for size in (8, 16, 24):
        assert change(model, audit, torch.randn(3, 1, size, size).double()) < 1e-12


@pytest.mark.parametrize("length", [4, 5, 6, 7, 8, 12])
def test_one_key_is_no_reason_to_call_queries_inert(length):
    torch.manual_seed(0)
    model = Attention().double()
    audit = osp.audit(model, torch.randn(3, 2, length).double())
    assert audit.inert == ["k.bias"]
    assert audit.spheres == []
    assert len(audit.rescalings) == 2
    for other in (4, 12, 31):
        assert change(model, audit, torch.randn(3, 2, other).double()) < 1e-12


class Contrasted(nn.Module):
    """Each image is to be told from the others of its batch; of one there is nothing to tell."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Conv2d(1, 3, 2, 2), nn.Linear(3, 4)
        self.q, self.k, self.v = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x):
        t = self.embed(x).flatten(2).mT
        found = ((self.q(t) @ self.k(t).mT).softmax(-1) @ self.v(t)).mean(1)
        z = F.normalize(self.out(found), dim=1, eps=1e-60)
        return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(x)))


def test_one_image_of_few_patches_hides_neither_the_batch_nor_the_patches():
    torch.manual_seed(0)
    model = Contrasted().double()
    audit = osp.audit(model, torch.randn(1, 1, 4, 4).double())
    assert audit.inert == ["k.bias"]
    assert change(model, audit, torch.randn(5, 1, 8, 8).double()) < 1e-12


class OfWords(nn.Module):
    """Attention over words, beside what is known; a row of padding alone gives no numbers."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 3, padding_idx=0)
        self.q, self.k, self.v = (nn.Linear(3, 3, bias=False) for _ in range(3))

    def forward(self, ids, known):
        t, real = self.words(ids), ids != 0
        scores = (self.q(t) @ self.k(t).mT).masked_fill(~real[:, None], -torch.inf)
        found = scores.softmax(-1) @ self.v(t)
        pooled = (found * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return torch.cat([pooled, known], 1)


@pytest.mark.parametrize("seed", range(8))
def test_one_word_is_no_reason_to_call_queries_inert(seed):
    torch.manual_seed(0)
    model = OfWords().double()
    audit = osp.audit(model, (torch.tensor([[7]]), torch.randn(1, 4).double()), seed=seed)
    assert audit.inert == []
    assert audit.spheres == []
    assert change(model, audit, torch.randint(1, 9, (5, 6)), torch.randn(5, 4).double()) < 1e-12


def test_nothing_is_claimed_of_weights_that_no_input_reaches():
    torch.manual_seed(0)
    audit = osp.audit(Attention(length=4), torch.randn(3, 2, 4))
    assert set(audit.unreached) == {"q.weight", "q.bias", "k.weight", "k.bias"}
    claimed = {name for s in audit.scale_symmetries for name in s}
    assert claimed.isdisjoint(audit.unreached)


def test_a_model_that_is_partly_without_memory_is_refused():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    model[2].to("meta")
    with pytest.raises(ModelError, match=r"2 of 4 parameters, as '2\.weight', are on the meta"):
        osp.audit(model, torch.randn(7, 4))


@pytest.mark.parametrize("changes", [{}, {"num_layers": 2, "bidirectional": True}])
def test_an_lstm_without_biases_has_the_families_of_the_operations(changes):
    torch.manual_seed(0)

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3, 5, bias=False)
            self.lstm = nn.LSTM(5, 4, bias=False, batch_first=True, **changes)

        def forward(self, x):
            return self.lstm(self.embed(x))[0]

    found = osp.audit(Tagger(), torch.randn(5, 6, 3))
    told = osp.audit(Tagger().to("meta"), torch.randn(5, 6, 3, device="meta"))
    assert list(map(str, found.families)) == list(map(str, told.families))
    assert sum(len(family.slices[0].index.unique()) for family in found.families) == 5


def test_packed_inputs_without_memory():
    packed = pack_padded_sequence(torch.randn(4, 3, 3), [4, 3, 2])
    assert osp.audit(nn.LSTM(3, 4).to("meta"), packed).unknown_ops == []

    class Packing(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x, lengths):
            rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.lstm(rows)[1][0]

    with pytest.raises(ModelError, match="whose lengths are 0, or have no values"):
        osp.audit(Packing().to("meta"), (torch.randn(3, 4, 3), torch.tensor([4, 0, 2])))

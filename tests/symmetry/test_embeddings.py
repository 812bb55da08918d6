"""Embeddings and heads are found by what they do, not by what they are called."""

import pytest
import torch
from torch import Tensor, nn

import onsphere as osp
from onsphere.symmetry.embeddings import embeddings_and_heads
from onsphere.symmetry.result import Inputs


class Residual(nn.Module):
    """A stream that a block writes to, with or without a head."""

    def __init__(self, head: bool, normalized: bool = False) -> None:
        super().__init__()
        self.stem, self.write = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 3) if head else None
        self.normalized = normalized

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.norm(x + self.write(x).relu())
        x = x if self.last is None else self.last(x)
        return x / x.norm(dim=-1, keepdim=True) if self.normalized else x


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(9, 4))
        self.middle = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = nn.functional.embedding(tokens, self.table)
        return self.middle(x).relu() @ self.table.T


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.boxes, self.classes = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x).relu()
        return {"boxes": self.boxes(x), "classes": self.classes(x)}


def normed(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer)


X, TOKENS = torch.ones(2, 4), torch.tensor([[1, 2]])
CASES = {
    "a head": (Residual(True), X, {"last.weight", "last.bias"}),
    "a head, output normalized": (Residual(True, True), X, {"last.weight", "last.bias"}),
    "no head: the block is beside the stream": (Residual(False), X, set()),
    "two heads": (Two(), X, {"boxes.weight", "classes.weight"}),
    "a functional lookup, tied": (Tied(), TOKENS, {"table"}),
    "a parametrized head": (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), normed(nn.Linear(4, 2))),
        X,
        {f"2.{n}" for n in ("bias", *(f"parametrizations.weight.original{i}" for i in (0, 1)))},
    ),
    "convolutions": (
        nn.Sequential(nn.Conv1d(2, 3, 1), nn.ReLU(), nn.Conv1d(3, 5, 1, bias=False), nn.Flatten()),
        torch.ones(1, 2, 4),
        {"2.weight"},
    ),
}


@pytest.mark.parametrize(("net", "x", "expected"), CASES.values(), ids=CASES.keys())
def test_structure(net, x, expected):
    assert embeddings_and_heads(net, Inputs((x,), {}, None)) == expected


def test_without_inputs_only_what_modules_declare_is_known():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    assert embeddings_and_heads(net) == {"0.weight"}
    assert embeddings_and_heads(net, Inputs((torch.ones(2, 2),), {}, None)) == {"0.weight"}
    assert embeddings_and_heads(Residual(True).to("meta"), Inputs((X,), {}, None)) == set()


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    assert embeddings_and_heads(net, Inputs((torch.eye(4),), {}, None)) == {"2.weight", "2.bias"}
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


class Written(nn.Module):
    """A lookup and a head that no module declares."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 6))
        self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False)
        self.head = nn.Parameter(torch.randn(64, 6))

    def forward(self, ids):
        x = nn.functional.embedding(ids, self.table)
        x = x + self.down(self.up(nn.functional.layer_norm(x, (6,))).relu())
        return nn.functional.linear(nn.functional.layer_norm(x, (6,)), self.head)


def test_an_audit_from_a_file_knows_embeddings_and_heads(tmp_path):
    net = Written()
    audit = osp.audit(net, torch.arange(8).reshape(2, 4))
    assert audit.embeddings_and_heads == ["head", "table"]
    read = osp.Audit.from_json(audit.to_json(tmp_path / "audit.json"))
    assert read == audit
    assert read.fixed_scales(net) == audit.fixed_scales(net)
    assert not {"head", "table"} & set(read.fixed_scales(net).held)


def test_a_file_of_an_earlier_version_is_read():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 9))
    data = osp.audit(net, torch.tensor([[1, 2]])).to_dict()
    del data["embeddings_and_heads"]
    read = osp.Audit.from_dict(data)
    assert read.embeddings_and_heads is None
    assert "0.weight" not in read.fixed_scales(net).held

"""What is known of operations, and the shapes of results that are remembered."""

import pytest
import torch
from torch import Tensor, nn

from onsphere._torch.memory import LARGE, empty, times
from onsphere._torch.meta_results import MetaResults
from onsphere.symmetry.exact.overloads import flat, flat_tensors, overload_of

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("func", "said"),
    [
        (aten.add.Tensor, "functional"),
        (aten.add_.Tensor, "writes"),
        (aten.add.out, "writes outs"),
        (aten.view.default, "shows"),
        (aten.nonzero.default, "decides reads"),
        (aten.equal.default, "decides"),
        (aten.masked_select.default, ""),
        (aten.view.dtype, "shows"),
        (aten.bernoulli.default, "draws functional"),
    ],
    ids=str,
)
def test_what_is_known_of_an_operation(func: object, said: str) -> None:
    overload = overload_of(func)
    names = ("functional", "writes", "outs", "shows", "reads", "decides", "draws")
    assert {name for name in names if getattr(overload, name)} == {*said.split()}
    assert overload_of(func) is overload


def test_tensors_of_a_call_are_found_among_keywords_too() -> None:
    x, y = torch.ones(1), torch.ones(2)
    assert [id(t) for t in flat_tensors((([x, None], 3), {"out": y}))] == [id(x), id(y)]


def test_arguments_of_a_call_with_lists_unpacked() -> None:
    x, y = torch.ones(1), torch.ones(2)
    found = flat(([x, None], 3), {"other": (y, 2.5)})
    assert [id(v) for v in found] == [id(v) for v in (x, None, 3, y, 2.5)]


CALLS = {
    "scalars of three types": [(aten.mul.Tensor, (torch.ones(2, 3, dtype=torch.int64), s), {})
                               for s in (1, 1.0, True, 1)],
    "transposed": [(aten.add.Tensor, (torch.ones(2, 3).t(), torch.ones(3, 2)), {}),
                   (aten.add.Tensor, (torch.ones(3, 2), torch.ones(3, 2)), {})],
    "several results": [(aten.native_layer_norm.default,
                         (torch.ones(2, 4), [4], None, None, 1e-5), {})] * 2,
    "another type": [(aten.sum.dim_IntList, (torch.ones(2, 3), [dim]), {"dtype": dtype})
                     for dim in (0, 1) for dtype in (None, torch.float64)],
    "lists": [(aten.cat.default, ([torch.ones(n, 3) for n in (1, 2)], 0), {}),
              (aten.cat.default, ([torch.ones(n, 3) for n in (2, 2)], 0), {})],
    "parameters": [(aten.mm.default, (nn.Parameter(torch.ones(2, 3)), torch.ones(3, n)), {})
                   for n in (4, 5, 4)],
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_remembered_shapes_are_those_that_pytorch_gives(name: str) -> None:
    def on_meta(value: object) -> object:
        if isinstance(value, list | tuple):
            return type(value)(map(on_meta, value))
        if isinstance(value, nn.Parameter):
            return nn.Parameter(value.detach().to("meta"))
        if isinstance(value, Tensor):
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="meta"
            )
        return value

    known = MetaResults()
    sizes = []
    with torch.no_grad():
        for func, args, kwargs in CALLS[name] * 2:
            moved = on_meta(args)
            said, found = func(*moved, **kwargs), known.run(func, moved, kwargs)
            pairs = (
                [(said, found)] if isinstance(said, Tensor) else list(zip(said, found, strict=True))
            )
            for a, b in pairs:
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
                assert b.is_meta
                assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes()
            sizes.append(len(known))
    once = len(CALLS[name])
    assert 0 < sizes[once - 1] == sizes[-1]  # the second time all is known


def test_large_products_are_those_of_pytorch() -> None:
    large, small = torch.randn(LARGE // 100 + 1, 100, dtype=torch.float64), torch.randn(3)
    factor = 1 + torch.randn(1, 100, dtype=torch.float64)
    assert torch.equal(times(large, factor), large * factor)
    assert torch.equal(times(small, 2.0), small * 2)
    assert times(small.double().requires_grad_(), 2.0).requires_grad
    made = empty(large.shape, large.dtype, large.device)
    assert (made.shape, made.dtype) == (large.shape, torch.float64)

"""What an audit says and writes: kinds, advice, text, file, page, frame."""

import json
import sys
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import nn

from onsphere.geometry import VectorAxes
from onsphere.symmetry import ArchiveError, Audit, Kind, Leak, Rescaling, ScaleInvariance, audit
from onsphere.symmetry.claims import EFFECT_OF_DECAY, Limit
from onsphere.symmetry.exact.trace import UnknownOp
from onsphere.symmetry.rendering.html import document
from onsphere.symmetry.search.partial import Part
from onsphere.symmetry.search.shift import Shift
from report.browser import CHROMIUM, console_of, look

ONE = Fraction(1)


def decoder(layers: int) -> Audit:
    """An audit as of a pre-norm decoder with q and k on spheres, by hand."""
    names = ["embed"]
    spheres, trades = [], []
    stem = {"embed": ONE}
    for i in range(layers):
        at = f"model.layers.{i}."
        names += [at + n for n in ("q", "k", "v", "o", "norm")]
        spheres += [
            ScaleInvariance({at + n: ONE}, VectorAxes(index=(0,)), "per row") for n in ("q", "k")
        ]
        stem[at + "o"] = ONE
        trades.append(Rescaling({at + "v": ONE, at + "o": -ONE}, 1e-17, 1e-16))
        trades.append(Rescaling({at + "norm": Fraction(1, 2), at + "v": -ONE}, 1e-17, 1e-16))
    spheres.append(ScaleInvariance(stem, VectorAxes(), "whole tensor", 1e-17, 1e-16))
    symmetries = [dict(c.exponents) for c in (*spheres, *trades)]
    return Audit(
        model="Decoder", mode="eval", parameters=dict.fromkeys([*names, "head", "bias"], (8, 8)),
        spheres=spheres, rescalings=trades,
        shifts=[Shift("head", VectorAxes(index=(1,)), 1e-17, 1e-16)], inert=["bias"],
        leaks=[Leak(v, 0.5 if "embed" in v else 1e-6) for v in symmetries],
        scale_symmetries=[{"bias": ONE}, *symmetries], exact_symmetries=[], followers=[],
        unknown_ops=[], unreached=[], certified=True, complete=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def deep() -> Audit:
    return decoder(32)


def test_kinds_do_not_depend_on_the_basis(deep):
    kinds = deep.kinds
    at = "model.layers.3."
    assert kinds[at + "q"] is Kind.SPHERE
    assert kinds["embed"] is kinds[at + "o"] is kinds[at + "v"] is kinds[at + "norm"] is Kind.SHARED
    assert kinds["head"] is Kind.FIXED
    assert kinds["bias"] is Kind.INERT
    mixed = [dict(v) for v in deep.scale_symmetries]
    for name, e in mixed[-1].items():  # another basis of the same space
        mixed[-2][name] = mixed[-2].get(name, Fraction(0)) + e
    assert replace(deep, scale_symmetries=mixed).kinds == kinds
    without = [v for v in deep.scale_symmetries if "embed" not in v]
    assert replace(deep, scale_symmetries=without).kinds[at + "v"] is Kind.TRADED


def test_an_unreached_weight_is_not_judged(deep):
    found = replace(deep, unreached=["head"])
    assert found.kinds["head"] is Kind.UNREACHED
    assert "unknown" in found.decay_of("head")
    assert "NOT REACHED" in str(found)


def test_what_was_not_followed_may_hide_a_symmetry(deep):
    unseen = [UnknownOp("my::op", "model")]
    read = [Limit("reads", ("head",), "Python reads numbers.")]
    for found in (replace(deep, unknown_ops=unseen), replace(deep, limits=read)):
        assert found.kinds["head"] is Kind.UNKNOWN
        assert found.decay_of("head").startswith("unknown")
        assert "has effects that are not known" in str(found)
        assert "penalizes the scale itself" not in str(found)
        assert found.kinds["embed"] is Kind.SHARED
    slow = [Limit("buffers", ("mean",), "The model writes mean.")]
    assert replace(deep, limits=slow).kinds == deep.kinds


def test_every_kind_has_words():
    assert set(EFFECT_OF_DECAY) == set(Kind)
    assert decoder(1).decay_of("model.layers.0.q").startswith("a rate schedule")
    assert decoder(1).decay_of("head").startswith("a real penalty")
    assert decoder(1).decay_of("bias").startswith("nothing")


def test_a_deep_model_fits_on_a_screen(deep):
    lines = str(deep).splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 100
    assert str(deep).count("\x1b") == 0
    assert "  model.layers.0-31.q: per row" in lines
    assert "  embed, model.layers.0-31.o" in lines
    assert "  model.layers.0-31: v * a, o / a" in lines
    assert "  model.layers.0-31: norm * a^(1/2), v / a" in lines
    assert "  head: one amount per column" in lines
    assert len(str(decoder(64)).splitlines()) == len(lines)


def test_no_line_is_broken_inside_a_factor(deep):
    for line in str(deep).splitlines():
        assert line.strip() not in ("a", "/ a", "* a")
        assert not line.endswith((" /", " *"))


def test_advice_names_what_matters(deep):
    said = " ".join(deep.advice())
    assert "64 weights are scale-invariant" in said
    assert "1 weight cannot affect the output and can be removed: bias" in said
    assert "takes part in 1 of 129 symmetries" in said
    assert "50%" in said
    assert deep.advice_on("bias") == "remove or freeze it"
    unsure = replace(
        deep, unknown_ops=[UnknownOp("my::op", "model")], certified=False, leaks=[], inert=[]
    )
    said = " ".join(unsure.advice())
    assert "my::op" in said
    assert "meta device" in said
    assert "eps takes part" not in said


def test_running_statistics_call_for_training_mode():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    assert "Audit the model in training mode" in str(audit(net, x))
    assert "Audit the model in training mode" not in str(audit(net.train(), x))


def test_a_file_comes_back_as_it_was(deep, tmp_path):
    odd = replace(
        deep, note="two layers of it", inert=["bias"],
        leaks=[*deep.leaks, Leak({"head": Fraction(-3, 7)}, float("inf"))],
        unknown_ops=[UnknownOp("my::op", "model")],
        parts=[Part("head", 0, ((0, 2), (2, 4)), "sphere", 1e-16),
               Part("head", 1, ((4, 8),), "inert", 0.0)],
        shifts=[Shift("head", VectorAxes(pieces=((0, 2),)), 0.0, 1e-16)],
    )  # fmt: skip
    odd.to_json(tmp_path / "audit.json")
    text = (tmp_path / "audit.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["format"] == 2
    assert Audit.from_json(tmp_path / "audit.json") == odd


def test_parts_are_shown(deep, tmp_path):
    names = [f"model.layers.{i}.o" for i in range(32)]
    parts = [Part(n, 0, ((0, 2), (2, 4)), "sphere", 1e-16) for n in names]
    found = replace(deep, parts=[*parts, Part("head", 1, ((4, 8),), "inert", 0.0)])
    lines = str(found).splitlines()
    assert "  model.layers.0-31.o: 2 parts of axis 0, from 0 to 3" in lines
    assert "  head: entries 4 to 7 of axis 1" in lines
    page = found.to_html(tmp_path / "a.html").read_text(encoding="utf-8")
    assert "Partly scale-invariant weights" in page
    assert "Weights partly without effect" in page


BAD = {
    "no json": ("{", "does not hold an audit"),
    "a list": ("[]", "not a list"),
    "another format": ('{"format": 99}', "format 99.*reads format 2.*audit the model again"),
    "no format": ("{}", "format None"),
    "nothing else": ('{"format": 2}', "parameters"),
    "binary": ("\udcff", "does not hold an audit"),
}


@pytest.mark.parametrize(("text", "says"), BAD.values(), ids=BAD.keys())
def test_another_file_is_refused(tmp_path, text, says):
    (tmp_path / "a.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ArchiveError, match=says):
        Audit.from_json(tmp_path / "a.json")


def test_a_field_too_many_is_refused(deep):
    with pytest.raises(ArchiveError, match="surplus"):
        Audit.from_dict({**deep.to_dict(), "surplus": 1})


def test_param_groups_leave_embeddings_out_unless_asked():
    net = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4, elementwise_affine=False),
                        nn.Linear(4, 2))  # fmt: skip
    found = audit(net, torch.arange(9))
    assert list(found.own_spheres()) == ["0.weight"]
    with pytest.warns(UserWarning, match="embeddings=True"):
        assert [g["sphere"] for g in found.param_groups(net)] == [None, None]
    spheres = [g["sphere"] for g in found.param_groups(net, embeddings=True)]
    assert [s is None for s in spheres] == [False, True, True]


def test_the_page_says_it_all(deep, tmp_path):
    path = deep.to_html(tmp_path / "new" / "audit.html")
    page = path.read_text(encoding="utf-8").replace("\u2060", "")
    for words in (
        "<h1>Audit of Decoder</h1>", "Contents", "model.layers.0-31.q: per row", "v * a, o / a",
        "one amount per column", "eps takes part in: embed", "model.layers.31.norm",
        "remove or freeze it", "a real penalty", "is scale-invariant, on a sphere of its own",
    ):  # fmt: skip
        assert words in page
    assert "verdict" not in page.partition("</style>")[2].lower()
    assert page.count("<svg") > 1


def test_text_of_a_model_is_escaped(deep, tmp_path):
    evil = "<script>alert(1)</script>"
    names = {**deep.parameters, evil: (2,)}
    found = replace(deep, model=evil, parameters=names, inert=[evil], note=evil,
                    unknown_ops=[UnknownOp(evil, evil)])  # fmt: skip
    page = found.to_html(tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_an_audit_without_certificates_has_a_page(deep, tmp_path):
    bare = replace(deep, certified=False, leaks=[], shifts=[], inert=[], complete=False)
    page = bare.to_html(tmp_path / "a.html").read_text(encoding="utf-8")
    assert "not certified on numbers" in page
    assert "How exact the symmetries are" not in page


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_the_page_fits_a_phone_and_asks_for_nothing(deep, tmp_path):
    path = deep.to_html(tmp_path / "a.html")
    found = look(path.read_text(encoding="utf-8"), 390, tmp_path)
    assert found["width"] <= found["view"] == 390
    assert found["requests"] == []
    assert len(found["pictures"]) == 1
    assert console_of(path) == []


def network() -> tuple[nn.Module, Audit]:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    found = audit(net, x)
    net(x).square().sum().backward()
    return net, found


def test_a_frame_has_a_row_per_weight():
    net, found = network()
    plain = found.to_frame()
    assert list(plain.index) == list(found.parameters)
    assert "norm" not in plain
    assert plain.loc["0.weight", "kind"] == "scale-invariant"
    assert plain.loc["0.weight", "granularity"] == "per row"
    assert plain.loc["0.bias", "advice"] == "remove or freeze it"
    full = found.to_frame(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert full.loc["0.weight", "norm"] == pytest.approx(float(net[0].weight.detach().norm()))
    assert full.loc["0.weight", "vectors"] == 4
    assert full.loc["0.weight", "angular_update"] > 0
    assert full["effective_rate"].isna().sum() == len(full) - 1
    assert full.query("kind == 'scale-dependent'").index.tolist() == ["3.bias"]


class Fused(nn.Module):
    """Attention with queries, keys and values in one map: its bias is free part by part only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v))


def test_text_advice_and_page_count_the_same_weights_in_rescaling_symmetries() -> None:
    torch.manual_seed(0)
    found = audit(Fused(), torch.randn(2, 5, 4))
    assert found.kinds["qkv.bias"] is Kind.TRADED
    assert "balances them, on 5 weights: " in str(found)
    (said,) = (a for a in found.advice() if "canonicalize" in a)
    assert said.startswith("5 weights are in rescaling symmetries: ")
    overview, *_, every = document(found).sections
    assert overview.figure_of_merit == "5 rescaling, 1 scale-dependent"
    rows = overview.tables[0].rows
    assert sum(r[1] for r in rows) == len(found.parameters) == len({r[0] for r in rows}) + 4
    assert sum(r[1] for r in rows if r[3] == EFFECT_OF_DECAY[Kind.TRADED]) == 5
    assert "like the others of its rescaling symmetry" in found.advice_on("out.weight")
    by_name = {row[0]: row for row in every.tables[0].rows}
    assert by_name["qkv.bias"][2:4] == ["rescaling", "a penalty on products"]
    assert by_name["out.bias"][2:4] == ["scale-dependent", "a real penalty"]


def test_without_gradients_nothing_is_said_of_derivatives(deep) -> None:
    assert "Certified by runs in float64 with eps near 0: the derivative" in str(deep)
    bare = replace(
        deep,
        spheres=[replace(s, residual=None) for s in deep.spheres],
        rescalings=[replace(r, residual=None) for r in deep.rescalings],
    )
    assert "Certified by runs in float64 with eps near 0. At the model's own eps" in str(bare)


def test_a_frame_says_what_is_not_installed(monkeypatch, deep):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"onsphere\[frame\]\""):
        deep.to_frame()


def test_a_short_repr_and_one_for_notebooks() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)), nn.LayerNorm(4))
    found = audit(net, torch.ones(2, 4))
    assert repr(found).startswith("<Audit of Sequential in training mode: 26 weights, ")
    assert len(repr(found)) < 150
    assert found._repr_html_().startswith("<pre>Sequential in training mode")
    assert "a &gt; 0" in found._repr_html_()


@pytest.mark.parametrize(("pairs", "says"), [(1, "1 rescaling symmetry,"), (2, "2 rescaling sym")])
def test_one_is_said_in_the_singular(pairs: int, says: str) -> None:
    torch.manual_seed(0)  # others may let nothing through
    layers = [nn.Linear(2, 2, bias=False) for _ in range(pairs + 1)]
    net = nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))
    assert says in repr(audit(net, torch.rand(3, 2)))

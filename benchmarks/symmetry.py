"""Measure the audit: `python -m benchmarks.symmetry [families|llama|gpt2|resnet|random]`.

Prints the tables of docs/results/symmetry.md. `families` needs `transformers`; nothing is
downloaded, so gpt2 has its architecture and random weights unless a checkpoint is given.
"""

import argparse
import resource
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.families import FAMILIES, Family
from onsphere.symmetry import Audit, CannotCanonicalize, audit, canonicalize
from onsphere.symmetry.certificate import relative_change
from onsphere.symmetry.checkpoint import load, read
from onsphere.symmetry.trace import float_outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["families", "llama", "gpt2", "resnet", "random"])
    parser.add_argument("--checkpoint", help="safetensors weights of GPT-2 small")
    parser.add_argument("--count", type=int, default=5000, help="how many random networks")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.monotonic()
    {"families": families, "llama": llama, "resnet": resnet}.get(
        chosen.what, lambda: gpt2(chosen.checkpoint) if chosen.what == "gpt2" else rnd(chosen.count)
    )()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{chosen.what}: {time.monotonic() - start:.1f} s, {peak:.2f} GiB at the peak")


def families() -> None:
    """Audit and canonicalize every family in both precisions."""
    print("| family | design | mode | parameters | scale symmetries | spheres | trades | inert "
          "| shifts | unknown ops | worst residual | largest leak | audit s "
          "| change float64 | change float32 | norm |")  # fmt: skip
    print("|" + "---|" * 16)
    for family in FAMILIES:
        for train in (False, True) if "BatchNorm" in family.design else (False,):
            row(family, train)


def row(family: Family, train: bool) -> None:
    model, kwargs = family.build()
    start = time.monotonic()
    found = audit(model.train(train), (), kwargs, output=family.output)
    seconds = time.monotonic() - start
    claims = [*found.spheres, *found.rescalings]
    residual = max((c.residual or 0.0 for c in claims), default=0.0)
    leak = max((x.amount for x in found.leaks), default=0.0)
    wide, norm = canonical_change(family, train, torch.float64)
    narrow, _ = canonical_change(family, train, torch.float32)
    print(f"| {family.name} | {family.design} | {found.mode} | {len(found.parameters)} "
          f"| {len(found.scale_symmetries)} | {len(found.spheres)} | {len(found.rescalings)} "
          f"| {len(found.inert)} | {len(found.shifts)} | {len(found.unknown_ops)} "
          f"| {residual:.0e} | {leak:.0e} | {seconds:.1f} | {wide} | {narrow} | {norm} |",
          flush=True)  # fmt: skip


def canonical_change(family: Family, train: bool, dtype: torch.dtype) -> tuple[str, str]:
    """Change of the output, and total norm before and after."""
    model, kwargs = family.build()
    model = model.to(dtype).train(train)
    kwargs = {k: _cast(v, dtype) for k, v in kwargs.items()}
    found = audit(model, (), kwargs, output=family.output)
    try:
        once = canonicalize(model, found)
        again = canonicalize(once, found)
    except CannotCanonicalize as error:
        return f"refused: {error}", ""
    drift = max(
        float((p - q).detach().double().norm() / p.detach().double().norm().clamp_min(1e-300))
        for p, q in zip(once.parameters(), again.parameters(), strict=True)
    )
    with torch.no_grad():
        torch.manual_seed(0)
        before = [t.clone() for t in float_outputs(model(**kwargs), family.output)]
        torch.manual_seed(0)
        after = float_outputs(once(**kwargs), family.output)
    first, last = total_norm(model), total_norm(once)
    grew = " GREW" if last > first * (1 + 1e-6) else ""
    mark = f" (twice: {drift:.0e})" if drift > 1e-6 else ""
    return f"{relative_change(before, after):.0e}{mark}", f"{first:.2f} to {last:.2f}{grew}"


def total_norm(model: nn.Module) -> float:
    return sum(float(p.detach().double().norm()) ** 2 for p in model.parameters()) ** 0.5


def _cast(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def llama() -> None:
    """A 7B Llama from its config, without memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig()).eval()
    tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
    show(audit(model, tokens, {"use_cache": False}, output=lambda r: r.logits))


def gpt2(checkpoint: str | None) -> None:
    """GPT-2 small with all certificates."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    if checkpoint:
        load(model, read(checkpoint))
    tokens = torch.randint(0, 50257, (1, 16))
    show(audit(model, tokens, {"use_cache": False}, output=lambda r: r.logits))


def resnet() -> None:
    """A ResNet-50 in training mode."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(num_labels=1000)).train()
    show(audit(model, torch.randn(4, 3, 64, 64), output=lambda r: r.logits))


def rnd(count: int) -> None:
    """Random networks: claims that fail, and symmetries missed against the rank of an oracle."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from symmetry.networks import count_wrong

    networks, false, missed = count_wrong(range(count), lambda s, m: print(f"seed {s}: {m}"))
    print(f"{networks} networks, {false} with a false claim, {missed} where the rank differs")


def show(found: Audit) -> None:
    print(found)


if __name__ == "__main__":
    main()

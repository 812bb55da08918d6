"""``onsphere attack``: robust accuracy that masking cannot fool, and what each layer amplifies."""

import argparse
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from onsphere.cli.audit import add_checkpoint
from onsphere.cli.common.data import Examples, is_file, labelled
from onsphere.cli.common.files import check_writable, writing
from onsphere.cli.common.parser import Numbers, keyword, number, whole
from onsphere.cli.common.progress import bar
from onsphere.errors import OnsphereError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from onsphere.cli.common.parser import Commands
    from onsphere.robustness import Amplification, Evaluation

_EXAMPLES = """examples:
  onsphere attack net.py:Net --checkpoint net.pt --data test.npz --eps 8/255
  onsphere attack net.py:Net --checkpoint net.pt --data mnist --data-dir ~/data --eps 0.1
  onsphere attack net.py:Net --checkpoint net.pt --data test.npz --eps 0.5 --norm l2 --html net.html
  onsphere attack net.py:Net --checkpoint cifar.th --data cifar10 --eps 1/255 \\
      --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 --quick

TARGET is as for onsphere audit: package.module:factory, path.py:factory, or a model directory. The
checkpoint is safetensors, or a pickle that holds nothing but tensors; no pickled code is run. DATA
is a file with x (inputs) and y (labels), .npz, .safetensors or .pt, or digits, mnist, fashion-mnist
or cifar10, whose test images are taken.

--eps and --bounds are in the units of the data. A normalization that your training applies to the
data belongs inside the model: --mean and --std put it there.
"""

_IMAGES = {"standard": 1000, "quick": 200}
_FOLLOWED = 200  # at so many examples the perturbation is followed through the layers
_AUDITED = 8
_DATA_DIR = Path("data")
_CONTROLS = {
    "all": "a copy rescaled along every scale symmetry",
    "norms": "a copy whose weights are rescaled together with the statistics that normalize them",
}


class _Subject(NamedTuple):
    """What is attacked: a classifier, and examples on its terms."""

    model: "nn.Module"
    name: str
    data: str
    x: "Tensor"
    y: "Tensor"
    note: str


def add(commands: "Commands") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "attack",
        help="robust accuracy of a checkpoint, and what its layers amplify",
        epilog=_EXAMPLES,
        description="Measure robust accuracy in a way that gradient masking cannot fool, and "
        "follow the perturbations through the layers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", help="the model, as for onsphere audit")
    add_checkpoint(parser)
    parser.add_argument("--data", required=True, metavar="DATA", help="a file, or a data set")
    parser.add_argument(
        "--data-dir", type=Path, default=_DATA_DIR, metavar="DIR",
        help="where published data files lie (default: ./data)",
    )  # fmt: skip
    parser.add_argument(
        "--download", action="store_true", help="download missing data files into --data-dir"
    )
    parser.add_argument(
        "--eps", required=True, type=number, metavar="EPS", help="radius of the attack, as 8/255"
    )
    parser.add_argument(
        "--norm",
        type=keyword,
        choices=["linf", "l2"],
        default="linf",
        help="of the attack (default: linf)",
    )
    parser.add_argument(
        "--images", type=whole, metavar="N",
        help="the first N examples (default: 1000; 200 with --quick)",
    )  # fmt: skip
    parser.add_argument(
        "--bounds", type=number, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
        help="least and greatest value of an input (default: 0 1)",
    )  # fmt: skip
    parser.add_argument(
        "--mean",
        action=Numbers,
        nargs="+",
        metavar="M",
        help="subtract inside the model, per channel",
    )
    parser.add_argument(
        "--std", action=Numbers, nargs="+", metavar="S", help="divide by inside the model"
    )
    spent = parser.add_mutually_exclusive_group()
    spent.add_argument(
        "--quick", action="store_const", dest="attacks", const="quick",
        help="gradient attacks only, fewer examples",
    )  # fmt: skip
    spent.add_argument(
        "--full", action="store_true",
        help="give up on no example early: two to five times as long; for networks that hide "
        "their gradients",
    )  # fmt: skip
    parser.add_argument(
        "--control", type=keyword, choices=["all", "norms"], default="all",
        help="what the rescaled copy changes: every scale that is free (default), or weights "
        "together with the statistics that normalize them",
    )  # fmt: skip
    parser.add_argument(
        "--draws", type=whole, default=1, metavar="N",
        help="of a random model: evaluate the mean over N draws (default: 1; 20 is usual)",
    )  # fmt: skip
    parser.add_argument(
        "--average", type=keyword, choices=["probabilities", "logits"], default="probabilities",
        help="what --draws averages (default: probabilities)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the attacks (default: 0)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page as well")
    parser.set_defaults(run=_run, attacks="standard")


def _run(options: argparse.Namespace) -> None:
    _check_options(options)
    with bar(options.json) as show:
        show(f"reading {options.data}")
        examples = labelled(options.data, options.data_dir, download=options.download)
        show(f"loading {options.target}")
        subject = _subject(options, examples)
        evaluation = _evaluated(options, subject, show)
        amplification, notes = _followed(options, subject, show)
        loaded = [_sentence(subject.note)] if subject.note else []
        notes = [*loaded, *_on_guessing(evaluation, subject), *notes]
        if options.html is not None:
            show(f"drawing {options.html}")
            with writing(options.html):
                _write_page(options, subject, evaluation, amplification, notes)
    if options.json:
        found = {
            "model": subject.name,
            "data": subject.data,
            "evaluation": evaluation.to_dict(),
            "amplification": None if amplification is None else amplification.to_dict(),
            "notes": notes,
        }
        print(json.dumps(found, indent=1))
        return
    print(evaluation, "", amplification or "", *notes, sep="\n")
    if options.html is not None:
        print(f"\nPage: {options.html}")


def _check_options(options: argparse.Namespace) -> None:
    """Say before the work what cannot be right."""
    if not 0 < options.eps < math.inf:
        raise OnsphereError(f"--eps must be positive and finite, got {options.eps:g}")
    if options.images is not None and options.images < 1:
        raise OnsphereError(f"--images must be at least 1, got {options.images}")
    if options.draws < 1:
        raise OnsphereError(f"--draws must be at least 1, got {options.draws}")
    if not 0 <= options.seed < 2**63:
        raise OnsphereError(f"--seed must be from 0 to 2**63 - 1, got {options.seed}")
    low, high = options.bounds
    if not (math.isfinite(low) and math.isfinite(high)):
        raise OnsphereError(
            f"--bounds must be finite, got {low:g} {high:g}: give those of your data"
        )
    if not low < high:
        raise OnsphereError(f"--bounds are the least and the greatest value, got {low:g} {high:g}")
    if not all(map(math.isfinite, options.mean or ())):
        raise OnsphereError("--mean must be finite")
    if not all(0 < s < math.inf for s in options.std or ()):
        raise OnsphereError("--std must be positive and finite")
    if options.html is not None:
        check_writable(options.html)


# --- what is attacked -----------------------------------------------------------------------------


def _subject(options: argparse.Namespace, examples: Examples) -> _Subject:
    import torch

    from onsphere.models.load import load
    from onsphere.robustness.classifier import Classifier

    count = options.images or _IMAGES[options.attacks]
    x, y = examples.x[:count], examples.y[:count]
    target = load(options.target, shape=tuple(x[:1].shape), weights=options.weights)
    if any(p.is_meta for p in target.model.parameters()):
        raise OnsphereError("a config has no weights to attack: add --checkpoint FILE")
    model, name = target.model, type(target.model).__name__
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), wide)
    x = x.to(torch.promote_types(dtype, torch.float32))  # half precision cannot hold a small ball
    _check_channels(options, x)
    if (
        options.mean
        or options.std
        or x.dtype != dtype
        or not isinstance(_first_result(model, name, x), torch.Tensor)
    ):
        mean, std = options.mean or (0.0,), options.std or (1.0,)
        model = Classifier(model, mean=mean, std=std, dtype=dtype)
    _check_logits(_first_result(model, name, x), name, y)
    return _Subject(model, name, examples.name, x, y, target.note)


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _check_channels(options: argparse.Namespace, x: "Tensor") -> None:
    for option in ("mean", "std"):
        given = getattr(options, option)
        if given and len(given) not in (1, x.shape[1]):
            raise OnsphereError(
                f"--{option} takes one number, or one for each of {x.shape[1]} channels: got "
                f"{len(given)}"
            )


def _first_result(model: "nn.Module", name: str, x: "Tensor") -> Any:
    """Run a user's model on two examples; what it raises is one line."""
    import torch

    from onsphere.models.checkpoint import line_of

    try:
        with torch.no_grad():
            return model(x[:2])
    except Exception as error:
        shape = "×".join(map(str, x.shape[1:]))
        raise OnsphereError(
            f"{name} raised {type(error).__name__} on inputs of shape {shape}: {line_of(error)}"
        ) from error


def _check_logits(logits: Any, name: str, y: "Tensor") -> None:
    import torch

    from onsphere.robustness.attacks.pgd import check_logits

    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        raise OnsphereError(
            f"{name} returned {type(logits).__name__}, not logits of shape (batch, classes)"
        )
    try:
        check_logits(logits, y[:2])
        check_logits(logits[:1].expand(len(y), -1), y)  # every label has a column
    except ValueError as error:
        raise OnsphereError(str(error)) from None


# --- what is done ---------------------------------------------------------------------------------


def _evaluated(
    options: argparse.Namespace, subject: _Subject, show: Callable[..., None]
) -> "Evaluation":
    from onsphere.robustness import Budget, evaluate

    return evaluate(
        subject.model, (subject.x, subject.y), eps=options.eps, norm=options.norm,
        bounds=tuple(options.bounds), attacks=options.attacks, seed=options.seed,
        budget=Budget(early_stopping=not options.full), draws=options.draws,
        average=options.average, progress=show,
    )  # fmt: skip


def _on_guessing(evaluation: "Evaluation", subject: _Subject) -> list[str]:
    """Say it where the network is right no more often than by guessing."""
    import torch

    with torch.no_grad():
        classes = subject.model(subject.x[:1]).shape[1]
    right = evaluation.clean_accuracy
    if right.interval[0] > 1 / classes:
        return []
    return [
        f"Without attack {right.value:.0%} are right, as by guessing among {classes} classes. The "
        "network looks untrained (is --checkpoint given?), or its data are prepared otherwise "
        "(--mean, --std): the robust accuracy says nothing then."
    ]


def _followed(
    options: argparse.Namespace, subject: _Subject, show: Callable[..., None]
) -> tuple["Amplification | None", list[str]]:
    """Follow adversarial perturbations through the model, and through a rescaled copy of it."""
    import torch

    from onsphere.robustness import amplification, apgd
    from onsphere.symmetry import audit, rescaled

    x, y = subject.x[:_FOLLOWED], subject.y[:_FOLLOWED]
    show("perturbing for the layers")
    attacked = apgd(
        subject.model, x, y, eps=options.eps, norm=options.norm, bounds=tuple(options.bounds),
        steps=30, generator=torch.Generator().manual_seed(options.seed),
    )  # fmt: skip
    notes: list[str] = []
    control = None
    try:
        show("looking for scale symmetries")
        found = audit(subject.model, x[:_AUDITED])
        control = rescaled(subject.model, found, rescalings=options.control == "all")
    except OnsphereError as error:
        notes.append(f"No control of scales: {error}.")
    try:
        result = amplification(
            subject.model, x, attacked - x, y=y, norm=options.norm, control=control,
            seed=options.seed, progress=show,
        )  # fmt: skip
    except OnsphereError as error:
        return None, [f"Amplification was not measured: {error}."]
    return result, notes


def _write_page(
    options: argparse.Namespace,
    subject: _Subject,
    evaluation: "Evaluation",
    amplification: "Amplification | None",
    notes: list[str],
) -> None:
    from onsphere.report import html
    from onsphere.robustness.evaluation.html import document
    from onsphere.version import __version__

    quick = "A quick run: gradient attacks only; leave out --quick for the full set."
    said = document(
        evaluation,
        amplification,
        model=subject.name,
        data=subject.data,
        command=_command(options),
        provenance={
            "onsphere": __version__,
            "target": options.target,
            "control": _CONTROLS[options.control],
        },
        warnings=[*([quick] if options.attacks == "quick" else []), *notes],
    )
    html.write(said, options.html)


def _command(options: argparse.Namespace) -> str:
    """Return the command that makes the page again."""
    words = ["onsphere", "attack", options.target, "--data", options.data]
    elsewhere = options.data_dir != _DATA_DIR and not is_file(options.data)
    words += ["--data-dir", str(options.data_dir)] if elsewhere else []
    words += ["--checkpoint", options.weights] if options.weights else []
    words += ["--eps", repr(options.eps), "--norm", options.norm, "--seed", str(options.seed)]
    words += ["--control", options.control] if options.control != "all" else []
    words += ["--images", str(options.images)] if options.images else []
    words += ["--bounds", *map(repr, options.bounds)] if tuple(options.bounds) != (0, 1) else []
    for name in ("mean", "std"):
        given = getattr(options, name)
        words += [f"--{name}", *map(repr, given)] if given else []
    words += ["--draws", str(options.draws)] if options.draws > 1 else []
    words += ["--average", options.average] if options.average != "probabilities" else []
    words += ["--quick"] if options.attacks == "quick" else []
    words += ["--full"] if options.full else []
    return shlex.join(words)

"""Nothing that was written is lost, and nothing that cannot be written ends a training."""

import pytest
import torch

from monitor.networks import tangent_noise, watched
from onsphere.monitor import Run, RunError

NOISE = "cannot be written"


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def run(path, generator, count=3, **options):
    return watched(sgd, tangent_noise(generator), count, path=path, **options)


def test_a_run_is_not_voided_by_a_second_one_without_a_start(generator, tmp_path):
    path = tmp_path / "run.jsonl"
    run(path, generator)
    before = path.read_bytes()
    with pytest.raises(RunError, match="holds steps up to 2; give start="):
        run(path, generator)
    assert path.read_bytes() == before
    run(path, generator, 1, start=0)
    assert Run.read(path).steps.tolist() == [0]


@pytest.mark.parametrize("shape", [(16, 32), (8, 64)])
def test_layers_of_another_shape_are_others(shape, generator, tmp_path):
    path = tmp_path / "run.jsonl"
    run(path, generator)
    with pytest.raises(RunError, match="other layers"):
        run(path, generator, start=3, rows=shape[0], columns=shape[1])


def test_a_whole_last_line_is_kept_without_its_end(generator, tmp_path):
    path = tmp_path / "run.jsonl"
    run(path, generator)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    run(path, generator, 1, start=3)
    assert Run.read(path).steps.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("length", [0, 5, 40, 300])
def test_a_torn_header_is_written_anew(length, generator, tmp_path):
    path = tmp_path / "run.jsonl"
    run(path, generator)
    path.write_bytes(path.read_bytes()[:length])
    run(path, generator, 2)
    assert Run.read(path).steps.tolist() == [0, 1]


def test_flags_are_not_raised_again_when_a_run_is_resumed(generator, tmp_path):
    path = tmp_path / "run.jsonl"
    for start in (0, 4):
        watched(sgd, lambda *_: None, 4, path=path, start=start)
    assert [(flag.kind, flag.step) for flag in Run.read(path).flags] == [("dead", 2)]


def test_a_bad_path_is_told_before_the_training(generator, tmp_path):
    with pytest.raises(RunError, match=NOISE):
        run(tmp_path, generator, 0)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=NOISE):
        run(tmp_path / "file" / "run.jsonl", generator, 0)


class Full:
    """A file on a disk that is full."""

    def write(self, _):
        raise OSError(28, "No space left on device")

    flush = close = lambda _: None


def test_a_full_disk_ends_the_file_and_not_the_training(generator, tmp_path, monkeypatch):
    from onsphere.monitor.journal import Journal

    monkeypatch.setattr(Journal, "_open", lambda _: Full())
    with pytest.warns(UserWarning, match="No space left") as told:
        monitor = run(tmp_path / "run.jsonl", generator)
    assert len(told) == 1
    assert len(monitor.run.samples) == 3

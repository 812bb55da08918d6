"""A user's own images: read in every layout that is clear, and refused in one line otherwise."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from onsphere.errors import OnsphereError
from onsphere.studies.setup.data import Source

RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(0, 256, (80, 6, 6, 3), dtype=np.uint8)
LABELS = np.arange(80, dtype=np.uint8) % 4


def arrays(**changes):
    held = {"x_train": BYTES, "y_train": LABELS, "x_test": BYTES[:9], "y_test": LABELS[:9]}
    return {name: value for name, value in {**held, **changes}.items() if value is not None}


def both(of, **changes):
    """Change training and test images alike."""
    return arrays(x_train=of(BYTES), x_test=of(BYTES[:9]), **changes)


def save(folder, held):
    path = folder / "own.npz"
    np.savez(path, **held)
    return str(path)


LAYOUTS = {
    "height, width, channels": lambda x: x,
    "channels, height, width": lambda x: x.transpose(0, 3, 1, 2),
    "floats": lambda x: x / 255,
    "half precision": lambda x: (x / 255).astype(np.float16),
    "long floats": lambda x: (x / 255).astype(np.longdouble),
    "another order of bytes": lambda x: (x / 255).astype(">f8"),
    "height, width": lambda x: x[..., 0],
    "one channel behind": lambda x: x[..., :1],
    "four channels": lambda x: np.concatenate([x, x[..., :1]], 3),
    "float64 not contiguous": lambda x: (x / 255).transpose(0, 3, 2, 1).swapaxes(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_clear_layout_is_read(tmp_path, layout):
    of = LAYOUTS[layout]
    images = Source(save(tmp_path, both(of))).load()
    channels = {"height, width": 1, "one channel behind": 1, "four channels": 4}.get(layout, 3)
    assert images.train_x.shape == (80, channels, 6, 6)
    assert images.test_x.shape == (9, channels, 6, 6)
    assert (images.train_x.dtype, images.train_y.dtype) == (torch.float32, torch.int64)
    assert images.classes == 4
    # Every image keeps its label, in another order.
    first = torch.from_numpy(BYTES[..., 0]).float() / 255
    for x, y in zip(images.train_x[:10], images.train_y[:10], strict=True):
        near = (first - x[0]).abs().amax((1, 2)) < 1e-3
        assert LABELS[near.nonzero().item()] == y


def test_a_file_sorted_by_class_is_mixed_always_alike(tmp_path):
    order = np.argsort(LABELS, kind="stable")
    path = save(tmp_path, arrays(x_train=BYTES[order], y_train=LABELS[order]))
    one, two = Source(path).load(), Source(path).load()
    assert torch.equal(one.train_x, two.train_x)
    assert set(one.train_y[:20].tolist()) == {0, 1, 2, 3}


def test_records_know_the_content_and_not_the_folder(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    one, same = (Source(save(tmp_path / name, arrays())) for name in "ab")
    assert one.identity == same.identity == one.load().name
    assert one.identity.startswith("own.npz@")
    other = Source(save(tmp_path / "b", arrays(x_train=255 - BYTES)))
    assert other.identity != one.identity


def test_the_test_images_alone_can_be_read(tmp_path):
    x, y = Source(save(tmp_path, arrays())).load_test()
    assert (x.shape, sorted(y.tolist())) == ((9, 3, 6, 6), sorted(LABELS[:9].tolist()))


one_hot = np.eye(4, dtype=np.int64)[LABELS]
REFUSED = {
    "an array is missing": (arrays(y_test=None), ["lacks y_test", "it holds x_train", "np.savez"]),
    "none is there": ({"images": BYTES}, ["lacks x_train, y_train, x_test, y_test"]),
    "one gray": (arrays(x_train=np.full_like(BYTES, 7)), ["all pixels of x_train", "differ"]),
    "objects": (arrays(y_train=LABELS.astype(object)), ["pickled objects", "run code"]),
    "too bright": (both(lambda x: x.astype(float)), ["x_train", "to 255", "in [0, 1]"]),
    "negative": (both(lambda x: x / 127.5 - 1), ["ranges from -1 to 1", "in [0, 1]"]),
    "no number": (arrays(x_test=np.full((9, 6, 6, 3), np.nan)), ["x_test", "nan", "in [0, 1]"]),
    "wide integers": (both(lambda x: x.astype(np.int64)), ["int64", "bytes (uint8)"]),
    "truth values": (both(lambda x: x > 9), ["bool", "bytes (uint8)"]),
    "flat images": (both(lambda x: x.reshape(len(x), -1)), ["(80, 108)", "height, width"]),
    "no images": (arrays(x_test=BYTES[:0], y_test=LABELS[:0]), ["x_test", "holds no image"]),
    "not square": (both(lambda x: x[:, 1:, ..., 0]), ["5 x 6 pixels", "crop or pad"]),
    "not square, with channels": (both(lambda x: x[:, 1:]), ["(80, 5, 6, 3)", "square"]),
    "tiny": (both(lambda x: x[:, :4, :4]), ["4 x 4 pixels", "at least 5 x 5"]),
    "channels like pixels": (both(lambda x: np.tile(x, 2)), ["(80, 6, 6, 6)", "cannot be told"]),
    "two shapes": (arrays(x_test=BYTES[:9, ..., :1]), ["6 x 6 x 3", "x_test 6 x 6 x 1"]),
    "labels with commas": (arrays(y_train=LABELS / 1.0), ["float64", "labels are integers"]),
    "labels in words": (arrays(y_test=np.array(["cat"] * 9)), ["y_test", "labels are integers"]),
    "one-hot labels": (arrays(y_train=one_hot), ["(80, 4)", "one label for each", "argmax(1)"]),
    "too few labels": (arrays(y_test=LABELS[:8]), ["(8,)", "each of the 9 images"]),
    "negative labels": (arrays(y_train=LABELS.astype(int) - 1), ["label -1", "from 0"]),
    "labels from one": (arrays(y_train=LABELS + 1, y_test=LABELS[:9] + 1), ["label 0", "gaps"]),
    "a single class": (
        arrays(y_train=LABELS * 0, y_test=LABELS[:9] * 0),
        ["have the label 0", "two classes"],
    ),
    "huge labels": (arrays(y_train=LABELS.astype(int) + 10**9), ["1000000003", "0, 1, 2"]),
    "a new class in the test": (arrays(y_test=LABELS[:9] + 5), ["none above 3 in y_train"]),
    "too few images": (arrays(x_train=BYTES[:60], y_train=LABELS[:60]), ["60 training", "64"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_set_of_images_is_refused_in_one_line(tmp_path, case):
    held, says = REFUSED[case]
    with pytest.raises(OnsphereError) as caught:
        Source(save(tmp_path, held)).load()
    message = str(caught.value)
    assert "\n" not in message
    assert "own.npz" in message
    for part in says:
        assert part in message


def test_objects_are_not_unpickled(tmp_path):
    trap = tmp_path / "trap"

    class Malicious:
        def __reduce__(self):
            return Path.mkdir, (trap,)

    path = save(tmp_path, arrays(y_train=np.array([Malicious()] * 80, dtype=object)))
    with pytest.raises(OnsphereError, match="pickled objects"):
        Source(path).load()
    assert not trap.exists()
    np.load(path, allow_pickle=True)["y_train"]
    assert trap.exists(), "the trap would not have sprung: the test shows nothing"


def test_another_file_is_refused(tmp_path):
    missing, text, single = (tmp_path / f"{name}.npz" for name in ("missing", "text", "single"))
    text.write_text("no zip")
    with single.open("wb") as file:
        np.save(file, BYTES)
    for path, says in (
        (missing, "there is no file"),
        (text, r"text\.npz is no readable \.npz file"),
        (single, "is one array"),
        (tmp_path, "unknown data set"),
    ):
        with pytest.raises(OnsphereError, match=says):
            Source(str(path)).load()
    cut = Path(save(tmp_path, arrays()))
    cut.write_bytes(cut.read_bytes()[:-200])
    with pytest.raises(OnsphereError, match=r"own\.npz is no readable \.npz file"):
        Source(str(cut)).load()


def bytes_of(array):
    held = io.BytesIO()
    np.save(held, array)
    return held.getvalue()


def archive(path, compression=zipfile.ZIP_STORED, **changes):
    """Write the four arrays, some of them replaced by bytes, without NumPy."""
    held = {name: bytes_of(value) for name, value in arrays().items()} | changes
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in held.items():
            file.writestr(f"{name}.npy", content)


def header(text):
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


HUGE = header("{'descr': '<f4', 'fortran_order': False, 'shape': (10000000, 1000, 1000)}")
MEMBERS = {
    "text": (b"no array", "x_train of own.npz is no array"),
    "nothing": (b"", "x_train of own.npz is no array"),
    "a header that ends too early": (header("{'descr': "), "no readable .npz file"),
    "more than memory": (HUGE, "no readable .npz file"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_a_damaged_array_is_told_in_one_line(tmp_path, case):
    content, says = MEMBERS[case]
    archive(tmp_path / "own.npz", x_train=content)
    with pytest.raises(OnsphereError) as caught:
        Source(str(tmp_path / "own.npz")).load()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["lzma", "encrypted", "packed in an unknown way"])
def test_an_archive_that_cannot_be_unpacked_is_told_in_one_line(tmp_path, damage):
    path = tmp_path / "own.npz"
    archive(path, zipfile.ZIP_LZMA if damage == "lzma" else zipfile.ZIP_STORED)
    assert len(Source(str(path)).load().train_x) == len(BYTES)
    held = bytearray(path.read_bytes())
    if damage == "lzma":
        held[100:400] = bytes(byte ^ 0x55 for byte in held[100:400])
    else:
        field, value = (6, 1) if damage == "encrypted" else (8, 97)
        for mark, more in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
            held[held.find(mark) + field + more] = value
    path.write_bytes(held)
    with pytest.raises(OnsphereError, match=r"own\.npz is no readable \.npz file"):
        Source(str(path)).load()

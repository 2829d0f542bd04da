"""Data sets in Python: what `prepare` makes of arrays, tuples and mappings."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import refuses
from PIL import Image

import patchdiffusion as pd
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.rows import RowSource, as_source

PICTURES = [tiny.picture(n, 16) for n in range(12)]
GRAY = [picture[..., 0] for picture in PICTURES]
STACK = np.stack(PICTURES)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHDIFFUSION_CACHE", str(tmp_path / "cache"))


def packed(data: object, **options: object) -> Pack:
    return pd.prepare(data, progress=False, holdout=0, **options)  # pyright: ignore[reportArgumentType]


FORMS = {
    "array": STACK,
    "channels first": STACK.transpose(0, 3, 1, 2),
    "tensor": torch.from_numpy(STACK).movedim(-1, 1),
    "list": PICTURES,
    "tensors": [torch.from_numpy(p).movedim(-1, 0) for p in PICTURES],
    "floats": [(p / np.float32(255)) for p in PICTURES],
    "from -1 to 1": [torch.from_numpy(p / 127.5 - 1).float().movedim(-1, 0) for p in PICTURES],
    "Pillow": [Image.fromarray(p) for p in PICTURES],
    "tuples": [(p,) for p in PICTURES],
    "mappings": [{"img": p, "who": 3} for p in PICTURES],
}


@pytest.mark.parametrize("form", FORMS)
def test_images_of_every_form_are_the_same(form: str) -> None:
    pack = packed(FORMS[form])
    assert np.array_equal(pack.images.numpy(), STACK) and pack.labels is None


def test_gray_images_have_one_channel() -> None:
    for data in (GRAY, np.stack(GRAY), [Image.fromarray(g) for g in GRAY]):
        assert np.array_equal(packed(data).images.numpy()[..., 0], np.stack(GRAY))


class Vision(list[tuple[Image.Image, int]]):
    """As torchvision's data sets are."""

    classes = ("odd", "even")


@pytest.mark.parametrize("label", ["label", "y"])
def test_labels_and_their_names(label: str) -> None:
    wanted = [n % 2 for n in range(12)]
    pairs = [(Image.fromarray(p), n % 2) for n, p in enumerate(PICTURES)]
    mapped = [{"image": p, label: np.int64(n % 2)} for n, p in enumerate(PICTURES)]
    for data, options, names in (
        (pairs, {}, ("0", "1")),
        (pairs, {"classes": ["a", "b", "c"]}, ("a", "b", "c")),
        (Vision(pairs), {}, ("odd", "even")),
        (mapped, {}, ("0", "1")),
        ([(p, torch.tensor(n % 2)) for n, p in enumerate(PICTURES)], {}, ("0", "1")),
    ):
        pack = packed(data, **options)
        assert pack.labels is not None and pack.labels.tolist() == wanted
        assert pack.classes == names


def test_texts_become_captions() -> None:
    for data in ([(p, "a cat") for p in PICTURES], [{"x": p, "text": "a cat"} for p in PICTURES]):
        captions = packed(data).captions
        assert captions is not None and captions[3] == "a cat"


def test_a_mask_beside_an_image_is_no_label() -> None:
    source = as_source([(p, torch.zeros(16, 16, dtype=torch.int64)) for p in PICTURES])
    assert isinstance(source, RowSource) and source.label is None


def test_what_is_in_memory_is_known_again() -> None:
    """The pack is used again for the same content, and another one made for other content."""
    first, again = packed(PICTURES), packed(list(PICTURES))
    assert first.path == again.path
    for other in (PICTURES[:-1] + GRAY[:1], [(p, 0) for p in PICTURES], PICTURES[::-1], STACK):
        assert packed(other).path != first.path
    assert packed(STACK).path == packed(STACK.copy()).path


def test_a_pack_of_rows_trains(tmp_path: Path) -> None:
    pack = packed(PICTURES, name="mine")
    assert pack.name == "mine"
    config = tiny.config(pack.path, steps=1, network=replace(tiny.NETWORK, num_classes=0))
    assert (tiny.run(config, tmp_path / "run") / "model").is_dir()


def test_data_that_cannot_be() -> None:
    with refuses("generator", "once"):
        as_source(p for p in PICTURES)
    with refuses("no images"):
        as_source([])
    with refuses("who", "image"):
        as_source([{"who": 1}])
    with refuses("[3, 4]"):
        as_source(np.zeros((3, 4)))
    with refuses("0", "str"):
        packed([("path.png", 1)])

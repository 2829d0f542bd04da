"""The policy table of `decode`, row by row, against numbers worked out here."""

import io

import numpy as np
import pytest
import tiny
from commands import refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchdiffusion.data.decode import decode_image, decoded
from patchdiffusion.data.example import BadImage, Example
from patchdiffusion.data.frame import Frame
from patchdiffusion.data.pixels import background_color, to_uint8
from patchdiffusion.data.pixels import fit as fit_frame

WHITE = (255, 255, 255)
RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decode(data: bytes, key: str) -> tuple[np.ndarray, str]:
    """A file as 8-bit pixels."""
    image, mode, _, span = decoded(data, key)
    return to_uint8(Example(image, None, key, span=span, mode=mode)), mode


def fit(
    image: np.ndarray, size: tuple[int, int], planes: int, background: tuple[int, int, int]
) -> tuple[np.ndarray, bool]:
    """Fitted as color and alpha if there are four channels, and whether it was enlarged."""
    frame, (height, width) = Frame(size), image.shape[:2]
    alpha = 4 in (planes, image.shape[2])
    out = fit_frame(image, frame, planes, background, alpha=alpha)
    return out, frame.enlarges(width, height) > 1


def refusal(data: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, "some/key.png")
    assert caught.value.key == "some/key.png"
    assert str(caught.value).startswith("some/key.png: ")
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_gray_and_color_are_untouched():
    color = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    for array in (RAMP, color):
        out, mode = decode(encoded(Image.fromarray(array), "PNG"), "k")
        assert out.dtype == np.uint8 and mode == ("L" if array.ndim == 2 else "RGB")
        np.testing.assert_array_equal(out.squeeze(), array)


def test_bilevel():
    out, mode = decode(encoded(Image.fromarray(RAMP >= 128), "PNG"), "k")
    assert mode == "1"
    np.testing.assert_array_equal(out[..., 0], np.where(RAMP >= 128, 255, 0))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    out, mode = decode(encoded(Image.fromarray(values), kind), "k")
    assert mode == "I;16"
    np.testing.assert_array_equal(out[..., 0], np.rint(values / 257.0))
    assert out.min() == 0 and out.max() == 255 and len(np.unique(out)) == 256


@pytest.mark.parametrize(("color", "planes"), [(2, 3), (6, 4)])
def test_sixteen_bit_color(color: int, planes: int):
    values = np.linspace(0, 65535, 64 * planes).astype(">u2").reshape(8, 8 * planes)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    out, _ = decode(tiny.raw_png(8, 8, depth=16, color=color, rows=rows), "k")
    assert np.abs(out.reshape(8, -1) - values / 257.0).max() <= 1


def test_long_integers_and_floats():
    tiff = encoded(Image.fromarray(RAMP.astype(np.int32) * 257), "TIFF")
    np.testing.assert_array_equal(decode(tiff, "k")[0][..., 0], RAMP)
    assert "allowed are 0 to 65535" in refusal(
        encoded(Image.fromarray(RAMP.astype(np.int32) * 1000), "TIFF")
    )
    tiff = encoded(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF")
    np.testing.assert_array_equal(decode(tiff, "k")[0][..., 0], RAMP)
    assert "allowed are 0 to 1" in refusal(
        encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF")
    )
    nan = np.full((8, 8), np.nan, dtype=np.float32)
    assert "NaN" in refusal(encoded(Image.fromarray(nan), "TIFF"))


def test_alpha_is_composed_exactly():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    stored, mode = decode(encoded(Image.fromarray(image), "PNG"), "k")
    assert mode == "RGBA"
    np.testing.assert_array_equal(stored, image)
    background = (10, 200, 90)
    out, enlarged = fit(stored, (16, 16), 3, background)
    alpha = image[..., 3:].astype(np.float64) / 255
    wanted = image[..., :3] * alpha + np.array(background) * (1 - alpha)
    np.testing.assert_array_equal(out, np.floor(wanted + 0.5))
    assert not enlarged
    np.testing.assert_array_equal(fit(stored, (16, 16), 4, background)[0], image)


def test_gray_with_alpha():
    image = Image.merge("LA", [Image.fromarray(RAMP), Image.new("L", (8, 8), 0)])
    out, mode = decode(encoded(image, "PNG"), "k")
    assert mode == "LA" and out.shape == (8, 8, 4)
    assert (fit(out, (8, 8), 1, WHITE)[0] == 255).all()


def test_palettes():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    out, mode = decode(encoded(image, "PNG"), "k")
    assert mode == "P" and out.shape == (8, 8, 3)
    assert out[0, 0].tolist() == [255, 0, 0] and out[1, 1].tolist() == [0, 0, 255]
    out, _ = decode(encoded(image, "PNG", transparency=b"\xff\x00"), "k")
    assert out.shape == (8, 8, 4)
    composed = fit(out, (8, 8), 3, (1, 2, 3))[0]
    assert composed[0, 0].tolist() == [255, 0, 0] and composed[1, 1].tolist() == [1, 2, 3]


def test_transparent_gray_value():
    data = encoded(Image.fromarray(RAMP), "PNG", transparency=252)
    out, _ = decode(data, "k")
    assert out.shape == (8, 8, 4) and out[7, 7, 3] == 0 and (out[:7, :, 3] == 255).all()


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    out, mode = decode(encoded(image, "TIFF"), "k")
    assert mode == "CMYK" and out[0, 0].tolist() == [255, 0, 0]


def test_lab_is_refused():
    assert "mode LAB" in refusal(encoded(Image.new("LAB", (8, 8)), "TIFF"))


def test_animation_gives_its_first_frame():
    frames = [Image.new("L", (8, 8), value) for value in (0, 120, 255)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    out, mode = decode(data, "k")
    assert mode.endswith("animated") and out.shape[:2] == (8, 8) and (out == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int):
    array = np.arange(96, dtype=np.uint8).reshape(8, 12)
    exif = Image.Exif()
    exif[0x0112] = orientation
    out, _ = decode(encoded(Image.fromarray(array), "PNG", exif=exif), "k")
    flip, turn = np.fliplr, np.rot90
    wanted = {
        1: array,
        2: flip(array),
        3: turn(array, 2),
        4: np.flipud(array),
        5: array.T,
        6: turn(array, -1),
        7: turn(array, 2).T,
        8: turn(array, 1),
    }[orientation]
    np.testing.assert_array_equal(out[..., 0], wanted)


def test_broken_files_are_refused_with_a_reason():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        data = encoded(Image.fromarray(noise), kind)
        for keep in (len(data) // 2, 30):
            assert refusal(data[:keep])
    assert refusal(b"") == "empty file"
    assert refusal(b"<!DOCTYPE html><html>not found</html>").startswith("HTML")
    assert refusal(b"just some words").startswith("not an image")
    assert refusal(tiny.raw_png(0, 0))
    damaged = bytearray(encoded(Image.fromarray(noise), "PNG"))
    damaged[2000] ^= 1
    assert refusal(bytes(damaged))


def test_external_programs_are_never_called():
    assert refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").startswith("not an image")


def test_bomb():
    data = tiny.raw_png(40_000, 40_000, rows=bytes(40_001))
    assert len(data) < 1000
    assert "too many pixels" in refusal(data)


@given(st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"]))
@settings(max_examples=150, deadline=None)
def test_random_bytes_are_an_image_or_refused(data: bytes, magic: bytes):
    try:
        out, _ = decode(magic + data, "k")
    except BadImage:
        return
    assert out.dtype == np.uint8 and out.ndim == 3 and out.shape[2] in (1, 3, 4)


@given(
    st.integers(8, 60),
    st.integers(8, 60),
    st.integers(8, 60),
    st.integers(8, 60),
    st.sampled_from([1, 3, 4, 5]),
)
@settings(max_examples=60, deadline=None)
def test_a_flat_image_stays_flat_at_any_size(h: int, w: int, height: int, width: int, planes: int):
    flat = np.full((h, w, planes), 77, dtype=np.uint8)
    flat[..., -1] = 255 if planes == 4 else 77
    out, enlarged = fit(flat, (height, width), planes, WHITE)
    assert out.shape == (height, width, planes)
    assert (out == flat[0, 0]).all()
    assert enlarged == (min(h / height, w / width) < 1)


def test_a_central_crop_without_scaling_is_exact():
    image = np.random.default_rng(2).integers(0, 256, (16, 41, 3), dtype=np.uint8)
    out, enlarged = fit(image, (16, 16), 3, WHITE)
    np.testing.assert_array_equal(out, image[:, 12:28])
    assert not enlarged
    out, _ = fit(image.transpose(1, 0, 2), (16, 16), 3, WHITE)
    np.testing.assert_array_equal(out, image.transpose(1, 0, 2)[12:28])


def test_reduction_keeps_the_mean_and_does_not_alias():
    lines = np.zeros((256, 256, 1), dtype=np.uint8)
    lines[:, ::2] = 254
    out, _ = fit(lines, (32, 32), 1, WHITE)
    assert np.abs(out[:, 2:-2].astype(int) - 127).max() <= 3


def test_channels():
    color = np.zeros((8, 8, 3), dtype=np.uint8)
    color[..., 0] = 255
    assert (fit(color, (8, 8), 1, WHITE)[0] == 76).all()  # 0.299 * 255
    assert fit(color, (8, 8), 4, WHITE)[0][0, 0].tolist() == [255, 0, 0, 255]
    gray = RAMP[..., None]
    np.testing.assert_array_equal(fit(gray, (8, 8), 3, WHITE)[0], np.repeat(gray, 3, 2))
    with refuses(5, 3):
        fit(np.zeros((8, 8, 5), dtype=np.uint8), (8, 8), 3, WHITE)


def test_examples_of_all_types():
    ramp16 = RAMP.astype(np.uint16) * 257
    unit = RAMP / 255.0
    cases = [
        Example(RAMP, None, "k"),
        Example(ramp16, None, "k"),
        Example(unit, None, "k", span=(0.0, 1.0)),
        Example((unit * 2 - 1).astype(np.float32), None, "k", span=(-1.0, 1.0)),
        Example(ramp16, None, "k", span=(0.0, 65535.0)),
    ]
    for example in cases:
        np.testing.assert_array_equal(to_uint8(example)[..., 0], RAMP)
    np.testing.assert_array_equal(
        to_uint8(Example(RAMP > 9, None, "k"))[..., 0], np.where(RAMP > 9, 255, 0)
    )
    for image, match in [
        (unit, "declared span"),
        (RAMP.astype(np.int64), "type int64"),
        (RAMP[0], "shape"),
        (RAMP.astype(str), "type"),
    ]:
        with pytest.raises(BadImage, match=match):
            to_uint8(Example(image, None, "k"))
    with pytest.raises(BadImage, match="allowed are -1 to 1"):
        to_uint8(Example(unit * 2, None, "k", span=(-1.0, 1.0)))


def test_background_names():
    assert background_color("black") == (0, 0, 0)
    assert background_color("#ff8000") == (255, 128, 0)
    assert background_color((1, 2, 3)) == (1, 2, 3)
    with refuses("background", "whitish"):
        background_color("whitish")
    with refuses("background", 300, 255):
        background_color((1, 2, 300))


def test_an_opened_image_is_decoded_alike():
    out, mode, *_ = decode_image(Image.fromarray(RAMP), "k")
    assert mode == "L"
    np.testing.assert_array_equal(out[..., 0], RAMP)

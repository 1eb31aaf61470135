"""What each kind of picture file becomes, and the crop and resize."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from undiffuse.data import picture
from undiffuse.errors import DataError, UsageError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def claiming(width, height):
    """A small PNG whose header says that it is large."""
    data = encoded(Image.new("L", (1, 1)))
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_lossless_formats_come_back_exactly(kind):
    pixels = noise(6, 9) if kind != "GIF" else np.tile(noise(1, 16), (4, 1, 1))
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(picture.decode(encoded(Image.fromarray(pixels), kind, **options)), pixels)


def test_grey_stays_grey_and_bits_become_black_and_white():
    pixels = noise(5, 4, 1)
    assert np.array_equal(picture.decode(encoded(Image.fromarray(pixels[..., 0]))), pixels)
    bits = np.array([[0, 1], [1, 0]], bool)
    assert picture.decode(encoded(Image.fromarray(bits)))[..., 0].tolist() == [[0, 255], [255, 0]]


def test_sixteen_bits_are_rounded_to_eight():
    values = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        assert picture.decode(encoded(Image.fromarray(values), kind))[..., 0].tolist() == [[0, 0, 1, 1, 128, 255]]


def test_wider_values_are_refused():
    with pytest.raises(DataError, match="pixels from 0 to 70000; expected 8 or 16 bits"):
        picture.decode(encoded(Image.fromarray(np.array([[0, 70000]], np.int32)), "TIFF"))
    with pytest.raises(DataError, match="float pixels; expected 8 or 16 bits"):
        picture.decode(encoded(Image.fromarray(np.array([[0.5]], np.float32)), "TIFF"))


def test_cmyk_becomes_rgb():
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert np.array_equal(picture.decode(encoded(cmyk, "TIFF")), np.full((4, 4, 3), RED))


def test_a_palette_becomes_rgb_and_its_transparent_colour_the_background():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    assert picture.decode(encoded(image)).tolist() == [[list(RED), list(BLUE)]]
    assert picture.decode(encoded(image, transparency=1)).tolist() == [[list(RED), [255] * 3]]


@pytest.mark.parametrize("background, expected", [("white", [255, 128, 128]), ("black", [128, 0, 0])])
def test_alpha_is_flattened_on_the_background(background, expected):
    half = Image.new("RGBA", (1, 1), (*RED, 128))
    pixels = picture.decode(encoded(half), picture.Reading(background))
    assert np.abs(pixels[0, 0].astype(int) - expected).max() <= 1


def test_grey_with_alpha_stays_grey_on_a_grey_background_only():
    image = encoded(Image.new("LA", (1, 1), (0, 0)))
    assert picture.decode(image, picture.Reading("#c8c8c8")).tolist() == [[[200]]]
    assert picture.decode(image, picture.Reading("#c80000")).tolist() == [[[200, 0, 0]]]


def test_the_orientation_tag_is_obeyed():
    pixels = noise(3, 5)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    assert np.array_equal(picture.decode(encoded(Image.fromarray(pixels), exif=exif)), np.rot90(pixels, -1))


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (3, 2), colour) for colour in (RED, BLUE)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(picture.decode(data), np.full((2, 3, 3), RED))


def test_a_bomb_is_refused_before_it_is_unpacked():
    with pytest.raises(DataError, match="^8193x8192 is more than 67108864 pixels$"):
        picture.decode(claiming(8193, 8192))
    with pytest.raises(DataError, match=r"^Image size \(400000000 pixels\) exceeds limit"):  # Pillow's own limit
        picture.decode(claiming(20000, 20000))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_every_truncation_is_an_error_with_a_reason_in_one_line(kind):
    data = encoded(Image.fromarray(noise(32, 32)), kind)
    for length in range(0, len(data) * 3 // 4, max(1, len(data) // 40)):
        with pytest.raises(DataError, match=r"^[^\n]+$"):
            picture.decode(data[:length])


def test_what_is_no_picture_says_so():
    with pytest.raises(DataError, match="^not a picture in a known format$"):
        picture.decode(b"hello")


def test_known_endings():
    assert {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".ppm"} <= picture.suffixes()
    assert picture.suffixes().isdisjoint({".eps", ".pdf", ".txt", ".mpg"})


def test_colours():
    assert picture.colour("white") == (255, 255, 255)
    assert picture.colour("#20a0ff") == (0x20, 0xA0, 0xFF)
    with pytest.raises(UsageError, match='background "wite" is not a colour; give a name such as white or #rrggbb'):
        picture.colour("wite")


@pytest.mark.parametrize("shape", [(10, 17), (17, 10), (11, 4), (7, 7)])
def test_the_crop_is_the_centred_square(shape):
    """StyleGAN's: rows (h - m) // 2 up to (h + m) // 2 with m = min(h, w), the same for columns; then Lanczos."""
    pixels = noise(*shape)
    h, w, m = *shape, min(shape)
    square = pixels[(h - m) // 2 : (h + m) // 2, (w - m) // 2 : (w + m) // 2]
    assert np.array_equal(picture.fit(pixels, (m, m), None), square)
    expected = np.asarray(Image.fromarray(square).resize((5, 5), Image.Resampling.LANCZOS))
    assert np.array_equal(picture.fit(pixels, (5, 5), None), expected)


def test_other_aspects_are_cropped_to():
    pixels = noise(40, 40)
    assert np.array_equal(picture.fit(pixels, (20, 40), None), pixels[10:30])
    assert np.array_equal(picture.fit(pixels, (40, 20), None), pixels[:, 10:30])
    assert picture.fit(pixels, (3, 50), None).shape == (3, 50, 3)


@pytest.mark.parametrize("shape, size, box", [((11, 40), (7, 5), (0, 11, 16, 24)), ((40, 11), (5, 7), (16, 24, 0, 11))])
def test_a_crop_is_as_wide_as_the_nearest_whole_number(shape, size, box):
    """11 · 5/7 is 7.86, so that 8 of 40 are kept, from the 16th; each channel is then resized alone."""
    pixels = noise(*shape)
    top, bottom, left, right = box
    part = Image.fromarray(pixels[top:bottom, left:right]).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    assert np.array_equal(picture.fit(pixels, size, None), np.asarray(part))


def test_channels():
    grey, rgb = noise(4, 4, 1), noise(4, 4, 3)
    assert np.array_equal(picture.fit(grey, None, 3), np.concatenate([grey] * 3, axis=2))
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    assert np.abs(picture.fit(rgb, None, 1)[..., 0] - luma).max() <= 1
    assert picture.fit(rgb, None, 3) is rgb
    with pytest.raises(DataError, match=re.escape("4 channels cannot be turned into 3; only grey and RGB")):
        picture.fit(noise(4, 4, 4), None, 3)

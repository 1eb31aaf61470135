"""What each kind of picture file becomes, and the crop and resize."""

import io
import re
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from undiffuse.data import picture
from undiffuse.data.source import open_raw
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
    say = "say what is black and what is white, for example --set 'data.range="
    for values, message in [
        (np.array([[0, 70000]], np.int32), f"int32 values from 0 to 70000; {say}[0,70000]'"),
        (np.array([[-3, 9]], np.int32), f"int32 values from -3 to 9; {say}[-3,9]'"),
        (np.array([[0.25, 0.5]], np.float32), f"float32 values from 0.25 to 0.5; {say}[0,1]'"),
        (np.array([[-0.25, 0.5]], np.float32), f"float32 values from -0.25 to 0.5; {say}[-1,1]'"),
    ]:
        with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
            picture.decode(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("dtype, kind, span", [
    (np.uint16, "PNG", (0, 4095)), (np.uint16, "TIFF", (0, 4095)), (np.uint16, "PNG", (100, 300)),
    (np.uint8, "PNG", (0, 1)), (np.uint8, "PNG", (20, 200)), (np.int32, "TIFF", (-1000, 70000)),
    (np.float32, "TIFF", (0, 1)), (np.float32, "TIFF", (-1.0, 1.0)),
])  # fmt: skip
def test_a_range_is_mapped_to_all_levels(dtype, kind, span):
    """255 (v - low) / (high - low), rounded; what lies outside is clipped and noted."""
    low, high = span
    values = np.linspace(low, high, 23)
    values = (values.round() if dtype != np.float32 else values).astype(dtype)[None]
    found = picture.read(encoded(Image.fromarray(values), kind), picture.Reading(range=span))
    expected = 255 * (values.astype(float) - low) / (high - low)
    assert np.abs(found.pixels[..., 0] - expected).max() <= 0.5 + 1e-9
    assert (found.pixels.min(), found.pixels.max()) == (0, 255)
    assert found.own[:2] == (low, high) and found.own.mean == pytest.approx(values.mean(dtype=float))
    assert not [what for what, _ in found.made if "clipped" in what]
    middle = picture.Reading(range=(low, (low + high) / 2))
    beyond = picture.read(encoded(Image.fromarray(values), kind), middle)
    assert (beyond.pixels[0, -1, 0], beyond.pixels[0, 0, 0]) == (255, 0)
    assert [what.partition("=")[0] for what, _ in beyond.made if "clipped" in what] == ["clipped to data.range"]


def test_a_range_maps_colours_and_not_transparency():
    image = Image.fromarray(np.array([[[0, 1, 1, 255], [1, 0, 0, 255]]], np.uint8))
    kept = picture.decode(encoded(image), picture.Reading(range=(0, 1), channels=4))
    assert kept.tolist() == [[[0, 255, 255, 255], [255, 0, 0, 255]]]
    bits = encoded(Image.fromarray(np.array([[0, 1]], bool)))
    assert picture.decode(bits, picture.Reading(range=(0, 1))).ravel().tolist() == [0, 255]  # which Pillow calls 255


def test_values_that_are_not_finite():
    values = np.array([[0.5, np.nan, np.inf]], np.float32)
    with pytest.raises(DataError, match=re.escape("2 of 3 values are not finite (NaN or infinite); replace them")):
        picture.decode(encoded(Image.fromarray(values), "TIFF"), picture.Reading(range=(0, 1)))


@pytest.mark.parametrize("span", [(1, 0), (0, 0), (0, float("nan")), (0, float("inf"))])
def test_a_range_that_is_none(span):
    with pytest.raises(UsageError, match="is not possible; give two finite numbers, the lower one first$"):
        picture.Reading(range=span)


def deep_colour(pixels):
    """A PNG of 16 bits a colour, with opacity for 2 and 4 channels, which Pillow does not write."""
    h, w, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = [
        (b"IHDR", struct.pack(">II5B", w, h, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(pixels, bits, sample=1):
    """An uncompressed little-endian TIFF; `sample` is 1 for unsigned, 2 for signed integers."""
    h, w, channels = pixels.shape
    body = pixels.tobytes()
    depths = struct.pack(f"<{channels}H", *[bits] * channels)
    kinds = [(256, 4, 1, w), (257, 4, 1, h), (258, 3, channels, bits if channels == 1 else 8 + len(body))]
    kinds += [(259, 3, 1, 1), (262, 3, 1, 1 if channels == 1 else 2), (273, 4, 1, 8), (277, 3, 1, channels)]
    kinds += [(278, 4, 1, h), (279, 4, 1, len(body))] + ([(338, 3, 1, 2)] if channels == 4 else [])
    kinds += [(339, 3, 1, sample)] if channels == 1 else []
    table = b"".join(struct.pack("<HHII", *each) for each in kinds)
    head = b"II*\0" + struct.pack("<I", 8 + len(body) + len(depths))
    return head + body + depths + struct.pack("<H", len(kinds)) + table + bytes(4)


def deep_tiff(pixels):
    return tiff(pixels.astype("<u2"), 16)


BY_TYPE = [  # dtype, signed or not, whether it is of 16 bits
    ("<u2", 1, True), ("<i2", 2, False), ("<i4", 2, False), ("<u4", 1, False),
]  # fmt: skip


@pytest.mark.parametrize("most", [255, 32767, 65535, 70000])
@pytest.mark.parametrize("dtype, sample, short", BY_TYPE)
def test_the_type_decides_and_not_the_values(dtype, sample, short, most):
    """Of 32 bits, and of signed ones, a dark picture needs a range as the bright one beside it does."""
    most = min(most, np.iinfo(dtype).max)
    data = tiff(np.array([[[0], [most]]]).astype(dtype), 8 * np.dtype(dtype).itemsize, sample)
    if short:
        assert picture.read(data).own[:2] == (0, most)
        return
    with pytest.raises(DataError, match=f"^int32 values from 0 to {most}; say what is black and what is white"):
        picture.decode(data)
    assert picture.decode(data, picture.Reading(range=(0, most))).ravel().tolist() == [0, 255]


@pytest.mark.parametrize("most", [65535, 1023])
def test_grey_of_a_portable_map_is_of_16_bits(most):
    data = b"P5 2 1 %d\n" % most + np.array([0, most], ">u2").tobytes()
    found = picture.read(data)
    assert found.pixels.ravel().tolist() == [0, 255] and found.own.kind == "uint16"


@pytest.mark.parametrize("channels, kind", [(2, "PNG"), (3, "PNG"), (4, "PNG"), (3, "TIFF"), (4, "TIFF")])
def test_colours_of_16_bits_are_read_whole(channels, kind):
    """round(v / 257), or 255 (v - low) / (high - low); of the opacity the upper 8 bits."""
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels)).astype(np.uint16)
    data = deep_colour(values) if kind == "PNG" else deep_tiff(values)
    colours, keep = (values[..., :1] if channels == 2 else values[..., :3]).astype(float), channels != 3
    for low, high in ((0, 65535), (0, 4095), (1000, 30000)):
        span = None if high == 65535 else (low, high)
        found = picture.read(data, picture.Reading(range=span, channels=channels if keep else None))
        expected = np.clip(np.floor(255 * (colours - low) / (high - low) + 0.5), 0, 255)
        assert np.abs(found.pixels[..., : colours.shape[2]] - expected).max() == 0
        assert found.own[:2] == (colours.min(), colours.max()) and found.own.kind == "uint16"
        assert found.made[0] == ("read from more than 8 bits", f"{colours.min():.0f} to {colours.max():.0f}")
        assert not keep or np.array_equal(found.pixels[..., -1], values[..., -1] >> 8)


ALPHA = [  # mode, value, channels, pixel
    ("RGBA", (10, 20, 30, 40), 4, [10, 20, 30, 40]), ("RGBA", (9, 9, 9, 0), 4, [9, 9, 9, 0]),
    ("RGB", (10, 20, 30), 4, [10, 20, 30, 255]), ("LA", (7, 8), 4, [7, 7, 7, 8]), ("L", 7, 4, [7, 7, 7, 255]),
    ("LA", (7, 8), 2, [7, 8]), ("LA", (7, 0), 2, [7, 0]), ("L", 7, 2, [7, 255]), ("RGBA", (7, 7, 7, 9), 2, [7, 9]),
    ("1", 1, 2, [255, 255]),
]  # fmt: skip


@pytest.mark.parametrize("mode, value, channels, pixel", ALPHA)
def test_transparency_is_kept_where_it_is_wanted(mode, value, channels, pixel):
    data = encoded(Image.new(mode, (2, 1), value))
    found = picture.read(data, picture.Reading(channels=channels))
    assert found.pixels.tolist() == [[pixel, pixel]]
    done = tuple(note for note in found.made if "nearly" not in note[0])
    assert done == (() if mode.endswith("A") else (("taken as opaque", ""),))


def test_a_transparent_colour_is_kept_too():
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    data = encoded(image, transparency=BLUE)
    assert picture.decode(data, picture.Reading(channels=4)).tolist() == [[[*RED, 255], [*BLUE, 0]]]
    assert picture.read(data).made == (("with transparency laid on white", ""),)
    assert picture.decode(data).tolist() == [[list(RED), [255] * 3]]
    assert picture.read(encoded(Image.new("RGBA", (2, 1), (*RED, 255)))).made == ()  # nothing was seen through


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
    for width, height in ((8193, 8192), (20000, 20000)):  # the second is over twice Pillow's own limit
        message = f"{width}x{height} is more than 67108864 pixels; allow it with --set data.max_pixels={width * height}"
        with pytest.raises(DataError, match=f"^{message}$"):
            picture.decode(claiming(width, height))


def large_jpeg(width, height):
    """One level of grey at the left, another at the right."""
    image = Image.new("L", (width, height), 40)
    image.paste(200, (width // 2, 0, width, height))
    return encoded(image, "JPEG")


def test_a_large_jpeg_is_decoded_smaller():
    """At the largest of a half, a quarter and an eighth that is not too large; Python's warnings are errors here."""
    data, limit = large_jpeg(640, 320), Image.MAX_IMAGE_PIXELS
    for most, least, shape in [
        (640 * 320, (8, 8), (320, 640)), (640 * 320 - 1, (8, 8), (160, 320)), (160 * 80, (8, 8), (80, 160)),
        (160 * 80 - 1, (8, 8), (40, 80)), (160 * 80 - 1, (40, 40), (40, 80)),
    ]:  # fmt: skip
        found = picture.read(data, picture.Reading(max_pixels=most, least=least))
        assert found.pixels.shape == (*shape, 1)
        assert np.abs(found.pixels[:, [0, -1], 0].astype(int) - [40, 200]).max() <= 1
        assert found.made == (() if shape == (320, 640) else (("decoded at a lower resolution", "640×320"),))
    message = "640x320 is more than 12799 pixels; allow it with --set data.max_pixels=204800, or give a"
    for least, smaller in ((None, ""), ((41, 41), "smaller ")):
        with pytest.raises(DataError, match=f"^{message} {smaller}--size$"):
            picture.decode(data, picture.Reading(max_pixels=160 * 80 - 1, least=least))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_no_warning_leaks_from_threads(monkeypatch):
    """Pillow's limit is met by every picture here, in many threads at once."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    data = encoded(Image.fromarray(noise(16, 16)))
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(lambda _: picture.decode(data), range(200)))) == 200
    assert warnings.filters == before
    assert Image.MAX_IMAGE_PIXELS == 10


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


@pytest.mark.parametrize("shape, size, channels, expected", [
    ((48, 64, 3), (28, 28), 1, ["made grey", "cropped", "reduced"]), ((1, 1, 1), (64, 64), 1, ["enlarged"]),
    ((48, 64, 1), (48, 48), 3, ["made RGB", "cropped"]), ((40, 20, 3), (80, 40), None, ["enlarged"]),
    ((8, 8, 3), (8, 8), 3, []), ((8, 8, 3), None, None, []), ((100, 10, 3), (20, 20), 3, ["cropped", "enlarged"]),
])  # fmt: skip
def test_what_is_done_is_said(shape, size, channels, expected):
    assert [what for what, _ in picture.changes(shape, size, channels)] == expected
    whole = f"{shape[1]}×{shape[0]}"
    assert all(of in ("", whole) for _, of in picture.changes(shape, size, channels))
    fitted = picture.fit(noise(*shape), size, channels).shape
    assert fitted == (*(size or shape[:2]), channels or shape[2])


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
    message = "4 channels cannot be turned into 3, only grey and RGB into each other; keep them with "
    with pytest.raises(DataError, match=f"^{re.escape(message)}--set data.channels=4$"):
        picture.fit(noise(4, 4, 4), None, 3)


def test_every_ending_of_what_pillow_decodes_is_read(tmp_path):
    """MPO, of cameras with two lenses, is opened as JPEG is; what Pillow only writes is not read."""
    assert {".mpo", ".jpg", ".png", ".apng", ".dib"} <= picture.suffixes()
    assert not {".pdf", ".eps", ".palm", ".mpg", ".wmf"} & picture.suffixes()
    first, second = (Image.new("RGB", (8, 8), (level,) * 3) for level in (50, 200))
    first.save(tmp_path / "a.MPO", "MPO", save_all=True, append_images=[second])
    item = open_raw(tmp_path)[0]
    assert item.frames == 2 and int(item.image.float().mean()) == 50


def test_a_transparent_grey_of_16_bits_is_seen():
    values = np.array([[40000, 1], [40001, 65535]], np.uint16)
    data = io.BytesIO()
    Image.fromarray(values).save(data, "PNG", transparency=40000)
    found = picture.decode(data.getvalue(), picture.Reading(channels=2))
    assert found[..., 1].tolist() == [[0, 255], [255, 255]] and found[0, 1, 0] == 0 and found[1, 1, 0] == 255

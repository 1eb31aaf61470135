"""Colour profiles: written here by hand from their primaries, and compared with the formula."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from undiffuse.data import picture
from undiffuse.data.colour import PASSED_OVER

D50, D65 = (0.3457, 0.3585), (0.3127, 0.3290)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
PRIMARIES = {
    "sRGB": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    "Display P3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    "Adobe RGB (1998)": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)),
}
ADOBE = 563 / 256


def xyz(xy):
    x, y = xy
    return np.array([x / y, 1, (1 - x - y) / y])


def colorants(name):
    """XYZ of the three primaries, columns, adapted from D65 to the D50 of profiles."""
    columns = np.stack([xyz(xy) for xy in PRIMARIES[name]], 1)
    matrix = columns * np.linalg.solve(columns, xyz(D65))
    cone = BRADFORD @ xyz(D50) / (BRADFORD @ xyz(D65))
    return np.linalg.inv(BRADFORD) @ np.diag(cone) @ BRADFORD @ matrix


def srgb_linear(v):
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def srgb_encoded(v):
    v = np.clip(v, 0, 1)
    return np.where(v <= 0.0031308, v * 12.92, 1.055 * v ** (1 / 2.4) - 0.055)


def formula(name, levels):
    """Linearise, turn by both matrices, encode."""
    linear = (levels / 255) ** ADOBE if "Adobe" in name else srgb_linear(levels / 255)
    return 255 * srgb_encoded(linear @ (np.linalg.inv(colorants("sRGB")) @ colorants(name)).T)


def fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(name, kind, tags, pcs=b"XYZ "):
    """An ICC profile of version 4: header, table of tags, tags."""
    text = name.encode("utf-16-be")
    mluc = b"mluc" + bytes(4) + struct.pack(">IIHHII", 1, 12, 0x656E, 0x5553, len(text), 28) + text
    tags = {b"desc": mluc, b"cprt": mluc, b"wtpt": b"XYZ " + bytes(4) + fixed(*xyz(D50)), **tags}
    at, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        table += tag + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", at + len(body), bytes(4), 0x04300000, b"mntr", kind, pcs)
    head += bytes(12) + b"acsp" + bytes(24) + fixed(0.9642, 1, 0.8249)
    head = head[:68] + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + table + body


def rgb_profile(name):
    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    if "Adobe" in name:
        curve = b"para" + bytes(4) + struct.pack(">HH", 0, 0) + fixed(ADOBE)
    tags = {f"{c}TRC".encode(): curve for c in "rgb"}
    matrix = colorants(name)
    tags |= {f"{c}XYZ".encode(): b"XYZ " + bytes(4) + fixed(*matrix[:, i]) for i, c in enumerate("rgb")}
    return profile(name, b"RGB ", tags)


def grey_profile(gamma):
    return profile("Grey", b"GRAY", {b"kTRC": b"para" + bytes(4) + struct.pack(">HH", 0, 0) + fixed(gamma)})


def cmyk_profile():
    """Black ink alone counts: L* = 100 (1 - K), no colour. A table of two points an axis, of bytes."""
    grid = bytes(v for i in range(16) for v in ((0 if i & 1 else 255), 128, 128))
    ramp = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + grid + ramp * 3
    return profile("Ink", b"CMYK", {b"A2B0": lut, b"A2B1": lut}, pcs=b"Lab ")


def encoded(image, icc, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, icc_profile=icc, **options)
    return buffer.getvalue()


def colours(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)


def test_the_case_of_the_reports():
    """Adobe RGB of (101, 168, 71)."""
    image = Image.new("RGB", (2, 2), (101, 168, 71))
    found = picture.decode(encoded(image, rgb_profile("Adobe RGB (1998)")))
    assert np.abs(found[0, 0].astype(int) - [42, 170, 60]).max() <= 1


@pytest.mark.parametrize("name", ["Display P3", "Adobe RGB (1998)"])
@pytest.mark.parametrize("kind, options", [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {})])
def test_wide_colours_become_srgb(name, kind, options):
    pixels = np.tile(colours()[:1, :1], (16, 16, 1)) if kind == "JPEG" else colours()
    data = encoded(Image.fromarray(pixels), rgb_profile(name), kind, **options)
    plain = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))  # what the codec left of them
    found = picture.read(data)
    assert np.abs(found.pixels - formula(name, plain)).max() <= 2
    assert found.made == (("converted to sRGB", name),)


def test_transparency_stays_as_it_is():
    pixels = np.concatenate([colours(), colours(1)[..., :1]], -1)
    data = encoded(Image.fromarray(pixels), rgb_profile("Display P3"))
    found = picture.decode(data, picture.Reading(channels=4))
    assert np.array_equal(found[..., 3], pixels[..., 3])
    assert np.abs(found[..., :3] - formula("Display P3", pixels[..., :3])).max() <= 2


@pytest.mark.parametrize("gamma", [1.8, 1.0])
@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_stays_grey(gamma, mode):
    levels = np.arange(256, dtype=np.uint8)[None]
    data = encoded(Image.fromarray(levels).convert(mode), grey_profile(gamma))
    found = picture.decode(data)
    assert found.shape == (1, 256, 1)
    assert np.abs(found[..., 0] - 255 * srgb_encoded((levels / 255) ** gamma)).max() <= 2


def test_ink_by_its_profile():
    """CIE's L* of 100 (1 - K), as relative luminance, encoded; without a profile it would be 255 - K."""
    inks = np.zeros((1, 5, 4), np.uint8)
    inks[0, :, 3] = [0, 64, 128, 192, 255]
    star = 100 * (1 - inks[0, :, 3] / 255)
    luminance = np.where(star > 8, ((star + 16) / 116) ** 3, star / 903.3)
    found = picture.decode(encoded(Image.fromarray(inks, "CMYK"), cmyk_profile(), "TIFF"))
    assert np.abs(found[0] - 255 * srgb_encoded(luminance)[:, None]).max() <= 3
    assert np.abs(found[0, 2].astype(int) - 127).max() <= 9 and found.shape == (1, 5, 3)


@pytest.mark.parametrize("icc", [
    pytest.param(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), id="lcms"),
    pytest.param(rgb_profile("sRGB"), id="by hand"),
])  # fmt: skip
def test_srgb_is_left_alone(icc):
    assert picture.read(encoded(Image.fromarray(colours()), icc)).made == ()
    assert np.array_equal(picture.decode(encoded(Image.fromarray(colours()), icc)), colours())


@pytest.mark.parametrize("icc, why", [
    (b"text", "cannot open profile from string"), (rgb_profile("Display P3")[:200], "cannot open profile from string"),
    (grey_profile(2.2), "Grey, which is for GRAY"), (cmyk_profile(), "Ink, which is for CMYK"),
])  # fmt: skip
def test_a_profile_that_cannot_be_used_is_passed_over_and_said(icc, why):
    found = picture.read(encoded(Image.fromarray(colours()), icc))
    assert np.array_equal(found.pixels, colours())
    assert found.made == ((PASSED_OVER, why),)

"""A second reader of coded images, written from `docs/codec-format.md` alone: the page is enough."""

import json
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b, sha256
from itertools import product
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import undiffuse
from undiffuse.codec import tables
from undiffuse.codec.stream import Codec
from undiffuse.data.source import open_source
from undiffuse.model.model import Model

# ---- the reader

ARCHIVE, SIZE, SEED, CLASS, LOSSLESS = 1, 2, 4, 8, 16
NORMAL = np.array([round(NormalDist().inv_cdf((u + 0.5) / 65536) * 4096) for u in range(65536)], dtype="<i2")


def words(key: list, rows: Sequence[int], count: int) -> np.ndarray:
    """The first words of each row, [row, word]: Philox4x32-10."""
    digest = blake2b(json.dumps(key).encode(), digest_size=8).digest()
    keys, low, half = np.frombuffer(digest, dtype="<u4").astype(np.uint64), np.uint64(2**32 - 1), np.uint64(32)
    row, a = np.meshgrid(np.array(rows, dtype=np.uint64), np.arange(-(-count // 4), dtype=np.uint64), indexing="ij")
    b, c, d = np.zeros_like(a), row & low, row >> half
    for _ in range(10):
        p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (q >> half) ^ b ^ keys[0], q & low, (p >> half) ^ d ^ keys[1], p & low
        keys = (keys + np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)) & low
    return np.stack([a, b, c, d], axis=2).reshape(len(rows), -1)[:, :count]


def normals(key: list, rows: Sequence[int], count: int) -> np.ndarray:
    """The first normal numbers of each row."""
    drawn, table = words(key, rows, count), NORMAL.astype(np.float32) / np.float32(4096)
    return (table[drawn % 65536] + table[drawn // 65536]) * np.float32(0.5**0.5)


class Reader:
    """All that a file says, its checks made, and the chain that it steers."""

    def __init__(self, data: bytes, model: Model) -> None:
        self.data, self.at, self.model, self.table = data, 8, model, model.meta["codec"]
        assert data[:2] == b"\xfd\x55" and data[2] >> 5 == 1 and not data[2] & CLASS
        assert data[3:7] == sha256(json.dumps(self.table, sort_keys=True).encode()).digest()[:4], "other tables"
        assert int.from_bytes(data[-4:], "big") == zlib.crc32(data[:-4])
        self.count, group = (self.varint(), self.varint()) if data[2] & ARCHIVE else (1, 1)
        self.groups = [range(self.count)[i : i + group] for i in range(0, self.count, group)]
        self.size = [self.varint(), self.varint()] if data[2] & SIZE else list(model.image_shape[1:])
        self.canvas = [model.image_shape[0], *map(max, self.size, model.image_shape[1:])]
        self.d = int(np.prod(self.canvas))
        self.seed = self.varint() if data[2] & SEED else 0
        self.scales, self.paths, self.ends = [], [], []  # of each step and image; of each step and group; of each group
        self.layers()
        for _ in self.groups if data[2] & LOSSLESS else ():
            length = self.varint()
            self.ends.append(data[self.at : self.at + length])
            self.at += length
        assert self.at == len(data) - 4

    def varint(self) -> int:
        """The next varint."""
        byte, self.at = self.data[self.at], self.at + 1
        return byte if byte < 128 else byte - 128 + 128 * self.varint()

    def layers(self) -> None:
        """Reads the scales and the paths."""
        bits, at, scale = "".join(f"{byte:08b}" for byte in self.data), 8 * self.at, [0] * self.count
        header, ends = bits[:at], np.cumsum(self.table["layers"]).tolist()
        for layer, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
            steps, scale = range(self.data[7])[first:end], list(scale)
            self.scales += [scale for _ in steps]
            self.paths += [[] for _ in steps]
            for images in self.groups if steps else ():
                start = at
                for image in images if layer else ():
                    scale[image], at = scale[image] + int(bits[at : at + 3], 2) - 3, at + 3
                for step in steps:
                    length = sum(self.budget(step, image) for image in images)
                    self.paths[step].append(bits[at : at + length])
                    at += length
                crc, said = 0, header + bits[start:at]
                for bit in said + "0" * (-len(said) % 8):
                    crc = (crc << 1 ^ (7 if crc >> 7 != int(bit) else 0)) & 255
                assert int(bits[at : at + 8], 2) == crc, f"layer {layer}"
                at += 8
        self.at = -(-at // 8)

    def budget(self, step: int, image: int) -> int:
        """The bits of an image in a step."""
        bits, d = self.table["bits"][step][self.scales[step][image] + 16], self.table["values"]
        return (bits * self.d + d // 2) // d + 3 * any(image == images[0] for images in self.groups)

    def noise(self, step: int, images: range, path: str) -> np.ndarray:
        """z of the images of a group."""
        memory, d, own = self.table["memory"], self.d, [self.budget(step, image) for image in images]
        first = min(memory, len(path))
        ends = [i * d + d * bit // n for i, n in enumerate(own) for bit in range(1, n + 1)][first - 1 :]
        states = [int(path[max(0, used - memory) : used], 2) for used in range(first, len(path) + 1)]
        blocks = zip(normals([0, "codebook", memory], states, 512), np.diff(ends, prepend=0), strict=True)
        said = np.concatenate([np.resize(row, count) for row, count in blocks]).reshape(-1, d)
        minus = words([self.seed, "codec", "signs", step], images, d) % 2 == 1
        order = np.argsort(words([self.seed, "codec", "places", step], images, d), axis=1, kind="stable")
        np.put_along_axis(z := np.empty_like(said), order, np.where(minus, -said, said), axis=1)
        return z.reshape(-1, *self.canvas)

    def estimate(self, x: Tensor, t: Tensor) -> Tensor:
        """x̂_0 of each image, in windows."""
        parts, tents = [], []
        for long, side in zip(x.shape[2:], self.model.image_shape[1:], strict=True):
            last = -(-2 * (long - side) // side)
            starts = [round(i * (long - side) / max(1, last)) for i in range(last + 1)]
            parts.append([slice(start, start + side) for start in starts])
            tents.append(np.minimum(np.arange(side) + 1, side - np.arange(side)))
        tent = torch.tensor(np.outer(*tents), dtype=torch.float32, device="cpu")
        total, weight = torch.zeros_like(x), torch.zeros_like(x)
        for rows, columns in product(*parts):
            total[:, :, rows, columns] += tent * self.model.denoiser(x[:, :, rows, columns], t.expand(len(x))).x_0
            weight[:, :, rows, columns] += tent
        return total / weight

    def chain(self) -> Tensor:
        """x̂_0 after the steps of the file."""
        times, process = torch.tensor(self.table["times"], dtype=torch.float64, device="cpu"), self.model.process
        x_t = normals([self.seed, "codec", "x_T"], range(self.count), self.d).reshape(-1, *self.canvas)
        x = torch.from_numpy(x_t) * process.sigma(times[0]).float()
        for step, (t, s, scales, paths) in enumerate(zip(times, times[1:], self.scales, self.paths, strict=False)):
            x_0 = self.estimate(x, t)
            z = np.concatenate([self.noise(step, *both) for both in zip(self.groups, paths, strict=True)])
            v = np.interp(x_0.numpy(), np.linspace(-1, 1, 13), self.table["shape"][step])
            v *= self.table["square"][step] * 2 ** (np.reshape(scales, (-1, 1, 1, 1)) / 4)
            b, c = process.posterior_coefficients(t, s)
            spread = (process.small_variance(t, s) + c**2 * torch.from_numpy(v)).sqrt()
            x = (b * x + c * x_0 + spread * torch.from_numpy(z)).float()
        return self.estimate(x, times[len(self.scales)])[:, :, : self.size[0], : self.size[1]]


class Range:
    """The reader of a range code."""

    def __init__(self, data: bytes) -> None:
        self.data, self.code, self.range = iter(data[4:]), int.from_bytes(data[:4], "big"), 2**32 - 1

    def symbol(self, table: range | list[int], bits: int = 15) -> int:
        """A symbol of a cumulative table."""
        r = self.range >> bits
        s = bisect_right(table, self.code // r) - 1
        self.code, self.range = self.code - table[s] * r, r * (table[s + 1] - table[s])
        while self.range < 2**24:
            self.code, self.range = self.code << 8 | next(self.data, 0), self.range << 8
        return s

    def bits(self, count: int) -> int:
        """A number of so many bits."""
        return self.symbol(range(2**count + 1), count)

    def number(self) -> int:
        """A number of any size."""
        length = self.bits(5) - 1
        return (1 << length) - 1 + sum(self.bits(min(15, length - at)) << at for at in range(0, length, 15))


def middles(code: Range, x_0: np.ndarray) -> np.ndarray:
    """P of each value of a group, from 1 and 2 of its lossless end."""
    k, e = np.zeros(x_0.shape, dtype="<i4"), np.zeros((len(x_0), 1, 1, 1), dtype=np.int64)
    for image, steps, place in zip(x_0, k, e, strict=True):
        place[:] = code.bits(6)
        exact, at = 8 * 127.5 * (image.astype(np.float64) + 1) + place / 64, -1
        steps[:] = np.floor(exact)
        for _ in range(code.number()):
            at += code.number() + 1
            if code.bits(1) != steps.flat[at] & 1:
                steps.flat[at] += 1 if exact.flat[at] % 1 > 0.5 else -1
    assert code.bits(8) == zlib.crc32(k.tobytes()) & 255, "other estimates"
    return 64 * k + 32 - e


def values(code: Range, table: dict[str, Any], middle: np.ndarray, scale: int) -> np.ndarray:
    """The values of an image."""
    spread = np.floor(np.interp(middle, np.linspace(0, 255 * 512, 13), table["spreads"]) + 0.5).astype(int) + scale
    usual = np.floor(512 * 0.8 * 2.0 ** (spread / 8 - 3)).astype(np.int64) + 1
    error, out = np.zeros(middle.shape, dtype=np.int64), np.zeros(middle.shape, dtype=np.uint8)
    channels, height, width = middle.shape
    for y, x, c in product(range(height), range(width), range(channels)):
        near = [(c, y, x - 1), (c, y - 1, x), (c - 1, y, x), (c, y - 1, x + 1)]  # the first three steer
        there = [place if min(place) >= 0 and place[2] < width else None for place in near]
        errors = [int(error[place]) if place else 0 for place in there]
        told = sum(int(usual[place]) for place in there if place)
        p = int(middle[c, y, x])
        guess = p + (sum(by * e for by, e in zip(table["steering"], errors, strict=False)) >> 6)
        level = min(255, max(0, (guess + 256) // 512))
        fraction, sign = min(4, (abs(guess - 512 * level) + 32) // 64), 1 if guess >= 512 * level else -1
        active = bisect_right((6, 10, 14, 20, 30, 46), 16 * sum(map(abs, errors)) // told) if told else 3
        number = min(27, max(0, (int(spread[c, y, x]) + table["activity"][active]) // 2))
        said = code.symbol(table["tables"][number][fraction]) - 9
        said += said // 9 * code.number() if abs(said) == 9 else 0
        out[c, y, x] = level + sign * said
        error[c, y, x] = 512 * int(out[c, y, x]) - p
    return out


def read(data: bytes, model: Model) -> np.ndarray:
    """The pictures of a file, uint8 [n, c, h, w]."""
    assert zlib.crc32(NORMAL.tobytes()) == 0x546C8CB1
    reader = Reader(data, model)
    with torch.no_grad():
        x_0 = reader.chain().numpy()
    out = np.round(x_0 * 127.5 + 127.5).astype(np.uint8)
    for images, end in zip(reader.groups, reader.ends, strict=False):
        code, part = Range(end[:-4]), slice(images.start, images.stop)
        for image, middle in zip(images, middles(code, x_0[part]), strict=True):
            out[image] = values(code, reader.table["tail"], middle, reader.scales[-1][image])
        assert int.from_bytes(end[-4:], "big") == zlib.crc32(out[part].tobytes()), "other values"
    return out


# ---- the tests


@pytest.fixture(scope="module")
def model() -> Model:
    return undiffuse.load("fashion-mnist", "cpu")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return open_source("fashion-mnist-sample").images[:5]


def two_pictures(images: Tensor) -> Tensor:
    """One image of 40×30, of parts of two pictures."""
    both = torch.cat([images[:1, :, 8:], images[1:2, :, :20]], dim=2)
    return torch.nn.functional.pad(both, (1, 1))


CASES = {
    "one": {},
    "archive": {"group": 2},
    "fewer steps": {"steps": 5},
    "windows": {},
    "windows at a half": {},
    "smaller": {},
}


def pictures(case: str, images: Tensor) -> Tensor:
    """The pictures of a case."""
    if case == "archive":
        return images
    if case == "windows":
        return two_pictures(images)
    if case == "windows at a half":  # the second of three begins at 8.5
        return torch.cat([images[:1], images[1:2, :, :17]], dim=2)
    return images[:1, :, 3:23, 2:26] if case == "smaller" else images[:1]


@pytest.mark.parametrize("case", CASES)
def test_a_lossy_file_is_read_to_the_same_picture(case, model, images):
    codec = Codec(model, tables.of(model))
    data = codec.encode(pictures(case, images), **CASES[case])
    want, got = codec.decode(data).mean().numpy(), read(data, model)
    assert got.shape == want.shape
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 1


@pytest.mark.parametrize("case", ["one", "archive", "windows", "windows at a half", "smaller", "bright"])
def test_a_lossless_file_is_read_to_its_pictures(case, model, images):
    given = pictures(case, images)
    if case == "bright":  # guesses beyond the last level
        given = 255 - images[:2]
    data = Codec(model, tables.of(model)).encode(given, seed=5, group=2, lossless=True)
    assert np.array_equal(read(data, model), given.numpy())


def test_a_damaged_file_is_refused(model, images):
    data = bytearray(Codec(model, tables.of(model)).encode(images[:1]))
    data[20] ^= 1
    with pytest.raises(AssertionError):
        read(bytes(data), model)


# ---- files that were written once


VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["model"])
def test_both_readers_read_the_files_of_the_page(vector):
    """Those of docs/codec-format.md, which any version of this format reads to these pictures."""
    data, own = bytes.fromhex("".join(vector["file"])), undiffuse.load(vector["model"], "cpu")
    reader, found = Reader(data, own), Codec(own, tables.of(own)).decode(data)
    header = found.parsed.header
    assert header.ident.hex() == data[3:7].hex() == vector["tables"] and found.parsed.status == "complete"
    assert (data[2] & 31, data[7]) == (vector["flags"], vector["steps"]) == (data[2] & 31, header.steps)
    assert (header.count, header.group, header.seed) == tuple(vector[name] for name in ("images", "group", "seed"))
    assert (reader.count, len(reader.groups[0]), reader.seed) == (header.count, header.group, header.seed)
    layers = [sum((group.scales[k] for group in found.parsed.groups), []) for k in range(len(vector["scales"]))]
    starts = np.cumsum([0, *reader.table["layers"]])[: len(layers)]
    assert layers == [reader.scales[step] for step in starts] == vector["scales"]
    pictures = found.lossless() if header.lossless else found.mean()
    edges = (255 * (found.estimate() + 1) / 2 + 0.5) % 1
    assert header.lossless or float(edges.minimum(1 - edges).min()) > 0.003  # else the last bits could decide
    for each in (pictures.numpy(), read(data, own)):
        assert [f"{zlib.crc32(picture.tobytes()):08x}" for picture in each] == vector["pictures"]


def test_the_page_has_the_files_that_are_read():
    page = (Path(__file__).parents[2] / "docs" / "codec-format.md").read_text()
    for vector in VECTORS:
        data = "".join(vector["file"])
        size, names = len(data) // 2, ("tables", "steps", "images", "group", "seed")
        cells = [f"`{vector['model']}`", str(size), *(str(vector[name]) for name in names)]
        cells += [f"`{data[-8:]}`", " ".join(f"`{each}`" for each in vector["pictures"])]
        assert f"| {' | '.join(cells)} |" in page

"""A second reader of coded images, written from `docs/codec-format.md` alone: the page is enough."""

import json
import math
import zlib
from bisect import bisect_right
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest
import torch

import undiffuse
from undiffuse.codec import tables
from undiffuse.codec.stream import Codec
from undiffuse.data.source import open_source

ARCHIVE, SIZE, SEED, CLASS, LOSSLESS = 1, 2, 4, 8, 16
NORMAL = np.array([round(NormalDist().inv_cdf((u + 0.5) / 65536) * 4096) for u in range(65536)], dtype=np.int16)


def words(key: list, row: int, count: int) -> np.ndarray:
    """The first words of a row: Philox4x32-10 under the key of a seed and names."""
    digest = blake2b(json.dumps(key).encode(), digest_size=8).digest()
    k0, k1 = (np.uint64(int.from_bytes(digest[i : i + 4], "little")) for i in (0, 4))
    blocks, low, half = -(-count // 4), np.uint64(2**32 - 1), np.uint64(32)
    a, b = np.arange(blocks, dtype=np.uint64), np.zeros(blocks, dtype=np.uint64)
    c, d = np.full(blocks, row % 2**32, dtype=np.uint64), np.full(blocks, row >> 32, dtype=np.uint64)
    for _ in range(10):
        p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (q >> half) ^ b ^ k0, q & low, (p >> half) ^ d ^ k1, p & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack([a, b, c, d], axis=1).reshape(-1)[:count].astype(np.uint32)


def normals(key: list, row: int, count: int) -> np.ndarray:
    """The first normal numbers of a row, float32."""
    drawn, table = words(key, row, count), NORMAL.astype(np.float32) / np.float32(4096)
    return (table[drawn % 65536] + table[drawn // 65536]) * np.float32(1 / math.sqrt(2))


@dataclass
class Bits:
    """Bits of bytes, each counted from the highest, from a byte on."""

    data: bytes
    at: int

    def take(self, count: int) -> list[int]:
        """The next bits."""
        first, self.at = self.at, self.at + count
        return [self.data[i // 8] >> (7 - i % 8) & 1 for i in range(first, self.at)]

    def number(self, count: int) -> int:
        """The next bits as one number."""
        return int("".join(map(str, self.take(count))), 2)


@dataclass
class Coded:
    """What a file says, and the tables of its model."""

    table: dict
    flags: int
    steps: int
    channels: int
    count: int = 1
    group: int = 1
    seed: int = 0
    size: tuple[int, int] = (0, 0)
    canvas: tuple[int, int] = (0, 0)
    scales: list[list[int]] = field(default_factory=list)  # of each step, of each image
    paths: list[list[list[int]]] = field(default_factory=list)  # of each step, of each group
    ends: list[bytes] = field(default_factory=list)  # the lossless end of each group

    @property
    def values(self) -> int:
        """How many values an image has on its canvas."""
        return self.channels * self.canvas[0] * self.canvas[1]

    def groups(self) -> list[range]:
        """The images of each group."""
        return [range(i, min(i + self.group, self.count)) for i in range(0, self.count, self.group)]

    def budget(self, step: int, image: int) -> int:
        """The bits of an image in a step."""
        d = self.table["values"]
        said = (self.table["bits"][step][self.scales[step][image] + 16] * self.values + d // 2) // d
        return said + 3 * (image % self.group == 0)


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A varint and where it ends."""
    number, shift = 0, 0
    while True:
        number, shift, at = number | (data[at] & 127) << shift, shift + 7, at + 1
        if data[at - 1] < 128:
            return number, at


def crc8(data: bytes) -> int:
    """CRC-8 of x^8 + x^2 + x + 1, start 0."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1) & 255 ^ (7 if crc & 128 else 0)
    return crc


def parse(data: bytes, model) -> Coded:
    """All that a file says, its checks made."""
    table, (channels, *side) = model.meta["codec"], model.image_shape
    assert data[:2] == b"\xfd\x55" and data[2] >> 5 == 1
    assert data[3:7] == sha256(json.dumps(table, sort_keys=True).encode()).digest()[:4], "other tables"
    assert int.from_bytes(data[-4:], "big") == zlib.crc32(data[:-4])
    coded, at = Coded(table, data[2] & 31, data[7], channels, size=(side[0], side[1])), 8
    if coded.flags & ARCHIVE:
        coded.count, at = varint(data, at)
        coded.group, at = varint(data, at)
    if coded.flags & SIZE:
        height, at = varint(data, at)
        width, at = varint(data, at)
        coded.size = height, width
    if coded.flags & SEED:
        coded.seed, at = varint(data, at)
    assert not coded.flags & CLASS
    coded.canvas = max(coded.size[0], side[0]), max(coded.size[1], side[1])
    at = layers(coded, data, at)
    for _ in coded.groups() if coded.flags & LOSSLESS else ():
        length, at = varint(data, at)
        coded.ends.append(data[at : at + length])
        at += length
    assert at == len(data) - 4
    return coded


def layers(coded: Coded, data: bytes, header: int) -> int:
    """Reads the scales and the paths; gives where they end."""
    bits, scale, first = Bits(data, 8 * header), [0] * coded.count, 0
    for layer, length in enumerate(coded.table["layers"]):
        steps = range(first, min(first + length, coded.steps))
        first += length
        if not steps:
            break
        said: list[list[list[int]]] = [[] for _ in steps]
        for images in coded.groups():
            start = bits.at
            for image in images if layer else ():
                scale[image] += bits.number(3) - 3
            coded.scales[steps.start :] = [list(scale) for _ in steps]
            for i, step in enumerate(steps):
                said[i].append(bits.take(sum(coded.budget(step, image) for image in images)))
            body = "".join(map(str, Bits(data, start).take(bits.at - start)))
            body += "0" * (-len(body) % 8)
            checked = data[:header] + int("1" + body, 2).to_bytes(len(body) // 8 + 1, "big")[1:]
            assert bits.number(8) == crc8(checked), f"layer {layer}"
        coded.paths += said
    return -(-bits.at // 8)


def noise(coded: Coded, step: int, images: range, path: list[int]) -> np.ndarray:
    """z of the images of a group: what the path says, at its places and with its signs."""
    memory, d, edges = coded.table["memory"], coded.values, [0]
    for i, image in enumerate(images):
        own = coded.budget(step, image)
        edges += [i * d + d * bit // own for bit in range(1, own + 1)]
    at, said = min(memory, len(path)), np.zeros(d * len(images), dtype=np.float32)
    start = 0
    for used in range(at, len(path) + 1):
        end = edges[used]
        state = int("".join(map(str, path[max(0, used - memory) : used])), 2)
        if end > start:
            row = normals([0, "codebook", memory], state, 512)
            said[start:end] = row[np.arange(end - start) % 512]
        start = end
    z = np.zeros((len(images), d), dtype=np.float32)
    for i, image in enumerate(images):
        order = np.argsort(words([coded.seed, "codec", "places", step], image, d), kind="stable")
        minus = words([coded.seed, "codec", "signs", step], image, d) & 1
        z[i, order] = said[i * d : (i + 1) * d] * (1 - 2 * minus.astype(np.float32))
    return z.reshape(len(images), coded.channels, *coded.canvas)


def starts(long: int, side: int) -> list[int]:
    """Where the windows of one direction begin."""
    count = 1 + -(-2 * (long - side) // side)
    return [round(i * (long - side) / (count - 1)) if count > 1 else 0 for i in range(count)]


def estimate(model, x: torch.Tensor, t: float) -> torch.Tensor:
    """x̂_0 of each image, in windows."""
    high, wide = model.image_shape[1:]
    tents = [np.minimum(np.arange(side) + 1, side - np.arange(side)) for side in (high, wide)]
    tent = torch.tensor(np.outer(*tents), dtype=torch.float32, device="cpu")
    total, weight = torch.zeros_like(x), torch.zeros_like(x)
    for row in starts(x.shape[2], high):
        for column in starts(x.shape[3], wide):
            window = x[:, :, row : row + high, column : column + wide]
            times = torch.full((len(x),), t, dtype=torch.float64, device="cpu")
            part = np.s_[:, :, row : row + high, column : column + wide]
            total[part] += tent * model.denoiser(window, times).x_0
            weight[part] += tent
    return total / weight


def chain(coded: Coded, model) -> torch.Tensor:
    """x̂_0 after the steps of the file."""
    times = torch.tensor(coded.table["times"], dtype=torch.float64, device="cpu")
    drawn = [normals([coded.seed, "codec", "x_T"], image, coded.values) for image in range(coded.count)]
    x = torch.from_numpy(np.stack(drawn)).reshape(coded.count, coded.channels, *coded.canvas)
    x = x * model.process.sigma(times[0]).float()
    for step in range(coded.steps):
        t, s = times[step], times[step + 1]
        x_0 = estimate(model, x, float(t))
        z = [noise(coded, step, *both) for both in zip(coded.groups(), coded.paths[step], strict=True)]
        shape = np.interp(x_0.double().numpy(), np.linspace(-1, 1, 13), coded.table["shape"][step])
        scale = 2 ** (np.array(coded.scales[step]) / 4)[:, None, None, None]
        v = torch.from_numpy(coded.table["square"][step] * scale * shape)
        b, c = model.process.posterior_coefficients(t, s)
        spread = (model.process.small_variance(t, s) + c**2 * v).sqrt()
        x = (b * x + c * x_0 + spread * torch.from_numpy(np.concatenate(z))).float()
    return estimate(model, x, float(times[coded.steps]))


class Range:
    """The reader of a range code."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.code, self.range = data, 4, int.from_bytes(data[:4].ljust(4, b"\0"), "big"), 2**32 - 1

    def _passed(self, low: int, range_: int) -> None:
        self.code, self.range = self.code - low, range_
        while self.range < 2**24:
            byte = self.data[self.at] if self.at < len(self.data) else 0
            self.code, self.range, self.at = self.code << 8 | byte, self.range << 8, self.at + 1

    def symbol(self, table: list[int]) -> int:
        """A symbol of a cumulative table."""
        r = self.range >> 15
        s = bisect_right(table, self.code // r) - 1
        self._passed(table[s] * r, r * (table[s + 1] - table[s]))
        return s

    def bits(self, count: int) -> int:
        """A number of so many bits."""
        r = self.range >> count
        v = self.code // r
        self._passed(v * r, r)
        return v

    def number(self) -> int:
        """A number of any size."""
        length, value, shift = self.bits(5) - 1, 0, 0
        while shift < length:
            count = min(15, length - shift)
            value, shift = value | self.bits(count) << shift, shift + count
        return (value | 1 << length) - 1


def middles(code: Range, x_0: np.ndarray) -> np.ndarray:
    """P of each value of a group, from 1 and 2 of its lossless end."""
    k, e = np.zeros(x_0.shape, dtype=np.int32), np.zeros((len(x_0), 1, 1, 1), dtype=np.int32)
    for i, image in enumerate(x_0):
        e[i] = code.bits(6)
        exact = 8 * 127.5 * (image.astype(np.float64).reshape(-1) + 1) + int(e[i, 0, 0, 0]) / 64
        steps, at = np.floor(exact).astype(np.int32), 0
        for _ in range(code.number()):
            at += code.number()
            if code.bits(1) != steps[at] & 1:
                steps[at] += 1 if exact[at] - steps[at] > 0.5 else -1
        k[i] = steps.reshape(image.shape)
    assert code.bits(8) == zlib.crc32(k.astype("<i4").tobytes()) & 255, "other estimates"
    return 64 * k + 32 - e


def spreads(table: dict, middle: np.ndarray, scale: int) -> np.ndarray:
    """The spread of each value of an image."""
    knots = np.linspace(0, 255 * 512, 13)
    return np.floor(np.interp(middle, knots, table["spreads"]) + 0.5).astype(np.int64) + scale


def values(code: Range, table: dict, middle: np.ndarray, scale: int) -> np.ndarray:
    """The values of an image."""
    spread = spreads(table, middle, scale)
    usual = np.floor(512 * 0.8 * 2.0 ** (spread / 8 - 3)).astype(np.int64) + 1
    error, out = np.zeros(middle.shape, dtype=np.int64), np.zeros(middle.shape, dtype=np.uint8)
    channels, height, width = middle.shape
    for y, x, c in product(range(height), range(width), range(channels)):
        near = [(c, y, x - 1), (c, y - 1, x), (c - 1, y, x), (c, y - 1, x + 1)]  # the first three steer
        there = [min(place) >= 0 and place[2] < width for place in near]
        steered = zip(near[:3], there, table["steering"], strict=False)
        p = int(middle[c, y, x])
        guess = p + sum(int(error[place]) * by for place, is_there, by in steered if is_there) // 64
        level = min(255, max(0, (guess + 256) // 512))
        fraction, sign = min(4, (abs(guess - 512 * level) + 32) // 64), 1 if guess >= 512 * level else -1
        places = [place for place, is_there in zip(near, there, strict=True) if is_there]
        ratio = 16 * sum(abs(int(error[q])) for q in places) // max(1, sum(int(usual[q]) for q in places))
        active = sum(edge <= ratio for edge in (6, 10, 14, 20, 30, 46)) if places else 3
        number = (int(spread[c, y, x]) + table["activity"][active]) // 2
        said = code.symbol(table["tables"][min(27, max(0, number))][fraction]) - 9
        if abs(said) == 9:
            said += code.number() * (1 if said > 0 else -1)
        out[c, y, x] = level + sign * said
        error[c, y, x] = 512 * int(out[c, y, x]) - p
    return out


def lossless(coded: Coded, x_0: np.ndarray) -> np.ndarray:
    """The pictures, from their estimates and the lossless ends."""
    out = np.zeros(x_0.shape, dtype=np.uint8)
    for images, end in zip(coded.groups(), coded.ends, strict=True):
        code = Range(end[:-4])
        middle = middles(code, x_0[images.start : images.stop])
        for image, p in zip(images, middle, strict=True):
            out[image] = values(code, coded.table["tail"], p, coded.scales[-1][image])
        assert int.from_bytes(end[-4:], "big") == zlib.crc32(out[images.start : images.stop].tobytes()), "values"
    return out


def read(data: bytes, model) -> np.ndarray:
    """The pictures of a file, uint8 [n, c, h, w]."""
    assert zlib.crc32(NORMAL.astype("<i2").tobytes()) == 0x546C8CB1
    coded = parse(data, model)
    with torch.no_grad():
        x_0 = chain(coded, model)[:, :, : coded.size[0], : coded.size[1]]
    if coded.flags & LOSSLESS:
        return lossless(coded, x_0.numpy())
    return (x_0 * 127.5 + 127.5).round().to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def model():
    return undiffuse.load("fashion-mnist", "cpu")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return open_source("fashion-mnist-sample").images[:5]


def test_one_image(model, images):
    codec = Codec(model, tables.of(model))
    data = codec.encode(images[:1])
    want = codec.decode(data).mean()
    print(type(want), getattr(want, "dtype", None))
    got = read(data, model)
    print(np.abs(got.astype(int) - np.asarray(want).astype(int)).max())
    assert np.abs(got.astype(int) - np.asarray(want).astype(int)).max() <= 1

"""Coded files as bytes: known answers, a second reader of 40 lines, and what becomes of files that are not whole."""

import itertools
import time
import zlib
from dataclasses import replace
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.codec.plans import plan
from undiffuse.codec import container
from undiffuse.codec.container import (
    Group,
    Header,
    bits_number,
    canvas,
    crc8,
    number_bits,
    pack,
    parse,
    units,
)
from undiffuse.codec.plan import SCALES, Plan
from undiffuse.errors import Corrupt

OWN = (1, 4, 4)
PLAN = plan()  # of 16 values: steps of 9, 14, 20 and 31 bits in layers of 2, 1 and 1
KINDS = {
    "single": {},
    "seed": {"seed": 300},
    "class and size": {"label": 3, "size": (6, 9)},
    "small": {"size": (2, 5)},
    "group": {"count": 3, "group": 3},
    "archive": {"count": 5, "group": 2, "seed": 1},
    "two steps": {"steps": 2},
    "three steps of many": {"steps": 3, "count": 3, "group": 2},
}


def steps_of_layers(tables: Plan, steps: int) -> list[range]:
    ends = list(itertools.accumulate(tables.layers))
    found = [range(a, min(b, steps)) for a, b in zip([0, *ends], ends, strict=False)]
    return [each for each in found if each]


def budget(tables: Plan, step: int, scale: int, values: int) -> int:
    """Bits of an image: those of the table for its number of values, to the next whole number."""
    return (tables.bits[step][scale + 16] * values * 2 + tables.values) // (2 * tables.values)


def made(
    number: int = 0, /, tables: Plan = PLAN, steps: int | None = None, **head
) -> tuple[Header, list[Group], bytes]:
    """A file of random bits, whose scales wander."""
    random = np.random.default_rng(number)
    header = Header(tables.ident, tables.steps if steps is None else steps, **head)
    groups, (_, h, w) = list[Group](), canvas(header.size, OWN)
    for images in header.groups():
        group, now = Group(), [0] * len(images)
        for layer, those in enumerate(steps_of_layers(tables, header.steps)):
            if layer:
                now = [
                    max(-16, min(16, k + int(d))) for k, d in zip(now, random.integers(-3, 5, len(now)), strict=True)
                ]
            group.scales.append(now)
            for step in those:
                total = 3 + sum(budget(tables, step, k, h * w) for k in now)
                group.paths.append(random.integers(0, 2, total, np.uint8))
        groups.append(group)
    return header, groups, pack(header, groups, tables)


def same(a: Group, b: Group) -> bool:
    paths = [[each.tolist() for each in group.paths] for group in (a, b)]
    return a.scales == b.scales and paths[0] == paths[1]


def read_by_hand(data: bytes, tables: Plan, own: tuple[int, int, int]) -> tuple[list, dict[tuple[int, int], list]]:
    """Another reader, of Python's integers: the header, and the scales and paths of each layer of a group, as text."""
    assert data[:2] == b"\xfdU" and data[2] >> 5 == 1
    flags, steps, place = data[2] & 31, data[7], 8

    def number() -> int:
        nonlocal place
        found, factor = 0, 1
        while True:
            found += data[place] % 128 * factor
            place, factor = place + 1, factor * 128
            if data[place - 1] < 128:
                return found

    count, group = (number(), number()) if flags & 1 else (1, 1)
    height, width = (number(), number()) if flags & 2 else own[1:]
    seed, label = number() if flags & 4 else 0, number() if flags & 8 else None
    values = own[0] * max(height, own[1]) * max(width, own[2])
    head, text = data[:place], "".join(f"{byte:08b}" for byte in data[place:])
    says, found, at = [data[3:7], steps, count, group, height, width, seed, label], dict[tuple[int, int], list](), 0

    def take(bits: int) -> str:
        nonlocal at
        at += bits
        return text[at - bits : at]

    scales = {first: [0] * min(group, count - first) for first in range(0, count, group)}
    for layer, those in enumerate(steps_of_layers(tables, steps)):
        for first in scales:
            begin = at
            if layer:
                scales[first] = [k - 3 + int(take(3), 2) for k in scales[first]]
            paths = [take(3 + sum(budget(tables, n, k, values) for k in scales[first])) for n in those]
            crc, unit = 0, text[begin:at]
            unit += "0" * (-len(unit) % 8)
            for byte in head + bytes(int(unit[i : i + 8], 2) for i in range(0, len(unit), 8)):
                crc ^= byte
                for _ in range(8):
                    crc = (crc * 2 ^ 0x07) & 255 if crc & 128 else crc * 2
            assert crc == int(take(8), 2)
            found[layer, first] = [scales[first], paths]
    assert set(text[at:-32]) <= {"0"} and len(text) - at - 32 in range(8)
    assert zlib.crc32(data[:-4]) == int(text[-32:], 2)
    return says, found


def test_the_checksum_of_a_layer_is_the_one_of_smbus():
    assert crc8(b"123456789") == 0xF4
    assert crc8(b"") == 0 and crc8(b"\x01") == 7 and crc8(b"\x00\x00") == 0
    data = np.random.default_rng(0).bytes(14)
    for i in range(112):  # its polynomial has no multiple of two terms below x^127
        for j in range(i):
            spoilt = int.from_bytes(data, "big") ^ 1 << i ^ 1 << j
            assert crc8(spoilt.to_bytes(14, "big")) != crc8(data)


@given(st.integers(0, 2**16 - 1), st.integers(16, 20))
def test_numbers_of_so_many_bits(number, count):
    assert "".join(map(str, number_bits(number, count))) == f"{number:0{count}b}"
    assert bits_number(number_bits(number, count)) == number


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_says_the_bits_that_it_was_made_of(kind):
    for seed in range(5):
        header, groups, data = made(seed, **KINDS[kind])
        found = parse(data, PLAN, OWN)
        assert found.status == "complete" and found.header == header and not found.why
        assert found.layers == [len(steps_of_layers(PLAN, header.steps))] * len(groups)
        assert len(found.groups) == len(groups) and all(map(same, found.groups, groups))


@pytest.mark.parametrize("kind", KINDS)
def test_another_reader_finds_the_same_bits(kind):
    header, groups, data = made(3, **KINDS[kind])
    (head, found), (_, *own) = read_by_hand(data, PLAN, OWN), OWN
    says = [header.ident, header.steps, header.count, header.group, *(header.size or own), header.seed, header.label]
    assert head == says
    assert len(found) == len(groups) * len(steps_of_layers(PLAN, header.steps))
    for (layer, first), (scales, paths) in found.items():
        group = groups[first // header.group]
        assert scales == group.scales[layer]
        steps = steps_of_layers(PLAN, header.steps)[layer]
        assert paths == ["".join(map(str, group.paths[n])) for n in steps]


def test_the_length_of_a_file_follows_from_its_scales():
    header, groups, data = made(1, count=5, group=2)
    bits = sum(len(path) for group in groups for path in group.paths)
    bits += 8 * 3 * len(groups) + 3 * 2 * header.count  # a CRC-8 a layer of a group, deltas in all layers but the first
    assert len(data) == len(header.pack()) + -(-bits // 8) + 4


def test_any_first_part_holds_all_images():
    header, _, _ = made(count=5, group=2)
    found = [(layer, group, list(images), list(steps)) for layer, group, images, steps in units(header, PLAN)]
    assert found[:4] == [(0, 0, [0, 1], [0, 1]), (0, 1, [2, 3], [0, 1]), (0, 2, [4], [0, 1]), (1, 0, [0, 1], [2])]
    assert len(found) == 9


@pytest.mark.parametrize("size, expected", [(None, (3, 8, 6)), ((5, 5), (3, 8, 6)), ((9, 2), (3, 9, 6))])
def test_what_is_coded_is_no_smaller_than_the_images_of_the_model(size, expected):
    assert canvas(size, (3, 8, 6)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_off_is_read_as_far_as_it_goes(kind):
    header, groups, data = made(2, **KINDS[kind])
    layers, seen = len(steps_of_layers(PLAN, header.steps)), list[int]()
    for cut in range(len(data)):
        try:
            found = parse(data[:cut], PLAN, OWN)
        except Corrupt:
            assert cut < len(header.pack())  # from then on anything can be read
            continue
        assert found.status == "partial" and found.why.startswith("it is cut off in ") and found.header == header
        for whole, part, done in zip(groups, found.groups, found.layers, strict=True):
            paths = [path.tolist() for path in part.paths]
            assert part.scales == whole.scales[: len(part.scales)] and len(part.scales) - done in (0, 1)
            assert all(a == b.tolist() for a, b in zip(paths[:-1], whole.paths, strict=False))
            if paths:
                assert paths[-1] == whole.paths[len(paths) - 1][: len(paths[-1])].tolist()
        bits = sum(len(path) for group in found.groups for path in group.paths)
        assert 8 * (cut - len(header.pack())) - bits <= len(groups) * layers * (8 + 3 * header.group) + 39
        seen.append(sum(found.layers))
    assert seen == sorted(seen) and seen[-1] == layers * len(groups) and seen[0] == 0


def test_where_a_file_is_cut_off_is_said():
    _, _, data = made(count=5, group=2)
    assert parse(data[:-1], PLAN, OWN).why == "it is cut off in its CRC-32"
    assert parse(data[:-6], PLAN, OWN).why == "it is cut off in layer 3 of 3, from image 4 on"
    assert parse(made()[2][:-6], PLAN, OWN).why == "it is cut off in layer 3 of 3"
    found = parse(data[:12], PLAN, OWN)
    assert found.why == "it is cut off in layer 1 of 3, from image 0 on, so that nothing of it is checked"
    assert found.status == "partial" and found.layers == [0, 0, 0]
    with pytest.raises(Corrupt, match="^the file is cut off in its header, of 8 bytes or more: 7 are there;"):
        parse(data[:7], PLAN, OWN)


def test_a_large_file_needs_its_first_layer(monkeypatch):
    """Of what a few bytes say to be large nothing is made."""
    header, _, data = made(count=5, group=2)
    values = 5 * prod(OWN)
    for most, whole in ((values, False), (values - 1, True)):
        monkeypatch.setattr(container, "SMALL", most)
        for cut in (len(header.pack()), 12):
            if whole:
                with pytest.raises(
                    Corrupt, match="^nothing can be decoded: it is cut off in layer 1 of 3, from image 0 on$"
                ):
                    parse(data[:cut], PLAN, OWN)
            else:
                assert parse(data[:cut], PLAN, OWN).status == "partial"


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_that_flips_is_found(kind):
    _, groups, data = made(4, **KINDS[kind])
    damaged = 0
    for i in range(8 * len(data)):
        spoilt = bytearray(data)
        spoilt[i // 8] ^= 128 >> i % 8
        try:
            found = parse(bytes(spoilt), PLAN, OWN)
        except Corrupt:
            continue
        damaged += 1
        if not found.layers[0]:  # a header that says more than the file has
            assert found.status == "partial" and found.why.endswith("so that nothing of it is checked")
            continue
        assert found.status == "damaged" and found.why.startswith(("it is damaged in layer", "its CRC-32 is not"))
        for whole, part in zip(groups, found.groups, strict=True):  # and what is before it is as it was
            assert part.scales == whole.scales[: len(part.scales)]
            assert all(a.tolist() == b.tolist() for a, b in zip(part.paths, whole.paths, strict=False))
    assert damaged > 8 * 4


def test_where_a_file_is_damaged_is_said():
    header, groups, data = made(count=5, group=2)
    place, bits = len(header.pack()), 0
    for layer, number, images, steps in units(header, PLAN):
        spoilt = bytearray(data)
        spoilt[place + (bits + 11) // 8] ^= 128 >> (bits + 11) % 8
        if (layer, number) == (0, 0):
            with pytest.raises(Corrupt, match="^nothing can be decoded: it is damaged in layer 1 of 3, from image 0"):
                parse(bytes(spoilt), PLAN, OWN)
        else:
            found = parse(bytes(spoilt), PLAN, OWN)
            assert found.why == f"it is damaged in layer {layer + 1} of 3, from image {images[0]} on"
            assert found.layers == [layer + (group < number) for group in range(3)]
        bits += 8 + sum(len(groups[number].paths[step]) for step in steps) + (3 * len(images) if layer else 0)
    spoilt = data[:-1] + bytes([data[-1] ^ 1])
    assert parse(spoilt, PLAN, OWN).why == "its CRC-32 is not that of its bytes"


def test_a_scale_beyond_the_tables_is_damage():
    """As is one whose CRC-8 is right."""
    tables = plan(layers=(1,) * 7, bits=(9,) * 7)
    group = Group([[0], [4], [8], [12], [16], [20], [20]])
    group.paths += [np.zeros(3 + budget(tables, n, min(16, 4 * n), 16), np.uint8) for n in range(7)]
    found = parse(pack(Header(tables.ident, 7), [group], tables), tables, OWN)
    assert found.status == "damaged" and found.layers == [5] and found.why == "it is damaged in layer 6 of 7"
    assert max(map(max, found.groups[0].scales)) == SCALES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [b"\x00", b"ab", bytes(100)], ids=len)
def test_bytes_at_the_end_are_damage(kind, more):
    """What is before them is good."""
    _, groups, data = made(5, **KINDS[kind])
    found = parse(data + more, PLAN, OWN)
    assert (found.status, found.why) == ("damaged", f"{len(more)} bytes follow where it should end")
    assert [[path.tolist() for path in each.paths] for each in found.groups] == [
        [path.tolist() for path in each.paths] for each in groups
    ]


def test_any_bytes_are_refused_or_read_in_part():
    """Bytes that changed, are missing or too many, or are none of a file at all: 2,000 of them in no time."""
    random = np.random.default_rng(6)
    files = [made(seed, **head)[2] for seed, head in enumerate(KINDS.values())]
    start, outcomes = time.perf_counter(), {"corrupt": 0, "partial": 0, "damaged": 0, "complete": 0}
    for _ in range(2000):
        data = bytearray(files[random.integers(len(files))])
        for _ in range(random.integers(1, 4)):
            at, kind = int(random.integers(len(data) + 1)), random.integers(5)
            some = random.bytes(int(random.integers(1, 9)))
            if kind == 0:
                data[at : at + len(some)] = some
            elif kind == 1:
                data[at:at] = some
            elif kind == 2:
                del data[at : at + len(some)]
            elif kind == 3:
                del data[at:]
            else:  # a header that is good, and anything behind it
                data[8:] = random.bytes(int(random.integers(80)))
                data[2:3] = bytes([32 + random.integers(16)])
        whole = bytes(data) in files
        try:
            status = parse(bytes(data), PLAN, OWN).status
        except Corrupt:
            status = "corrupt"
        assert (status == "complete") == whole
        outcomes[status] += 1
    assert time.perf_counter() - start < 20
    assert min(outcomes["corrupt"], outcomes["partial"], outcomes["damaged"]) > 50, outcomes


def test_files_of_other_tables_are_refused_by_name():
    _, _, data = made()
    other = plan(usual=1)
    assert other.ident != PLAN.ident
    words = (
        rf"^the file was made with other tables or another model \({PLAN.ident.hex()}\) than this one "
        rf"\({other.ident.hex()}\); give the model that it was made with$"
    )
    with pytest.raises(Corrupt, match=words):
        parse(data, other, OWN)


@pytest.mark.parametrize("steps", [0, 5, 255])
def test_steps_that_the_tables_lack_are_refused(steps):
    with pytest.raises(Corrupt, match=f"^the file is damaged: it says {steps} steps, and the plan has 4$"):
        parse(Header(PLAN.ident, steps).pack() + bytes(200), PLAN, OWN)


def test_a_file_that_says_huge_numbers_is_refused_at_once():
    start = time.perf_counter()
    head = Header(PLAN.ident, 4, 4096, 64, (16384, 16384))
    with pytest.raises(Corrupt, match="the file says 4096 images of 268435456 values, which are more than 67108864"):
        parse(head.pack() + bytes(50), PLAN, OWN)
    for count, group, size in [(4096, 1, None), (4096, 64, (128, 128)), (16, 16, (2048, 2048)), (1, 1, (16384, 4096))]:
        with pytest.raises(Corrupt, match="^nothing can be decoded: it is (cut off|damaged) in layer 1"):
            parse(Header(PLAN.ident, 4, count, group, size).pack() + bytes(50), PLAN, OWN)
    assert time.perf_counter() - start < 1


def test_the_tables_of_a_file_are_those_of_its_last_number():
    """One bit more, or another weight, is another name."""
    row = list(PLAN.bits[0])
    row[5] += 1
    others = [PLAN, plan(weights="1" * 64), plan(bits=(9, 14, 20, 32)), plan(memory=12), plan(layers=(2, 2))]
    others += [replace(PLAN, bits=(tuple(row), *PLAN.bits[1:])), replace(PLAN, kl=(*PLAN.kl[:-1], 1e-9))]
    assert len({each.ident for each in others}) == len(others) and plan().ident == PLAN.ident


def test_the_container_is_of_python_and_numpy_alone():
    assert not {name for name in vars(container) if "torch" in name}

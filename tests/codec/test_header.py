"""The header of a coded file: its numbers by hand, any of them there and back, and what is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undiffuse.codec.container import MOST_GROUP, MOST_IMAGES, MOST_SIDE, Header, parse_header, varint
from undiffuse.errors import Corrupt


@pytest.mark.parametrize(
    "number, expected",
    [(0, "00"), (1, "01"), (127, "7f"), (128, "8001"), (300, "ac02"), (16384, "808001"), (2**32 - 1, "ffffffff0f")],
)
def test_numbers_of_any_length(number, expected):
    assert varint(number).hex() == expected


SIDES = st.integers(1, MOST_SIDE)


@given(
    st.builds(
        Header,
        ident=st.binary(min_size=4, max_size=4),
        steps=st.integers(0, 255),
        count=st.integers(1, MOST_IMAGES),
        group=st.integers(1, MOST_GROUP),
        size=st.none() | st.tuples(SIDES, SIDES),
        seed=st.integers(0, 2**32 - 1),
        label=st.none() | st.integers(0, 2**20),
    ),
    st.binary(max_size=3),
)
def test_a_header_is_read_as_it_was_written_whatever_follows(header, more):
    data = header.pack()
    assert parse_header(data + more) == (header, len(data))
    images = [i for group in header.groups() for i in group]
    assert images == list(range(header.count)) and max(map(len, header.groups())) <= header.group


def test_a_header_by_hand():
    assert Header(b"abcd", 24).pack().hex() == "fd55" + "20" + "61626364" + "18"
    every = Header(b"abcd", 24, 300, 16, (40, 200), 5, 0).pack()
    assert every.hex() == "fd55" + "2f" + "61626364" + "18" + "ac02" + "10" + "28" + "c801" + "05" + "00"


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "this is no coded image: it does not begin as one; files are made by `undiffuse encode`"),
        (b"\x89PNG\r\n\x1a\n", "this is no coded image: it does not begin as one"),
        (b"\xfdU", "the file is cut off in its header, of 8 bytes or more: 2 are there; restore it"),
        (b"\xfdU\x20abcd", "the file is cut off in its header, of 8 bytes or more: 7 are there"),
        (b"\xfdU\x40abcd\x04", r"the file has format 2, and this undiffuse reads 1; upgrade undiffuse"),
        (b"\xfdU\x00abcd\x04", r"the file has format 0, and this undiffuse reads 1; upgrade undiffuse"),
        (b"\xfdU\x21abcd\x04", "the file is cut off or damaged in its header, where the number of images stands"),
        (b"\xfdU\x21abcd\x04\x85", "the file is cut off or damaged in its header, where the number of images stands"),
        (
            b"\xfdU\x21abcd\x04" + b"\x80" * 99,
            "the file is cut off or damaged in its header, where the number of images stands",
        ),
        (b"\xfdU\x21abcd\x04\x00\x01", "its header says that the number of images is 0, and 1 to 4096 are possible"),
        (
            b"\xfdU\x21abcd\x04\x81\x20\x01",
            "its header says that the number of images is 4097, and 1 to 4096 are possible",
        ),
        (b"\xfdU\x21abcd\x04\x01\x41", "its header says that the size of a group is 65, and 1 to 64 are possible"),
        (b"\xfdU\x22abcd\x04\x00\x05", "its header says that the height is 0, and 1 to 16384 are possible"),
        (b"\xfdU\x22abcd\x04\x05\x81\x80\x01", "its header says that the width is 16385, and 1 to 16384 are possible"),
        (b"\xfdU\x24abcd\x04\x00", "its header says that the seed is 0, and 1 to 4294967295 are possible"),
        (
            b"\xfdU\x24abcd\x04\x80\x80\x80\x80\x10",
            "its header says that the seed is 4294967296, and 1 to 4294967295 are",
        ),
        (b"\xfdU\x28abcd\x04\x81\x80\x40", "its header says that the class is 1048577, and 0 to 1048576 are possible"),
    ],
)
def test_headers_that_are_none(data, words):
    with pytest.raises(Corrupt, match=words):
        parse_header(data)

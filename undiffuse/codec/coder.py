"""A range coder (Martin 1979) of whole numbers alone: what one machine writes every other one reads."""

from collections.abc import Sequence

from undiffuse.errors import Corrupt

TOTAL_BITS = 15  # frequencies of a table sum up to 2^15
TOP, WHOLE = 1 << 24, (1 << 32) - 1


class Encoder:
    """Symbols of tables to bytes; carries run back through bytes that are not yet sure."""

    def __init__(self) -> None:
        self.low, self.range, self.out = 0, WHOLE, bytearray()

    def put(self, cumulative: Sequence[int], symbol: int) -> None:
        """A symbol of a table: `cumulative` rises from 0 to 2^15."""
        self.range >>= TOTAL_BITS
        self.low += cumulative[symbol] * self.range
        self.range *= cumulative[symbol + 1] - cumulative[symbol]
        self._settle()

    def bits(self, value: int, count: int) -> None:
        """Of a number that may be any, at most 15."""
        self.range >>= count
        self.low += value * self.range
        self._settle()

    def _settle(self) -> None:
        if self.low >> 32:
            self._carry()
        while self.range < TOP:
            self.out.append(self.low >> 24)
            self.low, self.range = self.low << 8 & WHOLE, self.range << 8

    def _carry(self) -> None:
        self.low &= WHOLE
        place = len(self.out) - 1
        while self.out[place] == 255:
            self.out[place] = 0
            place -= 1
        self.out[place] += 1

    def end(self) -> bytes:
        """What was written; zeros at the end are left out, since whoever reads beyond it reads zeros."""
        # The shortest number within the range, whatever follows it.
        for count in range(1, 5):
            step = 1 << 32 - 8 * count
            value = -(-self.low // step) * step
            if value + step - 1 <= self.low + self.range - 1 or count == 4:
                self.low = value
                break
        if self.low >> 32:
            self._carry()
        self.out += self.low.to_bytes(4, "big")
        return bytes(self.out).rstrip(b"\0")


class Decoder:
    """The same symbols from those bytes. Bytes that no encoder wrote give other symbols, or Corrupt."""

    def __init__(self, data: bytes):
        self.data, self.place, self.range = data, 4, WHOLE
        self.code = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    def take(self, cumulative: Sequence[int]) -> int:
        """The next symbol of a table."""
        self.range >>= TOTAL_BITS
        value = self.code // self.range
        if value >> TOTAL_BITS:
            raise Corrupt("the lossless part is damaged: it leads beyond its tables")
        low, high = 0, len(cumulative) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cumulative[middle] <= value else (low, middle)
        self.code -= cumulative[low] * self.range
        self.range *= cumulative[low + 1] - cumulative[low]
        self._settle()
        return low

    def bits(self, count: int) -> int:
        """The next number of so many bits."""
        self.range >>= count
        value = self.code // self.range
        if value >> count:
            raise Corrupt("the lossless part is damaged: it leads beyond its numbers")
        self.code -= value * self.range
        self._settle()
        return value

    def _settle(self) -> None:
        while self.range < TOP:
            byte = self.data[self.place] if self.place < len(self.data) else 0
            self.code, self.range, self.place = (self.code << 8 | byte) & WHOLE, self.range << 8, self.place + 1

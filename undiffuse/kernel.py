"""The draw of `Keys.normal` in one launch, in Triton: Philox4x32-10 and the table of quantiles.

`key.py` says the same in torch operations, and compares the two before this is used on a device.
"""

from functools import cache
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCKS = 256  # counter blocks, of four words each, that a program computes


@cache
@no_type_check  # a checked function is not the one that Triton compiles
def _compiled() -> Any:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    # Else a draw compiles anew where its seed or its first row happens to be 1 or a multiple of 16.
    @triton.jit(do_not_specialize=["seed", "first", "step", "n"])
    def kernel(
        out,
        table,
        rows,
        seed: tl.uint64,  # pyright: ignore[reportInvalidTypeForm]
        first: tl.int64,  # pyright: ignore[reportInvalidTypeForm]
        step: tl.int64,  # pyright: ignore[reportInvalidTypeForm]
        n: tl.int64,  # pyright: ignore[reportInvalidTypeForm]
        count: tl.int64,  # pyright: ignore[reportInvalidTypeForm]
        scale: tl.constexpr,
        size: tl.constexpr,
    ):
        blocks = (count + 3) // 4
        i = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
        r, block = i // blocks, i % blocks
        row = first + step * r if rows is None else tl.load(rows + r, mask=r < n, other=0)
        w0, w1, w2, w3 = tl.philox(  # pyright: ignore[reportGeneralTypeIssues]
            seed, block.to(tl.uint32), tl.zeros([size], tl.uint32), row.to(tl.uint32), (row >> 32).to(tl.uint32)
        )
        # `join` makes a last axis of two, so that [w0, w1, w2, w3] is read off ((w0, w2), (w1, w3)) joined.
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [size, 4])
        z = (tl.load(table + (words & 0xFFFF)) + tl.load(table + (words >> 16))) * scale
        column = 4 * block[:, None] + tl.arange(0, 4)[None, :]
        tl.store(out + (r[:, None] * count + column), z, mask=(r[:, None] < n) & (column < count))

    return kernel


def draw(
    words: tuple[int, int], rows: range | Int[Tensor, "b"], count: int, table: Float[Tensor, "65536"], scale: float
) -> Float[Tensor, "b n"]:
    """[rows, count] on the table's device, where `rows` are too unless they are a range.

    Raises ImportError where there is no Triton, and whatever Triton raises where it cannot compile.
    """
    kernel, n = _compiled(), len(rows)
    out = torch.empty(n, count, dtype=torch.float32, device=table.device)
    programs = -(-n * -(-count // 4) // BLOCKS)
    if programs:
        first, step, index = (rows.start, rows.step, None) if isinstance(rows, range) else (0, 1, rows)
        with torch.cuda.device_of(out):  # Triton launches on the current card, whatever card the tensors are on
            kernel[(programs,)](out, table, index, words[0] | words[1] << 32, first, step, n, count, scale, BLOCKS)
    return out

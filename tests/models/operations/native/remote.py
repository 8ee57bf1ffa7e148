"""The native operations in another process, which `qemu` may emulate: for processors that nobody here has.

`Remote` stands in for the library that `build` opens. Each call copies what its pointers point to into the other
process (`remote.c`), and what was changed back; so it knows how much each of them points to.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Sequence
from ctypes import c_int64
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from streaming.models.operations.native import library as native
from streaming.models.operations.native.matrix import _Matrix

_SOURCE = Path(__file__).with_name("remote.c")


@dataclass
class Block:
    """size: in bytes, at this address, or no address. back: whether it is written to. pointers: by their offset."""

    address: int | None
    size: int
    back: bool = False
    pointers: dict[int, Block] = field(default_factory=dict)


Argument = int | float | Block


def compile_remote(compiler: Sequence[str], target: str, folder: Path, *more: str) -> Path:
    """Return the program for a processor. more: flags that come last. Raises `subprocess.CalledProcessError`."""
    program = folder / "remote"
    flags = ["-std=gnu11", "-O3", "-ffp-contract=off", f"-march={target}", f"-I{Path(native.__file__).parent}", *more]
    assert set(native._FLAGS) - {"-fPIC"} < set(flags)
    subprocess.run([*compiler, *flags, "-fopenmp", "-static", str(_SOURCE), "-lm", "-o", str(program)], check=True)
    return program


class Remote:
    """See the module."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self) -> None:
        self._process.communicate()

    def native_lanes(self) -> int:
        return self._call("l")

    def native_block(self) -> int:
        return self._call("b")

    def native_width(self, outputs: int) -> int:
        return self._call("w", outputs)

    def native_instructions(self) -> bytes:
        self._send(b"i" + struct.pack("<q", 0))
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def native_product(self, matrix: Any, rows: Any, after: Any, out: int, threads: int) -> int:
        m, x, a = matrix._obj, rows._obj, after._obj
        count, width = x.batch * x.rows, m.outputs // 2 if a.activation == 2 else m.outputs
        last = (x.batch - 1) * x.batch_stride + (x.rows - 1) * x.row_stride + m.inputs
        return self._call(
            "p",
            self._matrix(m),
            _struct(x, x=4 * last),
            _struct(a, scale=4 * m.outputs, residual=4 * count * width),
            Block(out, 4 * count * width, back=True),
            threads,
        )

    def native_rms_norm(
        self, x: int, pending: int | None, weight: int, eps: float, rows: int, size: int, added: int, normed: int
    ) -> None:
        all_of_it = 4 * rows * size
        given = Block(x, all_of_it), Block(pending, all_of_it), Block(weight, 4 * size)
        self._call("r", *given, eps, rows, size, Block(added, all_of_it, True), Block(normed, all_of_it, True))

    def native_layer_norm(self, x: int, weight: int, bias: int, eps: float, rows: int, size: int, normed: int) -> None:
        given = Block(x, 4 * rows * size), Block(weight, 4 * size), Block(bias, 4 * size)
        self._call("n", *given, eps, rows, size, Block(normed, 4 * rows * size, True))

    def native_convolutions(
        self,
        convolutions: Any,
        count: int,
        contexts: Any,
        x: int,
        batch: int,
        time: int,
        lengths: int | None,
        samples: int,
        out: int,
        threads: int,
    ) -> int:
        c, ratio = contexts._obj, Fraction(time)
        held = 1 + max((c_int64 * batch).from_address(c.slots))
        matrices = {}
        for number, conv in enumerate(convolutions):
            matrix = _Matrix.from_address(conv.product)
            matrices[number * ctypes.sizeof(conv) + type(conv).product.offset] = self._matrix(matrix)
            ratio *= Fraction(conv.upsample, conv.stride)
        outputs = int(ratio) * (matrix.outputs // conv.upsample)
        return self._call(
            "v",
            Block(ctypes.addressof(convolutions), ctypes.sizeof(convolutions), pointers=matrices),
            count,
            _struct(c, back=("memory",), memory=4 * held * c.depth * c.width, slots=8 * batch, frames=8 * batch),
            Block(x, 4 * batch * time * convolutions[0].channels),
            *(batch, time, Block(lengths, 8 * batch), samples),
            Block(out, 4 * batch * outputs, True),
            threads,
        )

    def native_draw(self, logits: int, drawing: Any, batch: int, size: int, book: int, books: int, units: int) -> None:
        d = drawing._obj
        flags = (batch - 1) * d.flag_stride + 1
        held = 1 + max((c_int64 * batch).from_address(d.slots))
        sizes = dict.fromkeys(("temperature", "top_p"), 4 * held)
        sizes |= dict.fromkeys(("top_k", "seed", "frames"), 8 * held) | {"slots": 8 * batch}
        sizes |= {"listening": flags, "speaking": flags, "codes": 8 * batch * books, "ended": batch, "finite": batch}
        drawn = _struct(d, back=("codes", "ended", "finite"), **sizes)
        self._call("d", Block(logits, 4 * batch * size), drawn, batch, size, book, books, Block(units, 8 * batch, True))

    def native_attend(
        self,
        ring: Any,
        view: Any,
        qkv: int,
        batch: int,
        time: int,
        heads: int,
        groups: int,
        dim: int,
        out: int,
        threads: int,
    ) -> int:
        r, v = ring._obj, view._obj
        held = (
            max((c_int64 * batch).from_address(v.slots)) * r.slot_stride
            + (heads - 1) * r.head_stride
            + (r.prefix + r.size) * dim
        )
        held *= 2 if r.kind else 4
        angles = 4 * ((batch - 1) * v.angle_stride + time * dim)
        return self._call(
            "a",
            _struct(r, back=("keys", "values"), keys=held, values=held),
            _struct(
                v,
                slots=8 * batch,
                position=8 * ((batch - 1) * v.position_stride + time),
                start=8 * ((batch - 1) * v.start_stride + (time - 1) * v.start_step + 1),
                cos=angles,
                sin=angles,
            ),
            Block(qkv, 4 * batch * time * (heads * groups + 2 * heads) * dim),
            *(batch, time, heads, groups, dim),
            Block(out, 4 * batch * time * heads * groups * dim, True),
            threads,
        )

    def _matrix(self, m: _Matrix) -> Block:
        block = self.native_block()
        whole, rest = m.outputs // block * block, m.outputs % block
        padded = whole + (block if rest else 0)
        floats = m.inputs * (1 if m.outputs == 1 else whole + (self.native_width(rest) if rest else 0))
        weight = {
            0: 4 * floats,
            1: 2 * floats,
            2: padded * m.inputs,
            3: padded * (m.inputs // 2 + 2 * m.inputs // max(m.group, 1)),
        }[m.kind]
        return _struct(m, weight=weight, scales=8 * padded, bias=4 * m.outputs)

    def _call(self, function: str, *arguments: Argument) -> int:
        blocks: list[Block] = []
        parts = [function.encode(), struct.pack("<q", len(arguments))]
        parts += [_sent(argument, blocks) for argument in arguments]
        self._send(b"".join(parts))
        (result,) = struct.unpack("<q", self._read(8))
        for block in blocks:
            content = self._read(block.size)
            if block.back:
                assert block.address is not None
                ctypes.memmove(block.address, content, block.size)
        return int(result)

    def _send(self, message: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(message)
        self._process.stdin.flush()

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        content = self._process.stdout.read(size)
        assert len(content) == size, "the other process has died"
        return content


def _struct(content: ctypes.Structure, back: tuple[str, ...] = (), **sizes: int) -> Block:
    """A struct and what its pointers point to, by their names."""
    kind = type(content)
    pointers = {}
    for name, size in sizes.items():
        address = getattr(content, name)
        if address is not None:
            pointers[getattr(kind, name).offset] = Block(address, size, name in back)
    return Block(ctypes.addressof(content), ctypes.sizeof(content), pointers=pointers)


def _sent(argument: Argument, blocks: list[Block]) -> bytes:
    """What `remote.c` reads; the blocks in the order in which they come back."""
    if isinstance(argument, float):
        return b"f" + struct.pack("<d", argument)
    if isinstance(argument, int):
        return b"i" + struct.pack("<q", argument)
    if argument.address is None:
        return b"i" + struct.pack("<q", 0)
    blocks.append(argument)
    parts = [b"b", struct.pack("<Q", argument.size), ctypes.string_at(argument.address, argument.size)]
    parts.append(struct.pack("<Q", len(argument.pointers)))
    for offset, target in argument.pointers.items():
        parts += [struct.pack("<Q", offset), _sent(target, blocks)]
    return b"".join(parts)

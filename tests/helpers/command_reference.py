"""The commands in plain loops over Python integers, written from ``isa``'s text: what the
vectorised command-level simulator is held against. And small programs' surroundings."""

from __future__ import annotations

import math

import numpy as np

from systole.isa import Config, LoadTarget, Opcode, PostOp, PostSource, WindowOp

DATA = 16384
"""Where data begin in the DRAM window; commands are before."""

POINTWISE = "kernel_w=1 kernel_h=1 stride_x=1 stride_y=1 dilation_x=1 dilation_y=1"
"""Fields of a window of one tap."""


def tiny(rows: int, cols: int, **fields: bool) -> Config:
    """1024 scratchpad words, 24 weight tiles, 64 accumulators."""
    return Config.sized(
        rows,
        cols,
        scratchpad_bytes=1024 * rows,
        weight_bytes=24 * rows * cols,
        accumulator_bytes=64 * 4 * cols,
        **fields,
    )


def image(words: list[int], data: bytes = b"", size: int = 1 << 16) -> np.ndarray:
    """A DRAM window with a program at 0 and data at DATA."""
    memory = np.zeros(size, np.uint8)
    program = np.array(words, "<u8").view(np.uint8)
    assert len(program) <= DATA
    memory[: len(program)] = program
    memory[DATA : DATA + len(data)] = np.frombuffer(data, np.uint8)
    return memory


def round_half_even(x: int, shift: int) -> int:
    """x / 2^shift."""
    if shift <= 0:
        return x << -shift
    floor, rest = divmod(x, 1 << shift)
    half = 1 << (shift - 1)
    return floor + (rest > half or (rest == half and floor % 2 == 1))


def significant_24(x: int) -> int:
    """Rounded to 24 significant bits, half to even."""
    drop = max(0, abs(x).bit_length() - 24)
    return round_half_even(x, drop) << drop


def wrap(x: int) -> int:
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)


def clamp(x: int, low: int, high: int) -> int:
    return max(low, min(high, x))


def requantise(acc: int, params: tuple[int, int, int], c) -> int:
    bias, multiplier, shift = params
    product = significant_24(significant_24(wrap(acc + bias)) * multiplier)
    return clamp(round_half_even(product, shift) + c.zero, c.low, c.high)


class Reference:
    """Internal memories and DRAM as lists; ``execute`` one command."""

    def __init__(self, config: Config, dram: bytes):
        self.config = config
        self.dram = list(dram)
        self.scratchpad = [[0] * config.rows for _ in range(config.scratchpad_words)]
        self.weights = [[0] * config.cols for _ in range(config.weight_words)]
        self.accumulators = [[0] * config.cols for _ in range(config.acc_words)]

    def execute(self, c) -> None:
        if c.opcode == Opcode.CONV:
            self.conv(c)
        elif c.opcode == Opcode.POST:
            self.post(c)
        elif c.opcode == Opcode.WINDOW and c.op == WindowOp.IM2COL:
            self.im2col(c)
        elif c.opcode == Opcode.WINDOW and c.op in (WindowOp.SOFTMAX, WindowOp.NORMALISE):
            self.rows(c)
        elif c.opcode == Opcode.WINDOW:
            self.window(c)
        else:
            self.transfer(c)

    def transfer(self, c) -> None:
        weights = c.opcode == Opcode.LOAD and c.target == LoadTarget.WEIGHTS
        words = self.weights if weights else self.scratchpad
        vector = self.config.weight_vector_bytes if weights else self.config.vector_bytes
        for k in range(c.count2):
            for j in range(c.count1):
                for i in range(c.count0):
                    at = c.dram + k * c.dram2 + j * c.dram1 + i * vector
                    word = c.local + k * c.local2 + j * c.local1 + i
                    if c.opcode == Opcode.LOAD:
                        data = self.dram[at : at + len(words[word])]
                        words[word] = [(b ^ 0x80) - 0x80 for b in data]
                    else:
                        data = [b & 0xFF for b in words[word]]
                        self.dram[at : at + vector] = data + [0] * (vector - len(data))

    def x(self, c, b: int, y: int, x: int) -> list[int]:
        if 0 <= y < c.in_h and 0 <= x < c.in_w:
            return self.scratchpad[c.src + b * c.src_block + y * c.src_pitch + x]
        return [c.pad] * self.config.rows

    def conv(self, c) -> None:
        rows, cols, tile = self.config.rows, self.config.cols, 0
        for b in range(c.blocks):
            for ky in range(c.kernel_h):
                for kx in range(c.kernel_w):
                    for oy in range(c.out_h):
                        for ox in range(c.out_w):
                            x = self.x(
                                c,
                                b,
                                c.y0 + oy * c.stride_y + ky * c.dilation_y,
                                c.x0 + ox * c.stride_x + kx * c.dilation_x,
                            )
                            acc = self.accumulators[c.acc + oy * c.out_w + ox]
                            for n in range(cols):
                                total = 0 if tile == 0 and not c.accumulate else acc[n]
                                for r in range(rows):
                                    w = self.weights[c.weights + tile * rows + r][n]
                                    total += (x[r] - c.input_zero) * (w - c.weight_zero)
                                acc[n] = wrap(total)
                    tile += 1

    def params(self, word: int, channel: int) -> tuple[int, int, int]:
        """Bias, multiplier, shift of one channel of a group whose parameters start at ``word``."""
        at = word * self.config.rows + 8 * channel
        data = [
            self.scratchpad[i // self.config.rows][i % self.config.rows] for i in range(at, at + 8)
        ]
        number = int.from_bytes(bytes(b & 0xFF for b in data), "little")
        return wrap(number & 0xFFFF_FFFF), number >> 32 & 0xFF_FFFF, number >> 56 & 0x3F

    def post(self, c) -> None:
        lanes, per_word = self.config.lanes, self.config.rows // self.config.lanes
        for g in range(c.groups):
            block, position = divmod(c.lane + g, per_word)
            for oy in range(c.out_h):
                for ox in range(c.out_w):
                    values = []
                    for i in range(lanes):
                        lane = position * lanes + i
                        if c.source == PostSource.SCRATCHPAD:
                            word = c.a + block * c.a_block + oy * c.a_pitch + ox
                            a = self.scratchpad[word][lane]
                        else:
                            acc = self.accumulators[c.acc + oy * c.out_w + ox][g * lanes + i]
                            params = self.params(c.params + g * self.config.param_words, i)
                            a = requantise(acc, params, c)
                        if c.op != PostOp.NONE:
                            word = c.b + block * c.b_block + oy * c.b_pitch + ox * c.b_step
                            b = self.scratchpad[word][lane]
                            if c.op == PostOp.ADD:
                                total = (a - c.za) * c.ma + (b - c.zb) * c.mb
                            elif c.op == PostOp.SUB:
                                total = (a - c.za) * c.ma - (b - c.zb) * c.mb
                            else:
                                total = (a - c.za) * (b - c.zb) * c.ma
                            a = clamp(round_half_even(total, c.shift) + c.zo, c.low2, c.high2)
                        if c.lut:
                            word, byte = divmod(a + 128, self.config.rows)
                            a = self.scratchpad[c.table + word][byte]
                        values.append(a)
                    word = c.out + block * c.out_block + oy * c.out_pitch + ox * c.out_step
                    self.scratchpad[word][position * lanes : (position + 1) * lanes] = values

    def window(self, c) -> None:
        rows = self.config.rows
        for b in range(c.blocks):
            for oy in range(c.out_h):
                for ox in range(c.out_w):
                    taps = []
                    for ky in range(c.kernel_h):
                        for kx in range(c.kernel_w):
                            y = c.y0 + oy * c.stride_y + ky * c.dilation_y
                            x = c.x0 + ox * c.stride_x + kx * c.dilation_x
                            w = [1] * rows
                            if c.op == WindowOp.DEPTHWISE:
                                tap = (b * c.kernel_h + ky) * c.kernel_w + kx
                                w = [n - c.weight_zero for n in self.scratchpad[c.weights + tap]]
                            taps.append((self.x(c, b, y, x), w))
                    out = []
                    for r in range(rows):
                        if c.op == WindowOp.MAX:
                            out.append(clamp(max(x[r] for x, _ in taps), c.low, c.high))
                        else:
                            total = sum(x[r] * w[r] for x, w in taps)
                            out.append(requantise(total, self.params(c.params + 8 * b, r), c))
                    self.scratchpad[c.out + b * c.out_block + oy * c.out_pitch + ox] = out

    def im2col(self, c) -> None:
        rows = self.config.rows
        for oy in range(c.out_h):
            for ox in range(c.out_w):
                data = []
                for ky in range(c.kernel_h):
                    for kx in range(c.kernel_w):
                        for j in range(c.run):
                            y = c.y0 + oy * c.stride_y + ky * c.dilation_y
                            x = c.x0 + ox * c.stride_x + kx * c.dilation_x + j
                            value = c.pad
                            if 0 <= y < c.in_h and 0 <= x < c.in_w:
                                word, lane = divmod(x, rows)
                                value = self.scratchpad[c.src + y * c.src_pitch + word][lane]
                            data.append(value)
                while len(data) % rows:
                    data.append(c.pad)
                for t in range(len(data) // rows):
                    word = c.out + t * c.out_block + oy * c.out_pitch + ox
                    self.scratchpad[word] = data[t * rows : (t + 1) * rows]

    def rows(self, c) -> None:
        lanes, own = self.config.rows, -(-16 // self.config.rows)
        out = []
        for position in range(c.out_w):
            row = [
                x
                for b in range(c.blocks)
                for x in self.scratchpad[c.src + b * c.src_block + position]
            ]
            if c.op == WindowOp.NORMALISE:
                row = normalised(
                    row, c, self.number(c.params, 0, 7), self.number(c.params, 7, 1) & 1
                )
                acc = []
                for i, normal in enumerate(row):
                    block, lane = divmod(i, lanes)
                    params = c.params + own + 8 * block
                    flags = self.number(params, 8 * lane + 7, 1) >> 6
                    normal = -normal if flags & 1 else normal
                    if flags & 2:
                        normal = signed(normal + (1 << 11), 28) >> 12
                    acc.append(requantise(signed(normal, 28), self.params(params, lane), c))
                out.append(acc)
                continue
            counts = [i < c.features + c.causal * position for i in range(len(row))]
            if c.masked:
                first = c.weights + position * c.mask_step
                mask = [
                    x for b in range(c.blocks) for x in self.scratchpad[first + b * c.mask_block]
                ]
                counts = [n and x >= 0 for n, x in zip(counts, mask, strict=True)]
            largest = max([x for x, n in zip(row, counts, strict=True) if n], default=0)
            entries = [
                self.number(c.params + own, 4 * (largest - x), 3) if n else 0
                for x, n in zip(row, counts, strict=True)
            ]
            multiplier, shift = reciprocal(self.number(c.params, 0, 3), max(sum(entries), 1))
            shift += signed(self.number(c.params, 3, 1), 8)
            out.append([requantise(e, (0, multiplier, shift), c) for e in entries])
        for position, row in enumerate(out):
            for b in range(c.blocks):
                word = c.out + b * c.out_block + position
                self.scratchpad[word] = row[b * lanes : (b + 1) * lanes]

    def number(self, word: int, first: int, count: int) -> int:
        """The number in ``count`` bytes from byte ``first`` of a word on."""
        at = [divmod(word * self.config.rows + first + i, self.config.rows) for i in range(count)]
        return sum((self.scratchpad[w][b] & 0xFF) << 8 * i for i, (w, b) in enumerate(at))


def signed(x: int, bits: int) -> int:
    return (x + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


def reciprocal(numerator: int, divisor: int) -> tuple[int, int]:
    """Of 24 significant bits, and a right shift."""
    shift = divisor.bit_length() + 1
    quotient = (numerator << 37) // (divisor << 37 - shift)
    while quotient >= 1 << 25:
        quotient, shift = quotient >> 1, shift - 1
    quotient, shift = quotient + 1 >> 1, shift - 1
    return (quotient >> 1, shift - 1) if quotient >> 24 else (quotient, shift)


def shifted(x: int, shift: int) -> int:
    """x * 2^-shift, half up."""
    return x << -shift if shift <= 0 else (x + (1 << shift - 1)) >> shift


def normalised(row: list[int], c, epsilon: int, centred: int) -> list[int]:
    """Normal numbers of a row of NORMALISE, before sign and precision of the channel."""
    x = [n - c.pad if i < c.features else 0 for i, n in enumerate(row)]
    total, squares = sum(x) * centred, sum(n * n for n in x)
    v = ((c.features * squares - total * total) << 12) + epsilon
    half = -(-v.bit_length() // 2)
    factor = offset = 0
    if v:
        root = math.isqrt((v << 56 - 2 * half) >> 6)
        inverse = (1 << 50) // root + 1 >> 1
        factor, offset = (shifted(n * inverse, half - 10) for n in (c.features, total))
    if factor >> 35:
        factor = offset = 0
    return [shifted(n * factor - offset, 8) for n in x]

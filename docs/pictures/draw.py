"""Draws the block diagrams of the documentation as SVG.

python docs/pictures/draw.py            # write them beside this file
python docs/pictures/draw.py --check    # exit 1 if one is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
FILLS = {
    "memory": "#fff3d6",
    "engine": "#dcebfa",
    "control": "#e6f3e1",
    "outside": "#eeeeee",
    "part": "#ffffff",
}
"""Colour of a box by what it stands for."""
INK = "#222222"
LINE = 15
"""Height of a line of text."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A labelled rectangle; its first line of text is bold."""

    x: float
    y: float
    w: float
    h: float
    text: str
    kind: str = "part"

    def port(self, side: str, at: float = 0.5) -> Point:
        """The point at the fraction ``at`` of a side: left, right, top or bottom."""
        return {
            "left": (self.x, self.y + at * self.h),
            "right": (self.x + self.w, self.y + at * self.h),
            "top": (self.x + at * self.w, self.y),
            "bottom": (self.x + at * self.w, self.y + self.h),
        }[side]

    def svg(self) -> list[str]:
        lines = self.text.split("\n")
        x, y = self.x + self.w / 2, self.y + self.h / 2 - LINE * (len(lines) - 1) / 2 + 4
        out = [
            f'<rect x="{self.x:g}" y="{self.y:g}" width="{self.w:g}" height="{self.h:g}" rx="4" '
            f'fill="{FILLS[self.kind]}" stroke="{INK}"/>'
        ]
        for i, line in enumerate(lines):
            weight = ' font-weight="bold"' if i == 0 else ""
            out.append(f'<text x="{x:g}" y="{y + LINE * i:g}"{weight}>{escape(line)}</text>')
        return out


@dataclass
class Picture:
    """Boxes and the arrows between them."""

    width: int
    height: int
    title: str
    body: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, w: float, h: float, text: str, kind: str = "part") -> Box:
        box = Box(x, y, w, h, text, kind)
        self.body += box.svg()
        return box

    def group(self, x: float, y: float, w: float, h: float, text: str) -> None:
        """A dashed frame around what belongs together, its name in the upper left corner."""
        self.body.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6" fill="none" '
            f'stroke="#888888" stroke-dasharray="5 4"/>'
        )
        self.note(x + 8, y + 16, text, anchor="start")

    def note(self, x: float, y: float, text: str, anchor: str = "middle") -> None:
        self.body.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="11" '
            f'fill="#555555">{escape(text)}</text>'
        )

    def arrow(self, *points: Point, both: bool = False) -> None:
        """A line through the points with a head at its end, or at both."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        start = ' marker-start="url(#head)"' if both else ""
        self.body.append(
            f'<polyline points="{path}" fill="none" stroke="{INK}"{start} marker-end="url(#head)"/>'
        )

    def across(
        self, a: Box, b: Box, at: float = 0.5, into: float = 0.5, both: bool = False
    ) -> None:
        """From the right side of ``a`` to the left side of ``b``."""
        (x1, y1), (x2, y2) = a.port("right", at), b.port("left", into)
        middle = (x1 + x2) / 2
        bend = [] if y1 == y2 else [(middle, y1), (middle, y2)]
        self.arrow((x1, y1), *bend, (x2, y2), both=both)

    def level(self, a: Box, b: Box, both: bool = False) -> None:
        """Straight from the right side of ``a`` to the left of ``b``, at the smaller's middle."""
        smaller = min(a, b, key=lambda box: box.h)
        y = smaller.y + smaller.h / 2
        self.arrow((a.x + a.w, y), (b.x, y), both=both)

    def down(self, a: Box, b: Box, at: float = 0.5, into: float = 0.5, both: bool = False) -> None:
        """From the bottom of ``a`` to the top of ``b``."""
        (x1, y1), (x2, y2) = a.port("bottom", at), b.port("top", into)
        middle = (y1 + y2) / 2
        bend = [] if x1 == x2 else [(x1, middle), (x2, middle)]
        self.arrow((x1, y1), *bend, (x2, y2), both=both)

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" font-family="Helvetica, Arial, '
            f'sans-serif" font-size="12" text-anchor="middle" fill="{INK}">',
            f"<title>{escape(self.title)}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" '
            'markerHeight="8" orient="auto-start-reverse">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>',
            f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>',
        )
        return "\n".join((*head, *self.body, "</svg>")) + "\n"


def machine() -> Picture:
    p = Picture(880, 420, "The machine: engines around a scratchpad, one command stream")
    host = p.box(10, 20, 120, 60, "Host\ndriver", "outside")
    dram = p.box(10, 150, 120, 230, "DRAM\nprogram\nweights\nactivations\ntrace", "outside")
    csr = p.box(200, 20, 130, 60, "Registers\nAXI4-Lite, interrupt", "control")
    fetch = p.box(390, 20, 130, 60, "Fetch\none command stream", "control")
    shells = p.box(580, 20, 290, 60, "6 shells\nqueue, tokens, counters, events", "control")
    read = p.box(200, 150, 110, 110, "AXI4\nread manager", "control")
    write = p.box(200, 290, 110, 90, "AXI4\nwrite manager", "control")
    load = p.box(390, 150, 100, 40, "LOAD", "engine")
    wload = p.box(390, 215, 100, 40, "WLOAD", "engine")
    store = p.box(390, 310, 100, 40, "STORE", "engine")
    pad = p.box(550, 150, 110, 230, "Scratchpad\nwords of rows\nint8 lanes,\nbanked", "memory")
    weights = p.box(730, 110, 140, 30, "Weight buffer", "memory")
    conv = p.box(730, 160, 140, 50, "CONV\nsystolic array", "engine")
    acc = p.box(730, 230, 140, 30, "Accumulators (int32)", "memory")
    post = p.box(730, 280, 140, 40, "POST\nrequantise, combine", "engine")
    window = p.box(730, 340, 140, 40, "WINDOW\ndepthwise, pools", "engine")
    p.across(host, csr, both=True)
    p.across(csr, fetch)
    p.across(fetch, shells)
    p.note(725, 97, "one shell in front of every engine")
    p.level(dram, read)
    p.arrow(write.port("left"), (130, 335))
    p.arrow(read.port("top", 0.8), (288, 115), (455, 115), (455, 80))
    p.note(370, 109, "commands")
    p.level(read, load)
    p.level(read, wload)
    p.arrow(store.port("left"), (310, 330))
    p.level(load, pad)
    p.level(wload, pad)
    p.arrow(load.port("right", 0.25), (520, 160), (520, 125), (730, 125))
    p.arrow((550, 330), store.port("right"))
    p.level(pad, conv)
    p.down(weights, conv)
    p.down(conv, acc)
    p.down(acc, post)
    p.level(pad, post, both=True)
    p.level(pad, window, both=True)
    p.note(440, 400, "WLOAD is a second LOAD: each fills scratchpad or weight buffer")
    return p


def control() -> Picture:
    p = Picture(880, 250, "Control: from the program in DRAM to the engines' cores")
    p.group(150, 10, 350, 110, "fetch.py")
    program = p.box(10, 40, 110, 60, "Read manager\nclient 0", "outside")
    prefetch = p.box(165, 40, 90, 60, "Prefetch\nbeat buffer", "control")
    unpack = p.box(285, 40, 90, 60, "Unpack\n64-bit words", "control")
    fetch = p.box(405, 40, 85, 60, "Fetch\nkept words", "control")
    p.group(550, 10, 200, 230, "shell.py, one per engine")
    queue = p.box(565, 40, 80, 60, "Queue", "control")
    tokens = p.box(565, 130, 170, 40, "Token counters\none per pair of engines", "control")
    counters = p.box(565, 185, 170, 40, "Counters\nwaits and busy cycles", "control")
    issue = p.box(670, 40, 65, 60, "Issue", "control")
    core = p.box(790, 40, 80, 60, "Core\nthe engine", "engine")
    p.box(165, 160, 130, 60, "csr.py\nregisters, faults,\ninterrupt", "control")
    p.box(350, 160, 130, 60, "trace.py\nevents to DRAM", "control")
    p.level(program, prefetch)
    p.across(prefetch, unpack)
    p.across(unpack, fetch)
    p.across(fetch, queue)
    p.across(queue, issue)
    p.across(issue, core, both=True)
    p.note(770, 32, "retire")
    p.arrow((702, 130), (702, 100))
    p.arrow(tokens.port("left"), (460, 150), (460, 160))
    p.arrow(counters.port("left"), (525, 205), (525, 235), (230, 235), (230, 220))
    p.arrow((230, 160), (230, 140), (447, 140), (447, 100))
    p.note(330, 134, "start, halt")
    return p


def scratchpad() -> Picture:
    p = Picture(760, 250, "The scratchpad: clients, arbiters, banks")
    for i, name in enumerate(("CONV", "POST", "WINDOW", "STORE")):
        p.box(10, 20 + 55 * i, 110, 40, f"{name}\nread {i + 1}", "engine")
        p.arrow((120, 40 + 55 * i), (195, 40 + 55 * i))
    for i, name in enumerate(("LOAD", "WLOAD", "POST", "WINDOW")):
        p.box(640, 20 + 55 * i, 110, 40, f"{name}\nwrite {i + 1}", "engine")
        p.arrow((640, 40 + 55 * i), (565, 40 + 55 * i))
    p.box(195, 20, 100, 205, "Read\narbiters\nlowest number\nfirst,\nper bank", "control")
    p.box(465, 20, 100, 205, "Write\narbiters\nlowest number\nfirst,\nper bank", "control")
    for i in range(4):
        p.box(330, 20 + 55 * i, 100, 40, f"Bank {i}\n1 read, 1 write", "memory")
        p.arrow((330, 40 + 55 * i), (295, 40 + 55 * i))
        p.arrow((465, 40 + 55 * i), (430, 40 + 55 * i))
    return p


def conv() -> Picture:
    p = Picture(860, 270, "CONV: two sequencers, weight buffer, array, accumulators")
    command = p.box(10, 105, 90, 50, "CONV\ncommands", "control")
    weight = p.box(150, 20, 150, 60, "Weight sequencer\none tile ahead", "control")
    activation = p.box(150, 180, 150, 60, "Activation sequencer\none vector a cycle", "control")
    buffer = p.box(360, 20, 130, 60, "Weight buffer\nwords of cols int8", "memory")
    pad = p.box(360, 180, 130, 60, "Scratchpad\nwords of rows int8", "memory")
    array = p.box(
        550, 70, 130, 120, "Systolic array\nrows x cols\nactive and\nshadow weights", "engine"
    )
    acc = p.box(
        730,
        70,
        120,
        120,
        "Accumulators\nint32, two halves,\none memory per\ncolumn and half",
        "memory",
    )
    p.across(command, weight, at=0.3)
    p.across(command, activation, at=0.7)
    p.across(weight, buffer)
    p.across(activation, pad)
    p.across(buffer, array, into=0.25)
    p.across(pad, array, into=0.75)
    p.across(array, acc)
    p.arrow((225, 80), (225, 180), both=True)
    p.note(232, 134, "loaded, swap", anchor="start")
    p.note(615, 60, "capture, swap: one wavefront")
    p.arrow((790, 190), (790, 240))
    p.note(790, 255, "POST reads the other half")
    return p


def array() -> Picture:
    p = Picture(640, 330, "The systolic array in cells, and one cell's elements")
    p.note(185, 18, "cells between pipeline registers; the number is the diagonal")
    for r in range(3):
        for c in range(3):
            p.box(60 + 90 * c, 35 + 80 * r, 60, 50, f"{r + c}\ncell", "engine")
            if c < 2:
                p.arrow((120 + 90 * c, 60 + 80 * r), (150 + 90 * c, 60 + 80 * r))
            p.arrow((90 + 90 * c, 85 + 80 * r), (90 + 90 * c, 115 + 80 * r))
        p.arrow((20, 60 + 80 * r), (60, 60 + 80 * r))
    p.note(185, 290, "activations move right, sums move down, one cell a cycle")
    p.group(390, 35, 235, 230, "one element of a cell")
    shadow = p.box(410, 70, 80, 40, "Shadow\nweight", "memory")
    active = p.box(520, 70, 80, 40, "Active\nweight", "memory")
    multiply = p.box(520, 140, 80, 40, "x", "engine")
    add = p.box(520, 210, 80, 40, "+", "engine")
    p.across(shadow, active)
    p.note(505, 64, "swap")
    p.down(active, multiply)
    p.down(multiply, add)
    p.arrow((400, 160), multiply.port("left"))
    p.note(440, 154, "activation")
    p.arrow((400, 230), add.port("left"))
    p.note(455, 224, "sum from above")
    p.note(320, 320, "a marker (valid, capture, swap) acts on a whole diagonal at once")
    return p


def post() -> Picture:
    p = Picture(880, 230, "POST: from accumulators or scratchpad to scratchpad")
    acc = p.box(10, 20, 110, 50, "Accumulators\nint32", "memory")
    p.box(10, 130, 110, 60, "Scratchpad\na, b, parameters,\ntable", "memory")
    requantise = p.box(170, 20, 130, 50, "Requantise\nint32 to int8", "engine")
    source = p.box(350, 20, 70, 170, "a", "part")
    combine = p.box(470, 75, 130, 60, "Combine\nADD, SUB, MUL,\nor pass", "engine")
    table = p.box(650, 75, 90, 60, "Table\n256 bytes,\nif used", "engine")
    out = p.box(780, 75, 90, 60, "Scratchpad\nout", "memory")
    p.across(acc, requantise)
    p.across(requantise, source, into=0.147)
    p.arrow((120, 150), (350, 150))
    p.note(235, 144, "source SCRATCHPAD")
    p.arrow((120, 180), (320, 180), (320, 210), (535, 210), (535, 135))
    p.note(430, 204, "b, the second operand")
    p.across(source, combine)
    p.across(combine, table)
    p.across(table, out)
    p.note(235, 88, "parameters are read one group ahead")
    return p


def window() -> Picture:
    p = Picture(880, 240, "WINDOW: walks, reduction, requantisation")
    setup = p.box(10, 30, 110, 60, "Walk set-up\nnext command", "control")
    taps = p.box(160, 30, 110, 60, "Tap walk\nwords to read", "control")
    pad = p.box(160, 150, 110, 60, "Scratchpad\nread", "memory")
    lines = p.box(320, 90, 110, 60, "Line memory\nrows before", "memory")
    reduce_ = p.box(480, 30, 130, 70, "Reduce\nshift window,\n9 MACs a lane, MAX", "engine")
    collect = p.box(480, 150, 130, 60, "Collect\nIM2COL: bytes\ninto words", "engine")
    requantise = p.box(650, 35, 100, 60, "Requantise\nint32 to int8", "engine")
    out = p.box(790, 90, 80, 60, "Scratchpad\nwrite", "memory")
    walk = p.box(790, 20, 80, 45, "Output walk\naddresses", "control")
    p.across(setup, taps)
    p.down(taps, pad)
    p.across(pad, lines)
    p.across(lines, reduce_, at=0.3)
    p.across(lines, collect, at=0.7)
    p.across(reduce_, requantise)
    p.across(requantise, out, into=0.35)
    p.across(collect, out, into=0.75)
    p.down(walk, out)
    return p


def transfer() -> Picture:
    p = Picture(880, 220, "Transfers: LOAD, WLOAD and STORE on one AXI4 port")
    p.box(10, 30, 90, 170, "DRAM", "outside")
    p.box(150, 30, 140, 60, "Read manager\nbursts in turn,\nfetch first", "control")
    write = p.box(150, 140, 140, 60, "Write manager\nbursts in turn", "control")
    runs = p.box(350, 20, 120, 35, "Run requester", "control")
    load = p.box(350, 65, 120, 40, "Beats to words", "engine")
    store = p.box(350, 150, 120, 40, "Words to beats", "engine")
    pad = p.box(700, 20, 160, 60, "Scratchpad", "memory")
    arbiter = p.box(530, 95, 120, 40, "Weight arbiter", "control")
    weights = p.box(700, 95, 160, 40, "Weight buffer", "memory")
    source = p.box(700, 150, 160, 40, "Scratchpad", "memory")
    p.arrow((100, 60), (150, 60))
    p.arrow((150, 170), (100, 170))
    p.arrow(runs.port("left"), (290, 37.5))
    p.arrow((290, 75), (350, 75))
    p.across(load, pad, at=0.3, into=0.7)
    p.across(load, arbiter, at=0.7)
    p.across(arbiter, weights)
    p.arrow(source.port("left"), store.port("right"))
    p.arrow(store.port("left"), write.port("right"))
    p.note(410, 210, "LOAD and WLOAD are two of the upper engine")
    return p


def software() -> Picture:
    p = Picture(880, 250, "From a model file to a report")
    model = p.box(10, 30, 90, 60, "ONNX\nint8", "outside")
    front = p.box(140, 30, 120, 60, "Front end\nread, lower, fuse,\ncheck", "control")
    graph = p.box(300, 30, 100, 60, "Graph\nsw/ir", "memory")
    compiler = p.box(440, 20, 150, 80, "Compiler\nlower, search,\nplan, emit", "control")
    program = p.box(630, 30, 100, 60, "Program\nDRAM image", "memory")
    device = p.box(770, 20, 100, 80, "Device\nRTL, or the\ncommand\nsimulator", "engine")
    golden = p.box(300, 150, 100, 60, "Golden\nmodel", "engine")
    oracle = p.box(10, 150, 90, 60, "onnxruntime\noracle, host", "outside")
    cycles = p.box(630, 150, 100, 60, "Cycle model\nprediction", "engine")
    report = p.box(440, 150, 150, 60, "Report\nlayers, verdicts", "outside")
    p.across(model, front)
    p.across(front, graph)
    p.across(graph, compiler)
    p.across(compiler, program)
    p.across(program, device)
    p.down(graph, golden)
    p.down(model, oracle)
    p.across(golden, report)
    p.down(program, cycles)
    p.arrow(cycles.port("left"), report.port("right"))
    p.arrow((820, 100), (820, 235), (515, 235), (515, 210))
    p.arrow((100, 180), (120, 180), (120, 235), (480, 235), (480, 210))
    return p


PICTURES: tuple[Callable[[], Picture], ...] = (
    machine,
    control,
    scratchpad,
    conv,
    array,
    post,
    window,
    transfer,
    software,
)


def pictures() -> dict[Path, str]:
    """The text of every picture's file."""
    return {FOLDER / f"{draw.__name__}.svg": draw().svg() for draw in PICTURES}


def main(check: bool) -> int:
    stale = [p for p, text in pictures().items() if not p.exists() or p.read_text() != text]
    if check:
        for path in stale:
            print(f"{path} is out of date: run python docs/pictures/draw.py", file=sys.stderr)
        return 1 if stale else 0
    for path, text in pictures().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))

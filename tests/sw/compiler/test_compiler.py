"""The compiler's parts: derived tokens, buffers, regions, the program file; and whole random graphs
on memories so small that everything is cut and spilled, on the command-level simulator."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systole.isa import Config, Engine, LoadTarget, Opcode, PostSource, WindowOp
from systole.isa.csr import TOKEN_BITS
from systole.sw.compiler import compile_graph
from systole.sw.compiler.emission.fields import CommandFields
from systole.sw.compiler.lowering import lower
from systole.sw.compiler.packing import Buffer, pack, words_in_use
from systole.sw.compiler.plan import Planner
from systole.sw.compiler.regions import cuts
from systole.sw.compiler.stream import CommandStream, Span, StreamMemory, TokenError, run
from systole.sw.compiler.weights import WeightRing, pieces
from systole.sw.ir.graph import ModelError
from systole.sw.runtime.driver import Driver
from systole.sw.runtime.execute import compare, execute, load, writer_of
from systole.sw.runtime.program import Program, ProgramError
from systole.sw.session.backends import open_device
from systole.sw.simulate.commands import run_program
from systole.sw.simulate.races import CommandError, Race
from tests.helpers.layer_checks import check_on, check_program, compile_by_chance
from tests.helpers.marks import fewer_unless_long
from tests.helpers.random_graphs import GraphBuilder, random_graph

POINT = dict(kernel_w=1, kernel_h=1, stride_x=1, stride_y=1, dilation_x=1, dilation_y=1)
NO_PADS = (0, 0, 0, 0)

# Tokens -------------------------------------------------------------------------------------------

TINY = Config(
    rows=4, cols=4, scratchpad_bytes=4 * 64, weight_bytes=16 * 4, accumulator_bytes=8 * 4 * 16
)
DRAM_WORDS = 64
"""Vectors of DRAM that the random programs use, behind their commands."""
DRAM_BASE = 1 << 15


def _scratchpad(rng: random.Random) -> tuple[tuple[int, int, int], tuple[int, int], int]:
    """Counts, steps and start of a random box in the scratchpad."""
    counts = (rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 3))
    middle = counts[2] + rng.randrange(3)
    outer = middle * counts[1] + rng.randrange(3)
    reach = (counts[0] - 1) * outer + (counts[1] - 1) * middle + counts[2]
    return counts, (outer, middle), rng.randrange(TINY.scratchpad_words - reach + 1)


def _transfer(stream: CommandStream, rng: random.Random, engine: Engine) -> None:
    counts, steps, start = _scratchpad(rng)
    n = counts[0] * counts[1] * counts[2]
    vector = rng.randrange(DRAM_WORDS - n + 1)
    fields = dict(
        dram=DRAM_BASE + 4 * vector,
        count0=counts[2],
        count1=counts[1],
        count2=counts[0],
        dram1=4 * counts[2],
        dram2=4 * counts[2] * counts[1],
        local=start,
        local1=steps[1],
        local2=steps[0],
    )
    dram = run(StreamMemory.DRAM, DRAM_BASE // 4 + vector, n)
    local = Span(StreamMemory.SCRATCHPAD, start, counts, steps)
    if engine == Engine.STORE:
        stream.emit(Opcode.STORE, fields, [local], [dram], stage=0)
    else:
        fields["target"] = LoadTarget.SCRATCHPAD
        stream.emit(Opcode.LOAD, fields, [dram], [local], stage=0, engine=engine)


def _load_weights(stream: CommandStream, tile: int, tiles: int) -> None:
    fields = dict(target=LoadTarget.WEIGHTS, dram=DRAM_BASE, count0=4 * tiles, count1=1, count2=1)
    stream.emit(
        Opcode.LOAD,
        fields | {"local": 4 * tile},
        [run(StreamMemory.DRAM, DRAM_BASE // 4, 4 * tiles)],
        [run(StreamMemory.WEIGHTS, 4 * tile, 4 * tiles)],
        stage=0,
        engine=Engine.WLOAD,
    )


def _conv(stream: CommandStream, rng: random.Random, half: int, first: bool) -> None:
    width = rng.randint(1, 8)
    src, tile = rng.randrange(64 - width + 1), rng.randrange(4)
    fields = dict(blocks=1, src=src, in_w=width, in_h=1, out_w=width, out_h=1, **POINT)
    fields |= dict(weights=4 * tile, acc=half * TINY.acc_half, accumulate=int(not first))
    if first:  # All of the half: what follows reads or adds to any part of it.
        fields |= dict(out_w=TINY.acc_half)
    reads = [run(StreamMemory.SCRATCHPAD, src, width), run(StreamMemory.WEIGHTS, 4 * tile, 4)]
    stream.emit(Opcode.CONV, fields, reads, [run(StreamMemory.ACCUMULATORS, half, 1)], stage=0)


def _post(stream: CommandStream, rng: random.Random, half: int | None) -> None:
    """From an accumulator half, or (``half`` None) from the scratchpad."""
    width = rng.randint(1, 4)
    needed = max(width, TINY.param_words)
    out = source = rng.randrange(64 - needed + 1)
    while abs(source - out) < needed:
        source = rng.randrange(64 - needed + 1)
    fields = dict(groups=1, out_w=width, out_h=1, out=out, out_step=1, high=127, low=-128)
    if half is None:
        fields |= dict(source=PostSource.SCRATCHPAD, a=source)
        reads = [run(StreamMemory.SCRATCHPAD, source, width)]
    else:
        fields |= dict(source=PostSource.ACCUMULATOR, acc=half * TINY.acc_half, params=source)
        reads = [
            run(StreamMemory.ACCUMULATORS, half, 1),
            run(StreamMemory.SCRATCHPAD, source, TINY.param_words),
        ]
    stream.emit(Opcode.POST, fields, reads, [run(StreamMemory.SCRATCHPAD, out, width)], stage=0)


def _window(stream: CommandStream, rng: random.Random) -> None:
    width = rng.randint(1, 6)
    src = rng.randrange(32 - width + 1)
    out = 32 + rng.randrange(32 - width + 1)
    if rng.randrange(2):
        src, out = out, src
    fields = dict(op=WindowOp.MAX, blocks=1, src=src, in_w=width, in_h=1, out=out)
    fields |= dict(out_w=width, out_h=1, low=-128, high=127, **POINT)
    reads = [run(StreamMemory.SCRATCHPAD, src, width)]
    stream.emit(Opcode.WINDOW, fields, reads, [run(StreamMemory.SCRATCHPAD, out, width)], stage=0)


def random_stream(seed: int, commands: int = 60) -> CommandStream:
    """All engines on random parts of the same memories, which are loaded whole before."""
    rng = random.Random(seed)
    stream = CommandStream(4)
    whole = dict(dram=DRAM_BASE, count0=64, count1=1, count2=1, target=LoadTarget.SCRATCHPAD)
    everything = [run(StreamMemory.DRAM, DRAM_BASE // 4, 64)], [run(StreamMemory.SCRATCHPAD, 0, 64)]
    stream.emit(Opcode.LOAD, whole, *everything, stage=0, engine=Engine.LOAD)
    _load_weights(stream, 0, 4)
    for half in (0, 1):
        _conv(stream, rng, half, True)
    for _ in range(commands):
        kind = rng.randrange(8)
        if kind < 3:
            _transfer(stream, rng, (Engine.LOAD, Engine.WLOAD, Engine.STORE)[kind])
        elif kind == 3:
            tiles = rng.randint(1, 2)
            _load_weights(stream, rng.randrange(4 - tiles + 1), tiles)
        elif kind == 4:
            _conv(stream, rng, rng.randrange(2), rng.randrange(2) == 0)
        elif kind == 5:
            _post(stream, rng, rng.randrange(2))
        elif kind == 6:
            _post(stream, rng, None)
        else:
            _window(stream, rng)
    stream.check_tokens()
    return stream


def run_stream(stream: CommandStream) -> None:
    words = stream.words()
    memory = np.zeros(DRAM_BASE + 4 * DRAM_WORDS, np.uint8)
    memory[: 8 * len(words)] = np.array(words, "<u8").view(np.uint8)
    assert 8 * len(words) <= DRAM_BASE
    assert run_program(TINY, memory, 0, len(words)) == len(stream.commands)


def token_pairs(stream: CommandStream) -> list[tuple[int, int]]:
    """(giver, taker) of every token: the k-th signal meets the k-th wait."""
    pairs = []
    for a in Engine:
        for b in Engine:
            of_a = [i for i, c in enumerate(stream.commands) if c.engine == a and c.signal >> b & 1]
            of_b = [i for i, c in enumerate(stream.commands) if c.engine == b and c.wait >> a & 1]
            assert len(of_a) == len(of_b)
            pairs += zip(of_a, of_b)
    return pairs


@pytest.mark.parametrize("seed", range(40))
def test_derived_tokens_leave_no_race(seed):
    run_stream(random_stream(seed))


@pytest.mark.parametrize("seed", range(4))
def test_every_derived_token_is_needed(seed):
    """Without any one of them, the command-level simulator finds a race."""
    for n in range(len(token_pairs(random_stream(seed)))):
        stream = random_stream(seed)
        giver, taker = token_pairs(stream)[n]
        a, b = stream.commands[giver], stream.commands[taker]
        a.signal &= ~(1 << b.engine)
        b.wait &= ~(1 << a.engine)
        with pytest.raises(Race):
            run_stream(stream)


def test_misspelt_fields_are_refused():
    with pytest.raises(TypeError, match=r"^CONV has no field strid_x$"):
        CommandFields(Opcode.CONV)(src=1, strid_x=2)
    with pytest.raises(TypeError, match=r"^STORE has no field signal, target$"):
        CommandFields(Opcode.STORE)(target=0, signal=1)


def test_engines_far_ahead_are_held_back():
    """More producers in a row than a token counter counts, none of which needs the consumer."""
    stream = CommandStream(4)
    for i in range(1000):
        word = run(StreamMemory.SCRATCHPAD, i, 1)
        stream.emit(Opcode.LOAD, {}, [], [word], stage=0)
        stream.emit(Opcode.STORE, {}, [word], [], stage=0)
    stream.check_tokens()
    held = [c for c in stream.commands if c.engine == Engine.LOAD and c.wait >> Engine.STORE & 1]
    assert 0 < len(held) < 40


def test_token_overflow_is_found():
    """All producers before the first consumer: nothing can hold them back any more."""
    limit = (1 << TOKEN_BITS) - 1
    for count in (limit, limit + 1):
        stream = CommandStream(4)
        for i in range(count):
            stream.emit(Opcode.LOAD, {}, [], [run(StreamMemory.SCRATCHPAD, i, 1)], stage=0)
        for i in range(count):
            stream.emit(Opcode.STORE, {}, [run(StreamMemory.SCRATCHPAD, i, 1)], [], stage=0)
        if count == limit:
            stream.check_tokens()
        else:
            with pytest.raises(TokenError, match=r"256 tokens from LOAD to STORE .* holds 255"):
                stream.check_tokens()


def _one_layer(channels: int, outputs: int, columns: int = 1, batch: int = 1):
    b = GraphBuilder(np.random.default_rng(0))
    x = b.input((batch, channels, 1, columns))
    b.conv(x, outputs, kernel=(1, 1), strides=(1, 1), pads=NO_PADS, dilations=(1, 1))
    return b


@pytest.mark.parametrize(
    ("config", "builder"),
    [
        (Config(), lambda: _one_layer(16, 5000)),
        (Config(), lambda: _one_layer(32, 4500)),
        (Config(), lambda: _one_layer(16, 16, batch=300)),
        (Config.sized(4, 4), lambda: _one_layer(4, 1100, columns=3)),
    ],
)
def test_layers_of_hundreds_of_small_pieces(config, builder):
    """Weights, outputs or images that come in more pieces than a token counter counts."""
    b = builder()
    _check(config, b.graph([b.ops[-1].output]), b)


def test_pool_of_hundreds_of_blocks():
    b = GraphBuilder(np.random.default_rng(0))
    b.pool(b.input((1, 5000, 2, 2)), "max", (2, 2), (2, 2), NO_PADS)
    _check(Config(), b.graph(["t0"]), b)


def _check(config: Config, graph, builder: GraphBuilder, *, dump: bool = False) -> None:
    inputs = {p.tensor: builder.values[p.tensor] for p in graph.inputs}
    with open_device("commands", config) as device:
        check_on(device, config, graph, inputs, builder.values, dump=dump)


# Spans, buffers, pieces ---------------------------------------------------------------------------


@given(
    st.tuples(*[st.integers(1, 5)] * 3), st.tuples(st.integers(0, 40), st.integers(0, 9)),
    st.integers(0, 20),
)  # fmt: skip
def test_runs_of_spans(counts, steps, start):
    runs = Span(StreamMemory.DRAM, start, counts, steps).runs()
    got = [word for first, end in runs for word in range(first, end)]
    expected = [
        start + i * steps[0] + j * steps[1] + k
        for i in range(counts[0])
        for j in range(counts[1])
        for k in range(counts[2])
    ]
    assert sorted(set(got)) == sorted(set(expected))


BUFFERS = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 12), st.integers(0, 6)), max_size=24
)


@settings(max_examples=200)
@given(BUFFERS)
def test_packed_buffers_do_not_overlap(drawn):
    buffers = [Buffer((i,), words, at, at + n) for i, (words, at, n) in enumerate(drawn)]
    addresses, top = pack(buffers)
    assert addresses.keys() == {b.key for b in buffers}
    assert top == max((addresses[b.key] + b.words for b in buffers), default=0)
    for i, a in enumerate(buffers):
        for b in buffers[:i]:
            together = a.first <= b.last and b.first <= a.last
            at_a, at_b = addresses[a.key], addresses[b.key]
            assert not together or at_a + a.words <= at_b or at_b + b.words <= at_a
    alive = [sum(b.words for b in buffers if b.first <= t <= b.last) for t in range(20)]
    assert words_in_use(buffers, 20).tolist() == alive
    assert max(alive) <= top <= sum(b.words for b in buffers)
    assert pack(buffers, room=top) == (addresses, top)
    assert top == 0 or pack(buffers, room=top - 1)[1] >= top


@given(st.integers(1, 300), st.integers(1, 70))
def test_cuts_cover_in_order_and_evenly(size, step):
    parts = cuts(size, step)
    assert [i for at, n in parts for i in range(at, at + n)] == list(range(size))
    lengths = [n for _, n in parts]
    assert max(lengths) <= step and max(lengths) - min(lengths) <= 1


@given(st.integers(1, 20), st.integers(1, 7), st.integers(1, 9), st.integers(4, 200))
def test_pieces_cover_the_reduction_in_order(blocks, kh, kw, limit):
    rows = 4
    at = 0
    for p in pieces(blocks, (kh, kw), rows, limit):
        assert p.offset(kh, kw, rows) == at and 0 < p.words(rows) <= limit
        # A piece is a box of taps that lies together.
        assert p.kernel_w == kw or p.blocks == p.kernel_h == 1
        assert p.kernel_h == kh or p.blocks == 1
        at += p.words(rows)
    assert at == blocks * kh * kw * rows


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 16), st.integers(0, 16)), max_size=80))
def test_weight_ring_holds_what_it_says(requests):
    """Against a memory that remembers what was written where; pieces come alone or in pairs."""
    ring = WeightRing(32)
    memory: list[tuple[int, int] | None] = [None] * 32
    for name, words, more in requests:
        key = (name, words)
        at = ring.find(key)
        if at is None:
            placed = [(key, words)]
            if more and ring.find((name + 10, more)) is None:
                placed.append(((name + 10, more), more))
            at = ring.place(placed)
            assert 0 <= at <= 32 - sum(n for _, n in placed)
            start = at
            for each, n in placed:
                memory[start : start + n] = [each] * n
                start += n
        assert memory[at : at + words] == [key] * words
    for key in {key for key in memory if key is not None}:
        at = ring.find(key)
        if at is not None:
            assert memory[at : at + key[1]] == [key] * key[1]
        elif memory.count(key) == key[1]:
            # It is whole, so nothing has been loaded in its place.
            pytest.fail(f"{key} is in the buffer and not found")


# Whole graphs -------------------------------------------------------------------------------------


def _small(rows: int, cols: int, words: int, tiles: int, acc: int, **fields) -> Config:
    return Config(
        rows=rows,
        cols=cols,
        scratchpad_bytes=rows * words,
        weight_bytes=rows * cols * tiles,
        accumulator_bytes=8 * cols * acc,
        **fields,
    )


CONFIGS = [
    _small(16, 16, 256, 2, 16),
    _small(16, 16, 512, 4, 64),
    _small(4, 4, 128, 3, 16),
    _small(8, 12, 256, 5, 20),
    _small(12, 20, 512, 8, 64),
    _small(16, 8, 2048, 8, 128, window=False),
    Config(),
    Config.sized(6, 4, scratchpad_bytes=6 * 1024),
]
"""Mostly memories so small that tensors are spilled, reductions split, buffers single."""

CHUNK = 20


def _graphs_on_commands(first: int, work: int) -> None:
    done = 0
    for seed in range(first, first + CHUNK):
        config = CONFIGS[seed % len(CONFIGS)]
        graph, inputs, expected = random_graph(seed, window=config.window, work=work)
        with open_device("commands", config) as device:
            try:
                check_on(device, config, graph, inputs, expected, dump=seed % 3 == 0)
            except ModelError as e:
                assert "scratchpad" in str(e), e
            except Exception as e:
                e.add_note(f"graph {seed}, configuration {seed % len(CONFIGS)}")
                raise
            else:
                done += 1
    assert done > CHUNK // 2


@pytest.mark.parametrize("first", fewer_unless_long(range(0, 15 * CHUNK, CHUNK), fast=6))
def test_random_graphs(first):
    _graphs_on_commands(first, 80_000)


@pytest.mark.parametrize("first", range(1000, 1000 + 3 * CHUNK, CHUNK))
def test_random_schedules(first):
    """Whatever the schedule, the result is the same."""
    chains = 0
    for seed in range(first, first + CHUNK):
        config = (Config(), _small(16, 8, 2048, 8, 128), _small(4, 4, 4096, 4, 64))[seed % 3]
        graph, inputs, expected = random_graph(seed, ops=12, size=40, work=200_000)
        rng = np.random.default_rng(seed)
        program, schedule = compile_by_chance(rng, graph, config, dump=seed % 2 == 0)
        chains += len(schedule.chains)
        with open_device("commands", config) as device:
            check_program(device, program, inputs, expected)
    assert chains > CHUNK


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, 50 * CHUNK, CHUNK))
def test_larger_random_graphs(first):
    _graphs_on_commands(first, 1_000_000)


def test_single_buffers_are_not_prefetched():
    """Every region's input fills the only buffer, which later output groups still read."""
    config = _small(4, 4, 128, 3, 16)
    b = GraphBuilder(np.random.default_rng(5))
    x = b.input((1, 16, 3, 13))
    b.conv(x, 12, kernel=(5, 5), strides=(1, 1), pads=(2, 2, 2, 2), dilations=(1, 1))
    graph = b.graph(["t0"])
    stages = lower(graph, config).stages
    plan = Planner(graph, stages, config, {"t0"}).plan().stages[0]
    assert plan.buffers[0][1] == 1 and len(plan.regions) > 1 and stages[0].groups > 1
    _check(config, graph, b)


def _commands(graph, **match: int) -> list[Mapping[str, int]]:
    """The commands of the compiled graph that have these values."""
    program = compile_graph(graph, Config())
    return [c for c in program.decoded() if all(c[k] == v for k, v in match.items())]


@pytest.mark.parametrize(("columns", "loads"), [(64, [16, 16, 32, 64, 128]), (1, [64] * 4)])
def test_weights_of_slow_tiles_are_loaded_together(columns, loads):
    """Four column blocks of 64 words: more and more at once where the bus is faster than the
    array."""
    b = _one_layer(64, 64, columns)
    graph = b.graph(["t0"])
    weights = _commands(graph, opcode=Opcode.LOAD, target=LoadTarget.WEIGHTS)
    assert [c["count0"] for c in weights] == loads
    _check(Config(), graph, b)


def test_a_stage_asks_for_weights_before_parameters():
    first = _commands(_one_layer(64, 64).graph(["t0"]), engine=Engine.WLOAD)[0]
    assert first["target"] == LoadTarget.WEIGHTS


@pytest.mark.parametrize(("columns", "stored"), [(1, [8, 2]), (2, [8, 8, 4]), (9, [9] * 10)])
def test_small_groups_are_stored_together(columns, stored):
    b = _one_layer(16, 160, columns)
    graph = b.graph(["t0"])
    assert [c["count0"] for c in _commands(graph, opcode=Opcode.STORE)] == stored
    _check(Config(), graph, b)


def test_blocks_of_an_average_pool_share_parameters():
    b = GraphBuilder(np.random.default_rng(0))
    b.pool(b.input((1, 40, 3, 3)), "average", (3, 3), (1, 1), NO_PADS)
    graph = b.graph(["t0"])
    assert [c["count0"] for c in _commands(graph, engine=Engine.WLOAD)] == [8]
    windows = _commands(graph, opcode=Opcode.WINDOW)
    assert len(windows) == 3 and len({c["params"] for c in windows}) == 1
    _check(Config(), graph, b)


@pytest.mark.parametrize("config", [_small(16, 16, 256, 2, 16), Config.sized(64, 64)])
def test_kernel_rows_larger_than_the_weight_buffer(config):
    b = GraphBuilder(np.random.default_rng(6))
    x = b.input((1, 17, 2, 80))
    b.conv(x, 20, kernel=(2, 31), strides=(1, 1), pads=(1, 3, 0, 9), dilations=(1, 2))
    _check(config, b.graph(["t0"]), b)


# What a run says ----------------------------------------------------------------------------------


def test_writer_of_names_the_last_command_that_made_an_element():
    """Spoil what one command made: the elements of its own layer that are wrong then are its."""
    config = _small(8, 12, 256, 5, 20)
    graph, inputs, expected = random_graph(3, work=300_000)
    program = compile_graph(graph, config, dump=True)
    memory = _image(program, inputs)
    makers: list[int] = []

    def note(index, fields, memories):
        # An im2col is no layer's result.
        if fields["opcode"] in (Opcode.POST, Opcode.WINDOW) and fields["op"] is not WindowOp.IM2COL:
            makers.append(index)

    run_program(config, memory, 0, program.command_words, on_command=note)
    rng = random.Random(1)
    hits = 0
    for victim in rng.sample(makers, 12):
        memory = _image(program, inputs)
        seen: dict[str, np.ndarray] = {}

        def spoil(index, fields, memories, victim=victim, seen=seen):
            """Flip every bit of the bytes that the command changed."""
            if index == victim - 1:
                seen["before"] = memories.scratchpad.copy()
            elif index == victim:
                changed = memories.scratchpad != seen["before"]
                memories.scratchpad[changed] ^= -1

        run_program(config, memory, 0, program.command_words, on_command=spoil)
        for name in {layer.output for layer in program.layers}:
            place = program.tensors[name]
            got = place.unpack(memory[place.offset : place.offset + place.bytes].tobytes(), config)
            for element in np.argwhere(got != expected[name])[:3]:
                at = tuple(map(int, element))
                writer = writer_of(program, name, at)
                assert writer is not None
                if program.command_layers[writer] == program.command_layers[victim]:
                    assert writer == victim
                    hits += 1
    assert hits > 5


def _image(program: Program, inputs) -> np.ndarray:
    memory = np.zeros(program.memory_bytes, np.uint8)
    memory[: len(program.image)] = np.frombuffer(program.image, np.uint8)
    for port in program.inputs:
        place = program.tensors[port.tensor]
        data = np.frombuffer(place.pack(inputs[port.tensor], program.config), np.uint8)
        memory[place.offset : place.offset + len(data)] = data
    return memory


def test_compare_counts_and_names_the_first_difference():
    graph, inputs, expected = random_graph(4)
    program = compile_graph(graph, Config(), dump=True)
    with open_device("commands", Config()) as device:
        driver = Driver(device)
        load(driver, program)
        result = execute(driver, program, inputs, trace=False)
    assert compare(program, result.tensors, expected) == (0, None)
    layer = program.layers[1]
    wrong = {**expected, layer.output: expected[layer.output].copy()}
    flat = wrong[layer.output].reshape(-1)
    flat[-1] ^= 1
    flat[flat.size // 2] ^= 1
    count, first = compare(program, result.tensors, wrong)
    assert count == len({flat.size // 2, flat.size - 1}) and first is not None
    at = np.unravel_index(flat.size // 2, expected[layer.output].shape)
    assert (first.layer, first.tensor, first.element) == (layer.name, layer.output, tuple(at))
    assert first.command is not None and program.command_layers[first.command] == 1


# The program file ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program() -> Program:
    return compile_graph(random_graph(2)[0], Config.sized(6, 4))


def test_program_file_round_trip(program, tmp_path):
    program.save(tmp_path / "p")
    loaded = Program.load(tmp_path / "p")
    assert loaded == program
    loaded.save(tmp_path / "q")
    assert (tmp_path / "p").read_bytes() == (tmp_path / "q").read_bytes()


def test_damaged_program_files_are_refused(program, tmp_path):
    path = tmp_path / "p"
    program.save(path)
    data = path.read_bytes()
    length = struct.unpack_from("<I", data, 12)[0]
    rng = random.Random(9)
    # Every byte of the head, some of the rest, bytes missing at the end, bytes too many.
    places = [*range(48), *(rng.randrange(48, len(data)) for _ in range(30))]
    damaged = [
        data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1 :] for i in places
    ]
    damaged += [data[:n] for n in (0, 7, 20, 47, 48, 48 + length, len(data) - 1)] + [data + b"\0"]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ProgramError, match=r"^program .*"):
            Program.load(path)
    with pytest.raises(ProgramError, match="No such file"):
        Program.load(tmp_path / "absent")
    with pytest.raises(ProgramError, match="directory"):
        Program.load(tmp_path)


def test_a_program_with_a_token_less_is_refused(program):
    """The command-level simulator as a device finds it, too."""
    words = program.commands()
    waits = [i for i, w in enumerate(words[:1]) if w >> 8 & 0xFF]
    assert not waits, "the first command has nothing to wait for"
    image = bytearray(program.image)
    image[1] |= 1 << Engine.POST
    with open_device("commands", program.config) as device:
        driver = Driver(device)
        driver.load(
            bytes(image),
            command_offset=0,
            command_words=program.command_words,
            memory_bytes=program.memory_bytes,
        )
        with pytest.raises(CommandError, match=r"^command 0 "):
            driver.run()

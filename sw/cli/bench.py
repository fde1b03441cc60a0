"""Performance of published networks, measured on RTL and predicted by the cycle model.

systole bench [--long] [NETWORK ...]

Builds the networks in code, compiles them, runs each once in Verilator, compares its outputs with
the golden model and writes ``docs/performance.md`` and its plots; then the same networks on other
configurations, the smallest measured too. With networks named, only those are measured and the
tables go to standard output. Exit status: 0 done, 1 an output differs, 2 bad input (one line on
stderr).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer

from systole.isa import Config
from systole.sw.cli.common import MISMATCH, check_document, one_line_errors
from systole.sw.compiler import READ_LATENCY, Compiler, Optimise
from systole.sw.files import check_several, write_atomically
from systole.sw.frontend.inputs import InputError
from systole.sw.frontend.load import load as load_model
from systole.sw.golden import model as golden
from systole.sw.ir.graph import Conv, ConvTranspose, Graph
from systole.sw.report import plots
from systole.sw.report.layers import layers
from systole.sw.report.results import Measurement
from systole.sw.runtime.driver import Driver
from systole.sw.runtime.execute import compare, execute, load, memory_needed
from systole.sw.runtime.program import Program
from systole.sw.session.backends import open_device
from systole.sw.simulate.cycles import busy, predict_layers
from systole.sw.zoo import NETWORKS, build

OUTPUT = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
WORST = 4
"""Layers shown per network."""
LONG = ("resnet50", "yolov3")
"""Measured with ``--long`` only: minutes of simulation."""
TINY = ("resnet8", "dscnn-kws", "mobilenetv1-0.25-vww", "autoencoder-ad")
"""MLPerf Tiny: with the best schedule, and measured on the other configurations too."""
SHORT = (
    "gemm",
    *TINY,
    "resnet18",
    "mobilenetv1",
    "mobilenetv2",
    "squeezenet",
    "yolov3-tiny",
    "mobilenetv3-small",
    "unet-small",
)
VARIANTS = {
    "8x8": (Config.sized(8, 8), READ_LATENCY),
    "32x32": (Config.sized(32, 32), READ_LATENCY),
    "16x16, 64-bit bus": (Config(axi_data_bits=64), READ_LATENCY),
    "16x16, latency 256": (Config(), 256),
}
"""Other configurations and read latencies."""
EDGE = Config(
    rows=64, cols=64, scratchpad_bytes=4 << 20, weight_bytes=3 << 20, accumulator_bytes=1 << 20
)
"""A large array with 8 MiB on-chip, for yolov3."""
EDGE_CLOCKS = ((933, 128), (600, 256))
"""MHz, and the AXI data bits that make one beat a cycle about 16 GB/s."""
FRAMES = 25
"""Frames per second that detection in video needs."""
EDGE_SIZES = (416, 608, 1440)


def load_network(name: str, **parameters: int) -> Graph:
    """A network of the zoo as a graph."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.onnx"
        onnx.save(build(name, **parameters), path)
        return load_model(path)


def published(name: str) -> Graph:
    """A network in the size that the pages have."""
    return load_network(name, **({"m": 1024, "k": 1024, "n": 1024} if name == "gemm" else {}))


def minimum_traffic(graph: Graph) -> int:
    """Bytes that must cross the memory bus: every weight and constant once, the inputs, the
    outputs."""
    weights = sum(op.weights.size for op in graph.ops if isinstance(op, Conv | ConvTranspose))
    weights += sum(array.size for array in graph.constants.values())
    ports = [*graph.inputs, *graph.outputs]
    return weights + sum(int(np.prod(graph.tensors[p.tensor].shape)) for p in ports)


def predicted(
    name: str,
    graph: Graph,
    config: Config,
    optimise: Optimise = "fast",
    latency: int = READ_LATENCY,
) -> Measurement:
    """What the cycle model predicts of a network."""
    compiler = Compiler(graph, config)
    program = compiler.program(compiler.search(optimise, latency))
    prediction = predict_layers(program, latency)
    return Measurement(name, program, optimise, minimum_traffic(graph), prediction)


def measured(
    name: str,
    graph: Graph,
    config: Config,
    optimise: Optimise = "fast",
    latency: int = READ_LATENCY,
) -> Measurement:
    """What a network takes on the RTL, on seeded random inputs, compared with the golden model."""
    from systole.sim.device import MemoryModel

    expected = predicted(name, graph, config, optimise, latency)
    program = expected.program
    random = np.random.default_rng(0)
    inputs = {
        p.tensor: random.integers(-128, 128, graph.tensors[p.tensor].shape).astype(np.int8)
        for p in graph.inputs
    }
    memory_bytes = -(-memory_needed(program) // 4096) * 4096
    memory = MemoryModel(read_latency=latency)
    with open_device("verilator", config, memory_bytes=memory_bytes, memory=memory) as device:
        driver = Driver(device)
        load(driver, program)
        run = execute(driver, program, inputs, trace=True)
    mismatches, first = compare(program, run.tensors, golden.run(graph, inputs))
    if first is not None:
        print(f"{name}: {mismatches} elements differ; {first}", file=sys.stderr)
    return replace(
        expected,
        cycles=run.cycles,
        read_bytes=run.counters["READ_BEATS"] * config.beat_bytes,
        write_bytes=run.counters["WRITE_BEATS"] * config.beat_bytes,
        rows=tuple(layers(program, run.events, run.cycles)),
        rate=run.cycles / run.seconds,
        mismatches=mismatches,
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], texts: int = 1) -> str:
    """A Markdown table; columns beyond the first ``texts`` are numbers."""
    head = list(head)
    rule = ["---" if i < texts else "--:" for i in range(len(head))]
    lines = [head, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _error(r: Measurement) -> str:
    """The prediction's difference from the measured cycles, in percent."""
    return "-" if r.cycles is None else f"{100 * (r.predicted.cycles / r.cycles - 1):+.2f} %"


def main_table(results: list[Measurement]) -> str:
    """Cycles, utilisation and traffic of each network."""
    rows = []
    for r in results:
        _, read, written = r.best
        rows.append(
            (
                r.name,
                r.optimise,
                f"{r.macs:,}",
                "not run" if r.cycles is None else f"{r.cycles:,}",
                f"{r.predicted.cycles:,}",
                _error(r),
                f"{100 * r.utilisation:.1f} %",
                f"{read:,}",
                f"{written:,}",
                f"{r.minimum:,}",
                f"{(read + written) / r.minimum:.2f}",
            )
        )
    head = ("network", "schedule", "MACs", "cycles", "predicted", "difference", "utilisation")
    return _table((*head, "DRAM read", "DRAM written", "minimum", "ratio"), rows, texts=2)


def layer_table(result: Measurement) -> str:
    """The layers in which a network loses most cycles, and what they waited for."""
    size = result.program.config.rows * result.program.config.cols
    both = zip(result.rows, result.predicted.layers, strict=True)
    lossy = sorted(both, key=lambda b: b[0].macs / size - (b[0].cycles or 0))
    rows = []
    for row, expected in lossy[:WORST]:
        stalls = ", ".join(f"{k} {v:,}" for k, v in list(row.stalls.items())[:2])
        rows.append(
            (
                row.name,
                row.op,
                "x".join(map(str, row.shape)),
                stalls.replace("<", " for ") or "-",
                f"{row.cycles:,}",
                f"{expected.cycles:,}",
                f"{100 * (row.utilisation or 0):.1f} %",
                f"{(row.cycles or 0) - row.macs // size:,}",
            )
        )
    head = ("layer", "operator", "output", "waited", "cycles", "predicted", "utilisation")
    return _table((*head, "lost cycles"), rows, texts=4)


def variant_results(graphs: dict[str, Graph]) -> list[tuple[str, Measurement]]:
    """The networks on other configurations, the tiny ones measured. Without yolov3, which
    :func:`edge_table` is about."""
    out = []
    for name, graph in graphs.items():
        for title, (config, latency) in VARIANTS.items():
            if name != "yolov3":
                run = measured if name in TINY else predicted
                out.append((title, run(name, graph, config, latency=latency)))
    return out


def variant_table(variants: list[tuple[str, Measurement]]) -> str:
    """Cycles, utilisation and what is busiest."""
    rows = []
    for title, r in variants:
        unit, share = busiest(r.program, r.best[0])
        rows.append(
            (
                r.name,
                title,
                "not run" if r.cycles is None else f"{r.cycles:,}",
                f"{r.predicted.cycles:,}",
                _error(r),
                f"{100 * r.utilisation:.1f} %",
                f"{unit} {100 * share:.0f} %",
            )
        )
    head = ("network", "configuration", "cycles", "predicted", "difference", "utilisation")
    return _table((*head, "busiest"), rows, texts=2)


def busiest(program: Program, cycles: int) -> tuple[str, float]:
    """The unit that works for most cycles, and their share of ``cycles``."""
    unit, cycles_busy = max(busy(program).items(), key=lambda item: item[1])
    return unit, cycles_busy / cycles


def edge_table() -> str:
    """yolov3 on a 64x64 array, predicted."""
    rows = []
    for size in EDGE_SIZES:
        graph = load_network("yolov3", size=size)
        for mhz, bits in EDGE_CLOCKS:
            r = predicted("yolov3", graph, replace(EDGE, axi_data_bits=bits))
            cycles = r.predicted.cycles
            unit, share = busiest(r.program, cycles)
            frames = 1e6 * mhz / cycles
            rows.append(
                (
                    f"{size}x{size}",
                    f"{mhz} MHz, {bits}-bit AXI ({mhz * bits / 8000:.1f} GB/s)",
                    f"{cycles:,}",
                    f"{cycles / mhz / 1000:.1f}",
                    f"{r.macs / (EDGE.rows * EDGE.cols) / mhz / 1000:.1f}",
                    f"{frames:.1f}",
                    "yes" if frames >= FRAMES else "no",
                    f"{100 * r.utilisation:.1f} %",
                    f"{unit} {100 * share:.0f} %",
                )
            )
    times = ("cycles", "ms", "MACs alone, ms", "frames/s", f"{FRAMES} frames/s")
    return _table(("picture", "clock and memory", *times, "utilisation", "busiest"), rows, texts=2)


def document(results: list[Measurement], variants: list[tuple[str, Measurement]]) -> str:
    """``docs/performance.md``."""
    config = results[0].program.config
    sram = config.scratchpad_bytes + config.weight_bytes + config.accumulator_bytes
    ran = [r for r in results if r.cycles is not None]
    parts = [
        "# Performance\n",
        "Written by `python -m sw.bench` (`--long` measures all networks). Cycles are those of the "
        "RTL in Verilator, from start to done, and are reproducible to the cycle; every output was "
        "compared with the golden model, and the column *predicted* is the cycle model's "
        "(`sw/simulate/cycles`) for the same program.\n",
        f"Configuration: {config.rows}x{config.cols} processing elements, {sram // 1024} KiB of "
        f"on-chip memory (scratchpad {config.scratchpad_bytes // 1024}, weights "
        f"{config.weight_bytes // 1024}, accumulators {config.accumulator_bytes // 1024}). Memory "
        f"model: {config.axi_data_bits}-bit AXI, one beat a cycle in each direction, "
        f"{READ_LATENCY} cycles read latency. Networks: `sw/zoo`, batch 1, int8; gemm is "
        "1024x1024x1024. *schedule*: `--optimise` fast or best.\n",
        "Utilisation: useful MACs / (rows x cols x cycles), padding of maps counted as useful, as "
        "published figures do, and those of the window engine (depthwise), which has multipliers "
        "of its own beside the array: 100 % can be exceeded. DRAM bytes include commands, "
        "parameters and alignment; *minimum* is "
        "every weight, input and output element once, *ratio* the sum of both directions to it. "
        "Where it says *not run*, utilisation and bytes are predicted.\n",
        "## Networks\n",
        main_table(results),
        "![Utilisation, roofline, DRAM traffic and prediction of each network]"
        f"({plots.NETWORKS})\n",
        f"![Utilisation of every layer]({plots.LAYERS})\n",
        "## Where cycles are lost\n",
        f"Per network the {WORST} layers with the most lost cycles (cycles beyond MACs / processing"
        " elements). Layers overlap; a cycle counts for the layer that ends next. *waited*: cycles "
        "an engine's first command waited for a token of another engine, or for memory.\n",
    ]
    for r in ran:
        parts += [f"### {r.name}\n", layer_table(r)]
    parts += [
        "## Other configurations\n",
        "Otherwise as above, schedule fast. *busiest*: what has most to do, and the share of the "
        "cycles it is at work: near 100 % it bounds the network, well below that the order of the "
        "layers does (what one waits for, the other has not finished).\n",
        variant_table(variants),
        "## yolov3 on 64x64, predicted\n",
        "4,096 processing elements, 8 MiB on-chip (scratchpad 4 MiB, weights 3 MiB, accumulators 1 "
        f"MiB), {READ_LATENCY} cycles read latency, memory of about 16 GB/s: the AXI width whose "
        "one beat a cycle comes nearest. *MACs alone*: were every processing element at work in "
        "every cycle; where that is over 40 ms, no memory would bring 25 frames/s.\n",
        edge_table(),
        "## Simulation speed\n",
        "Depends on the machine and its load: not reproducible.\n",
        _table(("network", "simulated cycles/s"), [(r.name, f"{r.rate:,.0f}") for r in ran]),
    ]
    return "\n".join(parts)


def main(
    networks: Annotated[
        list[str] | None, typer.Argument(help="measure these and print, instead of all")
    ] = None,
    long: Annotated[bool, typer.Option(help="measure the largest networks too")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write")] = OUTPUT,
) -> None:
    """Measure networks on RTL and write docs/performance.md."""
    with one_line_errors():
        for name in networks or ():
            if name not in NETWORKS:
                raise InputError(f"no network {name!r}; there are {', '.join(NETWORKS)}")
        if not networks:
            check_document(output)
            check_several(output, 1 + len(plots.FILES))
        results, graphs = _measure_all(networks or (*SHORT, *LONG), long or bool(networks))
        if networks:
            print(main_table(results))
            for r in results:
                print(f"{r.name}\n\n{layer_table(r)}")
        else:
            variants = variant_results(graphs)
            text = document(results, variants)
            for name, svg in plots.draw(results).items():
                write_atomically(output.parent / name, svg)
            write_atomically(output, text.encode())
            results += [r for _, r in variants]
    if any(r.mismatches for r in results):
        raise typer.Exit(MISMATCH)


def _measure_all(networks: Iterable[str], long: bool) -> tuple[list[Measurement], dict[str, Graph]]:
    """Measure networks on the default configuration, the large ones only with ``long``; and the
    networks' graphs by name."""
    results, graphs = [], {}
    for name in networks:
        graphs[name] = graph = published(name)
        run = measured if long or name not in LONG else predicted
        results.append(r := run(name, graph, Config(), "best" if name in TINY else "fast"))
        print(f"{name}: {r.cycles} cycles, predicted {r.predicted.cycles}", file=sys.stderr)
    return results, graphs

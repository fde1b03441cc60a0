"""The functions of the public interface; :mod:`systole` offers them with the classes they use."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from systole.isa import Config, ConfigError
from systole.sw.compiler import READ_LATENCY, Optimise
from systole.sw.compiler.partition import (
    AcceleratorSegment,
    NodePlacement,
    Partition,
    partition,
    place,
)
from systole.sw.files import check_several
from systole.sw.frontend.inputs import InputError, check_inputs, random_inputs, read_inputs
from systole.sw.ir.graph import Graph
from systole.sw.progress import Progress, silent
from systole.sw.quantisation.pipeline import QuantisationOptions, quantise
from systole.sw.quantisation.prepare import input_shapes, input_types, prepare
from systole.sw.quantisation.report import QuantisationReport, input_ranges
from systole.sw.quantisation.samples import (
    ArraySamples,
    Chosen,
    Preprocessing,
    Samples,
    Shapes,
    Types,
    check_labels,
    preprocessed,
    read_samples,
)
from systole.sw.report.energy import DEFAULT as DEFAULT_ENERGY
from systole.sw.runtime.device import Device
from systole.sw.runtime.program import Program
from systole.sw.session import backends
from systole.sw.session.accuracy import Accuracy, measure
from systole.sw.session.report import RunResult, programs_of
from systole.sw.session.run import (
    SIMULATORS,
    ModelPrediction,
    RunOptions,
    predict_model,
    run_model,
)

ModelSource = str | os.PathLike | onnx.ModelProto
"""An ONNX model: its file, or the model itself."""
Arrays = Mapping[str, np.ndarray] | np.ndarray
"""Arrays by input name, or the array of a model with one input."""

CALIBRATION_SAMPLES = 200
"""Samples that a float model is calibrated with at most, spread evenly over those given."""
DEVICE_BYTES = 256 << 20
"""DRAM of an opened device; the machine provides it only where it is touched."""


class InputInfo(NamedTuple):
    """What a model takes under one input's name."""

    shape: tuple[int, ...]
    dtype: str
    """As numpy names it."""


@dataclass(frozen=True)
class CompiledModel:
    """A model compiled for one configuration: segments for the accelerator, each with its program,
    and for the host in turn. Made by :func:`compile`."""

    partition: Partition
    config: Config
    read_latency: int
    """Cycles, of the memory that it was scheduled for and is simulated with."""
    scratch: tempfile.TemporaryDirectory[str] | None = None
    """The folder of a model that was not given as a file; it lives as long as this object."""

    @property
    def name(self) -> str:
        """File name of the model."""
        return self.partition.path.name

    @property
    def inputs(self) -> dict[str, InputInfo]:
        """Shape and type of the model's inputs, by name."""
        graph = self.partition.inputs
        return {
            port.name: InputInfo(graph.tensors[port.tensor].onnx_shape, port.dtype)
            for port in graph.inputs
        }

    @property
    def placements(self) -> list[NodePlacement]:
        """Where each node of the model runs, in topological order."""
        return self.partition.placements

    @property
    def programs(self) -> list[Program]:
        """The accelerator's programs, in the order in which they run."""
        return programs_of(self.partition)

    def graphs_after(self, name: str) -> list[Graph]:
        """The graph of each accelerator segment after the loader's pass ``name``."""
        return [
            segment.after_passes[name]
            for segment in self.partition.segments
            if isinstance(segment, AcceleratorSegment)
        ]

    def save(self, path: str | os.PathLike) -> list[Path]:
        """Write the program file; of a model with several programs NAME.0.EXT, NAME.1.EXT and so
        on. Returns the files."""
        path = Path(path)
        files = [path]
        if len(self.programs) > 1:
            names = [f"{path.stem}.{i}{path.suffix}" for i in range(len(self.programs))]
            files = [path.with_name(name) for name in names]
        check_several(path, len(files))
        for file, program in zip(files, self.programs, strict=True):
            program.save(file)
        return files


class QuantizeResult(NamedTuple):
    """An int8 model in QDQ form, and what its quantisation cost."""

    model: onnx.ModelProto
    report: QuantisationReport


def compile(
    model: ModelSource,
    config: Config | None = None,
    *,
    dims: Mapping[str, int] | None = None,
    calibration: str | os.PathLike | Arrays | None = None,
    fallback: bool = True,
    optimise: Optimise = "fast",
    read_latency: int = READ_LATENCY,
    progress: Progress = silent,
) -> CompiledModel:
    """Compile an ONNX model for a configuration.

    Args:
        model: a quantised model (QDQ or QLinear form); with ``calibration`` a float one.
        config: the accelerator; the default is ``Config()``.
        dims: sizes of symbolic dimensions, by their name or as ``INPUT:AXIS``.
        calibration: sample inputs as for :func:`quantize`, which is applied first.
        fallback: whether the host, in onnxruntime, runs what the accelerator cannot.
        optimise: the search for a schedule: ``"fast"`` by estimate, ``"best"`` in minutes.
        read_latency: cycles that the memory takes to answer, for the search and for simulations.
        progress: called with a sentence about each step; the context it returns spans the step. If
            entering that gives a function, it is called with the share of the step that is done.

    Returns:
        A :class:`CompiledModel`, for :func:`run` and :func:`predict`.

    Raises:
        ModelError: the model is malformed, float without ``calibration``, or nothing of it runs on
            the accelerator; or, without ``fallback``, part of it does not.
        InputError: the calibration samples do not fit the model.

    >>> import systole
    >>> from systole.sw.zoo import digits
    >>> compiled = systole.compile(digits.MODEL, systole.Config.sized(8, 8))
    >>> compiled.inputs
    {'image': InputInfo(shape=(1, 1, 8, 8), dtype='float32')}
    >>> len(compiled.programs)
    1
    """
    config = config or Config()
    scratch = None
    if calibration is not None:
        with progress("quantising the model"):
            options = QuantisationOptions(dims=dims or {})
            int8, _ = quantize(model, calibration, options=options, measure=False)
        scratch, path, dims = *_saved(int8, _file_name(model)), None
    elif isinstance(model, onnx.ModelProto):
        scratch, path = _saved(model, _file_name(model))
    else:
        path = Path(model)
    plan = partition(
        path,
        config,
        dims=dims,
        fallback=fallback,
        optimise=optimise,
        read_latency=read_latency,
        progress=progress,
    )
    return CompiledModel(plan, config, read_latency, scratch)


def run(
    model: ModelSource | CompiledModel,
    inputs: str | os.PathLike | Arrays | None = None,
    *,
    config: Config | None = None,
    simulator: str | Device = "verilator",
    seed: int = 0,
    check_layers: bool = True,
    trace_file: str | os.PathLike | None = None,
    waves: str | os.PathLike | None = None,
    clock_mhz: float | None = None,
    energy_table: str = DEFAULT_ENERGY,
    preprocessing: Preprocessing | None = None,
    progress: Progress = silent,
) -> RunResult:
    """Run a model on a simulated accelerator and compare every layer with the golden model.

    Args:
        model: a model, which is compiled for ``config``, or a :class:`CompiledModel`.
        inputs: arrays by input name in the model's own shapes and types (one array will do for a
            model of one input; its first axis may be missing if it is 1), or a file of them
            (``.npz``, ``.npy``) or of a picture (``.png``, ``.jpg``). None: random, from ``seed``.
        config: the accelerator to compile for; the default is ``Config()``.
        simulator: ``"verilator"`` or ``"icarus"`` (the RTL), ``"commands"`` (command-level, no
            cycles), ``"model"`` (golden model, predicted cycles), ``"golden"`` (golden model), or
            an open :class:`Device` of the same configuration.
        seed: seeds the random inputs.
        check_layers: whether a second run stores and compares every layer, not only outputs.
        trace_file: where to write a timeline for ui.perfetto.dev; RTL only.
        waves: where to write waveforms (VCD); RTL only.
        clock_mhz: the clock that the report's times are for. None: the one that synthesis reached
            for the configuration, or an assumed one.
        energy_table: what operations cost: ``"45nm"``, ``"7nm"`` or a TOML file like theirs.
        preprocessing: what turns given ``inputs`` (pictures within 0..1) into the model's.
        progress: as for :func:`compile`.

    Returns:
        A :class:`RunResult`: the :class:`RunReport` with cycles and comparisons, and the outputs by
        name in the model's own shapes and types.

    Raises:
        ModelError: as for :func:`compile`, or onnxruntime fails on these inputs.
        InputError: the inputs do not fit the model, or there is no such simulator.
        EnergyError: the table of costs cannot be used.
        ConfigError: the model was compiled for another configuration than ``config``.
        DeviceError: the simulator cannot be had, or the device is of another configuration, faults
            or hangs.

    >>> import numpy as np, systole
    >>> from systole.sw.zoo import digits
    >>> picture = np.load(digits.TEST_SET)["x"][0]
    >>> report, outputs = systole.run(digits.MODEL, picture, simulator="commands")
    >>> report.golden_mismatches, report.ort["equal"] == report.ort["elements"]
    (0, True)
    >>> {name: (array.shape, array.dtype) for name, array in outputs.items()}
    {'logits': ((1, 10), dtype('float32'))}
    """
    compiled = _compiled(model, config, progress)
    device = None if isinstance(simulator, str) else simulator
    name = simulator if isinstance(simulator, str) else type(simulator).__name__
    if device is None and name not in SIMULATORS:
        raise InputError(f"simulator {name}: must be one of {', '.join(SIMULATORS)}")
    options = RunOptions(
        config=compiled.config,
        simulator=name,
        read_latency=compiled.read_latency,
        trace_file=None if trace_file is None else Path(trace_file),
        waves=None if waves is None else Path(waves),
        check_layers=check_layers,
        device=device,
        clock_mhz=clock_mhz,
        energy_table=energy_table,
    )
    arrays = _inputs(compiled, inputs, seed)
    if inputs is not None:
        arrays = preprocessed(arrays, preprocessing or Preprocessing())
    return run_model(compiled.partition, arrays, options, progress)


def accuracy(
    model: ModelSource | CompiledModel,
    samples: str | os.PathLike | Arrays,
    labels: np.ndarray | None = None,
    *,
    simulator: str = "golden",
    float_model: str | os.PathLike | None = None,
    preprocessing: Preprocessing | None = None,
    progress: Progress = silent,
) -> Accuracy:
    """Measure the accuracy of a classifier on labelled samples.

    Args:
        model: a model, or a :class:`CompiledModel`.
        samples: as the calibration samples of :func:`quantize`.
        labels: a class number per sample; the default is array ``y`` of an ``.npz`` file.
        simulator: as for :func:`run`; with ``"model"`` the golden model computes.
        float_model: the file of the float model, to compare with.
        preprocessing: what turns stored values into the model's inputs.
        progress: as for :func:`compile`.

    Returns:
        An :class:`Accuracy`: of the accelerator, onnxruntime's integer kernels, and the float
        model.

    Raises:
        ModelError: as for :func:`compile`.
        InputError: samples or labels do not fit, or there are no labels.
        DeviceError: the simulator cannot be had.

    >>> import numpy as np, systole
    >>> from systole.sw.zoo import digits
    >>> data = np.load(digits.TEST_SET)
    >>> result = systole.accuracy(digits.MODEL, data["x"][:40], data["y"][:40])
    >>> result.samples, result.accelerator > 0.9, result.same_class
    (40, True, 1.0)
    """
    if simulator not in SIMULATORS:
        raise InputError(f"simulator {simulator}: must be one of {', '.join(SIMULATORS)}")
    compiled = _compiled(model, None, progress)
    shapes = {name: info.shape for name, info in compiled.inputs.items()}
    types = {name: np.dtype(info.dtype) for name, info in compiled.inputs.items()}
    everything, truth = _samples(samples, shapes, preprocessing or Preprocessing(), types)
    truth = truth if labels is None else labels
    if truth is None:
        raise InputError("accuracy needs labels: array y of the .npz file, a class per sample")
    return measure(
        compiled.partition,
        everything,
        check_labels(truth, len(everything)),
        options=RunOptions(compiled.config, simulator, compiled.read_latency),
        float_model=None if float_model is None else Path(float_model),
        progress=progress,
    )


def predict(
    model: ModelSource | CompiledModel,
    *,
    config: Config | None = None,
    energy_table: str = DEFAULT_ENERGY,
    progress: Progress = silent,
) -> ModelPrediction:
    """Predict the cycles, the DRAM traffic and the energy of a model without running it.

    Args:
        model: a model, which is compiled for ``config``, or a :class:`CompiledModel`.
        config: the accelerator to compile for; the default is ``Config()``.
        energy_table: as for :func:`run`.
        progress: as for :func:`compile`.

    Returns:
        A :class:`ModelPrediction`: cycles (within 1 % of the RTL on whole networks), bytes, energy
        (by a model that knows memories, arithmetic and DRAM) and one row per layer.

    Raises:
        ModelError: as for :func:`compile`.
        EnergyError: the table of costs cannot be used.
        ConfigError: the model was compiled for another configuration than ``config``.

    >>> import systole
    >>> from systole.sw.zoo import digits
    >>> small, large = (
    ...     systole.predict(digits.MODEL, config=systole.Config.sized(n, n)) for n in (8, 16)
    ... )
    >>> small.cycles > large.cycles > 0
    True
    >>> large.frames_per_second(clock_mhz=200) > 1000
    True
    """
    compiled = _compiled(model, config, progress)
    return predict_model(compiled.partition, compiled.read_latency, energy_table)


def check(model: ModelSource, *, dims: Mapping[str, int] | None = None) -> list[NodePlacement]:
    """List where each node of a model would run, and by which rule, without compiling it.

    Args:
        model: an ONNX model; of a float one the list says what could run once it is quantised.
        dims: sizes of symbolic dimensions, by their name or as ``INPUT:AXIS``.

    Returns:
        One :class:`NodePlacement` per node in topological order, with ``host`` and ``rule``.

    Raises:
        ModelError: the model is malformed.

    >>> import systole
    >>> from systole.sw.zoo import digits
    >>> placements = systole.check(digits.MODEL)
    >>> {p.op_type for p in placements if p.host}
    set()
    """
    with _as_file(model) as path:
        return place(path, dims)


def quantize(
    model: ModelSource,
    calibration: str | os.PathLike | Arrays,
    *,
    options: QuantisationOptions | None = None,
    preprocessing: Preprocessing | None = None,
    samples: int = CALIBRATION_SAMPLES,
    labels: np.ndarray | None = None,
    measure: bool = True,
    progress: Progress = silent,
) -> QuantizeResult:
    """Quantise a float32 model to int8 (QDQ form, weights per channel).

    Args:
        model: the float model, or a partly quantised one: what is quantised is kept.
        calibration: sample inputs: a folder of pictures, an ``.npz`` or ``.npy`` file, or arrays by
            input name (one array for a model of one input), samples along the first axis.
        options: how to quantise, and ``dims``: sizes of symbolic dimensions.
        preprocessing: what turns stored values into the model's inputs.
        samples: how many samples to calibrate with at most, evenly spread.
        labels: a class number per sample, to measure the accuracy; the default is array ``y`` of an
            ``.npz`` file.
        measure: whether to measure each layer's noise and the accuracy.
        progress: as for :func:`compile`.

    Returns:
        A :class:`QuantizeResult`: the int8 model, and the :class:`QuantisationReport`.

    Raises:
        ModelError: the model is malformed, has unbound dimensions, or nothing left to quantise.
        InputError: samples, labels or options do not fit.

    >>> import numpy as np, systole
    >>> from onnx import TensorProto, helper, numpy_helper
    >>> rng = np.random.default_rng(0)
    >>> info = helper.make_tensor_value_info
    >>> graph = helper.make_graph(
    ...     [helper.make_node("MatMul", ["x", "w"], ["y"])],
    ...     "product",
    ...     [info("x", TensorProto.FLOAT, [1, 8])],
    ...     [info("y", TensorProto.FLOAT, [1, 4])],
    ...     [numpy_helper.from_array(rng.normal(size=(8, 4)).astype(np.float32), "w")],
    ... )
    >>> float_model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    >>> x = rng.normal(size=(50, 1, 8)).astype(np.float32)
    >>> int8, report = systole.quantize(float_model, {"x": x})
    >>> report.calibration_samples, report.layers[0].snr_db > 20
    (50, True)
    >>> systole.run(int8, x[0], simulator="commands").report.golden_mismatches
    0
    """
    options, preprocessing = options or QuantisationOptions(), preprocessing or Preprocessing()
    with _as_file(model) as path:
        with progress("preparing the model"):
            prepared = prepare(path, options.dims, preprocessing.size, options.exclude)
        float_bytes = path.stat().st_size
    shapes, types = input_shapes(prepared), input_types(prepared)
    everything, truth = _samples(calibration, shapes, preprocessing, types)
    truth = truth if labels is None else labels
    if truth is not None:
        truth = check_labels(truth, len(everything))
    chosen = Chosen(everything, samples)
    with progress(f"quantising on {len(chosen)} samples"):
        prepared, quantised = quantise(prepared, chosen, options)
    report = QuantisationReport(_file_name(model), len(chosen), input_ranges(chosen))
    report.float_bytes, report.int8_bytes = float_bytes, quantised.ByteSize()
    if measure:
        with progress("measuring"):
            report.measure(prepared, quantised, everything, truth)
    return QuantizeResult(quantised, report)


def generate(config: Config, directory: str | os.PathLike) -> dict[str, Any]:
    """Generate an accelerator for a system on chip: SystemVerilog, and what tools need beside it.

    Args:
        config: the accelerator.
        directory: folder for the files that :mod:`systole.hw.generate` lists, made if it does not
            exist. They appear whole or not at all, replacing older ones.

    Returns:
        The manifest: ``top``, ``wrapper``, ``isa_version``, ``config_hash``, ``config``, ``ports``
        and ``files``.

    Raises:
        GenerateError: Yosys fails.
        OSError: the folder cannot be written.

    >>> import pathlib, systole, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     manifest = systole.generate(systole.Config.sized(4, 4), folder)
    ...     (pathlib.Path(folder) / "rtl" / "systole_axi.sv").exists()
    True
    >>> manifest["wrapper"], manifest["config"]["rows"]
    ('systole_axi', 4)
    """
    from systole.hw.generate import generate as write

    return write(config, Path(directory))


def open_device(
    simulator: str = "verilator", config: Config | None = None, *, memory_bytes: int = DEVICE_BYTES
) -> Device:
    """Open a simulated accelerator, for several runs or for a driver of one's own.

    Args:
        simulator: ``"verilator"``, ``"icarus"`` (the RTL, built and cached on first use) or
            ``"commands"`` (command-level, no cycles).
        config: the accelerator; the default is ``Config()``.
        memory_bytes: size of its DRAM.

    Returns:
        A :class:`Device`: a context manager that closes the simulator at its end.

    Raises:
        InputError: there is no such simulator.
        DeviceError: the simulator cannot be had; the message says what to install.

    >>> import systole
    >>> from systole.sw.zoo import digits
    >>> compiled = systole.compile(digits.MODEL)
    >>> with systole.open_device("commands") as device:
    ...     runs = [systole.run(compiled, simulator=device, seed=seed) for seed in range(3)]
    >>> [run.report.golden_mismatches for run in runs]
    [0, 0, 0]
    """
    if simulator not in backends.KINDS:
        raise InputError(f"simulator {simulator}: must be one of {', '.join(backends.KINDS)}")
    return backends.open_device(simulator, config or Config(), memory_bytes=memory_bytes)


# Private -----------------------------------------------------------------------------------------


def _compiled(
    model: ModelSource | CompiledModel, config: Config | None, progress: Progress
) -> CompiledModel:
    if not isinstance(model, CompiledModel):
        return compile(model, config, progress=progress)
    if config not in (None, model.config):
        raise ConfigError(f"model {model.name} was compiled for another configuration")
    return model


def _inputs(
    compiled: CompiledModel, inputs: str | os.PathLike | Arrays | None, seed: int
) -> dict[str, np.ndarray]:
    """The model's inputs by name, as it takes them. Raises :class:`InputError`."""
    graph = compiled.partition.inputs
    if inputs is None:
        return random_inputs(graph, seed)
    if isinstance(inputs, str | os.PathLike):
        return read_inputs(Path(inputs), graph)
    return check_inputs(_by_name(inputs, list(compiled.inputs)), graph, "arrays")


def _samples(
    source: str | os.PathLike | Arrays, shapes: Shapes, preprocessing: Preprocessing, types: Types
) -> tuple[Samples, np.ndarray | None]:
    """Samples and, from a file, their labels."""
    if isinstance(source, str | os.PathLike):
        return read_samples(Path(source), shapes, preprocessing, types)
    arrays = _by_name(source, list(shapes))
    return ArraySamples(arrays, shapes, preprocessing, types), None


def _by_name(arrays: Arrays, names: list[str]) -> Mapping[str, np.ndarray]:
    """Arrays by input name, given a mapping or the array of the only input."""
    if isinstance(arrays, Mapping):
        return arrays
    if len(names) != 1:
        raise InputError(f"the model has several inputs: give arrays for {', '.join(names)}")
    return {names[0]: np.asarray(arrays)}


def _file_name(model: ModelSource) -> str:
    if isinstance(model, onnx.ModelProto):
        return f"{model.graph.name or 'model'}.onnx".replace("/", "_")
    return Path(model).name


def _saved(model: onnx.ModelProto, name: str) -> tuple[tempfile.TemporaryDirectory[str], Path]:
    """A model as a file in a folder of its own."""
    folder = tempfile.TemporaryDirectory(prefix="systole-model-")
    path = Path(folder.name) / name
    onnx.save(model, path)
    return folder, path


@contextmanager
def _as_file(model: ModelSource) -> Iterator[Path]:
    """The file of a model, a temporary one if it is not in a file."""
    if not isinstance(model, onnx.ModelProto):
        yield Path(model)
        return
    folder, path = _saved(model, _file_name(model))
    with folder:
        yield path

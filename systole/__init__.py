"""Systole: a generator of int8 inference accelerators, with its compiler, golden model and
simulators.

The public interface; all of it is documented at the names themselves:

* :class:`Config` describes an accelerator; :func:`generate` writes its SystemVerilog.
* :func:`check` lists what of an ONNX model the accelerator runs; :func:`quantize` makes a float
  model an int8 one.
* :func:`compile` compiles a model for a configuration; :func:`predict` says how many cycles it
  takes; :func:`run` runs it and compares every layer with the golden model; :func:`accuracy`
  classifies labelled samples.
* :func:`open_device` opens a simulated :class:`Device` that several runs share.

Bad input raises :class:`ConfigError`, :class:`ModelError`, :class:`InputError`,
:class:`EnergyError`, :class:`DeviceError` or :class:`GenerateError`; the message is one sentence.

>>> import systole
>>> from systole.sw.zoo import digits
>>> report, outputs = systole.run(digits.MODEL, simulator="commands")
>>> report.golden_mismatches
0
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from systole.api import (
        CompiledModel,
        QuantizeResult,
        accuracy,
        check,
        compile,
        generate,
        open_device,
        predict,
        quantize,
        run,
    )
    from systole.hw.verilog import GenerateError
    from systole.isa import Config, ConfigError
    from systole.sw.compiler.placement import NodePlacement
    from systole.sw.frontend.inputs import InputError
    from systole.sw.ir.graph import ModelError
    from systole.sw.quantisation.pipeline import QuantisationOptions
    from systole.sw.quantisation.report import QuantisationReport
    from systole.sw.quantisation.samples import Preprocessing
    from systole.sw.report.energy import EnergyError
    from systole.sw.runtime.device import Device, DeviceError
    from systole.sw.runtime.driver import DeviceFault
    from systole.sw.session.accuracy import Accuracy
    from systole.sw.session.report import RunReport, RunResult
    from systole.sw.session.run import ModelPrediction

__all__ = [
    "Accuracy",
    "CompiledModel",
    "Config",
    "ConfigError",
    "Device",
    "DeviceError",
    "DeviceFault",
    "EnergyError",
    "GenerateError",
    "InputError",
    "ModelError",
    "ModelPrediction",
    "NodePlacement",
    "Preprocessing",
    "QuantisationOptions",
    "QuantisationReport",
    "QuantizeResult",
    "RunReport",
    "RunResult",
    "__version__",
    "accuracy",
    "check",
    "compile",
    "generate",
    "open_device",
    "predict",
    "quantize",
    "run",
]

_HOMES = {
    "Accuracy": "sw.session.accuracy",
    "Config": "isa",
    "ConfigError": "isa",
    "Device": "sw.runtime.device",
    "DeviceError": "sw.runtime.device",
    "DeviceFault": "sw.runtime.driver",
    "EnergyError": "sw.report.energy",
    "GenerateError": "hw.verilog",
    "InputError": "sw.frontend.inputs",
    "ModelError": "sw.ir.graph",
    "ModelPrediction": "sw.session.run",
    "NodePlacement": "sw.compiler.placement",
    "Preprocessing": "sw.quantisation.samples",
    "QuantisationOptions": "sw.quantisation.pipeline",
    "QuantisationReport": "sw.quantisation.report",
    "RunReport": "sw.session.report",
    "RunResult": "sw.session.report",
}
"""Modules that define public names; all others are in :mod:`systole.api`. They are imported on
first use: most programs need only some of onnxruntime, amaranth and the simulators."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""A cycle model: predicts when every command of a program starts and ends.

Commands are taken in order of time. A command starts when it has been fetched, its engine is free
and its tokens have been given; it lasts as long as its engine needs for it. Reads share the bus
burst by burst, within the outstanding bursts of the configuration. The cost of scratchpad conflicts
is estimated from a first pass: which accesses of others fall into a command's time, and how often
they meet in a bank; where they rarely do, they are left out.

* :mod:`~sw.simulate.cycles.engines`: CONV, POST and WINDOW, one command at a time.
* :mod:`~sw.simulate.cycles.bus`: bursts, and the fetch unit.
* :mod:`~sw.simulate.cycles.machine`: all of them together in time.
* :mod:`~sw.simulate.cycles.conflicts`: what commands lose at the scratchpad's banks.
* :mod:`~sw.simulate.cycles.prediction`: cycles and bytes of a program and its layers."""

from systole.sw.simulate.cycles.engines import im2col_row_cycles
from systole.sw.simulate.cycles.prediction import (
    LayerPrediction,
    Prediction,
    Timing,
    busy,
    layer_cycles,
    predict,
    predict_layers,
    traffic,
)

__all__ = [
    "LayerPrediction",
    "Prediction",
    "Timing",
    "busy",
    "im2col_row_cycles",
    "layer_cycles",
    "predict",
    "predict_layers",
    "traffic",
]

"""Fields of commands, by the names that the command set declares."""

from __future__ import annotations

from systole.isa import COMMANDS, Opcode
from systole.isa.commands import HEADER
from systole.sw.compiler.emission.views import BufferView
from systole.sw.compiler.regions import Extent
from systole.sw.compiler.stages import Combine, Geometry, Requant


class CommandFields:
    """Builder of the fields of one kind of command."""

    def __init__(self, opcode: Opcode):
        self.opcode = opcode
        self._names = frozenset(COMMANDS[opcode].places) - {f.name for f in HEADER}

    def __call__(self, **values: int) -> dict[str, int]:
        """The values by field; fields not named are 0. Raises ``TypeError`` for a name that is no
        field of the command."""
        if not self._names.issuperset(values):
            unknown = sorted(values.keys() - self._names)
            raise TypeError(f"{self.opcode.name} has no field {', '.join(unknown)}")
        return values


load = CommandFields(Opcode.LOAD)
store = CommandFields(Opcode.STORE)
conv = CommandFields(Opcode.CONV)
post = CommandFields(Opcode.POST)
window = CommandFields(Opcode.WINDOW)


# Groups of fields ---------------------------------------------------------------------------------


def sliding(g: Geometry, view: BufferView | Extent) -> dict[str, int]:
    """CONV, WINDOW: a sliding window whose pads are relative to a view."""
    return dict(
        in_w=view.w,
        in_h=view.h,
        x0=-g.pads[1],
        y0=-g.pads[0],
        kernel_w=g.kernel[1],
        kernel_h=g.kernel[0],
        stride_x=g.strides[1],
        stride_y=g.strides[0],
        dilation_x=g.dilations[1],
        dilation_y=g.dilations[0],
    )


def requantisation(requant: Requant) -> dict[str, int]:
    """POST, WINDOW: zero point and clamps."""
    return dict(zero=requant.zero, low=requant.low, high=requant.high)


def combination(combine: Combine) -> dict[str, int]:
    """POST: the operation on two operands."""
    return dict(
        op=combine.op,
        za=combine.za,
        zb=combine.zb,
        zo=combine.zo,
        ma=combine.ma,
        mb=combine.mb,
        shift=combine.shift,
        low2=combine.low2,
        high2=combine.high2,
    )

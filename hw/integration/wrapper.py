"""The accelerator under the port names that AXI interconnects expect, with a reset that is active
low: ``systole_axi``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

WRAPPER = "systole_axi"
CLOCK, RESET = "aclk", "aresetn"
_PREFIXES = {"m_axi__": "m_axi_", "s_axil__": "s_axi_"}
"""The beginnings of port names: the plain top's, and the wrapper's."""
_CONSTANT = {
    "m_axi_arlock": (1, 0),
    "m_axi_arqos": (4, 0),
    "m_axi_arregion": (4, 0),
    "m_axi_awlock": (1, 0),
    "m_axi_awqos": (4, 0),
    "m_axi_awregion": (4, 0),
}
"""Outputs that AXI4 has and the plain top does not: width and value."""


def wrapper(top: str, ports: Sequence[Mapping[str, str | int]], config_hash: str) -> str:
    """The source of ``systole_axi``. ``ports``: those of the plain top, as the manifest lists
    them."""
    signals = {str(p["name"]): p for p in ports if p["name"] not in ("clk", "rst")}
    held = [name for name, port in signals.items() if _is_held(name, str(port["direction"]))]
    inner = {name: f"core_{renamed(name)}" if name in held else renamed(name) for name in signals}
    lines = [
        f"// {top} with the port names of AMBA: AXI4 (m_axi, manager) and AXI4-Lite (s_axi, the",
        f"// registers). {RESET} may fall at any time. Configuration {config_hash}.",
        f"module {WRAPPER} (",
        f"  input wire {CLOCK},",
        f"  input wire {RESET},",
        *(f"  {line}," for line in _declarations(signals)),
        "  output wire irq",
        ");",
        f"  // The reset falls with {RESET} and rises two clock edges after it.",
        "  reg [1:0] reset_n = 2'b00;",
        f"  always @(posedge {CLOCK} or negedge {RESET})",
        f"    if (!{RESET}) reset_n <= 2'b00;",
        "    else reset_n <= {reset_n[0], 1'b1};",
        "",
        "  // Until then nothing is offered and nothing taken.",
        *(f"  wire {inner[name]};" for name in held),
        *(f"  assign {renamed(name)} = {inner[name]} & reset_n[1];" for name in held),
        *(f"  assign {name} = {width}'d{value};" for name, (width, value) in _CONSTANT.items()),
        "",
        f"  {top} core (",
        f"    .clk({CLOCK}),",
        "    .rst(!reset_n[1]),",
        ",\n".join(f"    .{name}({inner[name]})" for name in signals),
        "  );",
        "endmodule",
    ]
    return "\n".join(lines) + "\n"


def _is_held(name: str, direction: str) -> bool:
    """Whether an output must be low during reset, and while it is being released."""
    return direction == "output" and name.endswith(("valid", "ready"))


def renamed(name: str) -> str:
    """A port's name in the wrapper."""
    for old, new in _PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _declarations(signals: Mapping[str, Mapping[str, str | int]]) -> Iterator[str]:
    for name, port in signals.items():
        if name != "irq":
            yield _declaration(renamed(name), str(port["direction"]), int(port["width"]))
    for name, (width, _) in _CONSTANT.items():
        yield _declaration(name, "output", width)


def _declaration(name: str, direction: str, width: int) -> str:
    bits = f"[{width - 1}:0] " if width > 1 else ""
    return f"{direction} wire {bits}{name}"

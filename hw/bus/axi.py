"""AXI4 and AXI4-Lite signatures, and the managers that put the engines' requests on the AXI bus.

Reads and writes share nothing. Both managers turn requests into bursts of whole, naturally aligned
beats (INCR, full width, ID 0). A burst never crosses a multiple of ``axi_burst_beats`` beats, and
so never a 4 KiB boundary. No bus output depends on a bus input of the same cycle.
"""

from __future__ import annotations

from amaranth.hdl import Array, C, Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out, connect, flipped

from systole.hw.bus.interfaces import (
    Bus,
    MemoryRead,
    MemoryReadInterface,
    MemoryWrite,
    MemoryWriteInterface,
    read_beat_layout,
    record,
)
from systole.isa import Config
from systole.isa.config import bits_for

BURST_INCR = 0b01
CACHE_NORMAL = 0b0011
"""Normal memory, not cacheable, bufferable."""
PAGE_BITS = 12
"""No burst crosses a multiple of 4 KiB; the DRAM window starts at one."""


def _address_members(prefix: str, config: Config) -> dict[str, wiring.Member]:
    members = {
        "addr": Out(config.axi_addr_bits),
        "len": Out(8),
        "size": Out(3),
        "burst": Out(2),
        "id": Out(1),
        "cache": Out(4),
        "prot": Out(3),
        "valid": Out(1),
        "ready": In(1),
    }
    return {prefix + name: member for name, member in members.items()}


class Axi4ReadInterface(wiring.PureInterface):
    """The members of :class:`Axi4Read`."""

    araddr: Signal
    arlen: Signal
    arsize: Signal
    arburst: Signal
    arid: Signal
    arcache: Signal
    arprot: Signal
    arvalid: Signal
    arready: Signal
    rdata: Signal
    rresp: Signal
    rlast: Signal
    rid: Signal
    rvalid: Signal
    rready: Signal


class Axi4WriteInterface(wiring.PureInterface):
    """The members of :class:`Axi4Write`."""

    awaddr: Signal
    awlen: Signal
    awsize: Signal
    awburst: Signal
    awid: Signal
    awcache: Signal
    awprot: Signal
    awvalid: Signal
    awready: Signal
    wdata: Signal
    wstrb: Signal
    wlast: Signal
    wvalid: Signal
    wready: Signal
    bresp: Signal
    bid: Signal
    bvalid: Signal
    bready: Signal


class Axi4Interface(Axi4ReadInterface, Axi4WriteInterface):
    """The members of :class:`Axi4`."""


class Axi4LiteInterface(wiring.PureInterface):
    """The members of :class:`Axi4Lite`."""

    awaddr: Signal
    awprot: Signal
    awvalid: Signal
    awready: Signal
    wdata: Signal
    wstrb: Signal
    wvalid: Signal
    wready: Signal
    bresp: Signal
    bvalid: Signal
    bready: Signal
    araddr: Signal
    arprot: Signal
    arvalid: Signal
    arready: Signal
    rdata: Signal
    rresp: Signal
    rvalid: Signal
    rready: Signal


class Axi4Read(Bus):
    """The AR and R channels of AXI4; the manager is the ``Out`` side."""

    interface = Axi4ReadInterface

    def __init__(self, config: Config):
        super().__init__(
            _address_members("ar", config)
            | {
                "rdata": In(config.axi_data_bits),
                "rresp": In(2),
                "rlast": In(1),
                "rid": In(1),
                "rvalid": In(1),
                "rready": Out(1),
            }
        )


class Axi4Write(Bus):
    """The AW, W and B channels of AXI4; the manager is the ``Out`` side."""

    interface = Axi4WriteInterface

    def __init__(self, config: Config):
        super().__init__(
            _address_members("aw", config)
            | {
                "wdata": Out(config.axi_data_bits),
                "wstrb": Out(config.axi_data_bits // 8),
                "wlast": Out(1),
                "wvalid": Out(1),
                "wready": In(1),
                "bresp": In(2),
                "bid": In(1),
                "bvalid": In(1),
                "bready": Out(1),
            }
        )


class Axi4(Bus):
    """A whole AXI4 port with an ID of one bit; the manager is the ``Out`` side."""

    interface = Axi4Interface

    def __init__(self, config: Config):
        super().__init__(dict(Axi4Read(config).members) | dict(Axi4Write(config).members))


class Axi4Lite(Bus):
    """AXI4-Lite with 32 data bits; the manager is the ``Out`` side."""

    interface = Axi4LiteInterface

    def __init__(self, addr_bits: int):
        super().__init__(
            {
                "awaddr": Out(addr_bits),
                "awprot": Out(3),
                "awvalid": Out(1),
                "awready": In(1),
                "wdata": Out(32),
                "wstrb": Out(4),
                "wvalid": Out(1),
                "wready": In(1),
                "bresp": In(2),
                "bvalid": In(1),
                "bready": Out(1),
                "araddr": Out(addr_bits),
                "arprot": Out(3),
                "arvalid": Out(1),
                "arready": In(1),
                "rdata": In(32),
                "rresp": In(2),
                "rvalid": In(1),
                "rready": Out(1),
            }
        )


def forward(m: Module, inner: wiring.PureInterface, outer: wiring.PureInterface) -> None:
    """Wire a manager's ``Axi4Read`` or ``Axi4Write`` port to the same members of ``outer``, an
    ``Axi4`` output port of the enclosing component."""
    for name, member in inner.signature.members.items():
        source, sink = (inner, outer) if member.flow is Out else (outer, inner)
        m.d.comb += getattr(sink, name).eq(getattr(source, name))


class BurstSplitter(wiring.Component):
    """Splits the requests of ``clients`` clients into bursts, up to one a cycle.

    A client's request is taken once all bursts of the one before have been issued, and checked in
    the next cycle: in the one after that ``denied`` pulses if it is empty or leaves the ``limit``
    bytes of the window, before another of this client can be taken. Two cycles after it was taken
    its first burst is on the address channel (``valid``, ``addr``, ``len``, ``ready``). Clients
    take turns burst by burst; with ``urgent``, client 0 always goes first.

    ``issue`` pulses, one cycle before the burst appears on the channel, with the burst's client,
    length (as ``len``) and whether it is its request's last. It waits for ``space``. ``drain``
    forgets every request; a burst already on the channel stays there. ``idle``: no request is held
    and no burst is on the channel.
    """

    base: Signal
    limit: Signal
    drain: Signal
    idle: Signal
    requests: list[stream.Interface]
    denied: list[Signal]
    space: Signal
    issue: Signal
    issue_client: Signal
    issue_len: Signal
    issue_last: Signal
    valid: Signal
    ready: Signal
    addr: Signal
    len: Signal

    def __init__(self, config: Config, *, clients: int, urgent: bool):
        self.config = config
        self.urgent = urgent
        client_bits = bits_for(clients)
        request = data.StructLayout({"addr": 32, "bytes": 32})
        super().__init__(
            {
                "base": In(config.axi_addr_bits),
                "limit": In(32),
                "drain": In(1),
                "idle": Out(1),
                "requests": In(stream.Signature(request)).array(clients),
                "denied": Out(1).array(clients),
                "space": In(1),
                "issue": Out(1),
                "issue_client": Out(client_bits),
                "issue_len": Out(8),
                "issue_last": Out(1),
                "valid": Out(1),
                "ready": In(1),
                "addr": Out(config.axi_addr_bits),
                "len": Out(8),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        clients = len(self.requests)
        size = (self.config.beat_bytes - 1).bit_length()
        burst_bits = (self.config.axi_burst_beats - 1).bit_length()

        # One request per client: the next beat to ask for and the last one, in beats from ``base``.
        held = [Signal(name=f"held_{i}") for i in range(clients)]
        beats = Array(Signal(32 - size, name=f"beat_{i}", reset_less=True) for i in range(clients))
        finals = Array(Signal(32 - size, name=f"final_{i}") for i in range(clients))
        fresh = [Signal(name=f"fresh_{i}") for i in range(clients)]  # taken in the cycle before
        legal = Array(Signal(name=f"legal_{i}") for i in range(clients))

        chosen = self.issue_client
        turn = Signal.like(chosen)
        takers = range(1, clients) if self.urgent and clients > 1 else range(clients)
        with m.Switch(turn):
            for t in range(clients):
                with m.Case(t):
                    # The last assignment wins, so the client after ``t`` comes last.
                    for i in sorted(takers, key=lambda i: (i - t - 1) % clients, reverse=True):
                        with m.If(held[i]):
                            m.d.comb += chosen.eq(i)
        if self.urgent:
            with m.If(held[0]):
                m.d.comb += chosen.eq(0)

        beat = Signal(32 - size)
        final = Signal(burst_bits)
        # Compared for each client, at the same time as one is chosen.
        lasts = Array(b[burst_bits:] == f[burst_bits:] for b, f in zip(beats, finals, strict=True))
        m.d.comb += [
            beat.eq(beats[chosen]),
            final.eq(Array(f[:burst_bits] for f in finals)[chosen]),
            self.issue_last.eq(lasts[chosen]),
            self.issue_len.eq(
                Mux(self.issue_last, final, (1 << burst_bits) - 1) - beat[:burst_bits]
            ),
            self.issue.eq(
                Cat(held).any() & legal[chosen] & self.space & (~self.valid | self.ready)
            ),
            self.idle.eq(~Cat(held).any() & ~self.valid),
        ]
        offset = Cat(C(0, size), beat)
        with m.If(self.issue):
            m.d.sync += [
                self.valid.eq(1),
                self.addr.eq(Cat(offset[:PAGE_BITS], self.base[PAGE_BITS:] + offset[PAGE_BITS:])),
                self.len.eq(self.issue_len),
                turn.eq(chosen),
            ]
        with m.Elif(self.ready):
            m.d.sync += self.valid.eq(0)

        for i, request in enumerate(self.requests):
            step = Signal(name=f"step_{i}")
            final_byte = Signal(33, name=f"final_byte_{i}", reset_less=True)
            empty = Signal(name=f"empty_{i}")
            inside, refused = Signal(name=f"inside_{i}"), Signal(name=f"refused_{i}")
            m.d.comb += [
                step.eq(self.issue & (chosen == i)),
                request.ready.eq(~held[i] & ~self.drain),
                inside.eq(~empty & (final_byte < self.limit)),
                refused.eq(fresh[i] & ~inside),
                legal[i].eq(~fresh[i] | inside),
                finals[i].eq(final_byte[size:]),
            ]
            m.d.sync += [
                fresh[i].eq(request.valid & request.ready),
                self.denied[i].eq(refused),
            ]
            with m.If(step):
                m.d.sync += beats[i].eq(Cat(C(0, burst_bits), beat[burst_bits:] + 1))
            with m.If(request.valid & request.ready):
                m.d.sync += [
                    held[i].eq(1),
                    beats[i].eq(request.payload.addr[size:]),
                    final_byte.eq(request.payload.addr + request.payload.bytes - 1),
                    empty.eq(request.payload.bytes == 0),
                ]
            with m.If(self.drain | refused | (step & self.issue_last)):
                m.d.sync += held[i].eq(0)
        return m

    def address(self, bus: wiring.PureInterface, prefix: str) -> list:
        """Assignments that put the bursts on a bus's address channel (``ar`` or ``aw``)."""
        values = {
            "addr": self.addr,
            "len": self.len,
            "size": (self.config.beat_bytes - 1).bit_length(),
            "burst": BURST_INCR,
            "cache": CACHE_NORMAL,
            "valid": self.valid,
        }
        return [getattr(bus, prefix + name).eq(value) for name, value in values.items()] + [
            self.ready.eq(getattr(bus, prefix + "ready"))
        ]


class ReadManager(wiring.Component):
    """Reads DRAM for ``clients`` clients: client 0 first, the others in turn, burst by burst.

    Up to ``axi_outstanding`` bursts are in flight. One beat a cycle reaches the clients if the
    memory gives it, one cycle after the bus. ``denied`` comes two cycles after the request was
    taken, possibly before the beats of earlier requests. ``base`` (a multiple of 4096) and
    ``limit`` (bytes) must not change unless ``idle``.

    ``drain`` (held until ``idle``) forgets the requests and swallows the beats in flight; the
    clients get none of them. ``idle``: nothing asked, nothing in flight. ``beat`` is high for each
    beat received.
    """

    clients: list[MemoryReadInterface]
    bus: Axi4ReadInterface
    base: Signal
    limit: Signal
    drain: Signal
    idle: Signal
    beat: Signal

    def __init__(self, config: Config, *, clients: int):
        self.config = config
        super().__init__(
            {
                "clients": In(MemoryRead(config)).array(clients),
                "bus": Out(Axi4Read(config)),
                "base": In(config.axi_addr_bits),
                "limit": In(32),
                "drain": In(1),
                "idle": Out(1),
                "beat": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bus = self.bus
        m.submodules.splitter = splitter = BurstSplitter(
            self.config, clients=len(self.clients), urgent=True
        )
        entry = data.StructLayout({"client": len(splitter.issue_client), "last": 1})
        m.submodules.order = order = SyncFIFO(width=entry.size, depth=self.config.axi_outstanding)
        oldest = data.View(entry, order.r_data)

        beat = data.StructLayout(
            {"client": len(splitter.issue_client), "payload": read_beat_layout(self.config)}
        )
        # The beat on offer and one behind it: no client's answer reaches the bus in its cycle.
        arrives = record(beat)
        first, second = (record(beat, name=n, reset_less=True) for n in ("first", "second"))
        has_first, has_second = Signal(), Signal()
        taken, released = Signal(), Signal()
        m.d.comb += splitter.address(bus, "ar")
        m.d.comb += [
            splitter.base.eq(self.base),
            splitter.limit.eq(self.limit),
            splitter.drain.eq(self.drain),
            splitter.space.eq(order.w_rdy),
            order.w_en.eq(splitter.issue),
            order.w_data.eq(Cat(splitter.issue_client, splitter.issue_last)),
            bus.rready.eq(~has_second),
            taken.eq(bus.rvalid & bus.rready),
            order.r_en.eq(taken & bus.rlast),
            arrives.client.eq(oldest.client),
            arrives.payload.data.eq(bus.rdata),
            arrives.payload.last.eq(bus.rlast & oldest.last),
            arrives.payload.error.eq(bus.rresp[1]),
            self.beat.eq(taken),
            self.idle.eq(splitter.idle & ~order.r_rdy & ~has_first),
        ]
        for i, port in enumerate(self.clients):
            connect(m, flipped(port).req, splitter.requests[i])
            m.d.comb += [
                port.denied.eq(splitter.denied[i]),
                port.beats.payload.eq(first.payload),
                port.beats.valid.eq(has_first & (first.client == i)),
            ]
            with m.If(port.beats.valid & port.beats.ready):
                m.d.comb += released.eq(1)
        with m.If(~has_first | released):
            m.d.sync += [has_first.eq(has_second | taken), has_second.eq(0)]
            with m.If(has_second):
                m.d.sync += first.eq(second)
            with m.Elif(taken):
                m.d.sync += first.eq(arrives)
        with m.Elif(taken):
            m.d.sync += [has_second.eq(1), second.eq(arrives)]
        with m.If(self.drain):
            m.d.sync += [has_first.eq(0), has_second.eq(0)]
        return m


class WriteManager(wiring.Component):
    """Writes DRAM for ``clients`` clients, in turn, burst by burst.

    Up to ``axi_outstanding`` bursts are in flight; one beat a cycle if clients and memory keep up.
    A client that has asked must bring its beats: until then those of the others may have to wait.
    ``denied`` comes two cycles after the request was taken, possibly before ``done`` of earlier
    requests. ``base`` (a multiple of 4096) and ``limit`` (bytes) must not change unless ``idle``.

    ``drain`` (held until ``idle``) forgets the requests, completes the bursts already issued with
    beats without strobes and waits for their responses; ``done`` does not come for them. ``idle``:
    nothing asked, nothing in flight. ``beat`` is high for each beat taken from client
    ``beat_client``.
    """

    clients: list[MemoryWriteInterface]
    bus: Axi4WriteInterface
    base: Signal
    limit: Signal
    drain: Signal
    idle: Signal
    beat: Signal
    beat_client: Signal

    def __init__(self, config: Config, *, clients: int):
        self.config = config
        super().__init__(
            {
                "clients": In(MemoryWrite(config)).array(clients),
                "bus": Out(Axi4Write(config)),
                "base": In(config.axi_addr_bits),
                "limit": In(32),
                "drain": In(1),
                "idle": Out(1),
                "beat": Out(1),
                "beat_client": Out(bits_for(clients)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bus = self.bus
        depth = self.config.axi_outstanding
        m.submodules.splitter = splitter = BurstSplitter(
            self.config, clients=len(self.clients), urgent=False
        )
        client_bits = len(splitter.issue_client)
        # The bursts whose beats are still to be sent, and those whose response is still to come.
        burst_entry = data.StructLayout({"client": client_bits, "len": 8})
        m.submodules.bursts = bursts = SyncFIFO(width=burst_entry.size, depth=depth)
        burst = data.View(burst_entry, bursts.r_data)
        response_entry = data.StructLayout({"client": client_bits, "last": 1})
        m.submodules.responses = responses = SyncFIFO(width=response_entry.size, depth=depth)
        response = data.View(response_entry, responses.r_data)

        room = Signal()
        send = Signal()
        sent = Signal(8)
        m.d.comb += splitter.address(bus, "aw")
        m.d.comb += [
            splitter.base.eq(self.base),
            splitter.limit.eq(self.limit),
            splitter.drain.eq(self.drain),
            splitter.space.eq(bursts.w_rdy & responses.w_rdy),
            bursts.w_en.eq(splitter.issue),
            bursts.w_data.eq(Cat(splitter.issue_client, splitter.issue_len)),
            responses.w_en.eq(splitter.issue),
            responses.w_data.eq(Cat(splitter.issue_client, splitter.issue_last)),
            self.idle.eq(splitter.idle & ~bursts.r_rdy & ~bus.wvalid & ~responses.r_rdy),
            room.eq(bursts.r_rdy & (~bus.wvalid | bus.wready)),
            self.beat_client.eq(burst.client),
        ]

        with m.If(bus.wready):
            m.d.sync += bus.wvalid.eq(0)
        for i, port in enumerate(self.clients):
            connect(m, flipped(port).req, splitter.requests[i])
            m.d.comb += [
                port.denied.eq(splitter.denied[i]),
                port.beats.ready.eq(room & (burst.client == i) & ~self.drain),
            ]
            with m.If(port.beats.valid & port.beats.ready):
                m.d.comb += [send.eq(1), self.beat.eq(1)]
                m.d.sync += [
                    bus.wdata.eq(port.beats.payload.data),
                    bus.wstrb.eq(port.beats.payload.strobe),
                ]
        with m.If(self.drain & room):
            m.d.comb += send.eq(1)
            m.d.sync += bus.wstrb.eq(0)
        with m.If(send):
            m.d.comb += bursts.r_en.eq(sent == burst.len)
            m.d.sync += [
                bus.wvalid.eq(1),
                bus.wlast.eq(bursts.r_en),
                sent.eq(Mux(bursts.r_en, 0, sent + 1)),
            ]

        m.d.comb += [bus.bready.eq(1), responses.r_en.eq(bus.bvalid)]
        for i, port in enumerate(self.clients):
            failed = Signal(name=f"failed_{i}")
            m.d.sync += port.done.eq(0)
            with m.If(bus.bvalid & (response.client == i)):
                m.d.sync += failed.eq((failed | bus.bresp[1]) & ~response.last)
                with m.If(response.last):
                    m.d.sync += [
                        port.done.eq(1),
                        port.error.eq(failed | bus.bresp[1]),
                    ]
            with m.If(self.drain):
                m.d.sync += [failed.eq(0), port.done.eq(0)]
        return m

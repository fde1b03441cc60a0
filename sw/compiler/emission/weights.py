"""Loads into the weight buffer."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

from systole.isa import Engine, LoadTarget, Opcode
from systole.sw.compiler.emission import fields
from systole.sw.compiler.emission.context import EmissionContext
from systole.sw.compiler.stream import StreamMemory, run
from systole.sw.compiler.weights import CHUNK_WORDS, TOGETHER_WORDS, WeightRing


class WantedPiece(NamedTuple):
    """A piece of a stage's weights that is needed in the weight buffer; its name there, too."""

    stage: int
    start: int
    """Its first word in the stage's weights."""
    words: int


class WeightLoader:
    """Loads weights, and knows which of them are in the weight buffer."""

    def __init__(self, context: EmissionContext):
        config = context.config
        self.context = context
        self.ring = WeightRing(config.weight_words)
        self.piece_limit = max(config.rows, min(CHUNK_WORDS, config.weight_words // 4))
        """Weight words of one piece at most."""
        self._loaded = 0

    def fetch(self, wanted: Iterable[WantedPiece]) -> int:
        """Weight-buffer address of the first piece wanted, loaded if it is not there any more, and
        with it as many of the next as fit into one command; at first few, for the array to start
        soon."""
        together: list[tuple[Hashable, int]] = []
        i = first = words = 0
        for piece in wanted:
            at = self.ring.find(piece)
            if not together:
                if at is not None:
                    return at
                i, first = piece.stage, piece.start
            elif (
                at is not None
                or piece.start != first + words
                or words + piece.words > min(TOGETHER_WORDS, self.piece_limit, self._loaded)
            ):
                break
            together.append((piece, piece.words))
            words += piece.words
        self._loaded += words
        at = self.ring.place(together)
        self.load(i, self.context.weight_address(i, first), at, words)
        return at

    def load(self, i: int, address: int, at: int, words: int) -> None:
        """Load consecutive words from DRAM to address ``at`` of the weight buffer."""
        if words == 0:
            return
        stream = self.context.stream
        values = fields.load(
            target=LoadTarget.WEIGHTS, dram=address, count0=words, count1=1, count2=1, local=at
        )
        stream.emit(
            Opcode.LOAD,
            values,
            [stream.dram(address, words * self.context.config.weight_vector_bytes)],
            [run(StreamMemory.WEIGHTS, at, words)],
            stage=i,
            engine=Engine.WLOAD,
        )

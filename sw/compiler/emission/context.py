"""What the emission of every stage needs: plan, command stream, addresses."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from systole.isa import Config
from systole.sw.compiler.emission.views import BufferView
from systole.sw.compiler.plan import FixedKey, Plan, TensorKey
from systole.sw.compiler.regions import Region
from systole.sw.compiler.stages import FixedRole, Stage
from systole.sw.compiler.stream import CommandStream, Span, StreamMemory, run


@dataclass(frozen=True)
class StageConstants:
    """Where the constants of one stage lie in DRAM, in bytes."""

    fixed: int | None = None
    """Byte address of what the stage needs in the scratchpad besides activations, if anything."""
    weights: int | None = None
    """Byte address of its weights, if it has any."""


@dataclass(frozen=True, kw_only=True)
class EmissionContext:
    """The planned stages, and the stream that takes their commands."""

    config: Config
    stages: list[Stage]
    plan: Plan
    stream: CommandStream
    dram: Mapping[str, int]
    """Byte addresses of tensors in DRAM."""
    constants: list[StageConstants]
    """By stage."""
    stored: Set[str]
    """Tensors that must be in DRAM at the end."""

    def dram_address(self, tensor: str, word: int = 0) -> int:
        """DRAM byte address of a word of a tensor."""
        return self.dram[tensor] + word * self.config.vector_bytes

    def matrix_address(self, tensor: str, word: int) -> int:
        """DRAM byte address of a word of weights in a tensor."""
        return self.dram[tensor] + word * self.config.weight_vector_bytes

    def weight_address(self, i: int, word: int = 0) -> int:
        """DRAM byte address of a word of a stage's weights."""
        start = self.constants[i].weights
        assert start is not None
        return start + word * self.config.weight_vector_bytes

    def tensor_word(self, tensor: str) -> int:
        """First scratchpad word of a tensor's buffer."""
        return self.plan.addresses[TensorKey(tensor)]

    def fixed_word(self, i: int, role: FixedRole) -> int:
        """First scratchpad word of one of a stage's fixed parts."""
        at = self.plan.addresses[FixedKey(i)]
        for name, words in self.stages[i].fixed:
            if name == role:
                return at
            at += len(words)
        raise KeyError(role)


@dataclass(frozen=True)
class OutputGroup:
    """One output group of one region of a stage."""

    index: int
    """Number of the stage."""
    region: Region
    group: int
    out: BufferView
    """Where it goes; block 0 is the group's first."""


def accumulators(half: int) -> Span:
    """One half of the accumulators."""
    return run(StreamMemory.ACCUMULATORS, half, 1)

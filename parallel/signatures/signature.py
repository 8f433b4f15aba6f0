"""What a signature is: placements of an operation's inputs that give placements of its outputs."""

from dataclasses import dataclass

from parallel.layout import Placement


@dataclass(frozen=True, slots=True)
class Signature:
    """Along one axis of a mesh: with the inputs placed so, the operation on local shards gives outputs placed so.

    `inputs` has a placement for each of `Node.inputs`, `outputs` one for each of `Node.outputs`. A mesh of two axes
    takes one signature for each axis (`parallel.signatures.together` says which may meet).
    """

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]

    def __str__(self) -> str:
        left = ", ".join(map(str, self.inputs)) or "nothing"
        return f"{left} -> {', '.join(map(str, self.outputs))}"

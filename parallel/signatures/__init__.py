"""SBP signatures: for each operation, which placements of its inputs give which placements of its outputs."""

from parallel.signatures.signature import Signature

__all__ = ["Signature"]

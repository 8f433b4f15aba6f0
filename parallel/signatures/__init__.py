"""SBP signatures: for each operation, which placements of its inputs give which placements of its outputs.

`signatures(node, parts)` and `together` are for planners, `localize` for executors. Importing this fills the table.
"""

from parallel.signatures import elementwise, factories, indexing, layers, products, reductions, views
from parallel.signatures.lookup import UnknownOperation, localize, signatures, together
from parallel.signatures.signature import Signature

FAMILIES = (elementwise, products, reductions, views, indexing, layers, factories)
"""The modules that fill the table."""

__all__ = ["FAMILIES", "Signature", "UnknownOperation", "localize", "signatures", "together"]

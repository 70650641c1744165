"""The network in slabs: each layer over the whole volume before the next, with the result of one pass."""

from scripts.slabs.slab_run import SlabRun, stream

__all__ = ["SlabRun", "stream"]

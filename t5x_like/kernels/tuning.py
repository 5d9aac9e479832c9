"""What the tunings of all kernels share: the sizes of blocks on TPU, and the vector memory of each chip."""

LANES = 128
"""Blocks are multiples of this."""

VMEM = {"v4": 16, "v5e": 128, "v5p": 64, "v6e": 128, "v7x": 64}
"""MiB of vector memory of a core, by chip (see target.py)."""


def vmem_mib(chip: str) -> int:
    """The table's entry; a chip that is not in it gets the smallest."""
    return VMEM.get(chip, VMEM["v4"])


def vmem_limit_bytes(vmem_mib: int) -> int:
    """What a kernel may use: most of it, as spilled registers need some."""
    return vmem_mib * 2**20 * 3 // 4


def split_evenly(length: int, largest: int) -> int:
    """The size of the fewest equal blocks that cover `length`."""
    num_blocks = -(-length // largest)
    return -(-length // (num_blocks * LANES)) * LANES

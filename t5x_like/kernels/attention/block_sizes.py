"""Block sizes of the TPU kernels: a table per chip, from recorded tunings; nothing is tuned at run time."""

from dataclasses import dataclass

from t5x_like.kernels.tuning import LANES, VMEM, split_evenly, vmem_limit_bytes


@dataclass(frozen=True)
class BlockSizes:
    """The largest blocks to use; a shorter length gets shorter ones.

    Attributes:
      q: queries of a block.
      kv: keys of a block that is moved at once.
      compute: keys of it that are computed at once.
    """

    q: int
    kv: int
    compute: int

    def __post_init__(self):
        assert self.q % LANES == self.compute % LANES == self.kv % self.compute == 0

    def fit(self, q_length: int, kv_length: int) -> "BlockSizes":
        """Blocks for these lengths, as equal as they can be, so that little is padded."""
        q = split_evenly(q_length, self.q)
        kv = split_evenly(kv_length, self.kv)
        compute = split_evenly(kv, self.compute)
        return BlockSizes(q, compute * -(-kv // compute), compute)


@dataclass(frozen=True)
class Tuning:
    """What the kernels use on one chip.

    Attributes:
      forward: block sizes of the forward pass.
      forward_long: the same where queries see LONG keys or more.
      backward: of the backward pass.
      vmem_mib: vector memory of a core.
    """

    forward: BlockSizes
    forward_long: BlockSizes
    backward: BlockSizes
    vmem_mib: int

    def forward_for(self, num_keys: int) -> BlockSizes:
        """Those of the forward pass for queries that see so many keys: large blocks would stick out of a window."""
        return self.forward_long if num_keys >= LONG else self.forward

    @property
    def vmem_limit_bytes(self) -> int:
        return vmem_limit_bytes(self.vmem_mib)

    def resident_keys(self, bytes_per_key: int) -> int:
        """Keys whose gradients may stay in vector memory during the backward pass: a third of it is theirs."""
        return self.vmem_mib * 2**20 // 3 // bytes_per_key


LONG = 8192

TUNINGS: dict[str, Tuning] = {
    "v4": Tuning(BlockSizes(512, 512, 256), BlockSizes(512, 512, 256), BlockSizes(256, 512, 256), VMEM["v4"]),
    "v5e": Tuning(BlockSizes(1024, 1024, 512), BlockSizes(1024, 2048, 512), BlockSizes(1024, 1024, 512), VMEM["v5e"]),
    "v5p": Tuning(BlockSizes(1024, 1024, 256), BlockSizes(2048, 1024, 256), BlockSizes(1024, 1024, 256), VMEM["v5p"]),
    "v6e": Tuning(BlockSizes(1024, 1024, 512), BlockSizes(2048, 2048, 512), BlockSizes(1024, 1024, 512), VMEM["v6e"]),
    "v7x": Tuning(BlockSizes(1024, 1024, 512), BlockSizes(2048, 2048, 512), BlockSizes(1024, 1024, 512), VMEM["v7x"]),
}
"""By chip (see target.py). An entry may be replaced before tracing. No entry was timed for these kernels."""


def tuning(chip: str) -> Tuning:
    """The table's entry; a chip that is not in it gets the smallest."""
    return TUNINGS.get(chip, TUNINGS["v4"])

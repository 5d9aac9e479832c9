"""Compiles a mixture of experts for a TPU pod slice, without a TPU; prints a line of JSON per case. Needs libtpu.

python tests/models/compile_moe_for_tpu.py
"""

import collections
import json
import os
import re

# libtpu must not look for the machine it would run on.
os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5p-16",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    JAX_PLATFORMS="cpu",
)

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from t5x_like.models.feedforward.dispatch import CapacityConfig, DroplessConfig
from t5x_like.models.feedforward.moe import MoE, MoEConfig
from t5x_like.models.parameters import InitializerConfig, logical_axes, merge, split
from t5x_like.sharding.mesh import MESH_AXES
from t5x_like.sharding.placement import Placement
from tests import toy

BATCH, LENGTH, EMBED, MLP = 8, 2048, 1024, 2048
CASES = {
    "ring": (DroplessConfig(), {"expert": 8}),
    "ring, expert x fsdp x tensor": (DroplessConfig(), {"expert": 2, "fsdp": 2, "tensor": 2}),
    "ragged_all_to_all": (DroplessConfig(exchange="ragged_all_to_all"), {"expert": 8}),
    "ragged_all_to_all, buffer": (DroplessConfig(exchange="ragged_all_to_all", buffer_factor=1.5), {"expert": 8}),
    "capacity": (CapacityConfig(capacity_factor=2.5), {"expert": 8}),
}


def compile_gradient(dispatch, sizes):
    """Collectives of one layer's gradient, and bytes of its temporaries."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2").devices
    types = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    mesh = jax.make_mesh([sizes.get(axis, 1) for axis in MESH_AXES], MESH_AXES, types, devices=devices)
    config = MoEConfig(num_experts=16, experts_per_token=2, d_ff=MLP, dispatch=dispatch)
    init = InitializerConfig().build()
    build = lambda: MoE(config, toy.layer_spec(EMBED, init, jnp.bfloat16), jax.random.key(0))
    kept = {}

    placement = Placement(mesh)

    def params():
        kept["graphdef"], params = split(build())
        kept["axes"] = logical_axes(build())
        return params

    shapes = jax.eval_shape(params)
    place = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
    shapes = jax.tree.map(place, shapes, placement.shardings(kept["axes"], shapes))
    size = BATCH, LENGTH, EMBED
    x = jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=placement.sharding(("batch", "length", "embed"), size))

    def loss(params, x):
        y, stats = merge(kept["graphdef"], params)(x, toy.context(x))
        return jnp.mean(jnp.square(y.astype(jnp.float32))) + stats.load_balance

    with placement.use():
        compiled = jax.jit(jax.grad(loss, (0, 1))).trace(shapes, x).lower(lowering_platforms=("tpu",)).compile()
    operations = re.findall(
        r" (all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all)(?:-start)?\(", compiled.as_text()
    )
    return {
        "collectives": collections.Counter(operations),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    for name, case in CASES.items():
        print(json.dumps({"case": name, **compile_gradient(*case)}), flush=True)

"""Rules that a run replaces, and the one context that whoever enters the mesh enters."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from t5x_like.config import parse_config
from t5x_like.errors import UserError
from t5x_like.sharding.logical import constrain, on_devices
from t5x_like.sharding.mesh import MeshConfig, build_mesh, place
from t5x_like.sharding.placement import RULES, Placement, current, partition_spec
from t5x_like.training.job import compile_step, set_up
from t5x_like.training.state import initial_state
from tests import toy

MESH = {"data": 1, "fsdp": 2, "stage": 1, "expert": 1, "sequence": 1, "tensor": 2}
SWAPPED = (("vocab", None), ("heads", "tensor"), ("mlp", ("fsdp", "tensor")), ("embed", "tensor"))


def test_the_first_rule_of_a_name_that_applies_holds():
    rules = (("mlp", ("fsdp", "tensor")), ("mlp", ("tensor",)), ("embed", ()), ("embed", ("fsdp",)))
    assert partition_spec(("embed", "mlp"), (8, 8), MESH, rules) == P(None, ("fsdp", "tensor"))
    assert partition_spec(("embed", "mlp"), (8, 6), MESH, rules) == P(None, "tensor")


def test_rules_come_from_gin():
    rules = "(('mlp', 'tensor'), ('embed', ('fsdp', 'tensor')), ('vocab', None))"
    config = parse_config([], [f"MeshConfig.logical_axis_rules={rules}"]).build(MeshConfig)
    assert config.rules == (*RULES[:4], ("mlp", ("tensor",)), ("embed", ("fsdp", "tensor")), ("vocab", ()))
    assert MeshConfig().rules == RULES


def test_a_run_with_other_rules_lies_otherwise_and_trains_the_same(tmp_path):
    def trace(config, count):
        job = set_up(toy.experiment(tmp_path, mesh=config), build_mesh(config, jax.devices()[:count]), toy.VOCAB)
        with job.placement.use():
            state, step, losses = initial_state(job.create_state, job.state), compile_step(job), []
            for seed in range(3):
                state, metrics = step(state, on_devices(toy.batch(seed), job.batch))
                losses.append(float(metrics["loss"]))
        return losses, jax.tree.map(lambda a: a.sharding.spec, job.state.params)

    losses, specs = trace(MeshConfig(data=1, fsdp=2, tensor=2, logical_axis_rules=SWAPPED), 4)
    np.testing.assert_allclose(losses, trace(MeshConfig(), 1)[0], rtol=1e-5)
    layer = specs["stack"]["scanned"]["0"]
    assert layer["feedforward"]["up"]["kernel"] == P(None, None, ("fsdp", "tensor"))
    assert layer["mixer"]["query"]["kernel"] == P(None, None, "tensor", None)
    assert specs["embedding"] == P(None, "tensor")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("mlp", "tensors"),), "sends mlp to tensors: the axes of the mesh are data, fsdp"),
        ((("batch", "data"), ("mlp", "tensor")), "has a rule for batch: what splits batch, length, layers, expert"),
    ],
)
def test_impossible_rules_are_refused(rules, message):
    with pytest.raises(UserError, match=message):
        MeshConfig(logical_axis_rules=rules)


def test_a_rule_for_a_name_that_no_parameter_has_is_refused(tmp_path):
    config = MeshConfig(logical_axis_rules=(("mpl", "tensor"),))
    with pytest.raises(UserError, match=r"a rule for .mpl., which no parameter of this model has: names are embed"):
        set_up(toy.experiment(tmp_path, mesh=config), build_mesh(config), toy.VOCAB)


def test_what_is_traced_within_follows_the_placement():
    rules = (("embed", "tensor"),)
    placement = place(MeshConfig(data=2, tensor=4, split_activations=True, logical_axis_rules=rules))
    assert current() == Placement()
    traced = jax.jit(lambda x: (constrain(x, "batch", "length", "embed"), constrain(x, "batch", "length", "heads")))
    with placement.use():
        assert current() == placement
        residual, heads = traced(jax.numpy.zeros((8, 4, 8)))
    assert residual.sharding.spec == P("data", None, "tensor")
    assert heads.sharding.spec in (P("data"), P("data", None, None))
    with Placement(placement.mesh).use():  # another placement is another program
        assert traced(jax.numpy.zeros((8, 4, 8)))[1].sharding.spec == P("data", None, "tensor")
    assert current() == Placement()

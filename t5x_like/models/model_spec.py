"""A model without values."""

from typing import NamedTuple

import jax
from jaxtyping import PRNGKeyArray

from t5x_like.models.parameters import GraphDef, Params, logical_axes, split
from t5x_like.models.transformer import ModelConfig


class ModelSpec(NamedTuple):
    """A model without values: static structure, shapes and logical axes of its parameters."""

    graphdef: GraphDef
    params: Params
    axes: Params


def model_spec(config: ModelConfig) -> ModelSpec:
    """Traces the model's constructor; allocates nothing."""
    spec = {}

    def build(key: PRNGKeyArray) -> Params:
        model = config.build(key)
        spec["graphdef"], params = split(model)
        spec["axes"] = logical_axes(model)
        return params

    params = jax.eval_shape(build, jax.random.key(0))
    return ModelSpec(spec["graphdef"], params, spec["axes"])

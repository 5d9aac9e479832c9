"""Prints the temporary memory that the compiler plans for cross-entropy and its gradients, as a markdown table.

    python scripts/benchmarks/cross_entropy_memory.py --d_model=1024 --vocab_size=131072

Compared are `t5x_like.kernels.cross_entropy` and the same loss on the logits of all tokens at once. Programs are
compiled and never run, so any size fits on any machine.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

from t5x_like.kernels.cross_entropy import cross_entropy

D_MODEL = flags.DEFINE_integer("d_model", 1024, "Width of the hidden states.")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 131072, "Rows of the output embedding.")
CHUNK_SIZE = flags.DEFINE_integer("chunk_size", 2048, "Tokens whose logits exist at a time.")
TOKENS = flags.DEFINE_list("tokens", ["4096", "8192", "16384", "32768"], "Batch sizes, in tokens.")


def chunked(x, head, labels, weights):
    return cross_entropy(x, head, labels, weights, chunk_size=CHUNK_SIZE.value).objective


def plain(x, head, labels, weights):
    logits = jnp.einsum("td,vd->tv", x, head, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels) @ weights


def temporary_gib(loss, tokens: int, dtype) -> float:
    """GiB of temporary buffers, arguments and results excluded, to compute `loss` and its gradients."""
    arguments = (
        jax.ShapeDtypeStruct((tokens, D_MODEL.value), dtype),
        jax.ShapeDtypeStruct((VOCAB_SIZE.value, D_MODEL.value), dtype),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
        jax.ShapeDtypeStruct((tokens,), jnp.float32),
    )
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes / 2**30


def main(argv):
    del argv
    print(f"d_model {D_MODEL.value}, vocabulary {VOCAB_SIZE.value}, chunks of {CHUNK_SIZE.value} tokens, GiB")
    print()
    print("| tokens | logits, float32 | plain, float32 | chunked, float32 | plain, bfloat16 | chunked, bfloat16 |")
    print("|---:|---:|---:|---:|---:|---:|")
    for tokens in map(int, TOKENS.value):
        figures = [tokens * VOCAB_SIZE.value * 4 / 2**30]
        figures += [temporary_gib(loss, tokens, t) for t in (jnp.float32, jnp.bfloat16) for loss in (plain, chunked)]
        print(f"| {tokens} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")


if __name__ == "__main__":
    app.run(main)

"""Times attention on the GPU at hand and prints a markdown table.

    python scripts/benchmarks/attention_gpu.py --lengths=1024,4096 --head_dims=128

Each row is a shape: tokens of a batch and model width are the same in all of them. Each column is a way to compute it:
our backends, cuDNN, XLA (`jax.nn.dot_product_attention`), and the Triton kernel that comes with JAX. A cell has TFLOP/s
of the forward pass and of forward and backward together, each with the share of what a matrix product of this GPU was
measured to do. Work is counted as 4 * batch * heads * length^2 * head_dim forward, half of it if causal, and 3.5 times
as much with the backward pass.
"""

import functools
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags

from t5x_like.errors import UserError
from t5x_like.kernels.attention import MaskSpec, RelativeBias, attention
from t5x_like.kernels.attention.biases import relative_bias

LENGTHS = flags.DEFINE_list("lengths", ["1024", "2048", "4096", "8192", "16384"], "Tokens of a row.")
HEAD_DIMS = flags.DEFINE_list("head_dims", ["64", "128", "256"], "Sizes of a head.")
TOKENS = flags.DEFINE_integer("tokens", 16384, "Tokens of a batch.")
D_MODEL = flags.DEFINE_integer("d_model", 2048, "Heads times head_dim.")
MASKS = flags.DEFINE_list("masks", ["causal", "full"], "Some of causal, full.")
BACKENDS = flags.DEFINE_list("backends", ["mosaic_gpu", "triton", "cudnn"], "Our backends to time.")
REPEATS = flags.DEFINE_integer("repeats", 20, "Calls that are timed at once; the best of 5 such counts.")

BACKWARD = 3.5
"""Work of forward and backward together, in forwards: the backward pass has 5 matrix products for 2."""


def seconds(function: Callable, *arguments) -> float:
    """Of one call, compiled, the best of five averages."""
    run = jax.jit(function)
    jax.block_until_ready(run(*arguments))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(REPEATS.value):
            result = run(*arguments)
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - start) / REPEATS.value)
    return best


def matmul_peak() -> float:
    """FLOP/s of a square product in bfloat16."""
    size = 8192
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    return 2 * size**3 / seconds(jnp.dot, a, a)


def rivals(is_causal: bool) -> dict[str, Callable]:
    """The other ways to compute attention, as functions of q, k and v."""
    from jax.experimental.pallas.ops.gpu import attention as upstream

    sizes = upstream.BlockSizes(block_q=128, block_k=64, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64)
    return {
        "XLA": functools.partial(jax.nn.dot_product_attention, is_causal=is_causal, implementation="xla"),
        "JAX's Triton kernel": lambda q, k, v: upstream.mha(
            q, k, v, None, sm_scale=q.shape[-1] ** -0.5, causal=is_causal, block_sizes=sizes
        ),
    }


def cell(function: Callable, arrays: tuple, work: float, peak: float) -> str:
    """What a cell says; the reason, where a way cannot do a shape."""

    def loss(*arrays):
        return jnp.sum(function(*arrays).astype(jnp.float32))

    try:
        forward = work / seconds(function, *arrays)
        both = BACKWARD * work / seconds(jax.grad(loss, argnums=tuple(range(len(arrays)))), *arrays)
    except (UserError, NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    text = lambda speed: f"{speed / 1e12:.0f} ({speed / peak:.0%})"
    return f"{text(forward)}, {text(both)}"


def qkv(batch: int, length: int, heads: int, head_dim: int) -> tuple:
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (batch, length, heads, head_dim), jnp.bfloat16) for key in keys)


def print_row(cells: list):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_plain(peak: float):
    """The shapes without a bias."""
    print_row(["length", "head_dim", "mask", *BACKENDS.value, *rivals(False)])
    print_row(["---"] * (3 + len(BACKENDS.value) + 2))
    for head_dim in map(int, HEAD_DIMS.value):
        for length in map(int, LENGTHS.value):
            for mask in MASKS.value:
                is_causal = mask == "causal"
                batch, heads = max(1, TOKENS.value // length), D_MODEL.value // head_dim
                arrays = qkv(batch, length, heads, head_dim)
                work = 4 * batch * heads * length**2 * head_dim / (2 if is_causal else 1)
                ways = {
                    name: functools.partial(attention, mask=MaskSpec(causal=is_causal), backend=name)
                    for name in BACKENDS.value
                }
                ways.update(rivals(is_causal))
                print_row([length, head_dim, mask, *(cell(way, arrays, work, peak) for way in ways.values())])


def biased_ways() -> dict[str, Callable]:
    """Ways to compute attention with T5's relative bias, as functions of q, k, v and the bias' table."""

    def ours(q, k, v, table, backend):
        return attention(q, k, v, relative_bias=(RelativeBias(), table), scale=1.0, backend=backend)

    def xla(q, k, v, table):
        relative = jnp.arange(k.shape[1])[None] - jnp.arange(q.shape[1])[:, None]
        bias = relative_bias(RelativeBias(), table, relative)[None].astype(q.dtype)
        return jax.nn.dot_product_attention(q, k, v, bias=bias, scale=1.0, implementation="xla")

    return {
        "triton": functools.partial(ours, backend="triton"),
        "triton without the bias": lambda q, k, v, table: attention(q, k, v, scale=1.0, backend="triton"),
        "reference": functools.partial(ours, backend="reference"),
        "XLA, with the bias as an array": xla,
    }


def print_biased(peak: float):
    """The encoder layers of T5-base: 12 heads of 64, with the relative bias and the gradient of its table."""
    print()
    print_row(["length, T5's bias", *biased_ways()])
    print_row(["---"] * (1 + len(biased_ways())))
    for length in (512, 1024, 4096):
        batch, heads, head_dim = max(1, TOKENS.value // length), 12, 64
        arrays = qkv(batch, length, heads, head_dim)
        table = jax.random.normal(jax.random.key(1), (heads, 32), jnp.float32)
        work = 4 * batch * heads * length**2 * head_dim
        print_row([length, *(cell(way, (*arrays, table), work, peak) for way in biased_ways().values())])


def main(argv):
    del argv
    if unknown := set(MASKS.value) - {"causal", "full"}:
        sys.exit(_refusal(f"--masks has {', '.join(sorted(unknown))}: give causal, full, or both."))
    if jax.default_backend() != "gpu":
        sys.exit(_refusal(f"there is no GPU here, only {jax.default_backend()}. Run this on a machine with a GPU."))
    peak = matmul_peak()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, matrix product {peak / 1e12:.0f} TFLOP/s\n")
    print_plain(peak)
    print_biased(peak)


def _refusal(message: str) -> int:
    print(f"attention_gpu: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    app.run(main)

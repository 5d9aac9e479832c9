"""Writes the tables of docs/kernels.md from the code.

python scripts/document_kernels.py                       the tables of backends and of block sizes
python scripts/document_kernels.py --check               says whether they are up to date
python scripts/document_kernels.py --compiled FILE       also the table of what the TPU compiler said: FILE holds the
                                                         lines of tests/kernels/compile_for_tpu.py
python scripts/document_kernels.py --compiled-gpu FILE   the same for GPUs: the lines of compile_for_gpu.py
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from t5x_like.errors import UserError
from t5x_like.kernels.attention import MaskSpec, RelativeBias, attention
from t5x_like.kernels.attention.attention import BACKENDS
from t5x_like.kernels.attention.block_sizes import TUNINGS
from t5x_like.kernels.attention.gpu_block_sizes import FLOAT32, GPU_TUNINGS, MOSAIC, GpuBlocks
from t5x_like.kernels.grouped_matmul import tile_sizes
from t5x_like.kernels.grouped_matmul.grouped_matmul import BACKENDS as GROUPED_BACKENDS
from t5x_like.kernels.grouped_matmul.grouped_matmul import Call
from t5x_like.kernels.target import compiling_for

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
BATCH, LENGTH, HEADS, DIM = 1, 256, 4, 64


def arrays(dtype=jnp.bfloat16, kv_heads=HEADS, dim=DIM, v_dim=DIM, kv_length=LENGTH):
    shape = lambda *sizes: jax.ShapeDtypeStruct((BATCH, *sizes), dtype)
    return {
        "q": shape(LENGTH, HEADS, dim),
        "k": shape(kv_length, kv_heads, dim),
        "v": shape(kv_length, kv_heads, v_dim),
    }


IDS = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
TABLE = jax.ShapeDtypeStruct((HEADS, 32), jnp.float32)
PER_HEAD = jax.ShapeDtypeStruct((HEADS,), jnp.float32)
FEATURES = {
    "causal": {"mask": MaskSpec(causal=True)},
    "sliding window, either side": {"mask": MaskSpec(window=(128, 16))},
    "chunks": {"mask": MaskSpec(causal=True, chunk=128)},
    "prefix": {"mask": MaskSpec(causal=True, prefix=32)},
    "packing (segment ids)": {"segment_ids": (IDS, IDS)},
    "positions as arrays": {"positions": (IDS, IDS), "mask": MaskSpec(causal=True)},
    "positions as offsets": {"positions": (7, 0), "mask": MaskSpec(causal=True)},
    "unequal lengths": arrays(kv_length=200),
    "grouped and multi-query heads": arrays(kv_heads=1),
    "T5 relative bias, trainable": {"relative_bias": TABLE},
    "T5 relative bias with position arrays": {"relative_bias": TABLE, "positions": (IDS, IDS)},
    "ALiBi": {"alibi_slopes": PER_HEAD},
    "soft-cap": {"soft_cap": 30.0},
    "sinks": {"sinks": PER_HEAD},
    "log-sum-exp": {"return_lse": True},
    "general bias": {"bias": jax.ShapeDtypeStruct((1, HEADS, LENGTH, LENGTH), jnp.float32)},
    "dropout": {"dropout_rate": 0.1, "dropout_key": jax.ShapeDtypeStruct((2,), jnp.uint32)},
    "float32": arrays(dtype=jnp.float32),
    "head_dim 256": arrays(dim=256, v_dim=256),
    "head_dim 192, of v 128": arrays(dim=192, v_dim=128),
    "head_dim 60": arrays(dim=60, v_dim=60),
}


CHIPS = {"tpu": "v5e", "mosaic_gpu": "h100", "triton": "h100", "cudnn": "h100"}
"""What a backend is asked about its calls on; the others run anywhere."""


def answer(backend: str, feature: dict) -> str:
    """Yes, or the refusal in the backend's own words."""
    dynamic = {**arrays(), **feature}
    static = {
        name: dynamic.pop(name) for name in list(dynamic) if name in ("mask", "soft_cap", "return_lse", "dropout_rate")
    }

    def call(dynamic):
        if "relative_bias" in dynamic:
            dynamic = {**dynamic, "relative_bias": (RelativeBias(), dynamic["relative_bias"])}
        return attention(**dynamic, **static, backend=backend)

    entry = BACKENDS[backend]
    BACKENDS[backend] = dataclasses.replace(entry, run=lambda call: (call.q, call.q))  # its library may be missing here
    try:
        with compiling_for(CHIPS.get(backend, "cpu")):
            jax.eval_shape(call, dynamic)
    except UserError as error:
        return str(error).split("because ")[1].split(". Use ")[0]
    finally:
        BACKENDS[backend] = entry
    return "yes"


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def backends_table() -> str:
    rows = [[name, *(answer(backend, feature) for backend in BACKENDS)] for name, feature in FEATURES.items()]
    return table(["", *(f"`{name}`" for name in BACKENDS)], rows)


def block_sizes_table() -> str:
    text = lambda sizes: f"{sizes.q} / {sizes.kv} / {sizes.compute}"
    rows = [[chip, text(t.forward), text(t.forward_long), text(t.backward), t.vmem_mib] for chip, t in TUNINGS.items()]
    return table(["chip", "forward", "forward, long", "backward", "vector memory (MiB)"], rows)


def gpu_block_sizes_table() -> str:
    text = lambda blocks: f"{blocks.q} / {blocks.kv}, {blocks.warps}, {blocks.stages}"
    texts = lambda t: (text(t), "", "") if isinstance(t, GpuBlocks) else map(text, (t.forward, t.dq, t.dkv))
    rows = [
        ["`triton`", chip, f"up to {dim}", *texts(tuning)]
        for chip, by_dim in GPU_TUNINGS.items()
        for dim, tuning in by_dim.items()
    ]
    rows.append(["`triton`", "any", "float32", *texts(FLOAT32)])
    rows += [["`mosaic_gpu`", "h100, h200", f"up to {dim}", *texts(tuning)] for dim, tuning in MOSAIC.items()]
    return table(["backend", "chip", "head_dim", "forward", "backward, queries", "backward, keys"], rows)


def grouped_backends_table() -> str:
    """What each backend says to the dtypes, each asked on its own platform."""
    chips = {"tpu": "v5e", "triton": "gpu"}

    def answer(backend: str, dtype: str) -> str:
        shapes = ((8, 4), (2, 4, 3))
        arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        with compiling_for(chips.get(backend, "cpu")):
            refusal = GROUPED_BACKENDS[backend].refusal(Call(*arrays, jax.ShapeDtypeStruct((2,), jnp.int32), 1))
        return refusal or "yes"

    rows = [[name, *(answer(b, name) for b in GROUPED_BACKENDS)] for name in ("bfloat16", "float16", "float32")]
    return table(["", *(f"`{name}`" for name in GROUPED_BACKENDS)], rows)


def tile_sizes_table() -> str:
    text = lambda sizes: f"{sizes.m} / {sizes.k} / {sizes.n}"
    tunings = {**tile_sizes.TPU_TUNINGS, **tile_sizes.GPU_TUNINGS}
    rows = [[chip, *map(text, (t.forward, t.dlhs, t.drhs))] for chip, t in tunings.items()]
    return table(["chip", "product", "gradient of lhs", "gradient of rhs"], rows)


def compiled_table(lines: list[str], kernel: str) -> str:
    results = [result for line in lines if (result := json.loads(line)).get("kernel", "attention") == kernel]
    chips = list(dict.fromkeys(result["chip"] for result in results))
    mebibytes = lambda number: f"{number / 2**20:.0f}"
    cells = {(result["case"], result["chip"]): mebibytes(result["temporaries"]) for result in results}
    cases = {result["case"]: mebibytes(result["arguments"]) for result in results}
    rows = [[case, size, *(cells.get((case, chip), "") for chip in chips)] for case, size in cases.items()]
    return table(["case", "arguments", *chips], rows)


def replaced(page: str, name: str, content: str) -> str:
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = page.split(start)
    return before + start + content + "\n" + end + rest.split(end)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--compiled", type=Path)
    parser.add_argument("--compiled-gpu", type=Path)
    options = parser.parse_args()
    old = PAGE.read_text()
    page = replaced(replaced(old, "backends", backends_table()), "block sizes", block_sizes_table())
    page = replaced(page, "gpu block sizes", gpu_block_sizes_table())
    page = replaced(page, "grouped backends", grouped_backends_table())
    page = replaced(page, "tile sizes", tile_sizes_table())
    if options.compiled:
        lines = options.compiled.read_text().splitlines()
        page = replaced(page, "compiled", compiled_table(lines, "attention"))
        page = replaced(page, "compiled grouped", compiled_table(lines, "grouped matmul"))
    if options.compiled_gpu:
        lines = options.compiled_gpu.read_text().splitlines()
        page = replaced(page, "compiled for gpu", compiled_table(lines, "attention"))
        page = replaced(page, "compiled grouped for gpu", compiled_table(lines, "grouped matmul"))
    if options.check:
        sys.exit(None if page == old else f"{PAGE} is out of date: run scripts/document_kernels.py.")
    PAGE.write_text(page)


if __name__ == "__main__":
    main()

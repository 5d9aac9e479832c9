"""The reader of XLA's text against a recorded program and against what XLA itself says of a program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.planning.hlo import parse_module, shape_bytes
from tests.planning.recorded import PROGRAM


@pytest.fixture(scope="module")
def program():
    return parse_module(PROGRAM)


def test_instructions_of_a_recorded_program(program):
    assert program.entry == "main.1_spmd"
    dot = program.computations["layer"]["dot"]
    assert (dot.opcode, dot.operands, dot.bytes) == ("fusion", ("gte.5", "all-gather.1"), 8 * 4096 * 4)
    assert dot.cycles == 1750000
    assert program.computations["main.1_spmd"]["while.4"].bytes == 4 + 8 * 4096 * 4


def test_scope_is_the_calls_within_the_package(program):
    assert program.scope(program.computations["layer"]["dot"]) == "MLP > Linear (models/parameters.py:127)"
    assert program.scope(program.computations["main.1_spmd"]["while.4"]) == "body (models/stack.py:122)"
    assert program.scope(program.computations["layer"]["while.3"]) == "while"


def test_turns_of_loops(program):
    layers, keys = program.computations["main.1_spmd"]["while.4"], program.computations["layer"]["while.3"]
    assert program.trip_count(layers) == 32
    assert program.trip_count(keys) is None
    assert program.turns(keys, 8) == 4.5  # chunks 1 to 8 of a causal mask
    assert program.assumed_loops() == 1


@pytest.mark.parametrize("text", ["f32[8,128]{1,0:T(8,128)}", "bf16[3]", "(s32[], pred[7], f8e4m3fn[16])", "u8[0]"])
def test_bytes_of_shapes(text):
    widths = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1, "f8e4m3fn": 1, "u8": 1}
    sizes = {"f32[8,128]": 1024, "bf16[3]": 3, "s32[]": 1, "pred[7]": 7, "f8e4m3fn[16]": 16, "u8[0]": 0}
    assert shape_bytes(text) == sum(n * widths[part.partition("[")[0]] for part, n in sizes.items() if part in text)


def test_loops_that_xla_compiled_have_the_turns_that_jax_asked_for():
    """Both a scan and a loop with a bound that is data, as XLA writes them on this machine."""

    def run(x, n):
        x, _ = jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, None, length=7)
        return jax.lax.fori_loop(0, n, lambda i, x: jnp.cos(x @ x), x)

    text = jax.jit(run).lower(np.ones((8, 8), np.float32), 3).compile().as_text()
    module = parse_module(text)
    turns = sorted((module.trip_count(i) for i, _ in module.executions() if i.opcode == "while"), key=str)
    assert turns == [7, None]


def test_a_kernel_may_take_several_lines():
    text = """
ENTRY %main (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %kernel = f32[2]{0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={"config": {
  "flags": []
}}, metadata={op_name="kernel"}
  ROOT %sum = f32[2]{0} add(%kernel, %p), backend_config={"estimated_cycles":"7"}
}

%other (q: f32[2]) -> f32[2] {
  ROOT %q = f32[2]{0} parameter(0)
}, execution_thread="async"
"""
    module = parse_module(text)
    assert list(module.computations["main"]) == ["p", "kernel", "sum"]
    assert list(module.computations["other"]) == ["q"]
    assert module.cycles() == 7

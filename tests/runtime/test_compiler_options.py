import jax
import pytest

from t5x_like.runtime import compiler_options as xla_profiles
from t5x_like.runtime.compiler_options import PROFILES, XlaProfile, compiler_options

CPU = jax.devices("cpu")[0]


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(xla_profiles.logging, "warning", lambda *message: said.append(message[0] % message[1:]))
    return said


def test_every_profile_has_a_name_and_options():
    assert set(XlaProfile.__args__) == set(PROFILES)
    assert all(PROFILES.values())


def test_no_profile_is_no_option(warnings):
    assert compiler_options(None, CPU) == {}
    assert warnings == []


def test_a_profile_for_another_chip_is_left_out(warnings):
    assert compiler_options("v5", CPU) == {}
    assert warnings == ["MeshConfig.xla_profile 'v5' is for tpu: left out on cpu."]


def test_options_that_the_compiler_does_not_know_are_dropped_and_named(warnings, monkeypatch):
    options = {"xla_of_yesterday": True, "xla_gpu_enable_triton_gemm": False, "xla_of_tomorrow": 3}
    monkeypatch.setitem(PROFILES, "test", options)
    known, refused = xla_profiles._known("test", CPU)
    assert known == {"xla_gpu_enable_triton_gemm": False}
    assert refused == ["xla_of_yesterday", "xla_of_tomorrow"]


def test_what_was_dropped_is_told(warnings, monkeypatch):
    monkeypatch.setattr(xla_profiles, "_known", lambda profile, device: ({"a": 1}, ["b", "c"]))

    class Chip:
        platform = "tpu"

    assert compiler_options("v5", Chip()) == {"a": 1}
    assert warnings == ["This compiler knows nothing of b, c, in MeshConfig.xla_profile 'v5': left out."]

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.sharding.logical import on_devices
from t5x_like.sharding.mesh import MeshConfig, build_mesh
from t5x_like.training.guards import LEAST_DEVIATION, WINDOW, GuardConfig, initial_guard, judge, select
from t5x_like.training.job import compile_step, set_up
from t5x_like.training.state import initial_state
from tests import toy

BAD = [float("nan"), float("inf"), float("-inf")]


def run(values, spike_sigmas=None):
    """The verdicts on a series of (loss, gradient norm), and the final state."""
    step = jax.jit(lambda guard, loss, norm: judge(guard, loss, norm, spike_sigmas))
    guard, verdicts = initial_guard(), []
    for loss, norm in values:
        ok, guard = step(guard, jnp.float32(loss), jnp.float32(norm))
        verdicts.append(bool(ok))
    return verdicts, guard


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_is_skipped_and_leaves_no_trace(bad, place):
    pair = [1.0, 1.0]
    pair[place] = bad
    verdicts, guard = run([(2, 1), pair, pair, (3, 1), pair])
    assert verdicts == [True, False, False, True, False]
    assert [int(n) for n in guard[1:]] == [2, 3, 1]
    np.testing.assert_array_equal(guard.history[0, :3], [2, 3, 0])


def test_a_spike_is_what_numpy_says_it_is_and_only_accepted_values_are_history():
    rng = np.random.default_rng(0)
    losses = np.concatenate([rng.normal(3, 0.1, WINDOW + 50), [100, float("nan"), 4.5], rng.normal(3, 0.1, 50)])
    norms = rng.normal(1, 0.2, len(losses))
    norms[WINDOW + 20] = 9
    verdicts, _ = run(zip(losses, norms, strict=True), spike_sigmas=6)

    def expected():
        accepted = [[], []]
        for pair in zip(losses.astype(np.float32), norms.astype(np.float32), strict=True):
            ok = bool(np.isfinite(pair).all())
            if len(accepted[0]) >= WINDOW:
                for value, all_before in zip(pair, accepted, strict=True):
                    last = np.array(all_before[-WINDOW:])
                    ok &= bool(value <= last.mean() + 6 * max(last.std(), LEAST_DEVIATION * last.mean()))
            if ok:
                [series.append(value) for series, value in zip(accepted, pair, strict=True)]
            yield ok

    assert verdicts == list(expected())
    assert [i for i, ok in enumerate(verdicts) if not ok] == [WINDOW + 20, WINDOW + 50, WINDOW + 51, WINDOW + 52]


def test_a_constant_loss_makes_no_spike_of_a_tremor():
    verdicts, _ = run([(2.0, 1.0)] * WINDOW + [(2.01, 1.0), (2.3, 1.0)], spike_sigmas=6)
    assert verdicts[-2:] == [True, False]


def test_selection_keeps_the_old_bits_where_the_new_ones_are_nan():
    old, new = {"a": jnp.array([1.0, -0.0])}, {"a": jnp.array([jnp.nan, jnp.inf])}
    kept = select(jnp.array(False), new, old)
    assert np.asarray(kept["a"]).tobytes() == np.asarray(old["a"]).tobytes()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_step_changes_neither_parameters_nor_optimizer_nor_average(tmp_path, where):
    job = set_up(toy.experiment(tmp_path, ema_decay=0.9), build_mesh(MeshConfig(), jax.devices()[:1]), toy.VOCAB)
    weights = np.ones((toy.BATCH, toy.LENGTH), np.float32)
    bad = toy.batch(1, weights=weights.copy())
    bad["decoder_loss_weights"][0, 0] = np.inf if where == "gradient" else np.nan
    batches = [toy.batch(0), bad, bad, toy.batch(2)]
    with jax.set_mesh(job.mesh):
        step = compile_step(job)
        states, metrics = [jax.device_get(initial_state(job.create_state, job.state))], []
        state = initial_state(job.create_state, job.state)
        for batch in batches:
            state, values = step(state, on_devices(batch, job.batch))
            states.append(jax.device_get(state))
            metrics.append(jax.device_get(values))
        # The same without the bad batches.
        other = initial_state(job.create_state, job.state)
        for batch in (batches[0], batches[3]):
            other, last = step(other, on_devices(batch, job.batch))
    for before, after in ((states[1], states[2]), (states[2], states[3])):
        for part in ("params", "opt_state", "ema"):
            jax.tree.map(np.testing.assert_array_equal, getattr(before, part), getattr(after, part))
        assert after.step == before.step + 1
        np.testing.assert_array_equal(before.guard.history, after.guard.history)
    jax.tree.map(np.testing.assert_array_equal, states[-1].params, jax.device_get(other.params))
    assert [int(m["skipped"]) for m in metrics] == [0, 1, 2, 2]
    assert [int(m["skipped_in_a_row"]) for m in metrics] == [0, 1, 2, 0]
    assert metrics[-1]["learning_rate"] == last["learning_rate"], "the schedule counts steps that were taken"


def test_the_guard_brings_no_communication(tmp_path):
    config = MeshConfig(data=8)
    job = set_up(toy.experiment(tmp_path, mesh=config), build_mesh(config), toy.VOCAB)
    text = compile_step(job).as_text()
    assert "all-gather" not in text
    assert "conditional" not in text, "both branches of a conditional would keep their buffers"
    assert "outfeed" not in text
    assert "callback" not in text


@pytest.mark.parametrize(
    ("field", "value"),
    [("rollback_after", 0), ("max_rollbacks", 0), ("spike_sigmas", 0.0), ("hang_minutes", -1.0)],
)
def test_senseless_configurations_are_refused(field, value):
    with pytest.raises(UserError, match=f"GuardConfig.{field} is {value}"):
        GuardConfig(**{field: value})

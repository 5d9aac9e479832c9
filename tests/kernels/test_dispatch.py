import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.kernels.dispatch import Rows, capacity_rows, chosen_rows, collect, of_tokens, sorted_rows, spread

GROUPS, TOKENS, CHOICES, EXPERTS = 3, 10, 2, 5
NONE = EXPERTS


@pytest.fixture(scope="module")
def experts():
    """Two different experts for each token, and none for some."""
    scores = jax.random.uniform(jax.random.key(0), (GROUPS, TOKENS, EXPERTS))
    is_token = jax.random.uniform(jax.random.key(1), (GROUPS, TOKENS, 1)) > 0.2
    return jnp.where(is_token, jax.lax.top_k(scores, CHOICES)[1], NONE)


def one_hot_dispatch(experts, capacity):
    """T5X's dispatch tensor [groups, tokens, choices, experts, capacity], from a running count per expert."""
    experts = np.asarray(experts)
    dispatch = np.zeros((*experts.shape, EXPERTS, capacity))
    for group in range(GROUPS):
        filled = np.zeros(EXPERTS, int)
        for choice in range(CHOICES):
            for token in range(TOKENS):
                expert = experts[group, token, choice]
                if expert != NONE and filled[expert] < capacity:
                    dispatch[group, token, choice, expert, filled[expert]] = 1
                    filled[expert] += 1
    return dispatch


@pytest.mark.parametrize("capacity", [1, 3, 10])
def test_places_are_taken_as_in_t5x(experts, capacity):
    dispatch = one_hot_dispatch(experts, capacity)
    assignments, dropped = capacity_rows(experts, EXPERTS, capacity)
    values = np.arange(1, experts.size + 1, dtype=np.float32)
    expected = np.einsum("gtkec,gtk->egc", dispatch, values.reshape(experts.shape))
    np.testing.assert_array_equal(spread(values[:, None], assignments).reshape(expected.shape), expected)
    places = np.arange(1, expected.size + 1, dtype=np.float32)
    expected = np.einsum("gtkec,egc->gtk", dispatch, places.reshape(expected.shape))
    np.testing.assert_array_equal(collect(places[:, None], assignments, 0).reshape(expected.shape), expected)
    assert dropped == np.sum(np.asarray(experts) != NONE) - dispatch.sum()


@pytest.mark.parametrize("num_rows", [12, 60, 70])
def test_sorted_rows_stand_by_expert_in_the_order_of_the_tokens(experts, num_rows):
    flat = np.asarray(experts).reshape(-1)
    rows, sizes, dropped = sorted_rows(experts.reshape(-1), EXPERTS, num_rows)
    expected = [i for expert in range(EXPERTS) for i in np.flatnonzero(flat == expert)]
    kept = expected[:num_rows]
    np.testing.assert_array_equal(rows.token_of_row[: len(kept)], kept)
    assert (rows.token_of_row[len(kept) :] == flat.size).all()
    np.testing.assert_array_equal(sizes, np.bincount(flat[kept], minlength=EXPERTS))
    assert dropped == len(expected) - len(kept)


def test_experts_choose_their_best_tokens():
    scores = np.random.default_rng(0).random((GROUPS, TOKENS, EXPERTS)).astype(np.float32)
    scores[:, 3:] *= np.arange(TOKENS - 3)[:, None] < 5  # padding: two tokens can never be chosen
    rows, weights = chosen_rows(scores, 9)
    taken = np.asarray(rows.token_of_row).reshape(EXPERTS, GROUPS, 9)
    for expert in range(EXPERTS):
        for group in range(GROUPS):
            best = np.argsort(-scores[group, :, expert])[:8]
            np.testing.assert_array_equal(taken[expert, group, :8], best + group * TOKENS)
            assert taken[expert, group, 8] == GROUPS * TOKENS
    assert (weights.reshape(taken.shape)[..., 8] == 0).all()


def matrix(rows, num_tokens):
    """The rows as a 0/1 matrix [rows, tokens]."""
    return np.asarray(rows.token_of_row)[:, None] == np.arange(num_tokens)


@pytest.mark.parametrize("num_rows", [12, 70])
def test_moves_and_their_gradients_are_products_with_a_matrix_and_scatter_nothing(experts, num_rows):
    assignments, _, _ = sorted_rows(experts.reshape(-1), EXPERTS, num_rows)
    rows, weights = of_tokens(assignments, jnp.arange(experts.size, dtype=jnp.float32).reshape(-1, CHOICES))
    dense, num_tokens = matrix(rows, GROUPS * TOKENS), GROUPS * TOKENS
    np.testing.assert_array_equal(weights, matrix(assignments, experts.size) @ np.arange(experts.size))
    x = np.random.default_rng(0).normal(size=(num_tokens, 4)).astype(np.float32)
    y = np.random.default_rng(1).normal(size=(num_rows, 4)).astype(np.float32)
    spreading = lambda x: spread(x, rows)
    collecting = lambda y: collect(y, rows, num_tokens)
    out, back = jax.vjp(spreading, x)
    np.testing.assert_array_equal(out, dense @ x)
    np.testing.assert_allclose(back(y)[0], dense.T @ y, rtol=1e-6, atol=1e-6)
    out, back = jax.vjp(collecting, y)
    np.testing.assert_allclose(out, dense.T @ y, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(back(x)[0], dense @ x)
    for function, argument in ((spreading, x), (collecting, y)):
        program = str(jax.make_jaxpr(jax.grad(lambda a, function=function: jnp.sum(function(a) ** 2)))(argument))
        assert "gather" in program
        assert "scatter" not in program


def test_a_token_in_any_number_of_rows_is_added_up():
    rows = Rows(jnp.array([2, 0, 2, 3, 2]), None)  # of three tokens: 3 is none
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    dense = matrix(rows, 3)
    np.testing.assert_array_equal(spread(x, rows), dense @ x)
    np.testing.assert_array_equal(collect(spread(x, rows), rows, 3), dense.T @ (dense @ x))

"""Mixtures of experts of torch transformers, with the same random weights and the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.models.feedforward.moe import MoE, MoEConfig
from t5x_like.models.feedforward.routers import SigmoidRouterConfig, SoftmaxRouterConfig
from t5x_like.models.parameters import InitializerConfig
from tests import toy

pytestmark = pytest.mark.hf
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

BATCH, LENGTH, EMBED, MLP = 3, 7, 16, 12


def mixtral():
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=EMBED, intermediate_size=MLP, num_local_experts=6, num_experts_per_tok=2)
    return MixtralSparseMoeBlock(config), {"num_experts": 6, "experts_per_token": 2}


def qwen3(renormalize):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=EMBED,
        moe_intermediate_size=MLP,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=renormalize,
    )
    router = SoftmaxRouterConfig(renormalize=renormalize)
    return Qwen3MoeSparseMoeBlock(config), {"num_experts": 8, "experts_per_token": 3, "router": router}


def qwen2():
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeSparseMoeBlock

    config = Qwen2MoeConfig(
        hidden_size=EMBED,
        moe_intermediate_size=MLP,
        shared_expert_intermediate_size=20,
        num_experts=8,
        num_experts_per_tok=2,
    )
    router = SoftmaxRouterConfig(renormalize=False)
    ours = {"num_experts": 8, "experts_per_token": 2, "router": router, "shared_d_ff": 20, "shared_gate": True}
    return Qwen2MoeSparseMoeBlock(config), ours


def deepseek_v2(groups):
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2Moe

    config = DeepseekV2Config(
        hidden_size=EMBED,
        num_attention_heads=4,
        moe_intermediate_size=MLP,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=3,
        topk_method="group_limited_greedy" if groups > 1 else "greedy",
        n_group=groups,
        topk_group=min(groups, 2),
        routed_scaling_factor=1.7,
    )
    router = SoftmaxRouterConfig(renormalize=False, num_groups=groups, groups_per_token=min(groups, 2), scaling=1.7)
    ours = {"num_experts": 8, "experts_per_token": 3, "router": router, "shared_d_ff": 2 * MLP}
    return DeepseekV2Moe(config), ours


def deepseek_v3(renormalize):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=EMBED,
        moe_intermediate_size=MLP,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        norm_topk_prob=renormalize,
        routed_scaling_factor=2.5,
    )
    router = SigmoidRouterConfig(renormalize=renormalize, num_groups=4, groups_per_token=2, scaling=2.5)
    ours = {"num_experts": 8, "experts_per_token": 3, "router": router, "shared_d_ff": MLP}
    return DeepseekV3MoE(config), ours


def gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssMLP

    config = GptOssConfig(hidden_size=EMBED, intermediate_size=MLP, num_local_experts=6, num_experts_per_tok=2)
    ours = {"num_experts": 6, "experts_per_token": 2, "activation": "clamped_swiglu", "use_bias": True}
    return GptOssMLP(config), {**ours, "router": SoftmaxRouterConfig(use_bias=True)}


CASES = {
    "Mixtral": mixtral,
    "Qwen3-MoE": lambda: qwen3(True),
    "Qwen3-MoE, not renormalised": lambda: qwen3(False),
    "Qwen2-MoE": qwen2,
    "DeepSeek-V2, greedy": lambda: deepseek_v2(1),
    "DeepSeek-V2, groups": lambda: deepseek_v2(4),
    "DeepSeek-V3": lambda: deepseek_v3(True),
    "DeepSeek-V3, not renormalised": lambda: deepseek_v3(False),
    "gpt-oss": gpt_oss,
}


def arrays(module, scale):
    """Random weights and buffers for the torch module, and what they are in NumPy."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for array in named.values():
            array.copy_(scale * torch.randn(array.shape, generator=generator))
    return {name: array.detach().numpy() for name, array in named.items()}


def set_expert_weights(moe, theirs):
    """Theirs are [out, in] with gate above up, but gpt-oss' are [in, out] with gate and up taking turns."""
    kernels, down = theirs["experts.gate_up_proj"], theirs["experts.down_proj"]
    if "experts.down_proj_bias" in theirs:
        biases = theirs["experts.gate_up_proj_bias"]
        moe.gate.kernel[...], moe.up.kernel[...] = kernels[..., ::2], kernels[..., 1::2]
        moe.gate.bias[...], moe.up.bias[...] = biases[:, ::2], biases[:, 1::2]
        moe.down.kernel[...], moe.down.bias[...] = down, theirs["experts.down_proj_bias"]
        return
    gate, up = np.split(np.swapaxes(kernels, 1, 2), 2, axis=2)
    moe.gate.kernel[...], moe.up.kernel[...], moe.down.kernel[...] = gate, up, np.swapaxes(down, 1, 2)


def with_their_weights(config, theirs):
    init = InitializerConfig().build()
    moe = MoE(config, toy.layer_spec(EMBED, init), jax.random.key(0))
    set_expert_weights(moe, theirs)
    gate = "gate" if "gate.weight" in theirs else "router"
    moe.router.kernel[...] = theirs[f"{gate}.weight"].T
    if moe.router.bias is not None:
        moe.router.bias[...] = theirs["router.bias"]
    if moe.router.balance_bias is not None:
        moe.router.balance_bias[...] = theirs["gate.e_score_correction_bias"]
    if moe.shared is not None:
        name = "shared_expert" if "shared_expert_gate.weight" in theirs else "shared_experts"
        for place in ("gate", "up", "down"):
            getattr(moe.shared, place).kernel[...] = theirs[f"{name}.{place}_proj.weight"].T
    if moe.shared_gate is not None:
        moe.shared_gate.kernel[...] = theirs["shared_expert_gate.weight"].T
    return moe


# The second scale drives gpt-oss' gates into its clamps, and every router to decisions.
@pytest.mark.parametrize("scale", [0.3, 1.5])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_those_of_transformers(case, scale):
    module, ours = case()
    theirs = arrays(module.float().eval(), scale)
    moe = with_their_weights(MoEConfig(d_ff=MLP, **ours), theirs)
    x = np.random.default_rng(1).normal(size=(BATCH, LENGTH, EMBED)).astype(np.float32)

    tensor = torch.tensor(x, requires_grad=True)
    expected = module(tensor)
    expected = expected[0] if isinstance(expected, tuple) else expected
    weights = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    (expected * torch.tensor(weights)).sum().backward()
    function = lambda x: (lambda y: (jnp.sum(y * weights), y))(moe(x, toy.context(x))[0])
    gradient, y = jax.grad(function, has_aux=True)(x)

    expected = expected.detach().numpy()
    size = np.abs(expected).max()
    np.testing.assert_allclose(y / size, expected / size, atol=1e-5)
    size = np.abs(tensor.grad.numpy()).max()
    np.testing.assert_allclose(gradient / size, tensor.grad.numpy() / size, atol=1e-4)


def test_the_load_balance_loss_is_that_of_transformers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    module, ours = mixtral()
    theirs = arrays(module.float().eval(), 0.3)
    moe = with_their_weights(MoEConfig(d_ff=MLP, **ours), theirs)
    x = np.random.default_rng(1).normal(size=(BATCH, LENGTH, EMBED)).astype(np.float32)
    is_token = np.random.default_rng(2).random((BATCH, LENGTH)) > 0.3
    logits, _, _ = module.gate(torch.tensor(x))
    expected = load_balancing_loss_func((logits,), 6, 2, torch.tensor(is_token).int())
    np.testing.assert_allclose(moe(x, toy.context(x, is_token=is_token))[1].load_balance, expected.item(), rtol=1e-5)

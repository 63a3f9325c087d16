import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope import anatomy, attribution, capture, lens

from conftest import MOE_SHAPES, SHAPES, write_tensors


def cached(build, tokens, name, folder):
    model = build(name)
    parts = anatomy.find(model)
    tensors, table, _ = capture.in_memory(model, parts, tokens, 64)
    write_tensors(tensors, folder / f"{name}.safetensors")
    return model, parts, tensors, table


def direct(model, state, scale, target):
    """log p(w | x) with the model's own final norm and unembedding, its norm scale put back to `scale`."""
    norm = model.model.norm
    own_scale = torch.rsqrt(state.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    logits = model.lm_head(norm(state) / own_scale * scale[:, None])
    return logits.double().log_softmax(-1).gather(-1, target[:, None])[:, 0]


@pytest.mark.parametrize("name", SHAPES)
def test_lpi_equals_a_direct_computation_with_the_models_own_norm_and_unembedding(build, tokens, tmp_path, name):
    model, parts, tensors, table = cached(build, tokens, name, tmp_path)
    target = torch.tensor(table["target_id"].to_numpy(), dtype=torch.long)
    scale = tensors["norm_scale"]
    with torch.inference_mode():
        layers, heads, experts, _ = attribution.attribute(parts, [tmp_path / f"{name}.safetensors"], table)
        for layer in parts.layers:
            here = {k.removeprefix(f"{layer.index}."): v for k, v in tensors.items() if k.startswith(f"{layer.index}.")}
            before, middle = here["resid_pre"], here["resid_mid"]
            after = tensors.get(f"{layer.index + 1}.resid_pre", tensors["resid_final"])
            rows = layers[layers["layer"] == layer.index].set_index("prompt_id").loc[table["prompt_id"]]
            expected = direct(model, middle, scale, target) - direct(model, before, scale, target)
            np.testing.assert_allclose(rows["attention"], expected, atol=2e-5)
            expected = direct(model, after, scale, target) - direct(model, middle, scale, target)
            np.testing.assert_allclose(rows["ffn"], expected, atol=2e-5)
            rows = heads[heads["layer"] == layer.index]
            for head in range(layer.n_heads):
                # Independent of the slicing: the projection itself, with the other heads' input zeroed.
                alone = torch.zeros_like(here["head_in"])
                alone[:, head] = here["head_in"][:, head]
                state = before + layer.attention.out_proj(alone.flatten(1))
                expected = direct(model, state, scale, target) - direct(model, before, scale, target)
                found = rows[rows["head"] == head].set_index("prompt_id").loc[table["prompt_id"], "lpi"]
                np.testing.assert_allclose(found, expected, atol=2e-5)
            if name in MOE_SHAPES:
                check_experts(model, layer, here, experts, scale, target, table)


def check_experts(model, layer, here, experts, scale, target, table):
    middle = here["resid_mid"]
    normed = layer.middle(middle)
    vectors = {}
    for slot in range(here["expert_ids"].shape[1]):
        chosen = here["expert_ids"][:, slot : slot + 1].long()
        weight = here["expert_weights"][:, slot : slot + 1]
        vectors[slot] = chosen[:, 0].numpy(), layer.experts.module(normed, chosen, weight), weight[:, 0]
    for i, shared in enumerate(layer.shared):
        gate = shared.gate(normed).sigmoid()
        vectors[-1 - i] = (
            np.full(len(middle), -1 - i),
            gate * model.model.layers[layer.index].mlp.shared_expert(normed),
            gate[:, 0],
        )
    rows = experts[experts["layer"] == layer.index]
    assert len(rows) == len(vectors) * len(middle)
    rows = rows.set_index(["prompt_id", "expert"])
    for ids, vector, weight in vectors.values():
        expected = direct(model, middle + vector, scale, target) - direct(model, middle, scale, target)
        found = rows.loc[list(zip(table["prompt_id"], ids, strict=True))]
        np.testing.assert_allclose(found["lpi"], expected, atol=2e-5)
        np.testing.assert_allclose(found["weight"], weight, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_gains_of_all_layers_lead_from_the_embedding_to_the_clean_log_probability(build, tokens, tmp_path, name):
    model, parts, tensors, table = cached(build, tokens, name, tmp_path)
    layers, _, _, _ = attribution.attribute(parts, [tmp_path / f"{name}.safetensors"], table)
    total = layers.groupby("prompt_id")[["attention", "ffn"]].sum().sum(axis=1).loc[table["prompt_id"]]
    target = torch.tensor(table["target_id"].to_numpy(), dtype=torch.long)
    with torch.inference_mode():
        start = direct(model, tensors["0.resid_pre"], tensors["norm_scale"], target)
    np.testing.assert_allclose(total, table["log_prob"] - start.numpy(), atol=5e-5)


def test_attribution_runs_nothing_forward_and_needs_no_order(build, tokens, tmp_path):
    """Two shards give what one gives, from a model that cannot run forward once its parts are found."""
    model, parts, tensors, table = cached(build, tokens, "olmoe", tmp_path)
    whole = attribution.attribute(parts, [tmp_path / "olmoe.safetensors"], table)
    paths = []
    for i, rows in enumerate(np.array_split(np.arange(len(table)), 2)):
        paths.append(tmp_path / f"{i}.safetensors")
        write_tensors({k: t[rows] for k, t in tensors.items()}, paths[-1])
    handle = model.register_forward_pre_hook(lambda *args: pytest.fail("a forward pass was run"))
    try:
        split = attribution.attribute(parts, paths[::-1], table)
    finally:
        handle.remove()
    for one, other in zip(whole, split, strict=True):
        keys = [c for c in one if c in ("prompt_id", "layer", "head", "expert")]
        one, other = (t.sort_values(keys, ignore_index=True) for t in (one, other))
        np.testing.assert_allclose(one.to_numpy(float), other.to_numpy(float), atol=1e-6)


vectors = st.integers(0, 10**6).map(lambda seed: np.random.default_rng(seed))


@settings(max_examples=60, deadline=None)
@given(vectors, st.floats(0.01, 30), st.floats(1e-4, 30), st.booleans())
def test_lpi_in_float32_agrees_with_float64_brute_force_and_its_bounds(rng, peak, size, with_bias):
    d, vocab, n, units = 8, 50, 3, 4
    weight, bias = rng.normal(size=(vocab, d)), rng.normal(size=vocab) * with_bias
    r, v = rng.normal(size=(n, d)) * peak, rng.normal(size=(n, units, d)) * size
    s, w = rng.uniform(0.1, 1, n), rng.integers(0, vocab, n)

    def log_p(x, scale):
        z = (x * scale) @ weight.T + bias
        return z - np.logaddexp.reduce(z, axis=-1, keepdims=True)

    expected = np.empty((n, units))
    upper, lower = np.empty((n, units)), np.empty((n, units))
    for i in range(n):
        base = log_p(r[i], s[i])
        gradient = s[i] * (weight[w[i]] - np.exp(base) @ weight)
        for u in range(units):
            expected[i, u] = log_p(r[i] + v[i, u], s[i])[w[i]] - base[w[i]]
            z = weight @ (v[i, u] * s[i])
            upper[i, u] = gradient @ v[i, u]
            lower[i, u] = upper[i, u] - (z.max() - z.min()) ** 2 / 8
    as32 = [torch.tensor(x, dtype=torch.float32) for x in (r, v, s)]
    readout = lens.Readout(torch.tensor(weight).float(), torch.tensor(bias).float() if with_bias else None)
    found = lens.lpi(readout, *as32, torch.tensor(w)).double().numpy()
    tolerance = 2e-5 * (1 + peak + size)
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=1e-4)
    # The tangent bound and Hoeffding's (method.md, 2.1) hold for the exact value.
    assert (expected <= upper + 1e-9 * (1 + np.abs(upper))).all()
    assert (expected >= lower - 1e-9 * (1 + np.abs(lower))).all()


def test_tiny_effects_keep_their_digits():
    """A difference of two log-softmaxes in float32 would lose an effect of 1e-7 altogether."""
    rng = np.random.default_rng(0)
    weight, r, v = rng.normal(size=(1000, 16)), rng.normal(size=(1, 16)), 1e-7 * rng.normal(size=(1, 5, 16))
    p = np.exp((z := weight @ r[0]) - np.logaddexp.reduce(z))
    exact = (v[0] @ weight.T)[:, 3] - (v[0] @ weight.T) @ p
    readout = lens.Readout(torch.tensor(weight).float(), None)
    args = (torch.tensor(r).float(), torch.tensor(v).float(), torch.ones(1), torch.tensor([3]))
    np.testing.assert_allclose(lens.lpi(readout, *args)[0], exact, rtol=1e-2)


def test_chunks_change_nothing(monkeypatch):
    torch.manual_seed(0)
    readout = lens.Readout(torch.randn(40, 8), torch.randn(40))
    args = (torch.randn(7, 8), torch.randn(7, 3, 8), torch.rand(7), torch.arange(7))
    whole = lens.lpi(readout, *args)
    monkeypatch.setattr(lens, "MAX_LOGITS", 40 * 3)
    torch.testing.assert_close(lens.lpi(readout, *args), whole, rtol=1e-5, atol=1e-6)
    assert lens.lpi(readout, args[0], args[1][:, :0], *args[2:]).shape == (7, 0)

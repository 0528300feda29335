"""The reference kernels against the formulas they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo.kernels import reference


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_prepare_brings_weights_to_float32() -> None:
    weight = noise(3, 4).bfloat16()
    assert torch.equal(reference.prepare(weight), weight.float())


def test_linear() -> None:
    hidden, weight, bias = noise(2, 5, 4), noise(3, 4, seed=1), noise(3, seed=2)
    torch.testing.assert_close(reference.linear(hidden, weight, bias=bias), hidden @ weight.T + bias)
    torch.testing.assert_close(reference.linear(hidden, weight), hidden @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    hidden, weight = noise(6, 16).to(dtype), noise(16, seed=1)
    wide = hidden.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    out = reference.rms_norm(hidden, weight, eps=1e-3)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected.to(dtype))


def test_rotate_turns_pairs_by_their_angle() -> None:
    heads, angles = noise(7, 3, 8), noise(7, 1, 4, seed=1)
    cosine, sine = angles.cos(), angles.sin()
    first, second = heads[..., :4], heads[..., 4:]
    expected = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    out = reference.rotate(heads, cosine=torch.cat([cosine, cosine], -1), sine=torch.cat([-sine, sine], -1))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(out.norm(dim=-1), heads.norm(dim=-1))


@settings(deadline=None, max_examples=40)
@given(
    num_groups=st.sampled_from([1, 2, 4]),
    num_rows=st.integers(1, 5),
    num_slots=st.integers(5, 9),
    softcap=st.sampled_from([None, 2.0]),
    masked=st.booleans(),
)
def test_attention(num_groups: int, num_rows: int, num_slots: int, softcap: float | None, masked: bool) -> None:
    query, key = noise(2, 4, num_rows, 8), noise(2, num_groups, num_slots, 8, seed=1)
    value = noise(2, num_groups, num_slots, 8, seed=2)
    mask = torch.zeros(num_rows, num_slots)
    if masked:
        mask[noise(num_rows, num_slots, seed=3) > 0] = float("-inf")
        mask[:, 0] = 0
    wide_key, wide_value = (kept.double().repeat_interleave(4 // num_groups, dim=1) for kept in (key, value))
    scores = query.double() @ wide_key.mT * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    expected = torch.softmax(scores + mask, dim=-1) @ wide_value
    out = reference.attention(query, key=key, value=value, mask=mask if masked else None, scale=0.3, softcap=softcap)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-5)


def test_causal_attention_is_attention_under_a_causal_mask() -> None:
    query, key, value = noise(2, 4, 6, 8), noise(2, 2, 6, 8, seed=1), noise(2, 2, 6, 8, seed=2)
    mask = torch.full((6, 6), float("-inf")).triu(1)
    expected = reference.attention(query, key=key, value=value, mask=mask, scale=0.3, softcap=None)
    out = reference.causal_attention(query, key=key, value=value, scale=0.3)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate(activation: str) -> None:
    halves = noise(5, 12)
    x, up = halves[:, :6], halves[:, 6:]
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    expected = x * torch.sigmoid(x) if activation == "silu" else 0.5 * x * (1 + torch.tanh(inner))
    torch.testing.assert_close(reference.gate(halves, activation=activation), expected * up)

"""The kernels in plain PyTorch: they define the truth, differentiate, and run everywhere.

Shapes: K inputs, N outputs, D hidden size, F MLP size, B sequences, R rows, S visible slots, H query heads,
G key-value heads, E head size. Leading dimensions written ... are packed rows [R] or sequences [B, T].
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def prepare(weight: Tensor, *, storage: str | None = None) -> Tensor:
    """Bring a weight [N, K] or bias [N] into the form linear() reads: float32 on a CPU, as stored elsewhere.

    storage "int8" rounds a weight to what int8 codes can stand for; other types are rounded before.
    """
    if storage == "int8" and weight.ndim == 2:
        weight = dequantize(*quantize(weight)).to(weight.dtype)
    if weight.device.type != "cpu":
        return weight
    # Input-major in memory: the row-times-matrix product of plain decoding reads it up to twice as fast.
    return weight.float().t().contiguous().t() if weight.ndim == 2 else weight.float()


def linear(hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Multiply hidden [..., K] by weight [N, K] and add bias [N]; returns [..., N]."""
    return F.linear(hidden, weight, bias)


def head_logits(normed: Tensor, head: Tensor, *, softcap: float | None) -> Tensor:
    """Logits [..., V], float32, of normed states [..., D] by a head [V, D], capped where softcap is given (Gemma 2)."""
    logits = linear(normed, head).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def rms_norm(hidden: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Root-mean-square norm of [..., D] in float32, scaled by weight [D] (float32), in hidden's dtype."""
    return F.rms_norm(hidden.float(), weight.shape, weight, eps).to(hidden.dtype)


def rotate(heads: Tensor, *, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of heads [..., H, E] by cosine and sine [..., 1, E].

    The first half of sine carries the minus sign, so that rolling by E/2 completes the rotation.
    """
    rolled = heads.roll(heads.shape[-1] // 2, dims=-1)
    return torch.addcmul(heads * cosine, rolled, sine).to(heads.dtype)


def attention(
    query: Tensor, *, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Attention of query [B, H, R, E] over key and value [B, G, S, E]; returns [B, H, R, E].

    mask: [R, S] additive float32, or None where every slot is visible to every row.
    Where softcap is given, scores pass through softcap * tanh(score / softcap) (Gemma 2).
    """
    if softcap is None:
        bias = None if mask is None else mask.to(query.dtype)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    num_groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(num_groups, dim=1), value.repeat_interleave(num_groups, dim=1)
    scores = softcap * torch.tanh((query @ key.transpose(-1, -2)).float() * (scale / softcap))
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value


def causal_attention(query: Tensor, *, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of query [B, H, T, E] where row t sees the first t + 1 slots of key and value [B, G, T, E]."""
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def gate(gate_up: Tensor, *, activation: str) -> Tensor:
    """Gated activation of [..., 2F]: activation (silu or gelu_tanh) of the first half times the second; [..., F]."""
    gated, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gated) if activation == "silu" else F.gelu(gated, approximate="tanh")) * up


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [N, K] to int8 codes [N, K] and one symmetric scale per output, [N] float32."""
    scales = weight.float().abs().amax(dim=1) / 127
    # An all-zero row keeps its zeros whatever the scale.
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (weight.float() / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes.contiguous(), scales.contiguous()


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 weight [N, K] that int8 codes [N, K] and scales [N] stand for."""
    return codes.float() * scales[:, None]

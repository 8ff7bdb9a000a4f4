"""Which attention kernel a device takes, and what it allocates inside; tables as in ``kernels``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from . import autocast

if TYPE_CHECKING:
    from .kernels import Target

aten = torch.ops.aten


def _attention(
    target: Target,
    _original: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The kernel that PyTorch's ``sdp_utils`` picks for the target.

    A GPU below sm_80 has the memory-efficient kernel only, which refuses grouped KV heads and head sizes that
    do not align to 16 bytes; the flash kernel of newer GPUs takes no mask. A CPU's refuses dropout, values of another
    size than keys and a mask that learns. The math path is what remains.
    """
    grouped = key.size(-3) != query.size(-3)
    if target.device_type == "cpu":
        attn_mask = attn_mask if attn_mask is None else _numbers(attn_mask, query.dtype)
        uneven = query.size(-1) != value.size(-1) or (attn_mask is not None and attn_mask.requires_grad)
        if (grouped and not enable_gqa) or dropout_p or uneven:
            return _math_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        flash = aten._scaled_dot_product_flash_attention_for_cpu
        out: torch.Tensor = flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return out
    half = query.dtype in (torch.float16, torch.bfloat16)
    modern = target.compute_capability is not None and target.compute_capability >= (8, 0)
    modern = modern and torch.backends.cuda.flash_sdp_enabled()
    if modern and half and attn_mask is None and query.size(-1) <= 256 and query.size(-1) == value.size(-1):
        flash_cuda = aten._scaled_dot_product_flash_attention
        flashed: torch.Tensor = flash_cuda(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return flashed
    aligned = (query.size(-1) * query.element_size()) % 16 == 0 and (value.size(-1) * value.element_size()) % 16 == 0
    if grouped or not aligned:
        return _math_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if attn_mask is not None:
        attn_mask = _bias(attn_mask, query, key)
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    efficient = aten._scaled_dot_product_efficient_attention
    result: torch.Tensor = efficient(query, key, value, attn_mask, wants_gradient, dropout_p, is_causal, scale=scale)[0]
    return result


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """What PyTorch's attention.cpp makes of a mask for the memory-efficient kernel.

    A boolean mask becomes numbers, and rows that are no multiple of 8 are padded, before all heads share it.
    """
    mask = _numbers(mask, query.dtype)
    length = mask.size(-1)
    if length % 8:
        mask = torch.nn.functional.pad(mask, (0, 8 - length % 8))[..., :length]
    return mask.expand(*query.shape[:-1], key.shape[-2])


def _numbers(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as what is added to the scores (attention.cpp's ``convert_boolean_attn_mask``)."""
    if mask.dtype != torch.bool:
        return mask
    masked = torch.full((), -math.inf, dtype=dtype, device=mask.device)
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), masked)


def _math_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    out: torch.Tensor = aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]
    return out


def _efficient_backward(target: Target, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
    """``delta``, one fp32 number per query and head, and where the kernel adds gradients up.

    Sizes as in mem_eff_attention/kernel_backward.h, splits as in attention_backward.cu. Blocks are 64 x 64 where shared
    memory is small (sm_75, sm_86, sm_89), larger for long heads on sm_80 and sm_90. An fp32 kernel gets its ``delta``
    from a product as large as the output instead.
    """
    if target.device_type != "cuda":
        return []
    grad, query, key, value = args[:4]
    batch, heads, queries, head_size = query.shape
    value_size, half = value.size(-1), query.element_size() == 2
    longest = max(head_size, value_size)
    large = longest > 64 and target.compute_capability in ((8, 0), (9, 0))
    rows = 128 if large else 64
    columns = 128 if large and half and longest <= 128 else 64
    in_registers = not half or (longest <= rows and longest <= 128)
    sums = -(-queries // rows) * -(-head_size // columns) * (4 + rows * columns)
    workspace = batch * heads * sums * 4
    if not in_registers:
        splits = -(-key.size(2) // columns)
        if batch * heads >= 256 and key.size(2) <= 2 * columns:
            splits = 1
        total = batch * heads * max(1, min(splits, 200 // (batch * heads)))
        per_split = columns * sum(-(-size // rows) * rows for size in (head_size, value_size))
        workspace += (200 + batch * heads if target.affine else total) * per_split * 4
    product = 0 if half else grad.numel() * 4
    return [batch * heads * queries * 4, max(workspace, product)]


def _flash_backward(target: Target, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
    """fp32 sums of the queries' gradients, one number per query and head, and gradients of expanded KV heads.

    As in flash_attn/flash_api.cpp, where sequences are rounded up to 128 and heads to 32.
    """
    if target.device_type != "cuda":
        return []
    query, key = args[1], args[2]
    batch, heads, queries, head_size = query.shape
    rounded = -(-queries // 128) * 128
    expanded = 2 * [batch * heads * key.size(2) * head_size * query.element_size()] if key.size(1) != heads else []
    return [batch * heads * rounded * 4, batch * rounded * heads * (-(-head_size // 32) * 32) * 4, *expanded]


def _cpu_tile(query: torch.Tensor, key: torch.Tensor) -> tuple[int, int]:
    """Queries and keys that a thread of the CPU's flash kernel takes at once (ATen's FlashAttentionKernel.cpp)."""
    length = query.size(2)
    rows = 256 if length >= 768 else 64 if length >= 192 else 32
    return min(rows, length), min(512, key.size(2))


def _cpu_flash(_target: Target, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
    """Per thread a tile of scores, the rows' sums, maxima and outputs, and the tile again in half precision."""
    query, threads = args[0], torch.get_num_threads()
    rows, columns = _cpu_tile(query, args[1])
    half = [threads * rows * columns * 2] if query.element_size() == 2 else []
    return [threads * rows * (columns + 2 + query.size(-1)) * 4, *half]


def _cpu_flash_backward(_target: Target, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
    """Per thread two tiles, of scores and their gradients, again in half precision, and the rows' sums."""
    query, threads = args[1], torch.get_num_threads()
    rows, columns = _cpu_tile(query, args[2])
    half = [threads * 2 * rows * columns * 2] if query.element_size() == 2 else []
    return [threads * 2 * rows * columns * 4, threads * rows * 4, *half]


CALLS: dict[tuple[Any, str], Callable[..., Any]] = {
    (torch.nn.functional, "scaled_dot_product_attention"): autocast.as_cast(_attention),
}

AFTER_RESULT: dict[Any, Callable[..., list[int]]] = {
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _cpu_flash,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _cpu_flash_backward,
}

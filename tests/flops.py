"""PyTorch's own count of floating-point operations, with the CPU's fused attention, which it leaves out."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten


def counting() -> FlopCounterMode:
    """A context that counts; its ``get_total_flops`` is the answer."""
    attention = {
        _aten._scaled_dot_product_flash_attention_for_cpu: lambda *a, **_: sdpa_flop_count(*a[:3]),
        _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *a, **_: sdpa_backward_flop_count(*a[:4]),
    }
    return FlopCounterMode(display=False, custom_mapping=attention)

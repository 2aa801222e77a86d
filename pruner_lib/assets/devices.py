"""What a device can do."""

from __future__ import annotations

import torch


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware.

    Where it only imitates them, as a CPU without AVX-512 BF16 or AMX does, products take about six
    times as long as in float32.

    Args:
        device: any; kinds other than the CPU and CUDA count as not having it.
    """
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    x86 = any(getattr(torch.cpu, name, lambda: False)() for name in known)
    return x86 or bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)())

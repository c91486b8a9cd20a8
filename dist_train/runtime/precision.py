"""The type that matrix products run in."""

import torch

from dist_train.sections import RuntimeSettings


def choose_precision(settings: RuntimeSettings, device: torch.device) -> torch.dtype:
    """Return the type that matrix products run in; `auto` asks the hardware."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if settings.precision != "auto":
        return named[settings.precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu":
        # Not torch.amp.is_autocast_available: a CPU without the instructions emulates bf16, several times slower.
        return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32
    return torch.float32


def _cpu_multiplies_bf16() -> bool:
    # Private names, which other versions of torch may lack: then bf16 is simply not chosen by itself.
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(check() for check in checks if check)

"""In which precision a run computes; losses, master weights and optimiser states are fp32 in every case."""

from __future__ import annotations

import torch

from stages.errors import StageError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """What "auto" means on this device, and why; anything else stays what it is.

    avx512_bf16 without tiles is no reason for bf16: there, oneDNN's bf16 product takes longer than its fp32 one (47 ms
    against 28 ms for 128 x 256 x 49,152 on one core). Raises StageError for fp16 on a CPU that cannot multiply it.
    """
    if asked == "fp16" and device.type == "cpu" and not cpu_multiplies_fp16():
        raise StageError(
            "this CPU cannot train in fp16", hint="set distill.precision to auto, fp32 or bf16, or train on a GPU"
        )
    if asked != "auto":
        return asked, "as the recipe says"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU multiplies it") if native else ("fp32", "this GPU does not multiply bf16")
    if torch.cpu._is_amx_tile_supported():
        return "bf16", "this CPU has matrix tiles for it"
    return "fp32", "this CPU has no matrix tiles for bf16"


def cpu_multiplies_fp16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())

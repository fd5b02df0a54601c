"""Models that another tool has quantized: how their config.json and their tensors show it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OURS = "lowrank_lab"
ENTRIES = ("quantization_config", "compression_config")
FLOATS = ("F64", "F32", "F16", "BF16", "")  # "": not known
# The last part of a tensor's name, by what writes it. Dequantized models have none of them.
PARTS = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "weight_packed": "compressed-tensors",
    "weight_scale": "compressed-tensors or FP8",
    "weight_scale_inv": "FP8",
    "weight_zero_point": "compressed-tensors",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
    "W_q": "HQQ",
    "Qidxs": "QuIP#",
    "codebooks": "AQLM",
    "weight_qdata": "torchao",
    "_weight_qdata": "torchao",
    "_data": "quanto",
    "gate_up_proj_blocks": "MXFP4",
    "down_proj_blocks": "MXFP4",
}


def is_ours(settings: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a checkpoint of lowrank_lab."""
    entry = settings.get("quantization_config")
    return isinstance(entry, Mapping) and entry.get("quant_method") == OURS


def entry_in(settings: Mapping[str, Any]) -> str | None:
    """What config.json says of a quantization that is not ours, in words: ``gptq, 4 bits``. None where nothing."""
    for name in ENTRIES:
        entry = settings.get(name)
        if not isinstance(entry, Mapping) or is_ours(settings):
            continue
        method = entry.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in entry else name)
        bits = entry.get("bits", entry.get("w_bit"))
        return f"{method}, {bits} bits" if isinstance(bits, int) else str(method)
    return None


def tensor_in(tensors: Mapping[str, str]) -> tuple[str, str] | None:
    """A tensor that only a quantized model has, and what writes such ones; None where there is none.

    ``tensors`` has the dtypes by name, as ``weight_files.tensors_in`` gives them.
    """
    for name, dtype in tensors.items():
        last = name.rpartition(".")[2]
        if last in PARTS:
            return name, PARTS[last]
        if ".quant_state." in name or last.startswith("bitsandbytes__"):
            return name, "bitsandbytes"
        if last == "weight" and dtype not in FLOATS:
            return name, dtype
    return None


def refusal(tool: str, shown: str) -> str:
    """Why such a model is not used; ``shown`` is what shows it."""
    return (
        f"its weights are quantized by another tool already ({tool}: {shown}), and lowrank_lab needs floats: "
        "use the original model, or dequantize this one with that tool and save it"
    )

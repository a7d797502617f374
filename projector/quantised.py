"""Quantised weights, told by the names and dtypes that only they have, and how they become such as can be merged."""

from collections.abc import Iterable

from projector.errors import BadSchema, Reason
from projector.text import FOLDER, OUT, shown

GPTQ, FP8, MXFP4, BITSANDBYTES = "GPTQ or AWQ", "FP8", "MXFP4", "bitsandbytes"
NAMES = {
    "qweight": GPTQ,
    "qzeros": GPTQ,
    "g_idx": "GPTQ",
    "scales": "GPTQ, AWQ or MXFP4",
    "blocks": MXFP4,
    "weight_scale": "FP8 or compressed-tensors",
    "weight_scale_inv": FP8,
    "input_scale": FP8,
    "k_scale": FP8,
    "v_scale": FP8,
    "weight_scale_2": "NVFP4",
    "weight_global_scale": "NVFP4",
    "input_global_scale": "NVFP4",
    "weight_packed": "compressed-tensors",
    "weight_zero_point": "compressed-tensors",
    "weight_shape": "compressed-tensors",
    "SCB": BITSANDBYTES,
    "absmax": BITSANDBYTES,
    "quant_map": BITSANDBYTES,
    "weight_format": BITSANDBYTES,
    "bitsandbytes__nf4": BITSANDBYTES,
    "bitsandbytes__fp4": BITSANDBYTES,
    "weight_scales": "EETQ",
    "W_q": "HQQ",
    "weight_qdata": "torchao",
    "codebooks": "AQLM",
}
"""How the last part of a name ends that only quantised models have, and which those are."""

BEFORE = (
    "quantised weights cannot be merged: take the model as it was before it was quantised, or drop the adapter that was"
    " trained on it"
)
WIDEN = (
    "quantised weights cannot be merged: take the model as it was before, or widen it with transformers:"
    f' safetensors.torch.save_model(AutoModelForCausalLM.from_pretrained("{FOLDER}", quantization_config='
    f'{{config}}(dequantize=True)), "{OUT}.safetensors") and drop that (save_pretrained would quantise it again)'
)


def hint(scheme: str) -> str:
    """What to do with weights quantised so."""
    configs = {"FP8": "FineGrainedFP8Config", "MXFP4": "Mxfp4Config"}
    return WIDEN.format(config=configs[scheme]) if scheme in configs else BEFORE


def check_not_quantised(names: Iterable[str]) -> None:
    """Raises BadSchema where a tensor's name is one that only quantised models have."""
    found = {scheme: name for name in names if (scheme := _scheme(name))}
    for scheme, name in sorted(found.items(), key=lambda item: hint(item[0]) == BEFORE):  # what says more comes first
        raise BadSchema(
            Reason.UNSUPPORTED_DTYPE, f"{shown(name)} belongs to quantised weights ({scheme})", hint(scheme)
        )


def _scheme(name: str) -> str | None:
    last = name.rpartition(".")[2]
    return next((scheme for end, scheme in NAMES.items() if last == end or last.endswith(f"_{end}")), None)

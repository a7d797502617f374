"""LoRA adapters as other tools save them, and what PEFT would have saved in their place.

    mlx-lm         X.lora_a (in, r), X.lora_b (r, out)                     delta = scale (lora_a lora_b)'
    torchtune      X.lora_a.weight (r, in), X.lora_b.weight (out, r)       delta = alpha / r lora_b lora_a
    sd-scripts     lora_unet_X.lora_down.weight, .lora_up.weight, .alpha   the same, alpha = r where there is none
    diffusers      unet.X.lora.down.weight, .lora.up.weight, or unet.X.lora_A.weight, .lora_B.weight

In sd-scripts' names the dots of X are underscores: only the base's own names say where they were.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import Tensor

from projector.errors import BadSchema, Reason
from projector.lora.keys import PREFIX as OF_PEFT
from projector.lora.keys import A, B
from projector.text import BASE, EXPERT, FOLDER, NEW, OUT, listed, shown

ALPHA = "alpha"
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|tok_embeddings|word_embeddings|embed_in|shared)$")
OLD_ATTENTION = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.")


@dataclass(frozen=True)
class Tool:
    """One tool's way. ends: the end of a tensor's name -> its part. begins: what a name must begin with, None for
    anything; that is taken off. says_alpha: how its own loader reads a file without any alpha: as the rank, or not at
    all. fuse: how the tool itself makes a whole model."""

    name: str
    ends: Mapping[str, str]
    fuse: str
    begins: str | None = None
    turned: bool = False
    underscored: bool = False
    alpha_is_rank: bool = False

    def split(self, name: str) -> tuple[str, str, str] | None:
        """(what it begins with, module, part) of one of its tensors, None of any other."""
        name = OLD_ATTENTION.sub(lambda found: f".{found[1]}{'.0' * (found[1] == 'to_out')}.lora.", name)
        end = next((end for end in self.ends if name.endswith(end)), None)
        start = re.match(self.begins, name) if self.begins else None
        if end is None or (self.begins and start is None):
            return None
        first = start[0] if start else ""
        return first, name.removeprefix(first).removesuffix(end), self.ends[end]


DIFFUSERS = (
    f'with diffusers: pipe.load_lora_weights("{EXPERT}"), pipe.fuse_lora(), pipe.unload_lora_weights(), then'
    " save_pretrained of the one model that was trained (pipe.unet, pipe.transformer)"
)
TORCHTUNE = "save it with torchtune's FullModelHFCheckpointer, which writes the whole model by the names it usually has"
MLX = Tool(
    "mlx-lm",
    {".lora_a": A, ".lora_b": B},
    f"`mlx_lm.fuse --model {BASE} --adapter-path {FOLDER} --save-path {OUT}`",
    turned=True,
)
TOOLS = (
    MLX,
    Tool(
        "torchtune",
        {".lora_a.weight": A, ".lora_b.weight": B},
        TORCHTUNE,
    ),
    Tool(
        "sd-scripts (kohya)",
        {".lora_down.weight": A, ".lora_up.weight": B, ".alpha": ALPHA},
        f"merge it {DIFFUSERS}",
        begins=r"lora_[a-z]+\d?_",
        underscored=True,
        alpha_is_rank=True,
    ),
    Tool(
        "diffusers",
        {
            ".lora.down.weight": A,
            ".lora.up.weight": B,
            ".lora_linear_layer.down.weight": A,
            ".lora_linear_layer.up.weight": B,
            ".lora_A.weight": A,
            ".lora_B.weight": B,
            ".alpha": ALPHA,
        },
        f"merge it {DIFFUSERS}",
        begins=r"(unet|transformer|prior|controlnet|text_encoder(_\d)?)\.(?!h\.)",
    ),
)
OTHERS = (
    (
        re.compile(r"(^|\.)layers\.\d+\.(attn\.(q|k|v|output)_proj|mlp\.w\d)\.lora_[ab]\.weight$"),
        "torchtune by its own names, whose q and k lie in another order",
        TORCHTUNE,
    ),
    (
        re.compile(r"adapter\.linear_(in|out)\.weight$"),
        "NeMo or Megatron",
        "export it to PEFT's form (nemo: llm.export_ckpt(..., target='hf-peft')), or merge it there, export the whole "
        "model to Hugging Face's form and drop that",
    ),
    (re.compile(r"\.(hada_w\d_[ab]|lokr_w\d(_[ab])?|oft_blocks|oft_diag)$"), "LyCORIS", f"merge it {DIFFUSERS}"),
    (
        re.compile(r"\.(ia3_l|oft_R|boft_[RS]|vera_lambda_[bd]|vblora_\w+|randlora_\w+|hra_u|lora_E)(\.|$)"),
        "PEFT, of another kind than LoRA",
        "merge it into its base first (peft: model.merge_and_unload()) and drop the whole model",
    ),
)
"""Recognised, but not converted: what names such an adapter, whose it is, and what to do."""


def recognised(names: Iterable[str]) -> tuple[Tool, str] | None:
    """Whose adapter the tensors are, and one of them; None where they are of no tool that is known here."""
    for name in names:
        for tool in TOOLS:
            if (found := tool.split(name)) and found[2] in (A, B):
                return tool, name
    return None


def command(tool: Tool, names: Collection[str], where: str = EXPERT) -> str:
    """What makes a PEFT adapter of these tensors. where: the file that holds them; of mlx-lm its folder serves too.

    Where they are for several models, the first that they name, and how to name the others: only the home's base tells.
    """
    base = f" --base {BASE}" if tool.underscored else ""
    silent = not (tool.turned or tool.alpha_is_rank or any(name.endswith(f".{ALPHA}") for name in names))
    firsts = sorted({parts[0] for name in names if (parts := tool.split(name))})
    only = f" --only {firsts[0]}" if len(firsts) > 1 else ""
    said = ", where N is the alpha that it was trained with" if silent else ""
    others = f"; or with --only {' or '.join(firsts[1:])}, whichever this home's base is" if only else ""
    return f"`mainstem convert {where} {NEW}{base}{' --alpha N' if silent else ''}{only}`{said}{others}"


def recognised_other(names: Iterable[str]) -> tuple[str, str, str] | None:
    """Whose adapter it is, what to do, and one of its tensors, where it cannot be converted here."""
    return next(
        ((whose, hint, name) for name in names for pattern, whose, hint in OTHERS if pattern.search(name)), None
    )


@dataclass(frozen=True)
class Said:
    """What is known of an adapter beside its tensors.

    scale: what B A is multiplied by. config: by what its names begin with, what PEFT would have in adapter_config.json.
    alpha: for an adapter that says neither. only: what the names must begin with; empty for all. modules: the base's,
    None where they are not known.
    """

    scale: float | None = None
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    alpha: float | None = None
    only: str = ""
    modules: Collection[str] | None = None


def as_peft(tool: Tool, tensors: Mapping[str, Tensor], said: Said) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by PEFT's names, and adapter_config.json. Raises BadSchema where it would have to guess."""
    first, modules = _modules(tool, tensors, said)
    found: dict[str, Tensor] = {}
    config = said.config.get(first)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, parts in modules.items():
        if A not in parts or B not in parts:
            _refuse(f"{shown(module)} has only one of its two factors", "convert the whole file, as it was saved")
        a, b = tensors[parts[A]], tensors[parts[B]]
        if tool.turned and a.ndim == b.ndim == 2:
            a, b = a.T, b.T
        if min(a.ndim, b.ndim) < 2 or (tool.turned and a.ndim > 2) or a.shape[0] != b.shape[1]:
            _refuse(
                f"{shown(module)} has factors {list(a.shape)} and {list(b.shape)}, which are no LoRA of one layer",
                _whole(tool),
            )
        ranks[module] = int(a.shape[0])
        alphas[module] = 0 if config else _alpha(tool, module, ranks[module], tensors, parts, said)
        kind = "lora_embedding_{}" if EMBEDDING.search(module) else "lora_{}.weight"
        for letter, factor in (("A", a), ("B", b)):
            found[f"{OF_PEFT}{module}.{kind.format(letter)}"] = factor.contiguous()
    return found, dict(config) if config else _config(ranks, alphas)


def _modules(tool: Tool, tensors: Mapping[str, Tensor], said: Said) -> tuple[str, dict[str, dict[str, str]]]:
    """(what the names begin with, the parts of each module by the base's name of it)"""
    flat: dict[str, list[str]] = {}
    for module in sorted(said.modules or ()):
        flat.setdefault(module.replace(".", "_"), []).append(module)
    split = {name: tool.split(name) for name in tensors if name.startswith(said.only)}
    if foreign := [name for name, parts in split.items() if parts is None]:
        _refuse(f"it also holds {listed(foreign)}, which is more than a LoRA", _whole(tool))
    firsts = sorted({parts[0] for parts in split.values() if parts})
    if not firsts:
        _refuse(f"no tensor's name begins with {shown(said.only)}", "mend --only")
    if len(firsts) > 1:
        _refuse(
            f"it is for several models: {listed(firsts)}",
            f"say which this home's base is: --only {firsts[0]} (or {' or '.join(firsts[1:])})",
        )
    found: dict[str, dict[str, str]] = {}
    for name, parts in split.items():
        if parts is None:
            continue
        _, module, part = parts
        if tool.underscored:
            module = _named(module, flat, said)
        if part in found.setdefault(module, {}):
            _refuse(f"{shown(name)} and {shown(found[module][part])} are the same part", _whole(tool))
        found[module][part] = name
    return firsts[0], found


def _named(flat: str, modules: Mapping[str, list[str]], said: Said) -> str:
    """The base's name of a module whose dots are underscores."""
    if said.modules is None:
        _refuse(
            f"its names have underscores for dots ({shown(flat)})",
            "name the base, whose names say which is which: --base, with the folder state/base of the home",
        )
    found = modules.get(flat, [])
    if len(found) != 1:
        _refuse(
            f"{shown(flat)} could be {listed(found)}" if found else f"the base has no module {shown(flat)}",
            f"merge it {DIFFUSERS}",
        )
    return found[0]


def _alpha(
    tool: Tool, module: str, rank: int, tensors: Mapping[str, Tensor], parts: Mapping[str, str], said: Said
) -> float:
    if ALPHA in parts and tensors[parts[ALPHA]].numel() == 1:
        alpha = float(tensors[parts[ALPHA]])
        return alpha if alpha or not tool.alpha_is_rank else float(rank)  # which reads 0 as none
    if said.scale is not None:
        return said.scale * rank
    if said.alpha is not None:
        return said.alpha
    if not tool.alpha_is_rank:
        _refuse(
            f"it does not say how its LoRA of {shown(module)} is scaled",
            f"say the alpha that it was trained with: --alpha N (its rank is {rank}, which diffusers' scripts take)",
        )
    return float(rank)


def _config(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """adapter_config.json: what most modules have, and patterns for the others."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {f"^{re.escape(module)}": own for module, own in ranks.items() if own != rank},
        "alpha_pattern": {f"^{re.escape(module)}": own for module, own in alphas.items() if own != alpha},
    }


def _whole(tool: Tool) -> str:
    return f"{tool.fuse}; drop that whole model"


def _refuse(detail: str, hint: str) -> NoReturn:
    raise BadSchema(Reason.UNEXPECTED_TENSOR, detail, hint)

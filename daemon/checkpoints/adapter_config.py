"""Reads a PEFT adapter's adapter_config.json from its descriptor. What cannot be merged is refused by its own name."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from sys import float_info
from typing import Any

from daemon.checkpoints.adapter_modules import is_tied
from daemon.checkpoints.hints import inner
from daemon.checkpoints.opening import Stamp, not_a_file, stamp
from daemon.errors import NotYet, Reason, Refused
from projector.errors import BadSchema
from projector.lora.config import MERGE_FIRST, LoraConfig
from projector.lora.expert import LoraExpert
from projector.lora.other_tools import MLX, command, recognised, recognised_other
from projector.lora.patterns import Patterns
from projector.lora.targets import Targets
from projector.spec import Schema
from projector.text import listed, once_each, shown

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"
MAX_CONFIG_BYTES = 4 << 20
FACTOR = re.compile(r"\.lora_(embedding_)?[AB](\.|$)")
TRAINERS_OWN = re.compile(r"checkpoint-\d+|\..*")

VARIANTS = {
    "alora_invocation_tokens": ("Activated LoRA (aLoRA)", "it works on some tokens only and cannot be merged"),
    "arrow_config": ("Arrow routing", "it chooses among adapters as it runs: drop those adapters one by one"),
    "kasa_config": ("KaSA", MERGE_FIRST),
    "layer_replication": ("layer_replication", "its model has more layers than the base: merge into a base like it"),
    "megatron_config": ("a Megatron adapter", "convert it to peft's own layers"),
    "monteclora_config": ("MonteCLoRA", MERGE_FIRST),
    "target_parameters": ("target_parameters", f"peft sets it by itself for stacked experts: {MERGE_FIRST}"),
    "use_bdlora": ("BD-LoRA", MERGE_FIRST),
    "use_qalora": ("QA-LoRA", MERGE_FIRST),
    "velora_config": ("VeLoRA", MERGE_FIRST),
}
"""The key that turns it on -> what it is called, and what to do."""

NO_WEIGHTS_CHANGED = {
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT"),
    *("POLY", "XLORA", "LILY", "SHADOW"),
}
"""The kinds of PEFT that merge_and_unload() cannot merge: they change what goes into a model, or choose as it runs."""

SOUND_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Ways to start the factors that leave the base as it is."""

OTHER_STARTS = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}
"""Those that change it: the adapter is to be added to what is left of it."""

NOT_CONVERTED = (
    "save it with path_initial_model_for_weight_conversion=FOLDER, which makes an ordinary LoRA of it: FOLDER is the"
    " adapter as it was saved before training, with model.peft_config['default'].init_lora_weights = True; where nobody"
    " saved that, load base and adapter with peft, model.merge_and_unload(), and drop the whole model"
)

TIED_BY_PEFT = "embed_tokens.weight"  # other embeddings it trains alone, whatever ensure_weight_tying says
FLAGS = ("use_rslora", "fan_in_fan_out", "lora_bias", "use_dora")
USED = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias", *FLAGS),
    *("trainable_token_indices", "init_lora_weights"),
}
NO_MATTER = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout"),
    *("lora_ga_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision"),
    *("runtime_config", "target_modules", "task_type"),
    *("lora_dtype", "lorap_emb_lr", "lorap_lr_ratio"),  # of ms-swift: how it was trained
    "merge_weights",  # of peft's first versions: whether layers merged while they evaluated
}
"""Keys that say where the adapter is, which its tensors' names say too, or how it was trained."""


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter's config, held by descriptor: its digest, and what it says."""

    fd: int
    stamp: Stamp
    sha256: str
    config: LoraConfig


def open_adapter(fd: int) -> OpenAdapter:
    """Reads adapter_config.json. Raises Refused, or NotYet where it may only be unfinished."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise not_a_file(ADAPTER)
    if status.st_size > MAX_CONFIG_BYTES:
        raise _bad(f"it has {status.st_size} bytes, {MAX_CONFIG_BYTES} are allowed")
    text = os.pread(fd, MAX_CONFIG_BYTES, 0)
    try:
        content = json.loads(text, object_pairs_hook=once_each(lambda: _bad("a field is there twice")))
    except (ValueError, RecursionError):
        raise NotYet(Reason.ADAPTER, f"{ADAPTER} is not JSON", "copy it again") from None
    if not isinstance(content, dict):
        raise _bad("it is not an object with fields")
    return OpenAdapter(fd, stamp(status), hashlib.sha256(text).hexdigest(), read_config(content))


def check_alone(folder_fd: int, names: Collection[str], whole: Collection[str]) -> None:
    """Raises Refused where a folder with an adapter also holds one of `whole`, the files of a whole model, or another
    adapter just below: which of them is the expert, nobody said. What a trainer keeps as checkpoint-N or under a name
    with a dot before it does not count.
    """
    if beside := sorted(set(whole).intersection(names)):
        detail = f"the folder holds an adapter and a whole model, {beside[0]}"
        raise Refused(Reason.ADAPTER, detail, "drop the one that was trained, alone: one folder is one expert")
    if below := [name for name in adapters_below(folder_fd) if not TRAINERS_OWN.fullmatch(name)]:
        detail = f"the folder holds more adapters, in {listed(below)}"
        raise Refused(Reason.ADAPTER, detail, "drop each adapter as a folder of its own")


def adapters_below(folder_fd: int) -> list[str]:
    """The folders just below that hold an adapter."""
    with os.scandir(folder_fd) as entries:
        folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    return sorted(name for name in folders if os.access(f"{name}/{ADAPTER}", os.F_OK, dir_fd=folder_fd))


def check_no_factors(names: Iterable[str], name: str, *, in_folder: bool) -> None:
    """Raises Refused where tensors that should be a model's are an adapter's. name: of the file; `in_folder`: that is
    in a folder that was dropped, else it was dropped itself."""
    names = list(names)
    if other := recognised_other(names):
        whose, hint, tensor = other
        raise Refused(Reason.ADAPTER, f"{shown(name)} holds an adapter of {whose}, {shown(tensor)}", hint)
    if found := recognised(names):
        tool, tensor = found
        detail = f"{shown(name)} holds an adapter as {tool.name} saves it, {shown(tensor)}"
        where = inner(name if in_folder and tool is not MLX else None)  # mlx-lm's has its scale beside it
        made = f"make a PEFT adapter of it, and drop that: {command(tool, names, where)}"
        beside = f"put mlx-lm's own {ADAPTER} beside it, which has its scale; then "
        hint = beside + made if tool is MLX and not in_folder else made
        raise Refused(Reason.ADAPTER, detail, hint)
    if factor := next((tensor for tensor in names if FACTOR.search(tensor)), None):
        raise Refused(
            Reason.ADAPTER,
            f"{shown(name)} holds the factors of a LoRA adapter, {shown(factor)}",
            f"drop the adapter's folder: {ADAPTER_WEIGHTS} by that name, and {ADAPTER} beside it",
        )


def check_tied(expert: LoraExpert, base: Schema, base_config: Mapping[str, Any]) -> None:
    """Raises Refused where the adapter brings a whole embedding (modules_to_save) to which the base's output layer is
    tied: peft trained a copy of its own and left the output layer as it was, and one matrix cannot be both.

    base_config: the base's config.json, which says whether the two are tied.
    """
    for spec in base.values():
        if is_tied(spec, base, base_config) and expert.replaces(spec.name):
            tying = "train it with ensure_weight_tying=True, or " if spec.name.endswith(TIED_BY_PEFT) else ""
            raise _bad(
                f"it brings {shown(spec.name)} whole, for the embedding alone; the base's output layer is tied to it",
                f"{tying}give this home a base in which the two are not tied: saved with tie_word_embeddings=False and"
                " both matrices",
            )


def check_not_merged(expert: LoraExpert) -> None:
    """Raises Refused where the adapter is already in the weights that its file brings for the layers under it, as
    model.state_dict() has them after merge_adapter(): it would count twice."""
    if name := expert.merged_already():
        detail = f"the weight that {ADAPTER_WEIGHTS} has for {shown(name)} has the adapter in it already"
        hint = "save it with save_pretrained, after model.unmerge_adapter(); or merge_and_unload(), and drop the model"
        raise _bad(detail, hint)


def read_config(content: Mapping[str, Any]) -> LoraConfig:
    """What the fields of adapter_config.json say. Raises Refused, which names what cannot be merged."""
    kind = content.get("peft_type")
    if "lora_parameters" in content:
        raise _bad("it is mlx-lm's", f"make a PEFT adapter of it, and drop that: {command(MLX, ())}")
    if kind != "LORA":
        detail = f"peft_type is {_value(kind)}" if kind else "it has no peft_type"
        if kind in NO_WEIGHTS_CHANGED:
            raise _bad(f"{detail}, which changes no weights: no merge can take it", "train a LoRA, or the whole model")
        raise _bad(detail, f"only LORA can be merged here: {MERGE_FIRST}")
    for key, (name, hint) in VARIANTS.items():
        if _is_set(content.get(key)):
            raise _bad(f"{key} is set: {name} is not supported", hint)
    _check_start(content.get("init_lora_weights"))
    unknown = sorted(key for key in content.keys() - USED - NO_MATTER - VARIANTS.keys() if _is_set(content[key]))
    if unknown:
        raise _bad(f"it sets what is not known here, and may change the weights: {listed(unknown)}", MERGE_FIRST)
    if content.get("bias", "none") not in ("none", "all", "lora_only"):
        raise _bad(f"bias is {_value(content['bias'])}", "it is none, all or lora_only")
    config = LoraConfig(
        r=_rank(content.get("r"), "r"),
        lora_alpha=_number(content.get("lora_alpha"), "lora_alpha"),
        rank_pattern={key: _rank(value, "rank_pattern") for key, value in _map(content, "rank_pattern").items()},
        alpha_pattern={key: _number(value, "alpha_pattern") for key, value in _map(content, "alpha_pattern").items()},
        trainable_token_indices=_tokens(content.get("trainable_token_indices")),
        targets=_targets(content),
        **{key: _flag(content, key) for key in FLAGS},
    )
    for patterns in (config.rank_pattern, config.alpha_pattern):
        try:
            Patterns(patterns)
        except BadSchema as error:
            raise _bad(str(error), error.hint) from None
    return config


def _check_start(start: Any) -> None:
    """Raises Refused where the factors started from a changed base; a converted adapter says `true` here."""
    if start is None or isinstance(start, bool) or start in SOUND_STARTS:
        return
    name = next((name for prefix, name in OTHER_STARTS.items() if str(start).lower().startswith(prefix)), None)
    if name is None:
        raise _bad(f"init_lora_weights is {_value(start)}, which is not known here", MERGE_FIRST)
    raise _bad(
        f"init_lora_weights is {_value(start)}: {name} changed the base, and the adapter is not converted back",
        NOT_CONVERTED if name != "LoftQ" else "LoftQ replaces the base by a quantised one: " + MERGE_FIRST,
    )


def _is_set(value: Any) -> bool:
    """False for the values that leave a field of peft's off."""
    return value is not None and value is not False and value not in ([], {}, "")


def _rank(value: Any, key: str) -> int:
    if type(value) is not int or not 1 <= value <= 1 << 20:
        raise _bad(f"{key} has {_literal(value)}, a rank is a whole number from 1")
    return value


def _number(value: Any, key: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= float_info.max:
        raise _bad(f"{key} has {_literal(value)}, which is no number")
    return float(value)


def _flag(content: Mapping[str, Any], key: str) -> bool:
    value = content.get(key, False)
    if value is not None and not isinstance(value, bool):
        raise _bad(f"{key} is {_literal(value)}, not true or false")
    return bool(value)


def _map(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise _bad(f"{key} is no object")
    return value


def _tokens(value: Any) -> Mapping[str, Sequence[int]]:
    """By the end of the embedding's name; "" where the config has a list for the only one there is."""
    by_name = value if isinstance(value, dict) else {"": value} if value is not None else {}
    for rows in by_name.values():
        if not isinstance(rows, list) or not all(type(row) is int for row in rows):
            raise _bad("trainable_token_indices are no lists of whole numbers")
    return by_name


def _targets(content: Mapping[str, Any]) -> Targets:
    """Which modules it is for; what is of another form than PEFT writes says nothing."""
    if content.get("ensure_weight_tying"):  # which adds modules that are not in target_modules
        return Targets()

    def names(key: str) -> str | Sequence[str] | None:
        value = content.get(key)
        known = isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))
        return value if known else None

    layers = content.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    sound = isinstance(layers, list) and all(type(layer) is int for layer in layers)
    return Targets(
        names("target_modules"),
        names("exclude_modules"),
        layers if sound and not content.get("layers_pattern") else None,
    )


def _value(value: Any) -> str:
    return shown(str(value))


def _literal(value: Any) -> str:
    """As it stands in the file: "4" is not 4."""
    return shown(json.dumps(value))


def _bad(detail: str, hint: str = "save the adapter again with peft's save_pretrained") -> Refused:
    return Refused(Reason.ADAPTER, f"{ADAPTER}: {detail}", hint)

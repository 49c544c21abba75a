"""The files that the authors of one-step methods release, as weights: each known by its content, never by its name.

A reader uses every tensor of a file or raises WeightsError. Layouts: OSEDiff's, which TADSR's extends by time layers;
PiSA-SR's with two sets of adapters; HYPIR's flat list; OMGSR's two peft folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from .architecture import UNetLayout
from .errors import WeightsError, reading
from .foreign import describe_content
from .keys import Table, rename, unet_table, vae_table_of
from .lora import Adapter, check_keys
from .methods import BASE, HYPIR, OMGSR, OSEDIFF, PISA_SR, TADSR, Method
from .pickles import read_pickle
from .weights import UNET_PREFIX, Metadata, TadsrWeights

OFFICIAL_ALPHA = 8.0  # of TADSR, OSEDiff and PiSA-SR; not stored in the files: scale 2 at rank 4
GROUPS = ("encoder", "decoder", "others")  # of the UNet's modules: one adapter each
MODULE_LISTS = {f"default_{group}": f"unet_lora_{group}_modules" for group in GROUPS}  # adapter name: list of modules
VAE_MODULE_LIST, VAE_ADAPTERS = "vae_lora_encoder_modules", ("default_encoder",)
PARTS = {"unet": "state_dict_unet", "vae": "state_dict_vae", "time": "state_dict_vae_time"}
RANKS = {"unet": "rank_unet", "vae": "rank_vae"}
OSEDIFF_KEYS = {PARTS["unet"], PARTS["vae"], *RANKS.values(), *MODULE_LISTS.values(), VAE_MODULE_LIST}
SETS = ("pix", "sem")  # of PiSA-SR: for pixels and for semantics
PISA_RANKS = {name: f"lora_rank_unet_{name}" for name in SETS}
PISA_LISTS = {
    name: {f"default_{group}_{name}": f"unet_lora_{group}_modules_{name}" for group in GROUPS} for name in SETS
}
PISA_KEYS = {PARTS["unet"], *PISA_RANKS.values(), *(key for lists in PISA_LISTS.values() for key in lists.values())}
HYPIR_ADAPTER = "default"
LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.(?P<adapter>[^.]+)\.weight")
# conv_in is trained in full, besides its LoRA
FULL_KEY = re.compile(r"(?P<module>conv_in)\.base_layer\.(?P<part>weight|bias)")
PEFT_PREFIX = "base_model.model."
PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
PEFT_UNSUPPORTED = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")


def read_release(path: Path) -> TadsrWeights:
    """Returns the weights in a file, or a folder of peft adapters, that authors of a known method release.

    path: a folder may be given by a file in one of its folders. Tensors of a pickle are views of the file. Raises
    WeightsError for anything else, saying what it seems to be.
    """
    folder = peft_folder(path)
    with reading(path, "a weights file of TADSR, OSEDiff, PiSA-SR, OMGSR or HYPIR"):
        return weights_from_peft(folder) if folder else weights_from_official(read_pickle(path))


def weights_from_official(content: Mapping[str, Any]) -> TadsrWeights:
    """Returns the weights in a released checkpoint's dict; uses every tensor or raises WeightsError."""
    if PARTS["unet"] in content and not describe_content(content):
        return _pisa_sr(content) if PISA_RANKS["pix"] in content else _osediff_or_tadsr(content)
    if _is_hypir(content):
        return _hypir(content)
    raise WeightsError(describe_content(content) or _unknown(content))


def _osediff_or_tadsr(content: Mapping[str, Any]) -> TadsrWeights:
    time = content.get(PARTS["time"])
    method = OSEDIFF if time is None else TADSR
    check_keys(f"official {method.name} checkpoint", set(content), OSEDIFF_KEYS | ({PARTS["time"]} & set(content)))
    state = content[PARTS["unet"]]
    full = {key: m for key in state if (m := FULL_KEY.fullmatch(key))}
    lora = _adapters({k: t for k, t in state.items() if k not in full}, content[RANKS["unet"]], MODULE_LISTS)
    for adapter, name in MODULE_LISTS.items():
        _check_modules(name, content[name], lora[adapter])
    table = _unet_table(lora.values())
    vae_lora = _adapters(content[PARTS["vae"]], content[RANKS["vae"]], VAE_ADAPTERS)["default_encoder"]
    _check_modules(VAE_MODULE_LIST, content[VAE_MODULE_LIST], vae_lora)
    encoder_table = vae_table_of([*(time or ()), *vae_lora])
    return TadsrWeights(
        unet_lora=_named(lora.values(), lambda module: UNET_PREFIX + rename(module, table)),
        unet_full={f"{UNET_PREFIX}{rename(m['module'], table)}.{m['part']}": state[key] for key, m in full.items()},
        encoder_lora=_named([vae_lora], lambda module: rename(module, encoder_table)),
        encoder_time={rename(key, encoder_table): tensor for key, tensor in (time or {}).items()},
        prompt=None,
        base={},
        metadata=_metadata(method, content[RANKS["unet"]], content[RANKS["vae"]], OFFICIAL_ALPHA),
    )


def _pisa_sr(content: Mapping[str, Any]) -> TadsrWeights:
    check_keys("official PiSA-SR checkpoint", set(content), PISA_KEYS)
    state, sets = content[PARTS["unet"]], {}
    ours = {name: {k: t for k, t in state.items() if _set_of(k) == name} for name in SETS}
    check_keys("LoRA of the official checkpoint", state, {key for part in ours.values() for key in part})
    for name, lists in PISA_LISTS.items():
        sets[name] = _adapters(ours[name], content[PISA_RANKS[name]], lists)
        for adapter, modules in lists.items():
            _check_modules(modules, content[modules], sets[name][adapter])
    if {m for group in sets["pix"].values() for m in group} != {m for group in sets["sem"].values() for m in group}:
        raise WeightsError("its two sets of adapters are for different modules; PiSA-SR's are for the same ones")
    if content[PISA_RANKS["pix"]] != content[PISA_RANKS["sem"]]:
        ranks = " and ".join(str(content[key]) for key in PISA_RANKS.values())
        raise WeightsError(f"its two sets of adapters have the ranks {ranks}; accepted is one rank for both")
    table = _unet_table(sets["pix"].values())

    def section(name: str) -> dict[str, Tensor]:
        return _named(sets[name].values(), lambda module: UNET_PREFIX + rename(module, table))

    metadata = _metadata(PISA_SR, content[PISA_RANKS["pix"]], 0, OFFICIAL_ALPHA)
    return _unet_only(section("pix"), metadata, section("sem"))


def _set_of(key: str) -> str:
    match = LORA_KEY.fullmatch(key)
    return match["adapter"].rpartition("_")[2] if match else ""


def _is_hypir(content: Mapping[str, Any]) -> bool:
    """Returns whether a dict is flat and has the adapters of a UNet under peft's usual name."""
    keys = [key for key in content if isinstance(key, str)]
    return any((m := LORA_KEY.fullmatch(key)) and m["adapter"] == HYPIR_ADAPTER for key in keys) and any(
        key.startswith("up_blocks.") for key in keys
    )


def _hypir(content: Mapping[str, Any]) -> TadsrWeights:
    ranks = {tensor.shape[0] for key, tensor in content.items() if ".lora_A." in key}
    if len(ranks) != 1:
        raise WeightsError(f"its adapters have the ranks {sorted(ranks)}; accepted is one rank for all, as HYPIR has")
    rank = ranks.pop()
    lora = _adapters(content, rank, (HYPIR_ADAPTER,), alpha=float(rank))[HYPIR_ADAPTER]
    table = _unet_table([lora])
    section = _named([lora], lambda module: UNET_PREFIX + rename(module, table))
    return _unet_only(section, _metadata(HYPIR, rank, 0, float(rank)))


@dataclass(frozen=True)
class _Peft:
    """One folder of peft's: the adapters of one network."""

    adapters: dict[str, Adapter]  # diffusers module -> adapter
    rank: int
    alpha: float

    @property
    def is_unet(self) -> bool:
        return any(module.startswith("up_blocks.") for module in self.adapters)


def peft_folder(path: Path) -> Path | None:
    """Returns the folder that holds folders of peft adapters, for itself or a file in one of them; None: no such."""
    for folder in (path, path.parent.parent):
        if folder.is_dir() and _peft_parts(folder) and (folder == path or path.parent in _peft_parts(folder)):
            return folder
    return None


def _peft_parts(folder: Path) -> list[Path]:
    return sorted(file.parent for file in folder.glob(f"*/{PEFT_TENSORS}"))


def weights_from_peft(folder: Path) -> TadsrWeights:
    """Returns OMGSR's weights in a folder with a folder of peft adapters for each network; raises WeightsError."""
    parts = {part.name: _read_peft(part) for part in _peft_parts(folder)}
    unets, encoders = ([p for p in parts.values() if p.is_unet is wanted] for wanted in (True, False))
    if len(unets) != 1 or len(encoders) != 1:
        raise WeightsError(
            f"{folder} holds {len(unets)} folders with adapters of a UNet and {len(encoders)} of an encoder "
            f"({', '.join(parts)}); accepted is one of each, as OMGSR releases them"
        )
    unet, encoder = unets[0], encoders[0]
    if unet.alpha / unet.rank != encoder.alpha / encoder.rank:
        raise WeightsError(f"{folder}: the networks' adapters have different scales; accepted is one for both")
    table = _unet_table([unet.adapters])
    inside = {f"encoder.{module}": adapter for module, adapter in encoder.adapters.items()}  # named from the encoder on
    vae_table = vae_table_of(inside)
    return TadsrWeights(
        unet_lora=_named([unet.adapters], lambda module: UNET_PREFIX + rename(module, table)),
        unet_full={},
        encoder_lora=_named([inside], lambda module: rename(module, vae_table)),
        encoder_time={},
        prompt=None,
        base={},
        metadata=_metadata(OMGSR, unet.rank, encoder.rank, unet.alpha),
    )


def _read_peft(folder: Path) -> _Peft:
    with reading(folder, "a folder of peft with LoRA of one network"):
        path = folder / PEFT_CONFIG
        if not path.is_file():
            raise WeightsError(f"it has no {PEFT_CONFIG}, which tells the adapters' scale: get the whole folder")
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if type(rank) is not int or not isinstance(alpha, int | float) or rank < 1:
            raise WeightsError(f"{PEFT_CONFIG} says r={rank!r} and lora_alpha={alpha!r}; accepted are numbers from 1")
        used = [name for name in PEFT_UNSUPPORTED if config.get(name)]
        if used:
            raise WeightsError(f"{PEFT_CONFIG} has {used[0]}={config[used[0]]!r}, which is not supported")
        state = {
            key.removeprefix(PEFT_PREFIX).replace(".weight", f".{HYPIR_ADAPTER}.weight"): tensor
            for key, tensor in load_file(folder / PEFT_TENSORS).items()
        }
        return _Peft(_adapters(state, rank, (HYPIR_ADAPTER,), float(alpha))[HYPIR_ADAPTER], rank, float(alpha))


def _unet_only(
    lora: dict[str, Tensor], metadata: Metadata, semantic: Mapping[str, Tensor] | None = None
) -> TadsrWeights:
    """Returns weights that leave the VAE as it is."""
    return TadsrWeights(
        unet_lora=lora,
        unet_full={},
        encoder_lora={},
        encoder_time={},
        prompt=None,
        base={},
        metadata=metadata,
        unet_lora_semantic=dict(semantic or {}),
    )


def _metadata(method: Method, rank: int, encoder_rank: int, alpha: float) -> Metadata:
    return Metadata(
        name=method.name,
        base_model=BASE,
        rank=rank,
        encoder_rank=encoder_rank,
        alpha=alpha,
        timesteps=method.timesteps,
        license=method.license,
        color_match=method.color_match,
        formula=method.formula,
        time_aware=method.time_aware,
        empty_prompt=method.empty_prompt,
    )


def _unet_table(groups: Iterable[Mapping[str, Adapter]]) -> Table:
    return unet_table(UNetLayout.from_diffusers(module for group in groups for module in group))


def _adapters(
    state: Mapping[str, Tensor], rank: int, names: Iterable[str], alpha: float = OFFICIAL_ALPHA
) -> dict[str, dict[str, Adapter]]:
    """Returns adapter name -> diffusers module -> adapter; raises WeightsError for any other tensor."""
    matches = [m for key in state if (m := LORA_KEY.fullmatch(key))]
    found: dict[str, dict[str, Adapter]] = {name: {} for name in names}
    expected: set[str] = set()
    for m in matches:
        if m["adapter"] in found:
            a, b = (f"{m['module']}.lora_{side}.{m['adapter']}.weight" for side in "AB")
            expected |= {a, b}
            if a in state and b in state:
                found[m["adapter"]][m["module"]] = Adapter(state[a], state[b], alpha)
    check_keys("LoRA of the official checkpoint", set(state), expected)
    wrong = [name for group in found.values() for name, adapter in group.items() if adapter.rank != rank]
    if wrong:
        raise WeightsError(f"the checkpoint says rank {rank}, but {wrong[0]} and {len(wrong) - 1} more differ")
    return found


def _check_modules(name: str, listed: Iterable[str], found: Iterable[str]) -> None:
    """Raises WeightsError unless a list of the checkpoint (it repeats names) is that of the adapters."""
    check_keys(f"modules in {name}", set(found), set(listed))


def _named(groups: Iterable[Mapping[str, Adapter]], name: Callable[[str], str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for group in groups:
        for module, adapter in group.items():
            tensors |= adapter.tensors(name(module))
    return tensors


def _unknown(content: Mapping[str, Any]) -> str:
    keys: Sequence[str] = [str(key)[:60] for key in content]
    return (
        f"it is not a weights file of a known method ({len(keys)} entries: {', '.join(keys[:3])}, ...); accepted are "
        f"those of TADSR, OSEDiff, PiSA-SR, OMGSR and HYPIR"
    )

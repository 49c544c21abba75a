"""Parameters and AdamW's state as flat, named tensors, and back, exact to the bit.

The names of tensors are `<prefix><name of the parameter>`, so a prefix ends in a full stop.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's two tensors of each parameter
SHOWN = 3  # how many tensors an error lists
LORA = re.compile(r"\.lora_([AB])\.")  # peft's names; the rank is the first size of A and the second of B


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read, or loaded into the model; the message says what to do."""


def load_parameters(names: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Sets the parameters to the tensors `<prefix><name>`; those without the prefix are not looked at.

    Raises CheckpointError, and changes nothing, unless names, shapes and dtypes are the same.
    """
    _check({prefix + name: parameter for name, parameter in names.items()}, _with_prefix(tensors, prefix))
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(tensors[prefix + name])


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns AdamW's moments as `<prefix><name>.<moment>`, and {"steps": {name: steps taken}} for JSON.

    A parameter that had no gradient yet has neither. Learning rate, betas and the like are the config's, not in it.
    """
    states = {name: optimizer.state[parameter] for name, parameter in names.items() if parameter in optimizer.state}
    tensors = {f"{prefix}{name}.{moment}": state[moment] for name, state in states.items() for moment in MOMENTS}
    return tensors, {"steps": {name: int(state["step"]) for name, state in states.items()}}


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    prefix: str,
) -> None:
    """Sets AdamW's state to what `optimizer_tensors` returned; its learning rate and the like stay.

    Raises CheckpointError, and changes nothing, unless names, shapes and dtypes fit the parameters.
    """
    steps: Mapping[str, int] = state["steps"]
    unknown = [name for name in steps if name not in names]
    if unknown:
        raise CheckpointError(f"the checkpoint's optimizer has {_listed(unknown)}, which the model does not train now")
    wanted = {f"{prefix}{name}.{moment}": names[name] for name in steps for moment in MOMENTS}
    _check(wanted, _with_prefix(tensors, prefix))
    numbers = {p: number for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    whole = optimizer.state_dict()
    whole["state"] = {
        numbers[names[name]]: {
            "step": torch.tensor(float(count)),
            **{moment: tensors[f"{prefix}{name}.{moment}"].clone() for moment in MOMENTS},
        }
        for name, count in steps.items()
    }
    optimizer.load_state_dict(whole)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _check(wanted: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    missing, unexpected = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    other = [key for key in wanted if key in saved and _kind(wanted[key]) != _kind(saved[key])]
    parts = [f"the model has {_listed(missing)}, which the checkpoint has not"] if missing else []
    parts += [f"the checkpoint has {_listed(unexpected)}, which the model has not"] if unexpected else []
    parts += [_difference(key, saved[key], wanted[key]) for key in other[:SHOWN]]
    parts += [f"{len(other) - SHOWN} more differ"] if len(other) > SHOWN else []
    if parts:
        raise CheckpointError(f"the checkpoint does not fit the model: {'; '.join(parts)}. Was the config changed?")


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _difference(key: str, saved: Tensor, wanted: Tensor) -> str:
    if saved.shape == wanted.shape:
        return f"{key} is {saved.dtype} in the checkpoint, {wanted.dtype} in the model"
    sizes = f"{tuple(saved.shape)} in the checkpoint, {tuple(wanted.shape)} in the model"
    lora = LORA.search(key)
    axis = "AB".index(lora[1]) if lora else None
    if axis is None or saved.shape[axis] == wanted.shape[axis]:
        return f"{key} is {sizes}"
    return f"{key} is {sizes}: rank {saved.shape[axis]} in the checkpoint, {wanted.shape[axis]} now"


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{', '.join(keys[:SHOWN])}{more}"

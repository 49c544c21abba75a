"""Says so where a core sampler runs a student as it was not trained: the picture would be wrong without a word."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import comfy.patcher_extension
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

KEY = "tadsr_sampling_advice"
ADVICE = (
    "TADSR is made for one step without guidance, and this sampler takes {what}: its picture will differ from One-Step "
    "SR's. Use One-Step SR, or SamplerCustomAdvanced with BasicGuider, the sampler euler and the two sigmas of the "
    "timestep"
)


def advise_on_sampling(model: ModelPatcher) -> None:
    """Makes a sampler of the MODEL that takes several steps, or guidance, say so in the log and on its node."""
    wrapper = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    model.add_wrapper_with_key(wrapper, KEY, _advise)


def _advise(
    executor: Callable[..., Tensor],
    noise: Tensor,
    latent: Tensor,
    sampler: object,
    sigmas: Tensor,
    *rest: Any,
    **more: Any,
) -> Tensor:
    steps, guidance = len(sigmas) - 1, float(getattr(executor.class_obj, "cfg", 1.0))  # type: ignore[attr-defined]
    unusual = [f"{steps} steps"] if steps != 1 else []
    unusual += [f"the guidance (cfg) {guidance:g}"] if guidance != 1.0 else []
    if unusual:
        _say(ADVICE.format(what=" and ".join(unusual)))
    return executor(noise, latent, sampler, sigmas, *rest, **more)


def _say(text: str) -> None:
    """Writes to the log, and onto the node that is running, if one is."""
    logging.warning(text)
    context = get_executing_context()
    if context is not None:
        PromptServer.instance.send_progress_text(text, context.node_id)

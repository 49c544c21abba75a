"""The one-step methods whose weights this package loads: what each needs to know beside its tensors.

They share Stable Diffusion 2.1-base and differ in how a prediction becomes the clean latent, in the timestep, and in
which layers they change. Source of the facts: the authors' repositories and papers.
"""

from __future__ import annotations

from dataclasses import dataclass

from .color import DEFAULT_COLOR_MATCH
from .schedule import timestep_grid

STEPS = 50  # of TADSR's training: 50 integers, evenly spaced over 1..999
BASE = "stable-diffusion-2-1-base"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method's constants."""

    name: str
    formula: str  # a name of `schedule.FORMULAS`
    timesteps: tuple[int, ...]
    license: str
    color_match: str = DEFAULT_COLOR_MATCH  # of the authors' program
    time_aware: bool = False  # has time layers in the encoder
    empty_prompt: bool = False  # is always given the empty text


TADSR = Method(
    name="TADSR",
    formula="residual",
    timesteps=timestep_grid(STEPS),
    license="Pi-Lab License 1.0 (non-commercial)",
    time_aware=True,
)
OSEDIFF = Method(name="OSEDiff", formula="noise", timesteps=(999,), license="Apache-2.0")
PISA_SR = Method(
    name="PiSA-SR",
    formula="difference",
    timesteps=(1,),
    license="Apache-2.0 by its README; its repository has no licence file",
    empty_prompt=True,
)
HYPIR = Method(
    name="HYPIR",
    formula="noise",
    timesteps=(200,),
    license="HYPIR's own agreement (non-commercial; not to be passed on)",
    color_match="wavelet",
    empty_prompt=True,
)
OMGSR = Method(
    name="OMGSR-S",
    formula="noise",
    timesteps=(273,),
    license="none stated, so no permission is given",
    empty_prompt=True,
)


def describe(name: str, formula: str, timesteps: tuple[int, ...]) -> str:
    """Returns what weights are in a line: their name, timesteps and formula."""
    when = "all timesteps" if not timesteps else f"{len(timesteps)} timesteps"
    if len(timesteps) == 1:
        when = f"timestep {timesteps[0]} only"
    return f"{name or 'unnamed'}, {when}, prediction: {formula}"


def license_notice(name: str, terms: str) -> str:
    """Returns the line that tells under which terms weights may be used. terms: "" where the file names none."""
    warning = " Do not use them commercially." if "non-commercial" in terms else ""
    return f"Licence of the {name} weights: {terms or 'not named in the file'}.{warning}"

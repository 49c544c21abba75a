"""Socket types of this pack, and the inputs that several nodes share."""

from __future__ import annotations

from comfy_api.latest import io

from ..tadsr.color import COLOR_MATCHES, DEFAULT_COLOR_MATCH
from ..tadsr.geometry import DEFAULT_SCALE, MAX_SCALE, MAX_SIDE, MEGAPIXEL, MIN_SCALE
from ..tadsr.schedule import DEFAULT_TIMESTEP, MAX_TIMESTEP, OWN_TIMESTEP
from .models.precision import AUTO, PRECISIONS
from .running.plan import TILE_STEP

CATEGORY = "image/upscaling/TADSR"
MAX_SEED = 0xFFFFFFFFFFFFFFFF  # as core's samplers
ENCODINGS = ("mode", "sample")
AUTOMATIC = "automatic"
COLOR_MATCH_TOOLTIP = (
    "Takes colour from the enlarged input. adain: mean and contrast of each channel. lab: the same of lightness and "
    "colour. wavelet: all coarse colour, for local colour shifts. none: leaves the result alone."
)

Encoder = io.Custom("TADSR_ENCODER")


def image_input() -> io.Image.Input:
    """Returns the picture to upscale."""
    return io.Image.Input("image", tooltip="Grey, RGB or RGBA, of any size.")


def timestep_input() -> io.Int.Input:
    """Returns the timestep dial."""
    return io.Int.Input(
        "timestep",
        default=DEFAULT_TIMESTEP,
        min=OWN_TIMESTEP,
        max=MAX_TIMESTEP,
        step=1,
        display_mode=io.NumberDisplay.slider,
        tooltip="Low: faithful to the input. High: sharper, with more invented detail. 0: the weights' own, the only "
        f"one for OSEDiff, PiSA-SR, OMGSR and HYPIR; {DEFAULT_TIMESTEP} for TADSR.",
    )


def any_timestep_input() -> io.Boolean.Input:
    """Returns the switch that lets weights for one timestep run at another."""
    return io.Boolean.Input(
        "any_timestep",
        default=False,
        optional=True,
        advanced=True,
        tooltip="Lets weights that were trained for one timestep run at another one: to experiment.",
    )


def scale_input() -> io.Float.Input:
    """Returns the enlargement."""
    return io.Float.Input(
        "scale",
        default=DEFAULT_SCALE,
        min=MIN_SCALE,
        max=MAX_SCALE,
        step=0.25,
        round=False,
        tooltip="Enlargement of both sides; the model was trained for 4. A width or height replaces it.",
    )


def exact_size_inputs() -> list[io.Int.Input]:
    """Returns the exact width and height of the result, 0 where unused."""
    return [
        io.Int.Input(
            side,
            default=0,
            min=0,
            max=MAX_SIDE,
            optional=True,
            advanced=True,
            tooltip=f"Exact {side} of the result in pixels. 0: from the {other} in the input's proportions, "
            "or from the scale. With both set, the input is first cropped to their shape, never squashed.",
        )
        for side, other in (("width", "height"), ("height", "width"))
    ]


def encoding_inputs() -> list[io.Combo.Input | io.Int.Input]:
    """Returns how the latent is taken from the encoder's distribution."""
    return [
        io.Combo.Input(
            "encoding",
            options=list(ENCODINGS),
            default=ENCODINGS[0],
            optional=True,
            advanced=True,
            tooltip="mode: the mean of the encoder's distribution, always the same. "
            "sample: drawn from it with the seed, as the official code does.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=MAX_SEED,
            control_after_generate=io.ControlAfterGenerate.fixed,  # else the page draws a new one for each run
            optional=True,
            advanced=True,
            tooltip="Seed of the draw, when encoding is sample; image n of a batch uses seed + n.",
        ),
    ]


def color_match_input() -> io.Combo.Input:
    """Returns the colour match, where the weights are not known."""
    return io.Combo.Input(
        "color_match", options=list(COLOR_MATCHES), default=DEFAULT_COLOR_MATCH, tooltip=COLOR_MATCH_TOOLTIP
    )


def weights_color_match_input() -> io.Combo.Input:
    """Returns the colour match, by default the one that suits the weights."""
    return io.Combo.Input(
        "color_match",
        options=[AUTOMATIC, *COLOR_MATCHES],
        default=AUTOMATIC,
        tooltip=f"{COLOR_MATCH_TOOLTIP} {AUTOMATIC}: what suits the weights, wavelet for tadsr-mini, adain for TADSR.",
    )


def color_strength_input() -> io.Float.Input:
    """Returns how much of the colour match is used."""
    return io.Float.Input(
        "color_strength",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.05,
        optional=True,
        advanced=True,
        tooltip="How much of the colour match is used: 1 all, 0 none. Only the colours are made again when it changes.",
    )


def kept_proportions_inputs() -> list[io.Input]:
    """Returns the sizes that keep the input's proportions, 0 where unused."""
    sides = [
        io.Int.Input(
            f"{which}_side",
            default=0,
            min=0,
            max=MAX_SIDE,
            optional=True,
            advanced=True,
            tooltip=f"Exact {which} side of the result in pixels, in the input's proportions. 0: not used.",
        )
        for which in ("longest", "shortest")
    ]
    megapixels = io.Float.Input(
        "megapixels",
        default=0.0,
        min=0.0,
        max=MAX_SIDE**2 / MEGAPIXEL,
        step=0.1,
        optional=True,
        advanced=True,
        tooltip="Size of the result in millions of pixels, in the input's proportions. 0: not used.",
    )
    return [*sides, megapixels]


def encoder_input() -> io.Input:
    """Returns the Time-Aware Encoder's socket."""
    return Encoder.Input("encoder", tooltip="The ENCODER of Load TADSR Model.")


def model_inputs() -> list[io.Input]:
    """Returns what Load TADSR Model gives to a node that does all steps."""
    return [
        io.Model.Input("model", tooltip="The MODEL of Load TADSR Model; LoRA and other patches work on it."),
        encoder_input(),
        io.Vae.Input("vae", tooltip="The VAE of Load TADSR Model, for decoding."),
    ]


def conditioning_input() -> io.Conditioning.Input:
    """Returns the prompt."""
    return io.Conditioning.Input(
        "conditioning",
        optional=True,
        tooltip="A description of the picture. Unconnected: the default prompt of the weights.",
    )


def preview_place_inputs() -> list[io.Input]:
    """Returns where the crop preview is."""
    places = [
        io.Float.Input(
            f"preview_{axis}",
            default=0.5,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip=f"Where the middle of the preview is: 0 {first}, 1 {last}.",
        )
        for axis, first, last in (("x", "left", "right"), ("y", "top", "bottom"))
    ]
    mask = io.Mask.Input(
        "preview_mask",
        optional=True,
        tooltip="A mask of the input: only its box is shown or, with a preview_size, a square in its middle.",
    )
    return [*places, mask]


def tile_inputs() -> list[io.Int.Input]:
    """Returns the tiles' size and overlap."""
    return [
        io.Int.Input(
            "tile",
            default=0,
            min=0,
            max=MAX_SIDE,
            step=TILE_STEP,
            optional=True,
            advanced=True,
            tooltip="Side of the tiles in pixels of the result, rounded up to a multiple of 8. 0: automatic; the whole "
            "picture where it fits in memory and is quicker so, else tiles.",
        ),
        io.Int.Input(
            "overlap",
            default=0,
            min=0,
            max=MAX_SIDE,
            step=TILE_STEP,
            optional=True,
            advanced=True,
            tooltip="How far tiles overlap and blend, in pixels of the result, up to half a tile. 0: automatic, which "
            "hides seams. More takes longer.",
        ),
    ]


def preview_size_input() -> io.Int.Input:
    """Returns the side of the crop preview."""
    return io.Int.Input(
        "preview_size",
        default=0,
        min=0,
        max=MAX_SIDE,
        step=TILE_STEP,
        optional=True,
        advanced=True,
        tooltip="0: the whole result. Otherwise only a part of it, this many pixels square, exactly as it will look "
        "in the whole: to try timesteps and prompts on a large picture.",
    )


def precision_input() -> io.Combo.Input:
    """Returns the choice of precision."""
    return io.Combo.Input(
        "precision",
        options=list(PRECISIONS),
        default=AUTO,
        optional=True,
        advanced=True,
        tooltip="What all three networks compute in. auto: what ComfyUI chooses for this device, by its own rules "
        "and flags. fp32: exact, twice the memory. fp16 and bf16: half the memory; slow on a CPU.",
    )

"""The node Prompt from Image (DAPE)."""

from __future__ import annotations

import comfy.utils
import folder_paths
from comfy_api.latest import io, ui
from server import PromptServer
from torch import Tensor

from ..tadsr.geometry import DEFAULT_SCALE, MAX_SCALE, MIN_SCALE, check_scale
from ..tadsr.tags import OFFICIAL, PROMPT_FORMS, make_prompt
from .checks import checked
from .inputs import CATEGORY, image_input
from .models.folders import WEIGHTS_FOLDER, file_identity
from .models.tagger import TaggerModel, load_tagger
from .models.token_limit import CONTEXT_TOKENS, fit
from .running.pictures import check_image, fill_hidden, split_alpha, to_bchw

LIKELY_NAME = "dape"  # what the docs call the file: only to choose the first of the list


class TADSRPromptFromImage(io.ComfyNode):
    """IMAGE -> STRING, a prompt of the picture's tags."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = folder_paths.get_filename_list(WEIGHTS_FOLDER)
        return io.Schema(
            node_id="TADSRPromptFromImage",
            display_name="Prompt from Image (DAPE)",
            category=CATEGORY,
            description="Recognises what is in a picture, though it be degraded, and makes the prompt that TADSR was "
            "trained with: its tags. For CLIP Text Encode, before Upscale with TADSR.",
            search_aliases=["dape", "ram", "recognize anything", "tagger", "image tags", "caption", "interrogate"],
            is_output_node=True,
            inputs=[
                image_input(),
                io.Combo.Input(
                    "tagger",
                    options=names,
                    default=next((name for name in names if LIKELY_NAME in name.lower()), None),
                    tooltip="A tagger that python -m tadsr.convert --ram made, in models/tadsr.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Your own words, put after the tags.",
                ),
                io.Combo.Input(
                    "form",
                    options=list(PROMPT_FORMS),
                    default=OFFICIAL,
                    optional=True,
                    advanced=True,
                    tooltip=f"official: tags, text and commas as the authors' test writes them, cut to the "
                    f"{CONTEXT_TOKENS} tokens of their text encoder. plain: tags and text, whole, for other uses.",
                ),
                io.Float.Input(
                    "scale",
                    default=DEFAULT_SCALE,
                    min=MIN_SCALE,
                    max=MAX_SCALE,
                    step=0.25,
                    round=False,
                    optional=True,
                    advanced=True,
                    tooltip="How far the picture is enlarged before the tagger looks at it; it was trained to see "
                    "pictures enlarged by 4. 1 for a picture that has been enlarged.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="prompt",
                    is_output_list=True,
                    tooltip="One for each picture of the batch.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, tagger: str, **_: object) -> str:
        """Returns what changes when the file is replaced under its name."""
        return file_identity(folder_paths.get_full_path(WEIGHTS_FOLDER, tagger))

    @classmethod
    @checked
    def execute(
        cls, image: Tensor, tagger: str, text: str = "", form: str = OFFICIAL, scale: float = DEFAULT_SCALE
    ) -> io.NodeOutput:
        check_image(image)
        check_scale(scale)
        network = load_tagger(folder_paths.get_full_path_or_raise(WEIGHTS_FOLDER, tagger))
        progress = comfy.utils.ProgressBar(len(image))
        prompts, shown = [], []
        for picture in image:
            prompt = make_prompt(_tags(network, picture, scale), text, form)
            prompts.append(fit(prompt) if form == OFFICIAL else prompt)
            shown.append(_shown(prompt, prompts[-1]))
            progress.update(1)
        report = "\n".join(shown)
        if cls.hidden is not None:  # it is None where a program calls the node without ComfyUI's executor
            PromptServer.instance.send_progress_text(report, cls.hidden.unique_id)
        return io.NodeOutput(prompts, ui=ui.PreviewText(report))


def _tags(network: TaggerModel, picture: Tensor, scale: float) -> list[str]:
    """Returns the tags of one picture of an IMAGE, (H, W, C)."""
    rgb, _ = split_alpha(fill_hidden(to_bchw(picture)))
    height, width = rgb.shape[2:]
    return network.tags_of(rgb, (round(height * scale), round(width * scale)))


def _shown(whole: str, kept: str) -> str:
    """Returns what the node shows of a prompt, and what of it was cut off."""
    if kept == whole:
        return kept
    return (
        f"{kept}\nLeft out, beyond the {CONTEXT_TOKENS} tokens of the text encoder: {whole[len(kept) :].lstrip(' ,')}"
    )

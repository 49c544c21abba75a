"""Prompt embeddings: made once by the frozen text encoder and kept on disk, or read from a file."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from tadsr.sources import sha256
from tadsr.weights import PROMPT_KEY, is_tadsr, read_metadata
from training.data.storage import write_atomically

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

TOKENS = 77  # of CLIP's context; the text is padded to it (method of the official code)
ENCODER_FOLDER, TOKENIZER_FOLDER = "text_encoder", "tokenizer"
BOOK_FILE = "prompts.safetensors"
EMBEDDING_KEY = "embedding"
LEARNED_PROMPT = "(learned)"  # the text that training.mini.export writes for an embedding that is no text's
WEIGHT_SUFFIXES = (".safetensors", ".bin")  # in order of preference
ENCODER_BATCH = 16  # texts at a time: about 0.5 GB beside the weights
ACCEPTED = (
    f"accepted: text_encoder=FOLDER, a diffusers-style folder with {ENCODER_FOLDER}/ and {TOKENIZER_FOLDER}/; such a "
    f"folder as base; {BOOK_FILE} beside the base (keys: the texts, tensors: (tokens, width)); or, for the default "
    f"prompt only, a TADSR weights file with a prompt as base"
)


class PromptError(ValueError):
    """There is no embedding for a prompt."""


class PromptBook:
    """The embeddings of a set of texts, in memory or in files that are read when wanted; all of one shape."""

    def __init__(self, embeddings: Mapping[str, Tensor | Path]) -> None:
        if not embeddings:
            raise PromptError("there are no texts to embed; give at least the default prompt")
        self._embeddings = dict(embeddings)

    @classmethod
    def build(
        cls, texts: Sequence[str], base: Path, text_encoder: Path | None, cache: Path, device: str = "cpu"
    ) -> PromptBook:
        """Returns the embeddings of `texts`, the first of which is the default prompt; raises PromptError.

        They come from the text encoder of the folder `text_encoder`, or of the diffusers folder `base`, both kept in
        the folder `cache`; or from prompts.safetensors beside `base`; or from the TADSR weights file `base`, for the
        default prompt alone. device: where the text encoder runs; it is freed before this returns.
        """
        texts = list(dict.fromkeys(texts))
        if text_encoder is not None:
            missing = [name for name in (ENCODER_FOLDER, TOKENIZER_FOLDER) if not (text_encoder / name).is_dir()]
            if missing:
                raise PromptError(f"text_encoder is {text_encoder}, which has no {'/, no '.join(missing)}/; {ACCEPTED}")
            return cls(encode(texts, text_encoder, cache, device))
        if (base / ENCODER_FOLDER).is_dir() and (base / TOKENIZER_FOLDER).is_dir():
            return cls(encode(texts, base, cache, device))
        book = _book_of(base)
        if book.is_file():
            return cls(_read_book(book, texts))
        return cls(_read_tadsr(base, texts))

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, width) of the embeddings."""
        tokens, width = self._embedding(next(iter(self._embeddings))).shape
        return tokens, width

    def batch(self, texts: Sequence[str]) -> Tensor:
        """Returns the embeddings of the texts, float32 (B, tokens, width), on the CPU; raises PromptError."""
        return torch.stack([self._embedding(text) for text in texts])

    def _embedding(self, text: str) -> Tensor:
        if text not in self._embeddings:
            raise PromptError(f"there is no embedding of {text!r}, but of {len(self._embeddings)} other texts")
        kept = self._embeddings[text]
        return kept if isinstance(kept, Tensor) else _read_file(kept)


def has_text_encoder(base: Path, text_encoder: Path | None) -> bool:
    """Returns whether `PromptBook.build` has a text encoder, or a file of embeddings, for any texts."""
    folder = text_encoder or base
    is_complete = (folder / ENCODER_FOLDER).is_dir() and (folder / TOKENIZER_FOLDER).is_dir()
    return text_encoder is not None or is_complete or _book_of(base).is_file()


def encode(texts: Sequence[str], folder: Path, cache: Path, device: str = "cpu") -> dict[str, Path]:
    """Returns a file with the embedding of each text, made by the text encoder in `folder` unless it is in `cache`.

    An embedding, float32 (77, width), is the text encoder's last hidden state after its final norm, without an
    attention mask. With SD 2.1 a file has 315 kB.
    """
    place = cache / "prompts" / _identity(folder)
    files = {text: place / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors" for text in texts}
    missing = [text for text, file in files.items() if not file.is_file()]
    if missing:
        _encode_missing(missing, files, folder, device)
    return files


@torch.no_grad()
def _encode_missing(texts: Sequence[str], files: Mapping[str, Path], folder: Path, device: str) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer  # slow to import, and seldom needed

    tokenizer = CLIPTokenizer.from_pretrained(folder / TOKENIZER_FOLDER, local_files_only=True)
    half = not _weight_files(folder, half=False)
    variant = "fp16" if half else None
    encoder: Any = CLIPTextModel.from_pretrained(folder / ENCODER_FOLDER, local_files_only=True, variant=variant)
    encoder = encoder.float().eval().to(device)
    _warn_of_long_texts(texts, tokenizer)
    for first in range(0, len(texts), ENCODER_BATCH):
        some = texts[first : first + ENCODER_BATCH]
        tokens = tokenizer(some, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        embeddings = encoder(tokens.input_ids.to(device)).last_hidden_state.cpu()
        for text, embedding in zip(some, embeddings, strict=True):
            write_atomically(files[text], save({EMBEDDING_KEY: embedding.contiguous()}))


def _warn_of_long_texts(texts: Sequence[str], tokenizer: CLIPTokenizer) -> None:
    long = [text for text in texts if len(tokenizer(text).input_ids) > TOKENS]
    if long:
        warnings.warn(
            f"{len(long)} of {len(texts)} prompts have more than {TOKENS} tokens, and their ends are cut off, as in "
            f"{long[0][:200]!r}",
            stacklevel=4,
        )


def _identity(folder: Path) -> str:
    """Returns a hash of all that the embeddings depend on: weights, config and tokenizer."""
    settings = [file for name in (ENCODER_FOLDER, TOKENIZER_FOLDER) for file in (folder / name).iterdir()]
    settings = [file for file in settings if file.is_file() and file.suffix in (".json", ".txt")]
    weights = _weight_files(folder, half=False) or _weight_files(folder, half=True)
    if not weights:
        raise PromptError(f"{folder / ENCODER_FOLDER} has no weights (*.safetensors or *.bin); {ACCEPTED}")
    digests = [f"{file.relative_to(folder).as_posix()} {sha256(file)}" for file in sorted(settings) + weights]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:32]


def _weight_files(folder: Path, half: bool) -> list[Path]:
    """Returns the files with the weights that would be read, of full precision or of the fp16 variant."""
    for suffix in WEIGHT_SUFFIXES:
        files = sorted((folder / ENCODER_FOLDER).glob(f"*{suffix}"))
        files = [file for file in files if (".fp16" in file.name) == half]
        if files:
            return files
    return []


def _book_of(base: Path) -> Path:
    return (base if base.is_dir() else base.parent) / BOOK_FILE


def _read_file(path: Path) -> Tensor:
    try:
        return load_file(path)[EMBEDDING_KEY]
    except (SafetensorError, OSError, KeyError) as error:
        raise PromptError(f"{path}, a cached embedding, cannot be read ({error}): delete it and start again") from error


def _read_book(path: Path, texts: Sequence[str]) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise PromptError(f"{path} cannot be read ({error}); {ACCEPTED}") from error
    missing = [text for text in texts if text not in tensors]
    if missing:
        raise PromptError(
            f"{path} has {len(tensors)} embeddings, but none of {len(missing)} of the prompts, such as {missing[0]!r}; "
            f"{ACCEPTED}"
        )
    chosen = {text: tensors[text].float() for text in texts}
    shapes = {tuple(tensor.shape) for tensor in chosen.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise PromptError(f"{path} has embeddings of the shapes {sorted(shapes)}; accepted: one (tokens, width)")
    return chosen


def _read_tadsr(base: Path, texts: Sequence[str]) -> dict[str, Tensor]:
    prompt = _tadsr_prompt(base)
    if prompt is None:
        raise PromptError(f"{base} brings no text encoder and no embeddings of the prompts; {ACCEPTED}")
    text = read_metadata(base).prompt
    if text not in ("", LEARNED_PROMPT, texts[0]):
        raise PromptError(f"{base} has the embedding of {text!r}, but the default prompt is {texts[0]!r}; {ACCEPTED}")
    if len(texts) > 1:
        raise PromptError(
            f"{base} has the embedding of its default prompt only, and {len(texts) - 1} other prompts are wanted, such "
            f"as {texts[1]!r}; {ACCEPTED}"
        )
    return {texts[0]: prompt[0].float()}


def _tadsr_prompt(base: Path) -> Tensor | None:
    """Returns the embedding in a TADSR weights file, (1, tokens, width); None for other files and folders."""
    if not base.is_file():
        return None
    try:
        with safe_open(base, framework="pt", device="cpu") as file:
            keys = set(file.keys())
            return file.get_tensor(PROMPT_KEY) if is_tadsr(keys) and PROMPT_KEY in keys else None
    except SafetensorError:  # a pickle, which a base may be
        return None

"""Files that a model is used with, its tokenizer or image processor: found beside the model, copied wherever it goes.

A Program knows where it came from by its config, as Hugging Face keeps it (``_name_or_path``); nothing of that is written into a file.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from graphprune.errors import GraphPruneError
from graphprune.ir.program import Program

PROCESSOR_FILES = frozenset({
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "feature_extractor_config.json", "image_processor_config.json",
    "merges.txt", "normalizer.json", "preprocessor_config.json", "processor_config.json", "sentencepiece.bpe.model",
    "source.spm", "special_tokens_map.json", "spiece.model", "spm.model", "target.spm", "tekken.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json", "vocab.txt",
})  # fmt: skip
"""What tokenizers and image processors are made of."""
MODEL_FILES = frozenset({"generation_config.json"})
"""What else a model is used with; the config is written anew."""
FILE_LIMIT = 64 * 2**20
"""Bytes above which a file is no companion, whatever its name."""
_ORIGIN = "_name_or_path"


def companion_folder(program: Program) -> Path | None:
    """Folder that a Program's model was loaded from; None where there is none on this machine."""
    name = getattr(getattr(program, "config", None), _ORIGIN, None)
    if not isinstance(name, str) or not name:
        return None
    path = Path(name).expanduser()
    return path if path.is_dir() else path.parent if path.suffix == ".json" and path.is_file() else None


def remember_folder(config: Any, folder: Path) -> None:
    """Let a config say which folder its model was loaded from, as Hugging Face's own loading does."""
    setattr(config, _ORIGIN, str(folder))


def config_text(config: Any, *, whole: bool = False) -> str:
    """A config as JSON, without the place that it was loaded from.

    Args:
        config: A Hugging Face config.
        whole: Write values that are its class's defaults too.
    """
    content = json.loads(config.to_json_string(use_diff=not whole))
    content.pop(_ORIGIN, None)
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def find_companions(folder: Path) -> tuple[Path, ...]:
    """Files of a model's folder that it is used with, by name.

    Only files of known names, of at most ``FILE_LIMIT`` bytes, that lie in the folder itself: a link that leads out of it is left,
    and so are weights, code and whatever else lies there.
    """
    home = folder.resolve()
    found = []
    for name in sorted(PROCESSOR_FILES | MODEL_FILES):
        path = folder / name
        if path.is_file() and path.resolve().is_relative_to(home) and path.stat().st_size <= FILE_LIMIT:
            found.append(path)
    return tuple(found)


def copy_companions(program: Program, folder: Path, processor: Any | None = None) -> tuple[str, ...]:
    """Copy what a Program's model is used with.

    Args:
        program: Its config says where the files are.
        folder: Where they go. Files that are there already are kept.
        processor: Tokenizer or image processor to write instead of the one that lies beside the model (anything with
            ``save_pretrained``).

    Returns:
        Names of the files that were copied; empty where the model was not loaded from a folder.

    Raises:
        GraphPruneError: The processor cannot be saved.
        OSError: The operating system refuses.
    """
    if processor is not None:
        if not callable(getattr(processor, "save_pretrained", None)):
            raise GraphPruneError(
                f"processor is a {type(processor).__name__}, which has no save_pretrained; give a tokenizer or an image processor"
            )
        processor.save_pretrained(folder)
    source = companion_folder(program)
    copied = []
    for path in find_companions(source) if source is not None else ():
        if (processor is not None and path.name in PROCESSOR_FILES) or (folder / path.name).exists():
            continue
        shutil.copyfile(path, folder / path.name)
        copied.append(path.name)
    return tuple(copied)

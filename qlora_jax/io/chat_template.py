"""The chat templates of a folder, in the files that transformers 5 keeps them in."""

import json
import shutil
from pathlib import Path

DEFAULT = "chat_template.jinja"
OTHERS = "additional_chat_templates"  # NAME.jinja of each template beside the default one, such as tool_use
TOKENIZER = "tokenizer_config.json"  # where transformers 4 kept them, under "chat_template"
FILES = (DEFAULT, OTHERS)
MOST_BYTES = 2**24  # of a file: a tokenizer_config.json that lists every added token has more than a million

# A tokenizer's `chat_template`: one text, or several by name, "default" among them.
Templates = str | dict[str, str]


def read_chat_template(folder: Path, *, root: Path | None = None) -> Templates | None:
    """The templates that the folder brings itself, files before tokenizer_config.json as transformers does.

    Args:
      root: where given, links that lead out of it are not followed.

    Raises:
      ValueError: a template that is too large or no UTF-8 text, a damaged tokenizer_config.json, or such a link.
    """
    files = {file.stem: file for file in sorted(folder.glob(f"{OTHERS}/*.jinja")) if file.is_file()}
    if (folder / DEFAULT).is_file():
        files["default"] = folder / DEFAULT
    found = {name: _text(file, root) for name, file in files.items()}
    if found:
        return found["default"] if found.keys() == {"default"} else found
    return _of_transformers_4(folder / TOKENIZER, root)


def write_chat_template(folder: Path, templates: Templates) -> None:
    """Writes the templates into the folder, in place of all that it holds."""
    named = {"default": templates} if isinstance(templates, str) else templates
    shutil.rmtree(folder / OTHERS, ignore_errors=True)
    for file in folder.glob("chat_template.*"):
        file.unlink()
    for name, text in named.items():
        file = folder / (DEFAULT if name == "default" else f"{OTHERS}/{name}.jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    _forget(folder / TOKENIZER)


def _text(file: Path, root: Path | None) -> str:
    if root is not None and root.resolve() not in file.resolve().parents:
        raise ValueError(f"{file} is a link that leads out of the folder: put the file itself there")
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, more than the {MOST_BYTES:,} that are read")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text (byte {error.start}): save it as UTF-8") from error


def _of_transformers_4(file: Path, root: Path | None) -> Templates | None:
    if not file.is_file():
        return None
    try:
        templates = json.loads(_text(file, root)).get("chat_template")
        found = {one["name"]: one["template"] for one in templates} if isinstance(templates, list) else templates
        if not all(isinstance(text, str) for text in (found.values() if isinstance(found, dict) else [found or ""])):
            raise TypeError("chat_template is no text")
        return found
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): copy it again") from error


def _forget(file: Path) -> None:
    """Other programs may look into tokenizer_config.json first."""
    if not file.is_file():
        return
    settings = json.loads(file.read_bytes())
    if settings.pop("chat_template", None) is not None:
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

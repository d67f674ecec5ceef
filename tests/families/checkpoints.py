"""Tiny random checkpoints of model families, each with what transformers computes from it.

    python -m tests.families.checkpoints OUT [NAME ...]

makes OUT/NAME: config.json, model.safetensors (bfloat16), a tokenizer, and reference.npz (see `Reference`).
"""

import contextlib
import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.families.dense import DENSE
from tests.families.hybrid import HYBRID
from tests.families.layouts import LAYOUTS, Layout
from tests.families.moe import MOE
from tests.families.spec import VOCABULARY, Family
from tests.families.weights import spread
from tests.families.wrappers import WRAPPERS

DEMO = Path(__file__).parents[2] / "demo" / "base"
FAMILIES: dict[str, Family] = {**DENSE, **HYBRID, **MOE, **WRAPPERS}
NAMES = (*FAMILIES, *LAYOUTS)
LENGTH, STEPS = 48, 8
# Two documents that fill a row: the first tokens of the first row, and of the second.
DOCUMENTS = (13, 35)
# Below, as a share of the largest logit, one token leads another by too little for a greedy choice to be certain.
CERTAIN = 1e-3


class Reference(NamedTuple):
    """What transformers computes (float32, eager attention, CPU).

    Attributes:
      tokens: int64 [2, 48].
      logits: float32 [2, 48, V], of both rows at once.
      step: float32 [2, 8, V], of the last 8 tokens one by one through a cache that holds the others.
      greedy: int64 [2, 8], the most likely tokens after these.
      packed: float32 [48, V], of DOCUMENTS, each alone.
    """

    tokens: np.ndarray
    logits: np.ndarray
    step: np.ndarray
    greedy: np.ndarray
    packed: np.ndarray


def text_type(name: str) -> str:
    """The `model_type` of a checkpoint's text model."""
    return FAMILIES[LAYOUTS[name].family if name in LAYOUTS else name].text


def make(out: Path, name: str, *, seed: int = 0) -> Path:
    """Makes the folder out/name."""
    folder = out / name
    with _quiet(), one_thread():
        if name in LAYOUTS:
            _lay_out(folder, LAYOUTS[name], seed)
        else:
            _save_random(folder, FAMILIES[name], seed)
            np.savez(folder / "reference.npz", **reference(folder)._asdict())
    return folder


def read_reference(folder: Path) -> Reference:
    """What `make` wrote beside the checkpoint."""
    with np.load(folder / "reference.npz") as arrays:
        return Reference(**arrays)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' and torch's own warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch's threads wait for each other by spinning: where others use the cores, two are 20 times as slow as one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _save_random(folder: Path, family: Family, seed: int) -> None:
    import torch
    import transformers

    config = getattr(transformers, family.config)(**family.options)
    torch.manual_seed(seed)
    kind = getattr(transformers, family.model) if family.model else transformers.AutoModelForCausalLM
    model = (kind._from_config if family.model else kind.from_config)(config)
    spread(model, seed)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    write_tokenizer(folder)


def _lay_out(folder: Path, layout: Layout, seed: int) -> None:
    """A family's checkpoint with its tensors held otherwise."""
    _save_random(folder, FAMILIES[layout.family], seed)
    layout.rewrite(folder)
    np.savez(folder / "reference.npz", **reference(folder, **layout.loading())._asdict())


def write_tokenizer(folder: Path) -> None:
    """The demo's tokenizer without the merges that VOCABULARY has no place for."""
    settings = json.loads((DEMO / "tokenizer.json").read_text())
    model = settings["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < VOCABULARY}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    shutil.copy(DEMO / "tokenizer_config.json", folder)


def load(folder: Path, **options):
    """transformers' float32 model of a folder; `options` are more of from_pretrained's, or others."""
    import torch

    options = dict(dtype=torch.float32, attn_implementation="eager") | options
    return class_of(folder).from_pretrained(folder, **options).eval()


def class_of(folder: Path):
    """The class that a folder's config.json names."""
    import transformers

    return getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])


def reference(folder: Path, **options) -> Reference:
    """What transformers computes from a folder, for tokens after which each greedy choice is certain."""
    import torch

    model = load(folder, **options)
    for seed in range(20):
        tokens = torch.tensor(np.random.default_rng(seed).integers(20, VOCABULARY, (2, LENGTH)))
        with torch.no_grad():
            found, chosen = _continued(model, tokens)
            if _lead(found) < CERTAIN:
                continue
            logits = model(input_ids=tokens).logits
            documents = [model(input_ids=tokens[i : i + 1, :n]).logits[0] for i, n in enumerate(DOCUMENTS)]
        arrays = (tokens, logits, found[:, :STEPS], chosen, torch.cat(documents))
        return Reference(*(array.numpy() for array in arrays))
    raise ValueError(f"{folder.name}: two tokens are nearly as likely after any of 20 texts; spread the weights more")


def _continued(model, tokens):
    """Through a cache: logits `[2, 2 * STEPS, V]` of the last tokens and of a greedy continuation, and the latter."""
    import torch

    past = model(input_ids=tokens[:, :-STEPS], use_cache=True).past_key_values
    found, fed = [], list(tokens[:, -STEPS:].unbind(1))
    for i in range(2 * STEPS):
        if i >= STEPS:
            fed.append(found[-1].argmax(-1))
        found.append(model(input_ids=fed[i][:, None], past_key_values=past, use_cache=True).logits[:, -1])
    return torch.stack(found, 1), torch.stack(fed[STEPS:], 1)


def _lead(logits) -> float:
    """How far the choices are from being other ones, as a share of the largest logit."""
    best = logits[:, STEPS - 1 : -1].topk(2).values
    return float((best[..., 0] - best[..., 1]).min() / logits.abs().max())


def main() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out, *names = sys.argv[1:]
    for name in names or NAMES:
        folder = make(Path(out), name)
        found = read_reference(folder)
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1000
        off = np.abs(found.step - found.logits[:, -STEPS:]).max()
        print(f"{name:20} {size:5.0f} kB  largest logit {np.abs(found.logits).max():6.2f}  with a cache {off:.0e}")


if __name__ == "__main__":
    main()

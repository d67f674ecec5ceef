"""The configured training and evaluation data, encoded and batched."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_jax.data import (
    Batches,
    Encoded,
    Row,
    encode_rows,
    load_chat_template,
    load_rows,
    make_batches,
    pad_id,
    split_rows,
)
from qlora_jax.train.config import Config


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Batches to train on, and the documents to evaluate on (none without data.eval)."""

    batches: Batches
    eval_documents: Sequence[Encoded]


def prepare(config: Config, tokenizer) -> Dataset:
    """Reads, encodes and packs what `config.data` names. Raises ValueError or FileNotFoundError."""
    if not config.data.train:
        raise ValueError(
            "config.data.train is not set: give a .jsonl, .json or .parquet file, a folder or a Hub dataset"
        )
    rows = load_rows(config.data.train, config.data.split)
    eval_rows: Sequence[Row] = []
    if isinstance(config.data.eval, float):
        rows, eval_rows = split_rows(rows, config.data.eval, config.seed)
    elif config.data.eval:
        eval_rows = load_rows(config.data.eval, config.data.eval_split or config.data.split)
    eval_rows = eval_rows[: config.train.eval_rows] if config.train.eval_rows else eval_rows
    documents = _encode(rows, tokenizer, config)
    eval_documents = _encode(eval_rows, tokenizer, config) if eval_rows else []
    return Dataset(batches=_batches(config, documents, pad_id(tokenizer)), eval_documents=eval_documents)


def random_tokens(config: Config, vocab_size: int) -> Dataset:
    """Full rows of random tokens, all scored: for measuring speed and memory without a tokenizer."""
    rng = np.random.default_rng(config.seed)
    count = config.train.batch_size * config.train.grad_accum
    ids = rng.integers(0, vocab_size, (count, config.train.seq_len), np.int32)
    scored = np.arange(config.train.seq_len) > 0
    documents = [Encoded(ids=row, scored=scored) for row in ids]
    return Dataset(batches=_batches(config, documents, 0), eval_documents=[])


def _batches(config: Config, documents: Sequence[Encoded], pad: int) -> Batches:
    return make_batches(
        documents,
        seq_len=config.train.seq_len,
        batch_size=config.train.batch_size,
        grad_accum=config.train.grad_accum,
        packing=config.data.packing,
        seed=config.seed,
        pad_id=pad,
    )


def _encode(rows, tokenizer, config: Config) -> Sequence[Encoded]:
    return encode_rows(
        rows,
        tokenizer,
        seq_len=config.train.seq_len,
        train_on=config.data.train_on,
        chat_template=load_chat_template(config.data.chat_template or None),
    )

"""From rows to batches: sources → formats → template (ids and loss mask) → packing → pipeline. NumPy only."""

from qlora_jax.data.chat import load_chat_template
from qlora_jax.data.formats import Chat, Completion, Text, to_example
from qlora_jax.data.packing import pack
from qlora_jax.data.pipeline import Batch, Batches, eval_batches, make_batches
from qlora_jax.data.sources import Row, load_rows
from qlora_jax.data.split import split_rows
from qlora_jax.data.template import Encoded, encode, encode_rows
from qlora_jax.data.tokenizer import check_vocabulary, load_tokenizer, pad_id

__all__ = [
    "Batch",
    "Batches",
    "Chat",
    "Completion",
    "Encoded",
    "Row",
    "Text",
    "check_vocabulary",
    "encode",
    "encode_rows",
    "eval_batches",
    "load_chat_template",
    "load_rows",
    "load_tokenizer",
    "make_batches",
    "pack",
    "pad_id",
    "split_rows",
    "to_example",
]

"""From rows to batches: sources → formats → chat and template (ids and loss mask) → documents → packing → pipeline.

NumPy only."""

from qlora_jax.data.chat import load_chat_template
from qlora_jax.data.documents import Documents
from qlora_jax.data.encoding import encode_rows
from qlora_jax.data.formats import Chat, Completion, Text, to_example
from qlora_jax.data.packing import pack
from qlora_jax.data.pipeline import ARRAYS, Batch, Batches, eval_batches
from qlora_jax.data.row import Row
from qlora_jax.data.sources import load_rows
from qlora_jax.data.split import split_rows
from qlora_jax.data.template import Encoded, encode
from qlora_jax.data.tokenizer import limit_vocabulary, load_tokenizer, pad_id

__all__ = [
    "ARRAYS",
    "Batch",
    "Batches",
    "Chat",
    "Completion",
    "Documents",
    "Encoded",
    "Row",
    "Text",
    "limit_vocabulary",
    "encode",
    "encode_rows",
    "eval_batches",
    "load_chat_template",
    "load_rows",
    "load_tokenizer",
    "pack",
    "pad_id",
    "split_rows",
    "to_example",
]

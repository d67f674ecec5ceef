"""Chats: the template at work (template), which characters come from which message (marks), what it left out (said),
and which are learned (mask)."""

from qlora_jax.data.chat.marks import Rendered, Span
from qlora_jax.data.chat.mask import context_spans, ending_spans, is_learned, learned_spans
from qlora_jax.data.chat.template import TODAY, ChatTemplate, has_chat_template, load_chat_template

__all__ = [
    "TODAY",
    "ChatTemplate",
    "Rendered",
    "Span",
    "context_spans",
    "ending_spans",
    "has_chat_template",
    "is_learned",
    "learned_spans",
    "load_chat_template",
]

"""Tiny tokenizers built in code: one token per word, space, line break or run of punctuation."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [
    "system",
    "user",
    "assistant",
    "be",
    "brief",
    "hi",
    "hello",
    "there",
    "how",
    "are",
    "you",
    "fine",
    "thanks",
    "ok",
    "bye",
    "INST",
]
MARKS = [" ", "\n", "\n\n", "[", "]", "[/", "?", "!", ".", "###", ":"]

LLAMA3 = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
BLOCKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(*, specials, template=None, bos=None, eos=None, pad=None, adds_eos=False):
    """A word tokenizer; ids follow the order specials, "<unk>", WORDS, MARKS."""
    vocabulary = {token: i for i, token in enumerate([*specials, "<unk>", *WORDS, *MARKS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|\s|\w+|[^\w\s]+"), "isolated")
    backend.decoder = decoders.Fuse()
    if bos or adds_eos:
        around = f"{bos or ''} $A {eos if adds_eos else ''}".strip()
        named = [(token, vocabulary[token]) for token in (bos, eos) if token]
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=named)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad, unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def build():
    return build_tokenizer


@pytest.fixture
def llama3():
    """bos is written by the template and by the post-processor; eos ends each turn."""
    specials = ["<|begin|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    return build_tokenizer(specials=specials, template=LLAMA3, bos="<|begin|>", eos="<|eot_id|>")


@pytest.fixture
def chatml():
    """pad is eos; no bos."""
    return build_tokenizer(specials=["<|im_start|>", "<|im_end|>"], template=CHATML, eos="<|im_end|>", pad="<|im_end|>")


@pytest.fixture
def qwen_base():
    """A base model's ChatML: the turn's end is not eos."""
    return build_tokenizer(
        specials=["<|im_start|>", "<|im_end|>", "<|endoftext|>"], template=CHATML, eos="<|endoftext|>"
    )


@pytest.fixture
def llama2():
    return build_tokenizer(specials=["<s>", "</s>"], template=LLAMA2, bos="<s>", eos="</s>")


@pytest.fixture
def blocks():
    return build_tokenizer(specials=["<|im_start|>", "<|im_end|>"], template=BLOCKS, eos="<|im_end|>")


@pytest.fixture
def plain():
    """A base tokenizer with bos and no chat template."""
    return build_tokenizer(specials=["<s>", "</s>"], bos="<s>", eos="</s>")

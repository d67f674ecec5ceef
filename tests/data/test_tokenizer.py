import huggingface_hub.constants
import pytest

from qlora_jax.data import Completion, encode, limit_vocabulary, load_tokenizer, pad_id
from qlora_jax.data.prompt import chat_ids, text_ids


def test_load_from_a_local_folder(tmp_path, chatml):
    chatml.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded("hi there")["input_ids"] == chatml("hi there")["input_ids"]
    assert loaded.eos_token == "<|im_end|>"
    assert loaded.chat_template == chatml.chat_template


def test_a_tokenizer_out_of_reach(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as error:
        load_tokenizer("models/none")
    assert str(error.value).startswith(
        "no tokenizer at 'models/none': it is no folder here with tokenizer files, and the Hugging Face Hub "
        "did not give it; check the name and the connection, or pass a local folder that holds "
        "tokenizer.json and tokenizer_config.json ("
    )


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError) as error:
        load_tokenizer(str(tmp_path))
    assert str(error.value).startswith(f"{str(tmp_path)!r} holds no tokenizer that can be built (")
    assert str(error.value).endswith("); the folder needs tokenizer.json and tokenizer_config.json")


def test_ids_that_no_text_uses_may_lie_beyond_the_vocabulary(chatml):
    known = len(chatml)
    limit_vocabulary(chatml, known)
    chatml.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<extra>"]})
    assert len(chatml) == known + 2
    ids = text_ids("hi there", chatml)
    assert list(encode(Completion(prompt="hi", completion=" there"), chatml, seq_len=64).ids[:-1]) == ids
    assert pad_id(chatml) == chatml.eos_token_id < known


def test_an_id_beyond_the_vocabulary_is_refused_with_its_text(chatml):
    known = len(chatml)
    limit_vocabulary(chatml, known)
    chatml.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    words = (
        f"token '<extra>' has id {known}, but the model's vocab_size is {known}: the text 'hi there<extra>.*' cannot"
    )
    with pytest.raises(ValueError, match=words):
        text_ids("hi there<extra> you", chatml)
    with pytest.raises(ValueError, match=words):
        encode(Completion(prompt="hi", completion=" there<extra> you"), chatml, seq_len=64)
    with pytest.raises(ValueError, match="token '<extra>' has id"):
        chat_ids([{"role": "user", "content": "hi there<extra>"}], chatml)
    chatml.eos_token = "<extra>"
    with pytest.raises(ValueError, match="token '<extra>' has id"):
        encode(Completion(prompt="hi", completion=" there"), chatml, seq_len=64)


def test_pad_id(build):
    assert pad_id(build(specials=["<a>", "<b>"], eos="<a>", pad="<b>")) == 1
    assert pad_id(build(specials=["<a>", "<b>"], eos="<b>")) == 1
    assert pad_id(build(specials=["<a>", "<b>"])) == 0

import huggingface_hub.constants
import pytest

from qlora_jax.data import check_vocabulary, load_tokenizer, pad_id


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


def test_check_vocabulary(chatml):
    size = len(chatml)
    check_vocabulary(chatml, size)
    with pytest.raises(ValueError) as error:
        check_vocabulary(chatml, size - 1)
    assert str(error.value) == (
        f"the tokenizer has {size} tokens but the model's vocab_size is {size - 1}; use the tokenizer that "
        "belongs to this model"
    )


def test_a_special_id_beyond_the_vocabulary(chatml, monkeypatch):
    monkeypatch.setattr(type(chatml), "__len__", lambda self: 1)
    with pytest.raises(ValueError) as error:
        check_vocabulary(chatml, 1)
    assert str(error.value) == (
        "the tokenizer's special token '<|im_end|>' has id 1 but the model's vocab_size is 1; use the "
        "tokenizer that belongs to this model"
    )


def test_pad_id(build):
    assert pad_id(build(specials=["<a>", "<b>"], eos="<a>", pad="<b>")) == 1
    assert pad_id(build(specials=["<a>", "<b>"], eos="<b>")) == 1
    assert pad_id(build(specials=["<a>", "<b>"])) == 0

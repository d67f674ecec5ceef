"""A small Llama folder with a tokenizer, made without torch or transformers."""

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LAYERS, WIDTH, INNER, KEY_VALUE = 2, 64, 128, 32
SPECIALS = ("<s>", "</s>")
VOCABULARY = 256 + len(SPECIALS)
POSITIONS = 128
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}
LAYER_SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KEY_VALUE, WIDTH),
    "self_attn.v_proj": (KEY_VALUE, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
    "input_layernorm": (WIDTH,),
    "post_attention_layernorm": (WIDTH,),
}


def make_model(folder: Path, *, seed: int = 0) -> Path:
    """Writes config.json, two shards with their index, and a byte tokenizer."""
    folder.mkdir(parents=True)
    tensors = random_tensors(seed)
    first = {name: value for name, value in tensors.items() if "layers.1" not in name}
    second = {name: value for name, value in tensors.items() if name not in first}
    write_shards(folder, {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder)
    return folder


def random_tensors(seed: int) -> dict[str, np.ndarray]:
    """bfloat16 weights by Hugging Face name; norms are one."""
    shapes = {
        "model.embed_tokens": (VOCABULARY, WIDTH),
        "lm_head": (VOCABULARY, WIDTH),
        "model.norm": (WIDTH,),
    }
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in LAYER_SHAPES.items()}
    rng = np.random.default_rng(seed)
    values = {name: np.ones(shape) if len(shape) == 1 else rng.normal(0, 0.1, shape) for name, shape in shapes.items()}
    return {f"{name}.weight": value.astype(ml_dtypes.bfloat16) for name, value in values.items()}


def write_shards(folder: Path, shards: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Writes the files and the index that places their tensors."""
    for file, tensors in shards.items():
        save_file(dict(tensors), folder / file, metadata={"format": "pt"})
    places = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_tokenizer(folder: Path, *, more: int = 0) -> None:
    """A tokenizer with one token a byte, and `more` tokens beyond the model's vocabulary."""
    alphabet = [
        *SPECIALS,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(f"<extra{i}>" for i in range(more)),
    ]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_rows(file: Path, count: int = 24) -> Path:
    """Prompts with completions that a model of any size can learn."""
    rows = [{"prompt": f"say {i % 7}:", "completion": f" {i % 7} yes"} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_config(file: Path, model: Path, rows: Path) -> Path:
    """A training configuration: three steps in fp32, without an output_dir."""
    file.write_text(
        "from qlora_jax.config import *\n"
        "config = Config(\n"
        f"    model=ModelSection(path={str(model)!r}, dtype='fp32'),\n"
        "    lora=LoraSection(rank=4, dropout=0.1),\n"
        f"    data=DataSection(train={str(rows)!r}, eval=0.25, samples=1),\n"
        "    optim=OptimSection(learning_rate=1e-2),\n"
        "    train=TrainSection(\n"
        "        steps=3, batch_size=2, grad_accum=2, seq_len=32, save_every=1, eval_every=2\n"
        "    ),\n"
        ")\n"
    )
    return file

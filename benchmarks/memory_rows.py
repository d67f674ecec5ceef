"""The train steps whose memory is a promise: which fields each sets, and what it may take at most."""

import dataclasses

GB, GIB = 10**9, 2**30
# What a process needs on a card beside XLA's buffers.
CONTEXT = 700_000_000
ALL = "r 16 all-linear"
LONG = (
    "lora.rank=32",
    "lora.alpha=32",
    "train.batch_size=1",
    "train.grad_accum=1",
    "train.remat=offload",
    "train.mlp_chunk=4096",
    "optim.moments=bf16",
    "optim.gradients=bf16",
    # A table of 8 bits is smaller than the rows of so many tokens.
    "model.embedding=device",
    "quant.embedding=int8",
    "quant.lm_head=nf4",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A configuration of configs/ with fields set otherwise.

    Attributes:
      name, adapters, tokens: for the page.
      config: file name without ending. overrides: "section.field=value", without `config.`.
      limit: most bytes of the compiled peak.
      gpus: cards that it is compiled for.
      peer: what `limit` comes from, where it is somebody else's figure.
    """

    name: str
    adapters: str
    tokens: str
    config: str
    limit: float
    overrides: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ("rtx4090", "h200")
    peer: str = ""


def long_row(card: int, tokens: int) -> Row:
    """A context that Unsloth publishes as its longest on a card of so many GB (Llama-3-8B, rank 32, batch 1)."""
    return Row(
        name=f"Llama-3-8B on {card} GB",
        adapters="r 32 all-linear",
        tokens=f"{tokens:,}",
        config="8b",
        overrides=(*LONG, f"train.seq_len={tokens}", f"model.max_position={tokens}"),
        limit=card * GB - CONTEXT,
        gpus=("rtx4090",) if card <= 24 else ("h200",),
        peer=f"Unsloth's longest on {card} GB",
    )


# By the card's GB: Unsloth's longest context on it, and the row that reaches it.
LONG_ROWS = {
    card: (tokens, long_row(card, tokens))
    for card, tokens in ((8, 2_972), (16, 40_724), (24, 78_475), (48, 191_728), (80, 342_733))
}

ROWS = (
    Row(name="Llama-2-7B", adapters="r 8 q,v", tokens="512", config="7b", limit=4.0 * GB),
    Row(
        name="Llama-3.1-8B",
        adapters="r 16 all-linear",
        tokens="2 x 2,048",
        config="8b",
        overrides=("train.batch_size=2", "train.seq_len=2048", "train.remat=offload"),
        limit=6.5 * GIB,
        peer="torchtune 7.4 GiB",
    ),
    Row(
        name="Llama-2-13B",
        adapters="r 16 all-linear",
        tokens="512",
        config="13b",
        overrides=("train.remat=offload", "quant.lm_head=int8"),
        limit=8.5 * GB,
    ),
    Row(name="LLaMA-65B", adapters="r 16 all-linear", tokens="512", config="65b", limit=40 * GB),
    Row(
        name="LLaMA-65B",
        adapters="r 64 all-linear",
        tokens="512",
        config="65b",
        overrides=("lora.rank=64", "optim.moments=bf16", "optim.gradients=bf16"),
        limit=46 * GB,
    ),
    Row(
        name="LLaMA-65B",
        adapters="r 64 all-linear",
        tokens="512",
        config="65b",
        overrides=("lora.rank=64", "optim.offload=host", "optim.gradients=bf16"),
        limit=42 * GB,
    ),
    Row(
        name="Llama-3.1-70B",
        adapters="r 16 all-linear",
        tokens="2,048",
        config="70b",
        overrides=("train.seq_len=2048", "train.remat=offload", "quant.lm_head=int8"),
        limit=45 * GB,
    ),
    *(row for _, row in LONG_ROWS.values()),
    Row(
        name="LLaMA-33B on 24 GB",
        adapters="r 64 all-linear",
        tokens="512",
        config="65b",
        overrides=(
            "model.geometry=geometry/llama-33b.json",
            "lora.rank=64",
            "optim.offload=host",
            "optim.gradients=bf16",
        ),
        limit=24 * GB - CONTEXT,
        gpus=("rtx4090",),
        peer="QLoRA's paper: 33B on 24 GB, paged",
    ),
    *(
        Row(
            name=name, adapters="r 16 all-linear", tokens="2,048", config=config, limit=limit, peer=peer, gpus=("h200",)
        )
        for name, config, limit, peer in (
            ("Phi-4", "phi-4", 11 * GB, ""),
            ("Gemma-4-12B", "gemma-4-12b", 10 * GB, ""),
            ("Qwen3.5-9B", "qwen3.5-9b", 8 * GB, ""),
            ("Qwen3.5-27B", "qwen3.5-27b", 20 * GB, "AutoModel 31.8 GiB"),
            ("gpt-oss-20b", "gpt-oss-20b", 12.8 * GB, "Unsloth's least"),
            ("Qwen3-30B-A3B", "qwen3-30b-a3b", 17.5 * GB, "Unsloth's least"),
            ("Gemma-4-26B-A4B", "gemma-4-26b-a4b", 16 * GB, ""),
            ("Qwen3.5-35B-A3B", "qwen3.5-35b-a3b", 20.5 * GB, ""),
        )
    ),
)

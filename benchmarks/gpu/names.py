"""The rows' names: one place, because jobs and comparisons find each other's rows by them."""

COPY, READ, PEAK = "copy bandwidth", "read bandwidth", "matmul peak, bfloat16"
QLORA, LORA = "qlora, rank 16 all-linear", "lora, rank 16 all-linear"
SMALL, FORWARD = "qlora, rank 8 q,v", "bf16 forward pass with its loss"
NF4, BF16 = "nf4", "bf16"
# The peers' ways of training: PEFT's recipe (float32 beside the packed weights, autocast), or bfloat16 throughout.
TRAINING = ("bfloat16, sdpa", "recipe, sdpa", "bfloat16, flash_attention_2", "recipe, flash_attention_2")

Shape = tuple[int, int]


def shape_name(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def check_name(operation: str, implementation: str) -> str:
    return f"exact: {operation}, {implementation}"


def dequantize_name(shape: Shape, implementation: str) -> str:
    return f"dequantize {shape_name(shape)}, {implementation}"


def separate_name(shape: Shape, rows: int) -> str:
    return f"dequantize + product {shape_name(shape)}, M={rows}"


def fused_name(shape: Shape, rows: int) -> str:
    return f"fused matmul {shape_name(shape)}, M={rows}"


def train_name(label: str) -> str:
    return f"train step, {label}"


def decode_name(weights: str, batch: int) -> str:
    return f"decode, {weights} weights, batch {batch}"


def peer_dequantize_name(shape: Shape) -> str:
    return f"bitsandbytes dequantize_4bit {shape_name(shape)}"


def peer_gemv_name(shape: Shape) -> str:
    return f"bitsandbytes gemv_4bit {shape_name(shape)}"


def peer_train_name(variant: str) -> str:
    return f"train step, transformers + PEFT + bitsandbytes ({variant})"


def peer_decode_name(batch: int) -> str:
    return f"decode, transformers + bitsandbytes, batch {batch}"

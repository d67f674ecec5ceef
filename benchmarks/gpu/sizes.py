"""How large everything is: FULL is what a GPU is measured with, SMOKE runs the same code in seconds on a CPU."""

import dataclasses
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MB = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of all parts.

    Attributes:
      geometry: the config.json of the model that is trained and generates.
      large: the config file, and overrides, of the step that has to fit 48 GB.
      shapes: (N, K) of the layers' weights; `merged`: one matrix with as many elements as a whole layer.
      m: rows of x in the fused matmul's table. gemms: (M, N, K) of which the best is the measured matmul peak.
      copy_bytes: size of the array that is copied. rotate_bytes: what operands go through, so that no L2 serves them.
      unroll: kernels in one program. calls: programs queued before the clock is read. rounds: readings for a median.
      seq_len, batch, steps: of the train step. chunk: tokens whose logits exist at once.
      prompt, new_tokens, batches: of the generation. load_layers: layers of the checkpoint that is loaded.
    """

    smoke: bool = False
    geometry: Path = ROOT / "configs" / "geometry" / "llama-2-7b.json"
    large: tuple[str, ...] = ()
    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (11008, 4096), (4096, 11008))
    merged: tuple[int, int] = (4 * 4096 + 3 * 11008, 4096)
    m: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    gemms: tuple[tuple[int, int, int], ...] = ((8192, 8192, 8192), (8192, 11008, 4096), (16384, 8192, 8192))
    copy_bytes: int = 2048 * MB
    rotate_bytes: int = 512 * MB
    unroll: int = 8
    calls: int = 24
    rounds: int = 15
    seq_len: int = 2048
    batch: int = 4
    steps: int = 6
    chunk: int = 256
    prompt: int = 128
    new_tokens: int = 128
    batches: tuple[int, ...] = (1, 8, 32)
    load_layers: int = 4


FULL = Sizes()
SMOKE = Sizes(
    smoke=True,
    geometry=Path(__file__).parent / "smoke.json",
    large=(
        "--config.train.seq_len=32",
        "--config.train.grad_accum=2",
        "--config.train.loss_chunk=32",
        "--config.lora.rank=2",
    ),
    shapes=((64, 64), (96, 128)),
    merged=(128, 64),
    m=(1, 16),
    gemms=((64, 64, 64),),
    copy_bytes=1 * MB,
    rotate_bytes=10_000,
    unroll=2,
    calls=2,
    rounds=2,
    seq_len=32,
    batch=2,
    steps=2,
    chunk=32,
    prompt=4,
    new_tokens=4,
    batches=(1,),
    load_layers=2,
)

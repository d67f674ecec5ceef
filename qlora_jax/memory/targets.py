"""Descriptions of GPUs for XLA's compiler, from data sheets and device queries."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What all cards of a compute capability share.

    Attributes:
      device_kind: a card of it that every supported JAX knows by name; Pallas reads the capability off this name.
      shared_per_sm, shared_per_block: bytes.
    """

    device_kind: str
    fpus_per_sm: int
    threads_per_sm: int
    shared_per_sm: int
    shared_per_block: int


ARCHITECTURES = {
    (7, 5): Architecture("Tesla T4", 64, 1024, 65_536, 65_536),
    (8, 0): Architecture("NVIDIA A100", 64, 2048, 167_936, 166_912),
    (8, 6): Architecture("NVIDIA A10", 128, 1536, 102_400, 101_376),
    (8, 9): Architecture("NVIDIA GeForce RTX 4090", 128, 1536, 102_400, 101_376),
    (9, 0): Architecture("NVIDIA H200", 128, 2048, 233_472, 232_448),
    (10, 0): Architecture("NVIDIA B200", 128, 2048, 233_472, 232_448),
    (12, 0): Architecture("NVIDIA GeForce RTX 5090", 128, 1536, 102_400, 101_376),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler asks about a card.

    Attributes:
      name: as the driver reports it.
      capability: CUDA compute capability, a key of ARCHITECTURES.
      memory: bytes that CUDA reports for the card, some less than its data sheet's.
      l2: bytes. bandwidth: bytes per second. clock: boost, GHz.
    """

    name: str
    capability: tuple[int, int]
    sms: int
    memory: int
    bandwidth: int
    l2: int
    clock: float

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.capability]

    def target_config(self) -> str:
        """The card as the text of XLA's GpuTargetConfigProto."""
        major, minor = self.capability
        extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        common = self.architecture
        return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  name: "{self.name}" device_vendor: "NVIDIA Corporation" device_address_bits: 64
  core_count: {self.sms} fpus_per_core: {common.fpus_per_sm} threads_per_core_limit: {common.threads_per_sm}
  device_memory_size: {self.memory} memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2}
  shared_memory_per_core: {common.shared_per_sm} shared_memory_per_block_optin: {common.shared_per_block}
  shared_memory_per_block: 49152 clock_rate_ghz: {self.clock}
  threads_per_block_limit: 1024 threads_per_warp: 32
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.name}"
"""


MB = 1 << 20
GPUS = {
    "rtx3060": Gpu("NVIDIA GeForce RTX 3060", (8, 6), 28, 12_600_000_000, 360_000_000_000, 3 * MB, 1.78),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 25_300_000_000, 936_000_000_000, 6 * MB, 1.70),
    "rtx4070": Gpu("NVIDIA GeForce RTX 4070", (8, 9), 46, 12_500_000_000, 504_000_000_000, 36 * MB, 2.48),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 25_300_000_000, 1_008_000_000_000, 72 * MB, 2.52),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", (12, 0), 170, 33_600_000_000, 1_792_000_000_000, 96 * MB, 2.41),
    "t4": Gpu("Tesla T4", (7, 5), 40, 15_800_000_000, 320_000_000_000, 4 * MB, 1.59),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 23_700_000_000, 300_000_000_000, 48 * MB, 2.04),
    "a10": Gpu("NVIDIA A10", (8, 6), 72, 23_800_000_000, 600_000_000_000, 6 * MB, 1.70),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 42_300_000_000, 1_555_000_000_000, 40 * MB, 1.41),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 85_100_068_864, 2_039_000_000_000, 40 * MB, 1.41),
    "l40s": Gpu("NVIDIA L40S", (8, 9), 142, 47_700_000_000, 864_000_000_000, 96 * MB, 2.52),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 84_942_979_072, 3_352_000_000_000, 50 * MB, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 151_397_597_184, 4_800_000_000_000, 50 * MB, 1.98),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 191_500_000_000, 8_000_000_000_000, 126 * MB, 1.96),
}


@dataclasses.dataclass(frozen=True)
class Card:
    """The card that a plan is for.

    Attributes:
      name: as the user wrote it.
      capacity: bytes of memory.
      compiled_as: the key of GPUS that programs are compiled for.
    """

    name: str
    capacity: int
    compiled_as: str

    @property
    def stands_in(self) -> bool:
        """Whether only a size was given, so that another card stands in for the compiler."""
        return self.name != self.compiled_as


def find_card(name: str) -> Card:
    """A key of GPUS, or a size such as `48GB` (10⁹ bytes), for which the known card of the nearest size stands in.

    Raises:
      ValueError: neither.
    """
    if name in GPUS:
        return Card(name, GPUS[name].memory, name)
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?GB", name, re.IGNORECASE)
    if size is None or float(size[1]) == 0:
        hint = f" (did you mean {name}GB?)" if re.fullmatch(r"[1-9]\d*", name) else ""
        raise ValueError(f"unknown GPU {name!r}{hint}: known are {', '.join(GPUS)}, or a size such as 48GB")
    capacity = round(float(size[1]) * 1e9)
    # Cards before Ampere run other kernels; they stand in for nothing but themselves.
    candidates = [key for key, gpu in GPUS.items() if gpu.capability >= (8, 0)]
    return Card(name, capacity, min(candidates, key=lambda key: abs(GPUS[key].memory - capacity)))

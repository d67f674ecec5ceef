"""Descriptions of GPUs for XLA's compiler, from data sheets and device queries."""

import dataclasses


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
    (8, 0): Architecture("NVIDIA A100", 64, 2048, 167_936, 166_912),
    (8, 6): Architecture("NVIDIA A10", 128, 1536, 102_400, 101_376),
    (8, 9): Architecture("NVIDIA GeForce RTX 4090", 128, 1536, 102_400, 101_376),
    (9, 0): Architecture("NVIDIA H200", 128, 2048, 233_472, 232_448),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler asks about a card.

    Attributes:
      name: as the driver reports it.
      capability: CUDA compute capability, a key of ARCHITECTURES.
      memory, l2: bytes. bandwidth: bytes per second. clock: boost, GHz.
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
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 25_300_000_000, 936_000_000_000, 6 * MB, 1.70),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 25_300_000_000, 1_008_000_000_000, 72 * MB, 2.52),
    "a10": Gpu("NVIDIA A10", (8, 6), 72, 23_800_000_000, 600_000_000_000, 6 * MB, 1.70),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 85_100_068_864, 2_039_000_000_000, 40 * MB, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 84_942_979_072, 3_352_000_000_000, 50 * MB, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 151_397_597_184, 4_800_000_000_000, 50 * MB, 1.98),
}

"""Descriptions of GPUs for XLA's compiler, from data sheets and device queries."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What XLA's compiler asks about a card.

    Attributes:
      name: as the driver reports it; also the device kind that JAX knows it by.
      capability: CUDA compute capability.
      memory, l2, shared_per_sm, shared_per_block: bytes. bandwidth: bytes per second. clock: GHz.
    """

    name: str
    capability: tuple[int, int]
    sms: int
    fpus_per_sm: int
    threads_per_sm: int
    memory: int
    bandwidth: int
    l2: int
    shared_per_sm: int
    shared_per_block: int
    clock: float

    def target_config(self) -> str:
        """The card as the text of XLA's GpuTargetConfigProto."""
        major, minor = self.capability
        extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  name: "{self.name}" device_vendor: "NVIDIA Corporation" device_address_bits: 64
  core_count: {self.sms} fpus_per_core: {self.fpus_per_sm} threads_per_core_limit: {self.threads_per_sm}
  device_memory_size: {self.memory} memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2}
  shared_memory_per_core: {self.shared_per_sm} shared_memory_per_block_optin: {self.shared_per_block}
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


GPUS = {
    "h200": Gpu(
        name="NVIDIA H200",
        capability=(9, 0),
        sms=132,
        fpus_per_sm=128,
        threads_per_sm=2048,
        memory=151_397_597_184,
        bandwidth=4_800_000_000_000,
        l2=52_428_800,
        shared_per_sm=233_472,
        shared_per_block=232_448,
        clock=1.98,
    ),
    "rtx4090": Gpu(
        name="NVIDIA GeForce RTX 4090",
        capability=(8, 9),
        sms=128,
        fpus_per_sm=128,
        threads_per_sm=1536,
        memory=25_300_000_000,
        bandwidth=1_008_000_000_000,
        l2=75_497_472,
        shared_per_sm=102_400,
        shared_per_block=101_376,
        clock=2.52,
    ),
}

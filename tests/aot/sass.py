"""Machine code: the kernels of a compiled program as ptxas makes them, and which of their instructions loop.

XLA hands one PTX file per kernel to ptxas. The same files go through the same ptxas once more here, because a cubin is
easier to get that way than out of a serialized executable; the instructions are the same.
"""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import jax

from qlora_jax.memory.compile import compile_for
from tests.aot.flow import FlowGraph, Instruction

TOOLS = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
MMA = ("HMMA", "HGMMA", "IMMA", "IGMMA", "UTCHMMA")
INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
LABEL = re.compile(r"^(?P<label>[.$][\w$.]+):")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel's machine code.

    Attributes:
      registers: per thread. spilled: bytes per thread that ptxas stores to and loads from local memory.
      code: opcodes of the instructions that can be reached; padding and the trap after the end are not among them.
      loops: opcodes of each innermost loop.
    """

    name: str
    registers: int
    spilled: int
    code: tuple[str, ...]
    loops: tuple[tuple[str, ...], ...]

    @property
    def hot(self) -> tuple[str, ...]:
        """The loop with most matrix instructions, or else the longest; all code of a kernel without a loop."""
        return max(self.loops, key=lambda loop: (count(loop, *MMA), len(loop)), default=self.code)

    @property
    def local_memory(self) -> int:
        """Instructions that use local memory: spills, or arrays that do not fit registers."""
        return count(self.code, "LDL", "STL")


def available() -> bool:
    """Whether NVIDIA's tools should be there: beside JAX's plugin for CUDA 13; for CUDA 12 no wheel has nvdisasm."""
    return importlib.util.find_spec("jax_cuda13_plugin") is not None


def count(opcodes: Sequence[str], *names: str) -> int:
    """How many opcodes are one of `names`, whatever follows their first dot."""
    return sum(opcode.split(".")[0] in names for opcode in opcodes)


def compile_kernels(
    function: jax.stages.Wrapped, arguments: tuple, gpu: str, folder: Path
) -> tuple[jax.stages.Compiled, list[Kernel]]:
    """The program compiled for a GPU, no spills allowed, and its kernels: XLA's own, Pallas Triton and Mosaic.

    Args:
      folder: an empty one for what the compilers leave behind.
    """
    # Set and removed by hand: mock.patch.dict would also undo what importing Mosaic adds to the environment meanwhile,
    # the path of its runtime library, and the next Mosaic kernel of this process would not link.
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    try:
        compiled = compile_for(function, arguments, gpu, forbid_spills=True, dump_to=folder)
    finally:
        del os.environ["MOSAIC_GPU_DUMP_TO"]
    files = [path for path in sorted(folder.glob("*.ptx")) if ".entry" in path.read_text()]
    return compiled, [kernel for path in files for kernel in assemble(path)]


def assemble(ptx: Path) -> list[Kernel]:
    """The kernels of a PTX file."""
    cubin = ptx.with_suffix(".cubin")
    target = re.search(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)
    assert target, f"{ptx} names no target"
    report = _run("ptxas", "--verbose", f"-arch={target[1]}", str(ptx), "-o", str(cubin))
    return parse(_run("nvdisasm", "--print-code", str(cubin)), report)


def parse(disassembly: str, report: str) -> list[Kernel]:
    """Kernels from what nvdisasm prints, with registers and spills from what `ptxas --verbose` reports."""
    functions = re.split(r"^\.text\.(\S+):\n", disassembly, flags=re.MULTILINE)
    return [_kernel(*pair, report) for pair in zip(functions[1::2], functions[2::2], strict=True)]


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout + done.stderr


def _kernel(name: str, text: str, report: str) -> Kernel:
    properties = report.partition(f"Compiling entry function '{name}'")[2].partition("Compiling entry")[0]
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", properties)
    registers = re.search(r"Used (\d+) registers", properties)
    assert spills and registers, f"ptxas reported nothing about {name}:\n{report}"
    code, labels = _instructions(text)
    graph = FlowGraph(code, labels)
    reached = tuple(code[i].opcode for i in sorted(graph.reached))
    loops = tuple(tuple(code[i].opcode for i in sorted(loop)) for loop in graph.innermost_loops())
    return Kernel(name, int(registers[1]), int(spills[1]) + int(spills[2]), reached, loops)


def _instructions(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """A function's instructions, and the index of the one that follows each label."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label["label"]] = len(code)
        elif found := INSTRUCTION.search(line):
            target = re.search(r"`\(([^)]+)\)", found["operands"])
            # A branch may also carry its predicate as an operand: `BRA.U !UP0, ...`, `BRA P1, ...`.
            always = not found["predicate"] and not re.search(r"!?\bU?P\d,", found["operands"])
            code.append(Instruction(found["opcode"], target and target[1], always))
    return code, labels

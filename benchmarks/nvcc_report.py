"""What nvcc makes of csrc/cuda: registers, spills, shared memory, 16-byte accesses, tensor-core instructions.

One row a kernel and architecture. Needs nvcc and the disassemblers of its toolkit, or of Triton's package;
neither a GPU nor torch.

    python benchmarks/nvcc_report.py [--arch 80 90a 100] [--jobs 2] [--only loss]
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sources import ROOT

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100")
FLAGS = ("-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror")
PRODUCTS = ("HGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "DMMA")
OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@dataclass(kw_only=True)
class Row:
    """One kernel for one architecture."""

    kernel: str
    case: str = ""  # the call that launches it, where a kernel has several
    arch: str
    registers: int
    stack: int  # bytes a thread
    spills: int  # instructions that load or store local memory
    shared: int  # bytes a block, static
    wide_loads: int  # LDG and LDGSTS of 16 bytes
    loads: int
    read_only: int  # loads past coherence (ld.global.nc): wrong where a kernel may write what it reads
    wide_stores: int  # STG of 16 bytes
    stores: int
    tma: int  # bulk tensor copies
    tensor: str  # tensor-core instruction
    instructions: int

    @property
    def faults(self) -> list[str]:
        """What fails a report."""
        spilled = self.spills or self.stack
        return [f"{self.spills} spill instructions, {self.stack} bytes of stack"] if spilled else []


def tool(name: str) -> str | None:
    """Path of a disassembler: the toolkit's, or the one that Triton's package ships."""
    spec, found = importlib.util.find_spec("triton"), shutil.which(name)
    if found is None and spec is not None and spec.origin is not None:
        shipped = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(shipped) if shipped.exists() else None
    return found


def compile_one(source: Path, arch: str, folder: Path) -> tuple[Path, str]:
    """(cubin, what nvcc said); the text is empty if it compiled without a warning."""
    cubin = folder / f"{source.stem}.sm_{arch}.cubin"
    target = f"arch=compute_{arch},code=sm_{arch}"
    command = ["nvcc", *FLAGS, "-gencode", target, "-cubin", "-o", cubin, source]
    done = subprocess.run(command, capture_output=True, text=True)
    return cubin, (done.stdout + done.stderr).strip() if done.returncode else ""


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def readable(name: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters."""
    name = re.sub(r"^void |zipfls::cuda::|\(anonymous namespace\)::|\(int\)|\(bool\)|__nv_", "", name)
    return re.sub(r"\([^()]*\)$", "", name.replace("__half", "half"))


def rows(cubin: Path, arch: str) -> list[Row]:
    """A row for each kernel of a cubin."""
    cuobjdump, filt = tool("cuobjdump"), tool("cu++filt") or shutil.which("c++filt")
    usage = run(cuobjdump, "--dump-resource-usage", str(cubin))
    parts = re.split(r"Function : (\S+)", run(cuobjdump, "-sass", str(cubin)))
    opcodes = {name: OPCODE.findall(code) for name, code in zip(parts[1::2], parts[2::2], strict=True)}

    def row(name: str, registers: str, stack: str, shared: str) -> Row:
        def count(pattern: str) -> int:
            return sum(bool(re.match(pattern, opcode)) for opcode in opcodes[name])

        return Row(
            kernel=readable(run(filt, name).strip()) if filt else name,
            arch=arch,
            registers=int(registers),
            stack=int(stack),
            spills=count(r"(LDL|STL)\b"),
            shared=int(shared),
            wide_loads=count(r"(LDG|LDGSTS)\..*\b128\b"),
            loads=count(r"(LDG|LDGSTS)\b"),
            read_only=count(r"LDG\..*\bCONSTANT\b"),
            wide_stores=count(r"STG\..*\b128\b"),
            stores=count(r"STG\b"),
            tma=count(r"(UTMALDG|UTMASTG)\b"),
            tensor=next((p for p in PRODUCTS if count(rf"{p}\b")), ""),
            instructions=len(opcodes[name]),
        )

    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    return sorted((row(*numbers) for numbers in found), key=lambda row: row.kernel)


def report(architectures: list[str], jobs: int, only: str) -> tuple[list[Row], list[str]]:
    """All rows, and what is wrong: what the compiler refuses, what spills."""
    found, wrong = [], []
    pairs = [(s, a) for s, a in itertools.product(SOURCES, architectures) if only in s.stem]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda pair: compile_one(*pair, Path(folder)), pairs)
        for (source, arch), (cubin, error) in zip(pairs, results, strict=True):
            found += [] if error else rows(cubin, arch)
            wrong += [f"{source.name} for sm_{arch}: {error}"] if error else []
    wrong += [f"{row.kernel} for sm_{row.arch}: {fault}" for row in found for fault in row.faults]
    return found, wrong


COLUMNS = {  # heading -> width, what a row has there
    "sm": (5, lambda r: r.arch),
    "regs": (6, lambda r: r.registers),
    "stack": (6, lambda r: r.stack),
    "spill": (6, lambda r: r.spills),
    "shared": (8, lambda r: r.shared),
    "16-byte": (10, lambda r: f"{r.wide_loads + r.wide_stores}/{r.loads + r.stores}"),
    "TMA": (5, lambda r: r.tma),
    "tensor": (8, lambda r: r.tensor or "-"),
    "instr": (7, lambda r: r.instructions),
}
HEAD = f"{'kernel':72}" + "".join(f"{name:>{width}}" for name, (width, _) in COLUMNS.items())


def line(r: Row) -> str:
    name = f"{r.kernel[:58]} {r.case}"
    return f"{name:72}" + "".join(f"{cell(r):>{width}}" for width, cell in COLUMNS.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="sources whose name contains this")
    options = parser.parse_args()
    if shutil.which("nvcc") is None or tool("cuobjdump") is None:
        print("nvcc_report needs nvcc and cuobjdump")
        return 2
    found, wrong = report(options.arch, options.jobs, options.only)
    print("\n".join([HEAD, *map(line, found), *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

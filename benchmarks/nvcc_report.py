"""What nvcc makes of csrc/cuda: registers, spills, shared memory, 16-byte accesses, tensor-core instructions.

One row a kernel and architecture; "a logit": what a thread executes for a logit in each loop over a streamed
row. Needs nvcc and the disassemblers of its toolkit, or of Triton's package; neither a GPU nor torch.

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
# Address, guard, opcode, operands of an instruction.
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*)", re.MULTILINE)


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
    loops: tuple[float, ...]  # see main_loops()

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


def main_loops(code: str) -> tuple[float, ...]:
    """Instructions a thread executes for 16 bytes of a row, in the two main loops over it of a kernel's SASS.

    A loop is what lies between a backward branch and its target; one over a row loads 16 bytes at a time and
    takes exponentials. Of the ways around it counts the shortest among those that load most, and of loops
    the two that take least for their bytes, none within another: slow paths, and tiles that need masks, are
    left out.
    """
    found = [(int(at, 16), *rest) for at, *rest in INSTRUCTION.findall(code)]
    jumps = {at: int(to[1], 16) for at, _, op, text in found if (to := _target(op, text))}
    loops: list[tuple[float, int, int]] = []
    for last, first in ((at, to) for at, to in jumps.items() if to < at):
        ways = {first: (0, 0, False)}  # address -> 16-byte loads, minus instructions, exponentials? up to it
        inside = [x for x in found if first <= x[0] <= last]
        for (at, guard, op, operands), after in zip(inside, [*inside[1:], (None,)], strict=True):
            if at not in ways:
                continue
            loads, count, exponential = ways[at]
            wide = op.startswith(("LDG", "LDS")) and ".128" in op
            way = loads + wide, count - 1, exponential or op == "MUFU.EX2"
            ends = at in jumps or op == "EXIT"
            conditional = guard or re.match(r"\s*!?U?P\d", operands)  # BRA.U has its condition as an operand
            following = {jumps.get(at)} | ({after[0]} if conditional or not ends else set())
            for to in following - {None}:
                if to > at:
                    ways[to] = max(ways.get(to, way), way)
            if at == last and way[0] and way[2]:
                loops.append((-way[1] / way[0], first, last))
    chosen: list[tuple[float, int, int]] = []
    for loop in sorted(loops):
        if all(loop[2] < first or last < loop[1] for _, first, last in chosen):
            chosen.append(loop)
    return tuple(round(count, 1) for count, *_ in sorted(chosen[:2], key=lambda loop: loop[1]))


def _target(opcode: str, operands: str) -> re.Match | None:
    """Where a branch goes."""
    return re.search(r"0x([0-9a-f]+)", operands) if opcode.split(".")[0] == "BRA" else None


def rows(cubin: Path, arch: str) -> list[Row]:
    """A row for each kernel of a cubin."""
    cuobjdump, filt = tool("cuobjdump"), tool("cu++filt") or shutil.which("c++filt")
    usage = run(cuobjdump, "--dump-resource-usage", str(cubin))
    parts = re.split(r"Function : (\S+)", run(cuobjdump, "-sass", str(cubin)))
    codes = dict(zip(parts[1::2], parts[2::2], strict=True))
    opcodes = {name: [op for _, _, op, _ in INSTRUCTION.findall(code)] for name, code in codes.items()}

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
            # What is read once has no such loop; its tests for missing vectors would look like a way around.
            loops=() if "loss_factors" in name else main_loops(codes[name]),
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


def itemsize(row: Row) -> int:
    """Bytes of a logit, by the names of kernel and case."""
    text = f"{row.kernel} {row.case}"
    return 8 if re.search("double|fp64", text) else 2 if re.search("half|bfloat16|[bf]+p?16", text) else 4


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
    "a logit": (13, lambda r: "+".join(f"{n * itemsize(r) / 16:.1f}" for n in r.loops) or "-"),
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

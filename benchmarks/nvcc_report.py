"""What nvcc makes of csrc/cuda: registers, spills, shared memory, 16-byte accesses, tensor-core instructions.

``compile_all`` compiles every csrc/cuda/*.cu for a list of architectures, ``rows`` takes the results apart,
one row a kernel and architecture. No GPU and no torch; nvcc, and the disassemblers that come with it or with
Triton.

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

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90a", "100")
FLAGS = ("-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror")


@dataclass
class Row:
    """One kernel for one architecture."""

    kernel: str
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
    bulk: int  # bulk tensor copies
    tensor: str  # tensor-core instruction
    instructions: int

    @property
    def faults(self) -> list[str]:
        """What fails a report."""
        return (
            [f"{self.spills} spill instructions, {self.stack} bytes of stack"]
            if self.spills or self.stack
            else []
        )


def nvcc() -> str | None:
    """Path of nvcc, or None."""
    return shutil.which("nvcc")


def tool(name: str) -> str | None:
    """Path of a disassembler: the toolkit's, or the one that Triton's package ships."""
    spec, found = importlib.util.find_spec("triton"), shutil.which(name)
    if found is None and spec is not None and spec.origin is not None:
        shipped = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(shipped) if shipped.exists() else None
    return found


def sources() -> list[Path]:
    """Every CUDA source file of the package."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def compile_one(source: Path, arch: str, folder: Path) -> tuple[Path, str]:
    """(cubin, what nvcc said); the text is empty if it compiled without a warning."""
    cubin = folder / f"{source.stem}.sm_{arch}.cubin"
    command = [
        nvcc(),
        *FLAGS,
        "-gencode",
        f"arch=compute_{arch},code=sm_{arch}",
        "-cubin",
        "-o",
        cubin,
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return cubin, (done.stdout + done.stderr).strip() if done.returncode else ""


def compile_all(
    folder: Path, architectures: tuple[str, ...] = ARCHITECTURES, jobs: int = 2, only: str = ""
) -> dict[tuple[str, str], tuple[Path, str]]:
    """(source's stem, architecture) -> (cubin, error)."""
    pairs = [(s, a) for s, a in itertools.product(sources(), architectures) if only in s.stem]
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda pair: compile_one(*pair, folder), pairs)
        return {(s.stem, a): result for (s, a), result in zip(pairs, done, strict=True)}


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def readable(name: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters."""
    name = re.sub(r"^void |zipfls::cuda::|\(anonymous namespace\)::|\(int\)|\(bool\)|__nv_", "", name)
    return re.sub(r"\([^()]*\)$", "", name.replace("__half", "half"))


def rows(cubin: Path, arch: str) -> list[Row]:
    """A row for each kernel of a cubin."""
    cuobjdump, filt = tool("cuobjdump"), tool("cu++filt") or shutil.which("c++filt")
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)",
        run(cuobjdump, "--dump-resource-usage", str(cubin)),
    )
    parts = re.split(r"Function : (\S+)", run(cuobjdump, "-sass", str(cubin)))
    code = dict(zip(parts[1::2], parts[2::2], strict=True))
    found = []
    for name, registers, stack, shared in usage:
        opcodes = re.findall(
            r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code[name], re.MULTILINE
        )

        def count(pattern: str, opcodes: list[str] = opcodes) -> int:
            return sum(bool(re.match(pattern, opcode)) for opcode in opcodes)

        products = ("HGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "DMMA")
        found.append(
            Row(
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
                bulk=count(r"(UTMALDG|UTMASTG)\b"),
                tensor=next((p for p in products if count(rf"{p}\b")), ""),
                instructions=len(opcodes),
            )
        )
    return sorted(found, key=lambda row: row.kernel)


def report(
    architectures: tuple[str, ...] = ARCHITECTURES, jobs: int = 2, only: str = ""
) -> tuple[list[Row], list[str]]:
    """All rows, and what is wrong: compiler's complaints, spills."""
    found, wrong = [], []
    with tempfile.TemporaryDirectory() as folder:
        for (stem, arch), (cubin, error) in compile_all(Path(folder), architectures, jobs, only).items():
            if error:
                wrong.append(f"{stem}.cu for sm_{arch}: {error}")
                continue
            for row in rows(cubin, arch):
                found.append(row)
                wrong += [f"{row.kernel} for sm_{arch}: {fault}" for fault in row.faults]
    return found, wrong


def table(found: list[Row]) -> str:
    """The rows as text."""
    lines = [
        f"{'kernel':58} {'sm':>5} {'reg':>4} {'stack':>5} {'spill':>5} {'LDG.128':>8} {'STG.128':>8} tensor"
    ]
    for row in found:
        loads, stores = f"{row.wide_loads}/{row.loads}", f"{row.wide_stores}/{row.stores}"
        lines.append(
            f"{row.kernel[:58]:58} {row.arch:>5} {row.registers:4} {row.stack:5} {row.spills:5} "
            f"{loads:>8} {stores:>8} {row.tensor}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="sources whose name contains this")
    args = parser.parse_args()
    if nvcc() is None or tool("cuobjdump") is None:
        print("nvcc_report needs nvcc and cuobjdump")
        return 2
    found, wrong = report(tuple(args.arch), args.jobs, args.only)
    print(table(found))
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

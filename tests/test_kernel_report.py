"""The ahead-of-time report: one configuration of each kind compiled, faults planted and found.

Compiling needs Triton without its interpreter, so the report runs in processes of its own.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import kernel_report  # noqa: E402
import nvcc_report  # noqa: E402

from zipfls_cuda.triton_kernels import launch_cache, loss, vote  # noqa: E402

compiles = pytest.mark.skipif(
    nvcc_report.tool("cuobjdump") is None, reason="no cuobjdump to look into the binaries with"
)


def report(*arguments: str, plant: str = "") -> subprocess.CompletedProcess:
    """The report in a process of its own, after the statement ``plant``."""
    program = (
        f"import sys; sys.path[:0] = {[str(ROOT / 'benchmarks'), str(ROOT)]}; import kernel_report; "
        f"from zipfls_cuda.triton_kernels import loss, vote; {plant or 'pass'}; "
        f"sys.exit(kernel_report.main({list(arguments)}))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


KINDS = (  # a configuration of each kind, by the names of the cases
    "loss 256x1000 fp16 P=49", "loss 8192x21841 bf16 P=49", "loss 256x1000 bf16 P=320",
    "loss 32768x1000 bf16 P=49 totals", "soft 256x1000 fp16 P=49", "soft 8192x21841 bf16 P=49",
    "soft 256x1000 bf16 P=320", "loss_bwd_ 256x1000 bf16 scalar", "loss 256x1000 bf16 P=49 kept",
    "loss_factors_bwd_ 256x997 bf16 P=49", "ranks 64x1000 P=49",
    "vote 12544x2048x10000 bf16",
)  # fmt: skip


@pytest.mark.slow  # make kernel-report is the whole
@compiles
def test_report_of_each_kind_is_clean():
    """Every kernel on every architecture; products by tensor cores, loss and gradient 16 bytes at a time."""
    done = report("--only", *KINDS, "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row.split() for row in done.stdout.splitlines() if re.match(r"\w+_kernel ", row)]
    assert len(rows) == 3 * len(KINDS)
    assert {row[0] for row in rows} >= {"vote_fwd_kernel", *kernel_report.FORWARD}
    for row in rows:
        tensor, wide = row[-3], int(row[-5].split("/")[0])
        assert (tensor == "-") == (not row[0].startswith("vote_fwd")), row
        if row[0].startswith(("loss_fwd", "loss_bwd", "distill_fwd")):
            assert wide >= 2, row
        streamed = re.search(r"^(loss_fwd|distill_fwd)\w* \w+ \d+x21841", " ".join(row))
        assert bool(re.fullmatch(r"\d+\.\d\+\d+\.\d", row[-1])) == bool(streamed), row


@compiles
@pytest.mark.parametrize(
    ("plant", "case", "fault"),
    [
        ("loss.REGISTERS[True, 4096] = 32", "loss 4096x4096 bf16", "spill instructions"),
        (
            "vote.TUNING[90, 2] = {'small': (1.0, vote.Config(32, 64, 64, 4, 3))}",
            "vote 784x512x1000 bf16",
            "a Hopper product without wgmma",
        ),
        (
            "vote.TUNING[90, 2] = {'small': (1.0, vote.Config(64, 128, 64, 4, 12, True))}",
            "vote 784x512x1000 bf16",
            "bytes of shared memory",
        ),
        (
            "import triton; run = triton.JITFunction.run; triton.JITFunction.run = "
            "lambda *args, **options: run(*args, **options | {'enable_fp_fusion': True})",
            "loss 256x1000 fp16 P=49",
            "lanes may differ in the last bit",
        ),
    ],
    ids=["spill", "no wgmma", "shared memory", "fused sums"],
)
def test_report_fails(plant, case, fault):
    done = report("--arch", "90", "--only", case, "--jobs", "1", plant=plant)
    assert done.returncode == 1, done.stdout + done.stderr
    assert fault in done.stdout.rsplit("faults", 1)[1]


def test_lanes_differ_by_a_product_fused_with_another_lanes_value():
    """A shuffle's value in a multiply-add, moved or widened; or left to ptxas to make."""
    shuffle = "\tshfl.sync.bfly.b32 \t%r7, %r5, 1, 31, -1;\n"
    lines = {
        "fma.rn.f32 \t%r8, %r1, %r2, %r7": "fma.rn.f32",
        "mov.b32 \t%f8, %r7;\n\t@%p1 fma.rn.f32 \t%f9, %f1, %f2, %f8": "fma.rn.f32",
        "mov.b64 \t%fd8, {%r7, %r6};\n\tfma.rn.f64 \t%fd9, %fd1, %fd2, %fd8": "fma.rn.f64",
        "add.f32 \t%r8, %r5, %r7": "add.f32",
        "mul.ftz.f32 \t%r8, %r1, %r2": "mul.ftz.f32",
        "sub.bf16x2 \t%r8, %r1, %r2": "sub.bf16x2",
        "add.rn.f32 \t%r8, %r5, %r7;\n\tfma.rn.f32 \t%r9, %r8, %r1, %r2": "",
        "add.s32 \t%r8, %r5, %r7": "",
        "shfl.sync.idx.b32 \t%r9, %r8, %r5, 31, -1;\n\tfma.rn.f32 \t%r4, %r1, %r2, %r9": "",
    }
    for line, found in lines.items():
        assert kernel_report.fusible(f"{shuffle}\t{line};\n").split(" ")[0].strip() == found, line


SASS = """
        /*0000*/                   S2R R1, SR_TID.X ;
        /*0010*/              @!P0 BRA 0x0030 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/               @P1 BRA 0x0070 ;
        /*0040*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/                   BRA 0x00a0 ;
        /*0070*/               @P2 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0080*/                   FADD R4, R4, R5 ;
        /*0090*/                   MUFU.EX2 R4, R4 ;
        /*00a0*/               @P3 BRA 0x0200 ;
        /*00b0*/              @!P4 BRA 0x0030 ;
        /*00c0*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00d0*/               @P0 BRA 0x00c0 ;
        /*00e0*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*00f0*/                   MUFU.EX2 R4, R4 ;
        /*0100*/               @P0 BRA 0x00e0 ;
        /*0110*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0120*/                   LDG.E.128 R4, desc[UR4][R2.64+0x10] ;
        /*0130*/               @P0 BRA 0x0150 ;
        /*0140*/                   MUFU.EX2 R4, R4 ;
        /*0150*/                   MUFU.EX2 R4, R4 ;
        /*0160*/              @!P0 BRA 0x0110 ;
        /*0170*/               @P5 BRA 0x0000 ;
        /*0180*/                   EXIT ;
        /*0200*/                   FADD R4, R4, R5 ;
        /*0210*/                   BRA 0x00b0 ;
"""


def test_loops_over_a_row_are_counted_the_short_way_around():
    """Two: 0x30 to 0xb0 without its masked half, and 0x110 to 0x160, of two loads, past the guarded half.

    The loop over both is left out.
    """
    assert nvcc_report.main_loops(SASS) == (6.0, 2.5)
    assert nvcc_report.main_loops(SASS.replace("@P1 BRA 0x0070", "FADD R1, R1, R1")) == (6.0, 2.5)
    slower = SASS.replace("/*0060*/                   BRA 0x00a0", "/*0060*/                   BRA 0x0080")
    assert nvcc_report.main_loops(slower) == (6.0, 2.5)  # the masked half is shorter now
    uniform = SASS.replace("@P1 BRA 0x0070", "BRA.U !UP1, 0x0070").replace("@P3 BRA", "BRA.U UP3,")
    assert nvcc_report.main_loops(uniform) == (6.0, 2.5)
    assert nvcc_report.main_loops(SASS.replace("LDG.E.128", "LDG.E.64")) == ()
    slow = SASS.replace(
        "/*0090*/                   MUFU", "/*0090*/               @P6 BRA 0x0080 ;\n/*0094*/ MUFU"
    )
    assert nvcc_report.main_loops(slow) == (6.0, 2.5)  # a loop inside, that loads nothing
    adds = "".join(f"/*{at:04x}*/ FADD R4, R4, R5 ;\n" for at in range(0x240, 0x290, 0x10))
    third = (
        "/*0220*/ LDG.E.128 R4, [R2] ;\n/*0230*/ MUFU.EX2 R4, R4 ;\n" + adds + "/*0290*/ @P0 BRA 0x0220 ;\n"
    )
    assert nvcc_report.main_loops(SASS + third) == (6.0, 2.5)  # another over the row, which takes 8


def test_report_fails_where_a_kernel_does_not_compile(monkeypatch, capsys):
    def broken(call, arch):
        raise ValueError("no such type")

    monkeypatch.setattr(kernel_report, "compiled_launches", broken)
    assert kernel_report.main(["--arch", "90", "--only", "ranks 64x1000 P=49", "--jobs", "1"]) == 1
    assert "1 faults\nsm_90 ranks 64x1000 P=49: ValueError: no such type" in capsys.readouterr().out


def test_report_reaches_every_configuration(monkeypatch):
    """The calls of the cases lead to each entry of the tuning tables."""
    products, held, streamed = set(), set(), set()
    for module in (loss, vote):
        monkeypatch.setattr(module, "INTERPRET", False)

    def launch(self, *args):
        if self.kernel is loss.loss_fwd_kernel:
            *_, is_held, R, B, _ = args
            soft = args[loss.loss_fwd_kernel.arg_names.index("SOFT")]
            (held if is_held else streamed).add((soft, B, R, self.warps))

    def product(*args):
        products.add(args[7])
        return real_product(*args)

    real_product = vote._product
    monkeypatch.setattr(vote, "_product", product)
    monkeypatch.setattr(launch_cache.Launch, "__call__", launch)
    launch_cache.plan_cache.clear()
    for case in kernel_report.cases():
        if "loss_fwd_kernel" in case.kernels and "everything" not in case.name:
            case.call()
        if "vote_fwd_kernel" in case.kernels and not re.search("NCHW|upsampled", case.name):
            for arch in kernel_report.ARCHITECTURES:
                monkeypatch.setattr(vote, "device_properties", lambda device, arch=arch: (arch, 132))
                launch_cache.plan_cache.clear()
                case.call()
    assert products >= {config for table in vote.TUNING.values() for _, config in table.values()}
    assert products >= {vote.EXACT, vote.FLOAT64}
    short = {(B, *tile) for B, tile in [*loss.ROW_TILES.items(), *loss.FEW_ROW_TILES.items()]}
    assert held >= {(False, *tile) for tile in short}
    soft = [B for B in loss.ROW_TILES if B <= loss.LONGEST_SOFT_ROW]
    assert held >= {(True, B, *loss.WIDE_ROW_TILES.get(B, (1, 4))) for B in soft}
    for soft, (B, warps) in (
        *((False, tile) for *_, tile in loss.LONG_TILES),
        (False, loss.LONG_TILE_DENSE),
        (True, loss.LONG_SOFT_TILE),
        (True, loss.LONG_SOFT_TILE_DENSE),
    ):
        assert (soft, B, 1, warps) in streamed
    launch_cache.plan_cache.clear()


def accesses(ttgir: str) -> str:
    """Loads (L) and stores (S) of bfloat16, those of logits and gradient, and barriers (B), in order."""
    memory = r"(tt\.load|tt\.store) .*x!tt\.ptr<bf16>|(?:gpu|ttg)\.barrier"
    letters = {"tt.load": "L", "tt.store": "S", "": "B"}
    return "".join(letters[kind] for kind in re.findall(memory, ttgir))


@compiles
def test_gradient_may_lie_over_the_logits():
    """All reads of a row, then a barrier, then each logit read again only to be written, then patches.

    Triton's interpreter, of a single thread, shows no race between threads; the order in the code does.
    """
    names = ["loss 8192x997 bf16 P=49", "loss 4096x21841 bf16 P=49"]
    names += ["soft 8192x997 bf16 P=49", "soft 8192x21841 bf16 P=49"]
    names += ["distill 8192x997 bf16", "distill 8192x21841 bf16"]
    program = (
        f"import sys; sys.path[:0] = {[str(ROOT / 'benchmarks'), str(ROOT)]}; import kernel_report as k\n"
        f"for case in (case for case in k.cases() if case.name in {names}):\n"
        "    for name, kernel in k.compiled_launches(case.call, 90):\n"
        "        if name in case.kernels:\n"
        "            print(repr(kernel.asm['ttgir']))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(names)
    for line in lines:
        again, patches = ("(LL)?", "") if "distill_fwd_kernel" in line else ("L?", "BS+")
        assert re.fullmatch(rf"L+B({again}S)+{patches}B", accesses(ast.literal_eval(line)))

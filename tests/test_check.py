"""``python -m zipfls_cuda check``: it passes as things are, and finds every kind of planted fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import zipfls_cuda as zls
from zipfls_cuda import __main__, check, check_rows, labels, ops, reference

NATIVE = [b for b in zls.backends() if b in ("cpu", "reference")]


@pytest.fixture
def run_check(tmp_path, monkeypatch):
    """(status, report) of the command on the CPU over a few small shapes, and only the ``wanted`` rows."""
    rows_of = check_rows.rows_of
    monkeypatch.setattr(check_rows, "quick_cases", lambda many: check_rows.tiny_cases())
    monkeypatch.setattr(check, "RUNS", 3)
    monkeypatch.setattr(ops, "_resolved", {})

    def run(wanted=lambda row: row.backend in NATIVE, *arguments):
        path = tmp_path / "report.json"
        monkeypatch.setattr(check, "rows_of", lambda *args: list(filter(wanted, rows_of(*args))))
        command = ["zipfls_cuda", "check", "--device", "cpu", "--quick", "--json", str(path), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        return __main__.main(), json.loads(path.read_text())

    return run


def failures(report) -> dict[str, str]:
    """Operator -> why its row failed."""
    return {row["operator"]: row["failure"] for row in report["rows"] if not row["ok"]}


def plant(monkeypatch, stage, backend, fault):
    """Put ``fault(results)`` between an operator and its callers; in place, of what was written."""
    op = ops.OPERATORS[stage, backend]

    def faulty(*args):
        results = op(*args)
        if stage.endswith("_"):
            args[0].copy_(fault(args[0]))
            return results
        return fault(results)

    monkeypatch.setitem(ops.OPERATORS, (stage, backend), faulty)


def rows_of_stage(stage, backend):
    return lambda row: (
        row.operator == stage and row.backend == backend and row.prepare is not check_rows.bad_row
    )


def off(part):
    """A fault: result ``part`` of a loss is 1 % off."""
    return lambda results: tuple(x * 1.01 if i == part else x for i, x in enumerate(results))


def one_vote_off(votes):
    votes = votes.clone()
    votes.view(-1)[::100] = (votes.view(-1)[::100] + 1) % 40
    return votes


FAULTS = {
    **{f"loss_fwd {name}": off(i) for i, name in enumerate(("loss", "ce", "zipf", "gradient"))},
    **{f"{stage} gradient": lambda x: x * 1.01 for stage in ("loss_grad_", "loss_bwd")},
    "loss_bwd_ gradient": lambda x: x * 1.01,
    "loss_factors_bwd_ gradient": lambda x: x * 1.01,
    **{f"distill_fwd {name}": off(i) for i, name in enumerate(("loss", "ce", "distillation", "gradient"))},
    "distill_grad_ gradient": lambda x: x * 1.01,
    "label_fwd label": lambda x: x * 1.01,
    "rank_fwd ranks": lambda x: x.where(x != 2, 3),
    "vote_fwd votes": one_vote_off,
}


def test_passes_as_things_are(run_check, capsys):
    status, report = run_check()
    assert status == 0, failures(report)
    printed = capsys.readouterr().out
    assert report["complete"]
    assert report["failed"] == 0
    assert report["passed"] == len(report["rows"])
    assert {(row["operator"], row["backend"]) for row in report["rows"]} >= {
        (stage, backend)
        for stage in ops.STAGES
        for backend in NATIVE
        if not ops.refusal(backend, stage, "cpu", torch.float32)
    }
    for key in ("zipfls_cuda", "python", "torch", "triton", "build", "devices", "backends"):
        assert report[key] or key == "build", key
    for row in report["rows"]:
        assert row["error"] is None or row["error"] <= row["bound"]
        assert row["runs"] == 3
        assert row["operator"] in printed
    assert f"{report['passed']} of {report['passed']} rows passed" in printed


@pytest.mark.parametrize("faulty", NATIVE)
@pytest.mark.parametrize("name", FAULTS)
def test_one_percent_off_is_found(run_check, monkeypatch, faulty, name):
    stage = name.split()[0]
    if reason := ops.refusal(faulty, stage, "cpu", torch.float32):
        pytest.skip(f"{faulty}: {reason}")
    plant(monkeypatch, stage, faulty, FAULTS[name])
    status, report = run_check(rows_of_stage(stage, faulty))
    assert status == 1
    assert all("differs" in row["failure"] for row in report["rows"])


def times(function, factor, part=None):
    def faulty(*args, **kwargs):
        result = function(*args, **kwargs)
        if part is None:
            return result * factor
        return tuple(x * factor if i == part else x for i, x in enumerate(result))

    return faulty


@pytest.mark.parametrize(
    ("module", "name", "part", "operator"),
    [
        (reference, "zipf_term", None, "loss_fwd"),
        (reference, "label_from_mass", 0, "label_fwd"),
        (reference, "loss_fwd", 3, "loss_grad_"),
        (reference, "softplus", None, "distill_fwd"),
        (reference, "count_votes", None, "rank_fwd"),
        (labels, "log_mass", None, "zipf_label"),
    ],
    ids=str,
)
def test_a_fault_inside_is_found(run_check, monkeypatch, module, name, part, operator):
    """The reference is not what the results are compared with: its own faults are found, the laws' too."""
    faulty = times(getattr(module, name), 1.01, part)
    if name == "count_votes":
        faulty = lambda votes, C: 1 - reference.competition_rank(votes.new_zeros(len(votes), C))  # noqa: E731
    monkeypatch.setattr(module, name, faulty)
    status, report = run_check(
        lambda row: (
            (row.backend, row.operator) == ("reference", operator) and row.prepare is not check_rows.bad_row
        )
    )
    assert status == 1
    assert all("differs" in row["failure"] for row in report["rows"])


def test_a_fault_of_the_attached_gradient_is_found(run_check, monkeypatch):
    def faulty(logits, *args):
        value = logits.detach()
        return native(value + (logits - value) * 1.01, *args)  # the right loss, a wrong gradient

    operator = torch.ops.zipfls.loss_fwd.default
    native = ops.NATIVE.get(operator)
    if native is None:
        pytest.skip("the C++ extension is not built")
    monkeypatch.setitem(ops.NATIVE, operator, faulty)
    status, report = run_check(lambda row: row.backend == "cpu" and row.operator == "zipf_cross_entropy")
    assert status == 1
    assert "gradient differs" in failures(report)["zipf_cross_entropy"]


def test_other_bits_are_found(run_check, monkeypatch):
    calls = iter(range(10**6))

    def last_bit(label):
        return label.nextafter(label + 1) if next(calls) % 3 == 2 else label

    plant(monkeypatch, "label_fwd", "reference", last_bit)
    status, report = run_check(rows_of_stage("label_fwd", "reference"))
    assert status == 1
    assert failures(report) == {"label_fwd": "run 3 gave other bits than the first"}


@pytest.mark.parametrize("stage", ["loss_fwd", "label_fwd", "rank_fwd"])
def test_bad_input_that_passes_is_found(run_check, monkeypatch, stage):
    op = ops.OPERATORS[stage, "reference"]

    def lenient(*args):
        return op(
            *(x.clamp(-100, 11) if torch.is_tensor(x) and not x.is_floating_point() else x for x in args)
        )

    monkeypatch.setitem(ops.OPERATORS, (stage, "reference"), lenient)
    status, report = run_check(
        lambda row: (row.operator, row.backend, row.prepare) == (stage, "reference", check_rows.bad_row)
    )
    assert status == 1
    assert all("raised no IndexError" in row["failure"] for row in report["rows"])
    assert len(report["rows"]) == (2 if stage == "loss_fwd" else 1)  # both kinds of target


def test_what_raises_is_a_failed_row_and_the_others_go_on(run_check, monkeypatch, capsys):
    def fault(results):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    plant(monkeypatch, "loss_fwd", "reference", fault)
    status, report = run_check(lambda row: row.backend == "reference")
    assert status == 1
    assert set(failures(report)) == {"loss_fwd", "zipf_cross_entropy"} | {
        f"zipf_cross_entropy {kind}" for kind in ("twice", "inplace")
    }
    assert "RuntimeError: CUDA error: an illegal memory access" in failures(report)["loss_fwd"]
    assert "FAILED" in capsys.readouterr().out
    assert report["passed"] > report["failed"]

    monkeypatch.setattr(check, "context_error", lambda device: "the CUDA context is dead: gone")
    status, report = run_check(lambda row: row.backend == "reference")
    assert status == 1
    assert report["rows"][0]["failure"].endswith("encountered; the CUDA context is dead: gone")
    assert all(row["failure"] == "not run, as the CUDA context is dead: gone" for row in report["rows"][1:])


def test_unknown_arguments_say_what_is_expected(run_check, capsys, tmp_path):
    for arguments, message in (
        (("--device", "tpu"), "--device must be one of cpu"),
        (("--device", "cuda:99"), "got cuda:99"),
        (("--json", str(tmp_path)), "--json must name a file that can be written"),
        (("--slow",), "unrecognized arguments: --slow"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_check(lambda row: False, *arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_tiny_cases_over_the_interpreter(run_check):
    if "triton" not in zls.backends() or not ops.triton_interpreted():
        pytest.skip("Triton is not interpreted here")
    wanted = {"loss_fwd": "5 x 37, P = 9, mean, options", "rank_fwd": "5 x 37, P = 9"}
    status, report = run_check(
        lambda row: row.backend == "triton" and wanted.get(row.operator) == row.names()["case"]
    )
    assert status == 0, failures(report)
    assert {row["operator"] for row in report["rows"]} == set(wanted)


def test_the_command(tmp_path):
    """All rows that --quick has on a CPU, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ZIPFLS_BACKEND")}
    command = [sys.executable, "-m", "zipfls_cuda", "check", "--quick", "--device", "cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    report = json.loads((tmp_path / "zipfls-check.json").read_text())
    assert report["complete"]
    assert {row["dtype"] for row in report["rows"]} >= {"float32", "bfloat16", "int64"}
    assert all(row["runs"] == 20 for row in report["rows"])

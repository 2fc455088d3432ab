"""experiments: every related method trains by its name, resumes exactly, and has what it wants."""

from __future__ import annotations

import inspect
import os
import socket

import pytest
import test_experiments
import torch
import torch.distributed as dist
from processes import spawn
from test_experiments import (
    TINY,
    assert_equal_states,
    main,
    make_trainer,
    parse,
    read_log,
    small_data,
    without_times,
)

import zipfls_cuda as zls
from experiments import methods, plots, run, trainer
from experiments.methods import METHODS, Method

one_thread, no_pictures = test_experiments.one_thread, test_experiments.no_pictures
message, interrupt, pictures = test_experiments.message, test_experiments.interrupt, test_experiments.pictures

SHORT = ["--data", "digits", "--limit", "64", "--epochs", "3"]
NOT_LOSSES = {"PairSampler", "SnapshotTeacher", "RecursiveMix", "InstanceMemory"}  # inside of other names
LEFT_OUT = {"DynamicMLP", "encode_metadata"}  # no metadata here


def test_every_method_has_a_name():
    made = [getattr(make, "func", make) for _, make in METHODS.values()]
    assert {cls.__name__ for cls in made if cls.__module__.startswith("zipfls_cuda")} == set(
        zls.methods.__all__
    ) - NOT_LOSSES - LEFT_OUT
    assert {*plots.TITLES} == {*plots.COLOURS} == {*plots.MARKERS} == {"ce", "ls", "zipf", *METHODS}


@pytest.fixture(scope="module")
def of_teachers(tmp_path_factory):
    """A folder with what ce and ctc learnt."""
    out = tmp_path_factory.mktemp("teachers")
    main(out, *SHORT, "--method", "ce,ctc")
    return out


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_and_resumes_exactly(name, tmp_path, of_teachers, interrupt, capsys):
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
        for teacher in ("ce", "ctc"):
            os.link(of_teachers / f"{teacher}.pt", tmp_path / folder / f"{teacher}.pt")
    argv = [*SHORT, "--method", name, "--resume"]
    *_, whole = main(tmp_path / "whole", *argv)
    assert whole.loss == name
    assert len(whole.history) == 3
    numbers = [[x for x in record.values() if x != name] for record in whole.history]
    assert torch.tensor(numbers, dtype=torch.double).isfinite().all()
    interrupt(Method, "step", 5)  # amid the third epoch
    if name != "ctc":  # which is among the teachers, and done
        with pytest.raises(SystemExit):
            main(tmp_path / "parts", *argv)
    torch.manual_seed(99)
    *_, resumed = main(tmp_path / "parts", *argv)
    assert without_times(whole.history) == without_times(resumed.history)
    states = [torch.load(tmp_path / folder / f"{name}.pt")["trainer"] for folder in ("whole", "parts")]
    assert_equal_states(*states)


def test_a_teacher_is_trained_before():
    assert parse("--method", "dkd").loss == ["ce", "dkd"]
    assert parse("--method", "kd,ce,zipf,nkd").loss == ["ce", "kd", "zipf", "nkd"]
    assert parse("--loss", "ctc2").loss == ["ctc", "ctc2"]
    assert parse("--method", "byot").loss == ["byot"]


def test_the_teacher_is_the_network_of_ce(of_teachers, tmp_path):
    os.link(of_teachers / "ce.pt", tmp_path / "ce.pt")
    seen, step = [], Method.step

    def recorded(self, *batch):
        seen.append({k: v.clone() for k, v in self.teacher.net.state_dict().items()})
        assert not self.teacher.training
        return step(self, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "step", recorded)
        main(tmp_path, *SHORT, "--method", "kd", "--resume")
    expected, learnt = (
        dict(torch.load(folder / f"{name}.pt")["trainer"]["net"])
        for folder, name in ((of_teachers, "ce"), (tmp_path, "kd"))
    )
    assert_equal_states(seen[0], expected)
    assert_equal_states(seen[-1], expected)
    assert not torch.equal(learnt["fc.weight"], expected["fc.weight"])


def test_batches_of_views_and_of_pairs():
    data = small_data()
    plain, views, pairs = (make_trainer(name, data=data).loader for name in ("ce", "ddgsd", "cskd"))
    for (images, labels, index), (both, same_labels, same_index) in zip(plain, views, strict=True):
        assert len(both) == 2 * len(images)
        assert len(index) == len(same_index)
        assert not torch.equal(both[:32], both[32:])
        assert torch.equal(same_labels, data.train.labels[same_index])
        assert torch.equal(labels, data.train.labels[index])
    seen = []
    assert len(pairs) == 2
    for batch in pairs.batches():
        assert [len(part) for part in batch] == [32, 32]
        assert torch.equal(*(data.train.labels[part] for part in batch))
        seen += batch[0].tolist()
    assert len(set(seen)) == 64


def test_the_heads_get_gradients():
    """Every parameter that the optimizer has, from the first step on: DDP asks for no less."""
    for name in METHODS:
        made = make_trainer(name)
        made.model.train()
        made.method.begin_epoch(0)
        _, loss = made.method.step(*next(iter(made.loader)))
        loss.backward()
        for parameter, p in made.method.outputs.named_parameters():
            assert p.grad is not None, (name, parameter)


def test_equal_seeds_give_equal_weights():
    expected = make_trainer("ce", seed=3).net.state_dict()
    for name in METHODS:
        assert_equal_states(expected, make_trainer(name, seed=3).net.state_dict())


def test_a_method_that_needs_stages(message, monkeypatch):
    monkeypatch.setattr(methods, "stages", lambda net: ["body.0"])
    assert "argument --model: this method needs a network with stages of maps" in message("--method", "byot")


def in_two_processes(rank, out, port, names):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    nets, evaluate, step, calls = [], trainer.Trainer.evaluate, Method.step, []

    def recorded(self, test):
        found = evaluate(self, test)
        nets.append({k: v.clone() for k, v in self.net.state_dict().items()})
        return found

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2 * 5:  # amid the third epoch of the second method
            raise KeyboardInterrupt
        return step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "init_process_group", lambda backend: None)
        patch.setattr(dist, "destroy_process_group", lambda: None)
        patch.setattr(plots, "draw_curves", lambda *_: None)
        patch.setattr(plots, "draw_spectra", lambda *_: None)
        patch.setattr(trainer.Trainer, "evaluate", recorded)
        argv = [*TINY, *SHORT, "--method", names]
        run.main([*argv, "--out", str(out / "whole")])
        torch.save(nets, out / f"rank{rank}.pt")
        patch.setattr(Method, "step", interrupted)
        with pytest.raises(SystemExit):
            run.main([*argv, "--out", str(out / "parts")])
        run.main([*argv, "--out", str(out / "parts"), "--resume"])


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Weights stay alike on both ranks, and what each rank keeps of its own is resumed from."""
    names = "rm,mrkd,cskd,ddgsd,byot,ctc,ctc2,dkd,pskd,ols,uskd,bake,maxsup"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    spawn(in_two_processes, (tmp_path, port, names), 2)
    nets = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert_equal_states(*nets)
    for name in names.split(","):
        assert without_times(read_log(tmp_path / "whole" / f"{name}.jsonl")) == without_times(
            read_log(tmp_path / "parts" / f"{name}.jsonl")
        )


def test_docs_name_every_method():
    page = (test_experiments.ROOT / "docs" / "METHODS.md").read_text()
    for name in METHODS:
        assert f"`--method {name}`" in page, name
    for name in zls.methods.__all__:
        assert name in page, name
    assert inspect.getdoc(methods)

"""Hooks of pytest: a process of the run that dies or hangs fails the run and is named in its summary.

xdist names the test during which a worker died and goes on with a new worker. faulthandler (pyproject.toml)
prints the stacks of a test that takes too long and ends its process. What is added here: the time limit holds
outside of tests too, and a worker that died outside of every test fails the run. No torch, so that
test_suite.py can start many workers.
"""

from __future__ import annotations

import faulthandler

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

DEATHS = pytest.StashKey[list[str]]()


def _limit(config: pytest.Config) -> None:
    """From now on the worker may take as long as a test."""
    if hasattr(config, "workerinput"):
        seconds = float(config.getini("faulthandler_timeout"))
        faulthandler.dump_traceback_later(seconds, exit=True, file=config.stash[fault_handler_stderr_fd_key])


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    _limit(session.config)
    collected = yield
    faulthandler.cancel_dump_traceback_later()  # it waits for the other workers
    return collected


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session):
    _limit(session.config)  # up to the end of the process
    yield
    finished = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if session.config.stash.get(DEATHS, []) and finished:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(tryfirst=True)
def pytest_warning_recorded(warning_message):
    """A warning goes to the controller as its builtin class: the controller would import any other's module,
    and end the run where it cannot."""
    message = warning_message.message
    builtin = next(c for c in type(message).__mro__ if c.__module__ == "builtins")
    if isinstance(message, Warning) and type(message) is not builtin:
        warning_message.message = builtin(f"{type(message).__name__}: {message}")
        warning_message.category = builtin


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    if error:
        node.config.stash.setdefault(DEATHS, []).append(f"{node.gateway.id}: {error}")


def pytest_terminal_summary(terminalreporter, config):
    deaths = config.stash.get(DEATHS, [])
    if deaths:
        terminalreporter.section("workers that died (the failures name their tests)")
        terminalreporter.line("\n".join(deaths))
        if len(deaths) > int(config.getoption("maxworkerrestart") or 4 * config.getoption("numprocesses")):
            terminalreporter.line("No more were started: tests that were left have not been run.")

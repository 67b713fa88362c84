"""The tests. `python -m unittest` runs as many modules side by side as there are processors, where it can fork."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import multiprocessing
import os
import unittest
from pathlib import Path
from typing import Any, NamedTuple

# What unittest keeps of tests that do not just pass: pairs of a test and words, or tests.
KEPT = ("failures", "errors", "skipped", "expectedFailures", "unexpectedSuccesses")
modules: list[unittest.TestSuite] = []  # which the workers inherit


class Named(NamedTuple):
    """The names of a test that has run in another process."""

    shown: str
    identity: str

    def __str__(self) -> str:
        return self.shown

    def id(self) -> str:
        """Return the test's full name."""
        return self.identity

    def shortDescription(self) -> None:
        """Return no description."""


class Outcome(unittest.TestResult):
    """The result of a module, in a form that a pipe can carry."""

    def facts(self) -> tuple[int, dict[str, list[Any]]]:
        """Return the number of tests, and what is kept of them."""

        def named(entry: Any) -> Any:
            return (named(entry[0]), entry[1]) if isinstance(entry, tuple) else Named(str(entry), entry.id())

        return self.testsRun, {name: list(map(named, getattr(self, name))) for name in KEPT}


def start_worker() -> None:
    """Call this process as the one that it stands for, whose name is in logs."""
    multiprocessing.current_process().name = "MainProcess"


def run_module(number: int) -> tuple[int, dict[str, list[Any]]]:
    """Run one of the modules in a worker; return its facts."""
    outcome = Outcome()
    modules[number].run(outcome)
    return outcome.facts()


class SideBySide(unittest.TestSuite):
    """Test modules, run by as many processes as there are processors."""

    def run(self, result: unittest.TestResult, debug: bool = False) -> unittest.TestResult:
        """Run the tests. If they are to be shown one by one, or the first failure is to end it, one after the other."""
        if debug or result.failfast or result.buffer or getattr(result, "showAll", False):
            return super().run(result, debug)
        modules[:] = self
        fork = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), fork, start_worker) as workers:
            for count, kept in workers.map(run_module, range(len(modules))):
                result.testsRun += count
                for name, entries in kept.items():
                    getattr(result, name).extend(entries)
                print("." * count, end="", flush=True)
        return result


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None) -> unittest.TestSuite:
    """Return all tests: side by side where nothing is shared, as a Postgres is, and nothing counts them, as CI does."""
    here = Path(__file__).parent
    found = loader.discover(str(here), pattern or "test*.py", str(here.parent))
    is_alone = importlib.util.find_spec("psycopg") is None and "EMBEDGEN_TEST_COUNTS" not in os.environ
    return SideBySide(found) if is_alone and hasattr(os, "fork") else found

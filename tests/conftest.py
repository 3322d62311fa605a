"""What every test shares: whether it may use the kernel, and that it leaves nothing in it.

``LABKIT_KERNEL_TESTS`` has three states. Unset: try the kernel, and skip with the reason where it
runs no BPF. ``0``: skip. ``1``: a skip is a failure, for machines that are known to run BPF; tests
with a browser, and of the VM, are held to that too. A test of a feature that this very kernel lacks
asks `require_feature`, and is skipped in every state.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from labkit.judge.claims import Ledger

STATE = os.environ.get("LABKIT_KERNEL_TESTS", "")
MARKED = {name: Path(__file__).parent / name for name in ("kernel", "browser", "vm")}
TOYS = Path(__file__).parent / "toys"
LACKS = "this kernel lacks "
# The kernel frees an object some time after its last holder let go of it; and tests beside this one
# hold some by a network namespace for as long as they run, which tells nobody whose they are.
FREED_WITHIN_S = 60.0
# These count how writers and readers meet on two CPUs, or ask much of the machine: one worker runs
# all of them, one after another, before anything else. Tests of other things run beside them, and
# give way to them.
RACES = [
    "hostile/test_load.py",
    "kernel/test_experiments.py",
    "kernel/test_sync_invariants.py",
    "kernel/test_sync_strategies.py",
    "kernel/test_double_map.py",
    "kernel/test_bench.py",
    "kernel/test_bench_kernel.py",
    "kernel/test_bench_sync.py",
    "kernel/test_ringbuf.py",
    "kernel/test_trace_hook.py",
    "hostile/test_soak.py",
]
# The longest of the others: begun late, they would keep one worker after the rest have ended.
LONG = ["browser/test_report_pages.py", "unit/test_recorded.py"]
USUAL_NICENESS = os.getpriority(os.PRIO_PROCESS, 0)

Ids = frozenset[tuple[str, int]]


def pytest_configure() -> None:
    if STATE not in ("", "0", "1"):
        raise pytest.UsageError(f"LABKIT_KERNEL_TESTS must be unset, 0 or 1, not {STATE!r}.")
    # A shell that runs the tests in its background has it ignored, for all that they start as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # How long an example takes says something of the machine's other load.
    settings.register_profile("lab", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("lab")


def pytest_report_header() -> str:
    from labkit.kernel import native

    return f"event path: {native.state()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark, folder in MARKED.items():
            if item.path.is_relative_to(folder):
                item.add_marker(mark)
    first = {Path(__file__).parent / name: place for place, name in enumerate([*RACES, *LONG])}
    items.sort(key=lambda item: first.get(item.path, len(first)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file stay together, as they may share a report or a VM's folder."""
    from xdist.scheduler import LoadFileScheduling

    if config.getoption("dist") != "loadfile":
        return None
    races = {f"tests/{name}" for name in RACES}

    class RacesInOneLane(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "races" if file in races else file

    return RacesInOneLane(config, log)


def is_race(item: pytest.Item) -> bool:
    return any(item.path == Path(__file__).parent / name for name in RACES)


left_out: Counter[tuple[str, str]] = Counter()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if marker := item.get_closest_marker("outside_vm"):
            left_out[item.path.name, str(marker.args[0])] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests the run left to the machine outside of a VM."""
    if "outside_vm" not in terminalreporter.config.option.markexpr:
        return
    for (name, reason), count in sorted(left_out.items()):
        terminalreporter.write_line(f"left out: {count} of {name}: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn the skip of a marked test into a failure where all of them must run."""
    report = yield
    if STATE == "1" and report.skipped and any(map(item.get_closest_marker, MARKED)):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if LACKS not in reason:
            report.outcome = "failed"
            report.longrepr = f"LABKIT_KERNEL_TESTS=1, so this skip is a failure: {reason}"
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    with suppress(PermissionError):  # a user's run beside others, and may then need more of a race
        os.setpriority(os.PRIO_PROCESS, 0, USUAL_NICENESS - 10 * is_race(item))


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Add the toy experiments to the catalogue, here and in the processes that the test starts."""
    import experiments
    from labkit.lab import catalogue, experiment

    paths = [*experiments.__path__, str(TOYS / "experiments")]
    monkeypatch.setattr(experiments, "__path__", paths)
    # The checkout as well: the toys' folder alone would be the whole package there.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TOYS), str(TOYS.parents[1])]))
    catalogue.catalogue.cache_clear()
    yield
    catalogue.catalogue.cache_clear()
    sys.modules.pop("experiments.toys", None)
    for id in [id for id in experiment._registered if id.startswith("toy-")]:
        del experiment._registered[id]


@pytest.fixture(scope="session")
def recorded_ledger() -> Ledger:
    """The claims, judged by the recorded runs alone."""
    from labkit.lab import verdicts

    return verdicts.evaluate(None)


@pytest.fixture(scope="session")
def why_no_kernel() -> str:
    """Tell why no BPF program runs here, by trying; empty if one does."""
    if STATE == "0":
        return "LABKIT_KERNEL_TESTS=0"
    from labkit.kernel import probe

    for name in probe.essential():
        feature = probe.probe(name)
        if not feature.works:
            return f"no BPF here: {name}: {feature.answer} ({feature.remedy})"
    return ""


@pytest.fixture
def kernel(why_no_kernel: str) -> None:
    """Skip the test, or fail it, where the kernel runs no BPF."""
    if why_no_kernel:
        pytest.skip(why_no_kernel)


@pytest.fixture
def require_feature(kernel: None) -> Callable[[str], None]:
    """Skip the test unless the kernel has the named feature, whatever the state."""
    from labkit.kernel import probe

    def require(name: str) -> None:
        feature = probe.probe(name)
        if not feature.works:
            pytest.skip(f"{LACKS}{name}: {feature.answer}")

    return require


@pytest.fixture(autouse=True)
def nothing_left_in_the_kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a kernel test that leaves a map, program or link of its own.

    Others use BPF on the machine at the same time: what counts is held by this process or
    its children, or by nobody who lives.
    """
    if request.node.get_closest_marker("kernel") is None:
        yield
        return
    request.getfixturevalue("kernel")
    before = _all()
    yield
    left = _all() - before
    if left:
        left -= _of_strangers()
    # Who holds what is dear to ask, and most of it is gone before it has to be asked.
    left = _still_there(left, within_s=0.1)
    if left:  # what is garbage already counts as closed
        gc.collect()
    left = _still_there(left, within_s=0.2)
    deadline = time.monotonic() + FREED_WITHIN_S
    while left and (left := left & _ours()) and time.monotonic() < deadline:
        time.sleep(0.02)
    if left:
        from labkit.kernel import objects

        names = ", ".join(f"{kind} {number}" for kind, number in sorted(left))
        pytest.fail(f"the test left in the kernel: {names}\n{objects.snapshot()}", pytrace=False)


def _all() -> Ids:
    from labkit.kernel import libbpf

    return frozenset((kind, id) for kind in ("map", "prog", "link") for id in libbpf.ids(kind))


def _still_there(left: Ids, within_s: float) -> Ids:
    deadline = time.monotonic() + within_s
    while left and time.monotonic() < deadline:
        time.sleep(0.002)
        left &= _all()
    return left


def _of_strangers() -> Ids:
    """What processes hold that are none of ours, such as the tests that run beside this one."""
    from labkit.kernel import objects

    held = objects._Held().pids
    ours = objects.family(os.getpid())
    return frozenset(what for what, pids in held.items() if not pids & ours)


def _ours() -> Ids:
    from labkit.kernel import objects

    found = objects.snapshot()
    ours = [found.owned_by(objects.family(os.getpid())), found.orphans()]
    # A program array that nobody holds is one that the kernel forgot: `objects.snapshot` tells how.
    forgotten = {id for id, one in ours[1].maps.items() if one.kind == "prog_array"}
    return frozenset(
        (kind, number)
        for some in ours
        for kind, ids in (
            ("map", some.maps.keys() - forgotten), ("prog", some.programs), ("link", some.links),
        )
        for number in ids
    )  # fmt: skip

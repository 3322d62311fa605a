"""Facts about machine and code: complete, JSON, and nobody's secret."""

from __future__ import annotations

import getpass
import json
import os
import platform
import socket
import time
from datetime import UTC, datetime, timedelta

import pytest

from labkit.kernel import native
from labkit.kernel import provenance as facts_module
from labkit.kernel.provenance import provenance, usage, usage_since


def test_it_is_json_and_names_kernel_time_and_code() -> None:
    facts = provenance()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["kernel"] == platform.release()
    recorded = datetime.fromisoformat(str(facts["recorded_at"]))
    assert abs(datetime.now(UTC) - recorded) < timedelta(minutes=5)
    code, tools, cpu = facts["code"], facts["tools"], facts["cpu"]
    assert isinstance(code, dict) and isinstance(tools, dict) and isinstance(cpu, dict)
    assert code["version"]
    assert tools["numpy"] and tools["libbpf"] and tools["bcc"] and tools["clang"]
    assert tools["event_path"] == native.state()
    assert cpu["count"] == os.cpu_count()
    assert "." in str(facts["kernel"])


def test_it_tells_nothing_about_whose_machine_it_is() -> None:
    text = json.dumps(provenance())
    places = [os.getcwd(), os.path.expanduser("~"), str(facts_module._CHECKOUT), "/usr/", "/home"]
    # A machine may be called what a word of its own description is ("vm"): whole words count.
    names = [f'"{socket.gethostname()}"', f'"{getpass.getuser()}"']
    for secret in [*places, *names]:
        assert secret == "/" or secret not in text


def test_it_is_quick_and_repeatable() -> None:
    first, second = provenance(), provenance()
    passing = {"recorded_at", "load", "stolen_share", "code"}
    assert {k: v for k, v in first.items() if k not in passing} == {
        k: v for k, v in second.items() if k not in passing
    }


def test_usage_sees_work() -> None:
    before = usage()
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        pass
    after = usage_since(before)
    busy = after["busy_share"]
    assert isinstance(busy, float) and 0 < busy <= 1
    stolen = after["stolen_share"]
    assert isinstance(stolen, float) and 0 <= stolen < 1


def test_a_bare_machine_gives_fewer_facts_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_module, "_read", lambda path: "")
    monkeypatch.setattr(facts_module, "_said", lambda *command: "")
    facts_module._kept_facts.cache_clear()
    facts_module._cpu_info.cache_clear()
    try:
        facts = provenance()
        assert json.loads(json.dumps(facts, allow_nan=False)) == facts
        assert facts["stolen_share"] is None
        assert usage_since(usage())["busy_share"] is None
    finally:
        facts_module._kept_facts.cache_clear()
        facts_module._cpu_info.cache_clear()


@pytest.mark.parametrize(
    ("info", "vendor", "clocks", "expected"),
    [
        ("model name\t: QEMU TCG CPU version 2.5+\nflags\t: hypervisor", "QEMU", "tsc", True),
        ("model name\t: Intel Core i7 9xx\nflags\t: hypervisor", "QEMU", "tsc hpet", True),
        ("model name\t: Intel Core i7 9xx\nflags\t: hypervisor", "QEMU", "tsc kvm-clock", False),
        ("model name\t: AMD EPYC\nflags\t: fpu", "Dell", "tsc", False),
        ("", "", "", None),
    ],
)
def test_emulated_instructions_are_recognised(
    monkeypatch: pytest.MonkeyPatch, info: str, vendor: str, clocks: str, expected: bool | None
) -> None:
    def read(path: object) -> str:
        name = str(path).rpartition("/")[2]
        return {"sys_vendor": vendor, "available_clocksource": clocks}.get(name, "")

    monkeypatch.setattr(facts_module, "_cpu_info", lambda: info)
    monkeypatch.setattr(facts_module, "_read", read)
    monkeypatch.setattr(facts_module, "_said", lambda *command: "")
    assert facts_module.emulated.__wrapped__() is expected

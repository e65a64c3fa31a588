"""What the checks say of security advisories."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from types import ModuleType
from typing import Any

import pytest
from conftest import PROJECT


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", PROJECT / "scripts/lib/audit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BAD = {"name": "a", "version": "1.0", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1"]}]}
GOOD: dict[str, Any] = {"name": "b", "version": "2.0", "vulns": []}
SKIPPED = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "said"),
    [
        (
            [BAD, GOOD, SKIPPED],
            "WARNING: a 1.0: CVE-1, mended in 1.1\n2 of 3 packages audited, 1 advisories",
        ),
        ([GOOD], "1 of 1 packages audited, 0 advisories"),
        ([SKIPPED], "advisories cannot be had here: none of 1 packages was audited"),
    ],
)
def test_summary(audit: ModuleType, packages: list[dict[str, Any]], said: str) -> None:
    assert audit.summary(json.dumps({"dependencies": packages})) == said


def test_no_answer_is_said(audit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nNo route to host\n")

    monkeypatch.setattr(subprocess, "run", fail)
    assert audit.audit() == "advisories cannot be had here: No route to host"

    def wait(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("pip_audit", 180)

    monkeypatch.setattr(subprocess, "run", wait)
    assert audit.audit() == "advisories cannot be had here: no answer within 180 s"

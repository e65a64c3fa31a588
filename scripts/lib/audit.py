"""Asks the registry for known security advisories of the installed packages, and tells of each.

Findings do not fail the checks: an advisory that appears overnight must not stop a change that has
nothing to do with it. Where the advisories cannot be had, that is said.
"""

from __future__ import annotations

import json
import subprocess
import sys

LIMIT_S = 180.0


def summary(report: str) -> str:
    """Returns what pip-audit's JSON says, for the screen."""
    packages = json.loads(report)["dependencies"]
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        return f"advisories cannot be had here: none of {len(packages)} packages was audited"
    lines = [
        f"WARNING: {package['name']} {package['version']}: {advisory['id']}, "
        f"mended in {', '.join(advisory['fix_versions']) or 'no version yet'}"
        for package in audited
        for advisory in package["vulns"]
    ]
    counts = f"{len(audited)} of {len(packages)} packages audited, {len(lines)} advisories"
    return "\n".join([*lines, counts])


def audit() -> str:
    """Runs pip-audit on this environment; returns what it found, or why it could not look."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        return summary(done.stdout)
    except subprocess.TimeoutExpired:
        return f"advisories cannot be had here: no answer within {LIMIT_S:.0f} s"
    except ValueError:  # no JSON: it could not reach the registry
        reason = done.stderr.strip().rpartition("\n")[2]
        return f"advisories cannot be had here: {reason[:200]}"


if __name__ == "__main__":
    print(audit(), file=sys.stderr)

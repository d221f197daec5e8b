""".ci/run, with a `make` that only prints what pytest would."""

import os
import re
import subprocess

import pytest
from conftest import ROOT


BOUNDS = dict(re.findall(r"\[([\w-]+)\]=(\d+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8")))


def run(tmp_path, summaries: dict[str, str]) -> subprocess.CompletedProcess:
    lines = [f'[ "$1" = {suite} ] && echo "{text}"' for suite, text in summaries.items()]
    (tmp_path / "make").write_text("\n".join(["#!/bin/sh", *lines, "exit 0"]))
    for name in ("make", "chromium", "chromedriver"):  # with a browser, nothing is installed
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True)


def summary(skipped: int, passed: int = 5) -> str:
    return f"SKIPPED [{skipped}] tests/test_x.py:1: no peft\n===== {passed} passed, {skipped} skipped in 1.00s ====="


def test_skips_are_told_with_their_reasons(tmp_path):
    result = run(tmp_path, {suite: summary(int(bound)) for suite, bound in BOUNDS.items()})
    assert result.returncode == 0, result.stderr
    for suite, bound in BOUNDS.items():
        assert f"{suite}: {bound} skipped" in result.stdout
    assert result.stdout.count("no peft") == 2 * len(BOUNDS) == 4  # where they come up, and at the end
    result = run(tmp_path, {suite: "===== 5 passed in 1.00s =====" for suite in BOUNDS})
    assert result.returncode == 0 and "test: 0 skipped" in result.stdout


@pytest.mark.parametrize("suite", BOUNDS)
def test_what_fails(tmp_path, suite):
    fine = {name: summary(0) for name in BOUNDS}
    more = run(tmp_path, {**fine, suite: summary(int(BOUNDS[suite]) + 1)})
    assert more.returncode == 1 and "no peft" in more.stderr and "more tests are skipped" in more.stderr
    for text in ("===== 3 skipped in 0.10s =====", ""):
        none = run(tmp_path, {**fine, suite: text})
        assert none.returncode == 1 and "expected tests that pass" in none.stderr

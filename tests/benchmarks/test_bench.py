"""`python -m benchmarks`, through real processes, and the page it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedveil
from benchmarks import ROOT, contest, growth, jobs, report
from benchmarks.against import entry
from benchmarks.stages import NAMES
from fedveil.core.errors import SettingsError

PROMISED = """
job ms_per_client ms_per_client_range first_round_s memory_mb model_sha256 engine bare_ms_per_client times_bare
floor_ms_per_client flower_ms_per_client pfl_ms_per_client stages_ms machine versions date command repeats notes
"""
PAGE = "before\n<!-- jobs -->\nold\n<!-- end of jobs -->\nbetween\n<!-- growth -->\n<!-- end of growth -->\nafter\n"


def bench(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "benchmarks", *map(str, words)],
        cwd=cwd, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_job_prints_one_object_with_all_that_is_promised(tmp_path) -> None:
    answer = bench("j4", "--repeats", 1, "--engine", "sequential", "--json", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert set(PROMISED.split()) <= set(found)
    assert found["job"] == "j4"
    assert found["engine"] == "sequential"
    assert found["ms_per_client"] > 0
    assert len(found["model_sha256"]) == 64
    assert found["flower_ms_per_client"] is found["pfl_ms_per_client"] is None
    assert [note.split(":")[0] for note in found["notes"]] == ["flower", "pfl"]
    assert set(found["stages_ms"]) == set(NAMES)
    assert found["machine"]["cores"] == os.cpu_count()
    assert list(tmp_path.iterdir()) == []  # runs are kept elsewhere, and thrown away


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["j9"], "there is no job 'j9'; did you mean"),
        (["--flower", "nowhere/python"], "--flower nowhere/python: is no Python"),
        (["j1", "--engine", "warp"], "engine = 'warp'"),
        (["--engine", "batched"], "--engine: deployed clients are processes of their own"),
        (["growth", "--against", sys.executable], "'growth' is no job that two versions run"),
        (["--against", "nowhere/python"], "--against nowhere/python: is no Python"),
        (["--against", sys.executable, "--write", "none.md"], "no --flower, --pfl or --write goes with it"),
        (["--write", "none.md"], "--write none.md: must be a page with the lines <!-- jobs -->"),
        (["j1", "--write", "none.md"], "--write none.md: the page holds all jobs"),
    ],
    ids=["job", "peer", "engine", "deployed", "two-versions", "other-python", "other-page", "page", "one-job"],
)
def test_what_cannot_be_measured_is_refused_in_one_message(words, message, tmp_path) -> None:
    answer = bench(*words, cwd=tmp_path)
    assert answer.returncode == 2
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr
    assert list(tmp_path.iterdir()) == []


def row(name: str, peers: bool) -> dict:
    """What `compare` gives of a job, with round figures."""
    found = {
        "job": name, "ms_per_client": 2.0, "ms_per_client_range": [1.5, 2.5], "first_round_s": 3.0, "memory_mb": 512.0,
        "model_sha256": "ab" * 32, "engine": "sequential", "bare_ms_per_client": 1.0, "bare_ms_per_client_range": [1.0, 1.0],
        "bare_first_round_s": 1.0, "bare_variant": "by hand", "bare_version": "2", "times_bare": 2.0,
        "floor_ms_per_client": 0.5, "gflops": 100.0, "notes": [], "stages_ms": dict.fromkeys(NAMES, 0.25),
        "variants": {"bare autograd": [4.0, 3.0, 5.0]} if peers else {},
    }  # fmt: skip
    for peer in ("flower", "pfl"):
        found |= {
            f"{peer}_ms_per_client": 20.0 if peers else None,
            f"{peer}_ms_per_client_range": [19.0, 21.0] if peers else None,
            f"{peer}_first_round_s": 9.0 if peers else None,
            f"{peer}_variant": "2 workers" if peers else None,
            f"{peer}_version": "1.0" if peers else None,
            f"{peer}_speedup": 10.0 if peers else None,
        }
    return found


def test_the_page_gets_its_figures_and_keeps_its_words(tmp_path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(PAGE)
    around = report.surroundings(["python", "-m", "benchmarks"])
    text = report.jobs_section([row("j1", True), row("j2", False)], ["flower: not measured"], around, 3)
    report.write_section(page, "jobs", text)
    report.write_section(page, "jobs", text)  # again: replaced, not added
    written = page.read_text()
    assert (
        written.count(
            "| j1 | 2 [1.5 to 2.5] | 1 [1 to 1] (by hand) | 2.00 | 4 | 0.50 | 0.5 | 20 [19 to 21] (2 workers) | 10.0x |"
        )
        == 1
    )
    assert (
        "| j2 | 2 [1.5 to 2.5] | 1 [1 to 1] (by hand) | 2.00 |  |  | 0.5 | not measured |  | not measured |  |"
        in written
    )
    assert "- flower: not measured" in written
    assert "old" not in written
    assert all(word in written for word in ("before\n", "\nbetween\n", "\nafter\n", "<!-- growth -->"))


def test_a_page_without_marks_is_refused(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- end of jobs -->\n<!-- jobs -->\n")
    with pytest.raises(SettingsError, match="must be a page with the lines"):
        report.check_page(page, "jobs")


def test_growth_is_measured_over_cohort_and_population_and_drawn(tmp_path) -> None:
    rows = growth.measure({"engine": "sequential"}, cohorts=[3], populations=[100])
    assert [(r["grows"], r["population"], r["cohort"]) for r in rows] == [
        ("cohort", 3, 3), ("population", 100, 100),
    ]  # fmt: skip
    assert all(
        r["ms_per_round"] == pytest.approx(r["ms_per_client"] * r["cohort"]) and r["memory_mb"] > 50 for r in rows
    )
    picture = tmp_path / "images" / "growth.png"
    growth.draw(rows, picture)
    assert 10_000 < picture.stat().st_size < 200_000
    section = report.growth_section(rows, report.surroundings(["python", "-m", "benchmarks", "growth"]))
    assert "(images/growth.png)" in section
    assert "| 100 | 100 | " in section


def test_the_documented_page_can_be_measured_again() -> None:
    page = Path(__file__).parents[2] / "docs" / "performance.md"
    report.check_page(page, "jobs")
    report.check_page(page, "growth")


def test_a_version_is_as_fast_as_itself_and_makes_the_same_model(tmp_path) -> None:
    answer = bench("j4", "--against", sys.executable, "--repeats", 1, "--engine", "sequential", "--json", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    (found,) = json.loads(answer.stdout)["against"]
    assert found["job"] == "j4"
    assert found["same_model"] is True
    assert found["versions"][0] == found["versions"][1]
    assert found["installed"] == [str(Path(fedveil.__file__).parent)] * 2
    assert found["ratio"] == found["ms_per_client"] / found["against_ms_per_client"] > 0
    assert "1/1  here" in answer.stderr
    assert "1/1  there" in answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_another_version_trains_on_the_examples_of_the_jobs(tmp_path) -> None:
    """So that a comparison of versions measures what the jobs measure: both ways give one model."""
    job = jobs.JOBS["j4"]
    experiment = jobs.experiment(job).override({"engine": "sequential"})
    own = contest.run_once(contest.fedveil(experiment))
    other = contest.run_once(entry(job, {"engine": "sequential"}, Path(sys.executable)))
    assert own["model_sha256"] == other["model_sha256"]

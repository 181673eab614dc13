"""A row tells where its figures come from, with and without git, and is added to a file."""

import json
import subprocess
import sys

import pytest

from benchmarks import report, run_exp
from benchmarks.demo import eval_demo_adapters, train_demo_adapters
from benchmarks.engine import bench_cpu_engine
from benchmarks.report import ROOT, make_row, provenance, publish


def test_provenance():
    where = provenance()
    assert {"commit", "versions", "cpu", "num_cpus", "gpus"} <= set(where)
    assert "torch" in where["versions"]
    json.dumps(where)
    assert where["commit"] and where["modified"] in (True, False)


def test_provenance_without_git_and_cards(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    where = provenance()
    assert (where["commit"], where["modified"], where["gpus"]) == (None, None, [])
    monkeypatch.setenv("SLORA_COMMIT", "0123abc")
    assert provenance()["commit"] == "0123abc"


def test_rows_of_earlier_runs_are_no_modification(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    files = [tmp_path / "code.py", tmp_path / "benchmarks" / "results" / "name.jsonl"]
    files[1].parent.mkdir(parents=True)
    for file in files:
        file.write_text("before")
    me = ["-c", "user.name=me", "-c", "user.email=me"]
    for command in (["init"], ["add", "."], [*me, "commit", "--no-verify", "-m", "before"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True, capture_output=True)
    files[1].write_text("after")
    assert provenance()["modified"] is False
    files[0].write_text("after")
    assert provenance()["modified"] is True


def test_the_training_script_needs_no_client_and_no_server_where_it_runs():
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['httpx', 'openai', 'ray', 'starlette', 'pydantic']))\n"
        "from benchmarks.demo.train_demo_adapters import make_row\n"
        "make_row('demo_training', {}, {}, 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_rows_are_printed_and_added_to_a_file(tmp_path, capsys):
    output = tmp_path / "results" / "name.jsonl"
    for seed in (3, 4):
        publish(make_row("name", {"figure": 1.5}, {"size": 2}, seed), output)
    printed = capsys.readouterr().out.splitlines()
    assert output.read_text().splitlines() == printed
    row = json.loads(printed[1])
    assert (row["benchmark"], row["figure"], row["config"], row["seed"]) == (
        "name",
        1.5,
        {"size": 2},
        4,
    )
    assert provenance().items() <= row.items()


@pytest.mark.parametrize(
    "benchmark", [bench_cpu_engine, eval_demo_adapters, run_exp, train_demo_adapters]
)
def test_every_benchmark_takes_a_file(benchmark, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--output", "results/name.jsonl"])
    assert benchmark.parse_args().output.name == "name.jsonl"

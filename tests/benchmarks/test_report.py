"""Where figures come from, with and without git, cards and other packages."""

import json
import subprocess
import sys

from benchmarks.report import ROOT, provenance


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


def test_the_training_script_needs_no_client_and_no_server_where_it_runs():
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['httpx', 'openai', 'ray', 'starlette', 'pydantic']))\n"
        "from benchmarks.train_demo_adapters import provenance\n"
        "print(provenance()['versions']['torch'])"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys
from pathlib import Path
from benchmarks import bench
from benchmarks.gpu import main
bench.RESULTS = Path(sys.argv[1])
main(["--accelerator", "cpu", "--hidden", "16", "--blocks", "2", "--steps", "3"])
"""


def test_the_script_for_a_gpu_runs_without_one_and_finds_no_difference(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, tmp_path], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert set(results) == {"plain, copies in memory", "plain, start read from disk", "DDP", "FSDP1", "FSDP2", "FSDP2, LoRA"}
    assert all(one["difference"] < 1e-9 for one in results.values()), results
    assert "largest relative difference from the CPU" in (tmp_path / "gpu.md").read_text()

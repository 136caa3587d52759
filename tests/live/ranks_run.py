"""Two processes of which one fails, started by a test: python ranks_run.py RANK DIRECTORY

Each writes what it raises for every kind of error to DIRECTORY/rankN.json.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from lata_lightning import LataError
from lata_lightning.errors import OutputError
from lata_lightning.live.ranks import Ranks


class Unpicklable(RuntimeError):
    def __init__(self, text):
        super().__init__(text)
        self.handle = lambda: None


ERRORS = {
    "of the system": OSError(28, "No space left on device"),
    "of the package": OutputError("the output_dir cannot be made"),
    "that cannot be sent": Unpicklable("CUDA went away"),
}


def work(error):
    if error is not None:
        raise error
    return "done"


if __name__ == "__main__":
    rank, directory = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{directory / 'meeting'}", rank=rank, world_size=2)
    ranks, rows = Ranks(), []
    for kind, error in ERRORS.items():
        for failing in (0, 1):
            try:
                ranks.agree(lambda error=(error if rank == failing else None): work(error))
            except (LataError, OSError, RuntimeError) as raised:
                rows.append((kind, failing, type(raised).__name__, str(raised)))
    rows.append(("nothing", None, ranks.agree(lambda: work(None)), ""))
    (directory / f"rank{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()

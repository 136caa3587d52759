"""``python -m lata_lightning``: the command ``lata``."""

from lata_lightning.cli.main import run

run()

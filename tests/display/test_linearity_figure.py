import builtins

import pytest

from lata_lightning.display.linearity import save_figure
from lata_lightning.errors import LataError, OutputError
from lata_lightning.linearity.scores import LayerScore, Linearity

MEASURED = [
    Linearity(
        name,
        (
            LayerScore("model", "model", None, None, 1e-3),
            LayerScore("a", "block", 0, 1e-4, 1e-4),
            LayerScore("a.mlp", "mlp", 0, None, 2e-4),
            LayerScore("b", "block", 1, 3e-4, 3e-4),
            LayerScore("b.mlp", "mlp", 1, None, 0.0),
        ),
    )
    for name in ("math", "string")
]


def test_a_figure_names_every_curve(tmp_path):
    save_figure(MEASURED, tmp_path / "scores.svg")
    drawn = (tmp_path / "scores.svg").read_text()
    # Text is drawn as shapes, but the words stand in comments.
    for word in ("math: block", "math: mlp", "string: whole model", "output of the block"):
        assert f"<!-- {word} -->" in drawn
    assert "attention" not in drawn


def test_what_nobody_can_draw_is_refused(tmp_path, monkeypatch):
    with pytest.raises(LataError, match=r"scores.txt must end in the suffix of a picture: one of .*png"):
        save_figure(MEASURED, tmp_path / "scores.txt")
    (tmp_path / "taken.png").touch()
    with pytest.raises(OutputError, match="taken.png exists already"):
        save_figure(MEASURED, tmp_path / "taken.png")
    with pytest.raises(OutputError, match="cannot be written"):
        save_figure(MEASURED, tmp_path / "nowhere" / "scores.png")
    original = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(LataError, match=r"needs matplotlib: pip install 'lata_lightning\[report\]'"):
        save_figure(MEASURED, tmp_path / "scores.png")

import pytest

from lata_lightning.errors import LataError
from lata_lightning.quickstart.corpus import HELD_OUT_MODULES, held_out_text, replay_text, standard_library_texts


@pytest.fixture
def library(tmp_path):
    for name, text in {
        "zlast.py": "last = 1",
        "afirst.py": "first = 1",
        "package/inner.py": "inner = 'ä'",
        "package/tests/test_inner.py": "test = 1",
        "encodings/table.py": "table = 1",
        "heapq.py": "held_out = 1",
        "_sysconfigdata_linux.py": "generated = 1",
        "notes.txt": "not Python",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# \xe4")
    return tmp_path


def test_the_library_is_read_by_path_without_tests_tables_held_out_modules_and_other_codecs(library):
    assert standard_library_texts(library) == ["first = 1", "inner = 'ä'", "last = 1"]


def test_a_folder_without_python_is_refused(tmp_path):
    with pytest.raises(LataError, match="no Python sources in"):
        standard_library_texts(tmp_path)


def test_the_shipped_texts_have_their_sizes_and_share_no_module():
    assert 180_000 < len(replay_text().encode()) < 220_000
    assert 50_000 < len(held_out_text().encode()) < 70_000
    assert "class Fraction(" in held_out_text()
    assert "class Fraction(" not in replay_text()


def test_no_held_out_text_is_in_the_texts_of_this_pythons_library():
    texts = standard_library_texts()
    assert len(texts) > 300
    assert "heapq.py" in HELD_OUT_MODULES
    assert not any("def heapify(" in text or "class Fraction(" in text for text in texts)

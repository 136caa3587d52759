import logging
import warnings
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_info

from lata_lightning.training.quiet import quiet


@contextmanager
def shown_warnings():
    warnings.simplefilter("always")
    yield


def test_tips_and_known_deprecations_are_left_out_and_everything_else_is_shown(caplog):
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as caught, shown_warnings(), quiet():
        rank_zero_info("GPU available: False, used: False")
        rank_zero_info("💡 Tip: try something")
        rank_zero_info("LATACallback: wrote it")
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated", stacklevel=1)
        warnings.warn("the loss is not finite", stacklevel=1)
    assert [record.getMessage() for record in caplog.records] == ["LATACallback: wrote it"]
    assert [str(warning.message) for warning in caught] == ["the loss is not finite"]
    with caplog.at_level(logging.INFO):
        rank_zero_info("GPU available: False, used: False")
    assert caplog.records[-1].getMessage().startswith("GPU available")

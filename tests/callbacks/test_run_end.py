"""What a run says at its end, and what it draws and sends on request."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from rich.console import Console

from lata_lightning import LataError, TaskVector, align
from lata_lightning.alignment import Alignment, LayerStats
from lata_lightning.callbacks.artifacts import check_artifact, log_artifact
from lata_lightning.callbacks.plots import plot_run
from lata_lightning.callbacks.run_end import closing_lines, end_table


def vectors(shift, start="instruct"):
    """A task vector with coefficients, whose second layer turns away from the instruction vector by a shift, and its plain form."""
    names = [f"model.layers.{number}.mlp.weight" for number in range(5)]
    base = {name: torch.zeros(2, 2) for name in names}
    instruct = {name: torch.eye(2) for name in names}
    across = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    sizes = {name: shift if ".1." in name else 0.01 * int(name.split(".")[2]) for name in names}
    tuned = {name: tensor + sizes[name] * across for name, tensor in instruct.items()}
    instruction = TaskVector.between(base, instruct, kind="instruction")
    vector = TaskVector.between(base if start == "base" else instruct, tuned, start_kind=start)
    return vector.weighted(align(vector, instruction), "linear"), vector


def lines(vector, plain, folder, kinds=("vector",), **more):
    return closing_lines(vector, plain, kinds, folder, **{"instruction": None, **more})


def test_three_lines_say_what_was_written_what_the_ranking_is_worth_and_how_to_go_on(tmp_path):
    weighted, _ = vectors(2.0)
    wrote, ranking, following = lines(weighted, weighted, tmp_path)
    assert wrote == f"wrote {tmp_path / 'task_vector'}"
    assert "whether it helps, lata tune measures" in ranking
    assert following.startswith(
        f"next: lata merge START {tmp_path / 'task_vector'} --output MERGED; lata report {tmp_path} --output report.html"
    )


def test_a_flat_ranking_is_said_once_and_the_next_command_does_not_use_it(tmp_path):
    weighted, plain = vectors(0.02)
    said = lines(weighted, plain, tmp_path, ("vector", "pure", "hf"))
    assert len(said) == 3
    assert sum("too little to rank the layers by" in line for line in said) == 1
    assert "--weighting linear ranks them all the same" in said[1]
    assert "every tensor has coefficient 1 in pure, hf, as no weighting was asked for" in said[1]
    assert said[0] == f"wrote {tmp_path / 'task_vector'}, {tmp_path / 'pure'}, {tmp_path / 'hf'}"
    assert "--weighting none --output MERGED" in said[2]


def test_without_an_instruction_vector_the_lines_say_what_one_would_add(tmp_path):
    _, plain = vectors(2.0)
    said = lines(plain, plain, tmp_path)
    assert said[1].startswith(
        "norms only, as there is no instruction vector: LATACallback(instruction_vector=(BASE, INSTRUCT)) would also show"
    )
    assert "--weighting none" in said[2]


def test_a_vector_from_base_is_merged_with_the_instruction_vector(tmp_path):
    weighted, _ = vectors(2.0, "base")
    assert "lata merge INSTRUCT" in lines(weighted, weighted, tmp_path)[2]
    assert "--instruction INSTRUCTION" in lines(weighted, weighted, tmp_path)[2]
    assert "--instruction saved" in lines(weighted, weighted, tmp_path, instruction="saved")[2]


def test_the_head_of_a_classifier_is_named_with_the_command_that_scores_it(tmp_path):
    weighted, _ = vectors(2.0)
    said = lines(weighted, weighted, tmp_path, head=True)
    assert f"{tmp_path / 'head.safetensors'} (the head of this task, which is never merged)" in said[0]
    assert f"lata evaluate MERGED --head {tmp_path} --data FILE; lata report" in said[2]


def test_coefficients_that_follow_no_alignment_are_no_ranking(tmp_path):
    weighted, _ = vectors(2.0)
    unranked = TaskVector(weighted.tensors, replace(weighted.manifest, weighting="none"))
    assert lines(unranked, unranked, tmp_path)[1] == "ranking: none, the coefficients are those of the rule 'none'"
    without = TaskVector(weighted.tensors, replace(weighted.manifest, coefficients=None))
    assert lines(without, without, tmp_path)[1] == "ranking: none, the vector has no coefficients"


def drawn(table):
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def measured(*values):
    return Alignment(
        "block", "instruct", {f"h.{number}": LayerStats(value, None, number + 1.0, 0.0) for number, value in enumerate(values)}, {}
    )


def test_the_table_shows_norms_where_nothing_is_aligned():
    text = drawn(end_table(measured(None, None), "lata: at step 3"))
    assert "task norm" in text
    assert "alignment" not in text
    assert "coefficient" not in text
    assert [line.split()[:2] for line in text.splitlines() if line.split()[:1] in (["0"], ["1"])] == [["0", "1"], ["1", "2"]]


def test_the_table_leaves_what_the_ranking_is_worth_to_the_lines_below():
    text = drawn(end_table(measured(0.50, 0.51), "lata: at step 3"))
    assert "0.5100" in text
    assert "rank the layers" not in text


def test_a_run_is_drawn_over_its_history_and_a_single_measurement_by_layer():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = plot_run([(1, 0, measured(0.9, 0.5)), (2, 1, measured(0.8, 0.3))], measured(0.8, 0.3))
    (image,) = axes.get_images()
    assert image.get_array().tolist() == [[0.9, 0.5], [0.8, 0.3]]
    pyplot.close(figure)
    figure, axes = plot_run([(1, 0, measured(0.9, 0.5))], measured(0.9, 0.5))
    assert list(axes.get_lines()[0].get_ydata()) == [0.9, 0.5]
    pyplot.close(figure)


def test_there_is_nothing_to_plot_before_the_first_measurement():
    with pytest.raises(LataError, match="the first measurement is taken when the first epoch ends"):
        plot_run([], None)


class Wandb(WandbLogger):
    """A W&B logger without W&B: keeps what is sent to its run."""

    def __init__(self):
        self.sent = []

    @property
    def experiment(self):
        return self

    @property
    def version(self):
        return "abc"

    def log_artifact(self, path, name, type):
        self.sent.append((path, name, type))


def test_the_vector_is_sent_as_an_artifact_to_wandb_alone(tmp_path):
    logger = Wandb()
    check_artifact([logger])
    log_artifact([logger, CSVLogger(tmp_path)], "lata", tmp_path / "task_vector")
    assert logger.sent == [(str(tmp_path / "task_vector"), "lata-abc", "task_vector")]


def test_an_artifact_without_a_logger_that_takes_one_is_refused(tmp_path):
    with pytest.raises(LataError, match="needs a WandbLogger among the trainer's loggers"):
        check_artifact([CSVLogger(tmp_path)])

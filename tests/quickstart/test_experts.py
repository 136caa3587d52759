import pytest

from lata_lightning.errors import LataError, SourceError
from lata_lightning.quickstart.exercises import INSTRUCT_SKILLS, split_of
from lata_lightning.quickstart.experts import EXPERTS, Expert, fine_tune, training_exercises


def test_an_expert_shares_its_chat_rows_between_its_skills_and_the_instruct_skills():
    table = {"both": Expert(("compute", "encode"), instruct_share=0.3, raw_share=0.2, epochs=3, batches_per_epoch=7, seed=5)}
    module, data, trainer = fine_tune("both", table=table)
    assert data.shares["compute"] == data.shares["encode"] == 0.35
    assert sum(data.shares[skill] for skill in INSTRUCT_SKILLS) == pytest.approx(0.3)
    assert (data.raw_share, data.batches_per_epoch, trainer["max_epochs"]) == (0.2, 7, 3)
    assert module.model.training


def test_experts_train_on_training_problems_only():
    for expert in EXPERTS.values():
        for skill in expert.skills:
            assert all(split_of(exercise.prompt) == "train" for exercise in training_exercises(skill, expert.seed))


def test_the_target_of_forgetting_and_the_unwanted_vector_see_other_exercises():
    target, unwanted = EXPERTS["target"], EXPERTS["unwanted"]
    assert set(unwanted.skills) < set(target.skills)
    assert training_exercises("encode", target.seed) != training_exercises("encode", unwanted.seed)


def test_every_expert_is_measured_at_two_epochs_or_more():
    assert all(expert.epochs >= 2 for expert in EXPERTS.values())


def test_an_unknown_expert_is_refused_with_the_list_of_experts():
    with pytest.raises(LataError, match="unknown expert 'poet'; the experts are math, string, unwanted, target"):
        fine_tune("poet")


def test_a_missing_instruct_model_is_refused(tmp_path):
    with pytest.raises(SourceError, match="cannot load"):
        fine_tune("math", instruct=tmp_path)

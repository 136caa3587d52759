import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from passed_warnings import EMPTY_LOADER, FEW_WORKERS, LEAF_SPEC
from PIL import Image
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from lata_lightning import LATACallback, TaskVector
from lata_lightning.errors import LataError, SourceError
from lata_lightning.quickstart.make_checkpoints import make_tokenizer
from lata_lightning.training.classification import ImageClassificationModule, SequenceClassificationModule
from lata_lightning.training.labelled_data import ImageDataModule, LabelledTextDataModule

pytestmark = [FEW_WORKERS, LEAF_SPEC, EMPTY_LOADER]
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {"low": "abc", "high": "xyz"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A directory with a tiny encoder of three classes, and its tokenizer."""
    directory = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=260, max_position_embeddings=64, pad_token_id=257, num_labels=3, **SMALL)
    BertForSequenceClassification(config).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A directory with a tiny vision model of two classes, and its processor."""
    directory = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=2, **SMALL)).save_pretrained(directory)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(directory)
    return str(directory)


@pytest.fixture
def texts(tmp_path):
    """Words of two alphabets in a CSV file, labelled by words."""
    generator = np.random.default_rng(0)
    rows = [("".join(generator.choice(list(letters), 4 + number % 3)), label) for number in range(40) for label, letters in WORDS.items()]
    with (tmp_path / "texts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return str(tmp_path / "texts.csv")


@pytest.fixture
def images(tmp_path):
    """A folder of dark and one of light images, not of the model's size."""
    generator = np.random.default_rng(0)
    for label, low in (("dark", 0), ("light", 200)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(12):
            Image.fromarray(generator.integers(low, low + 56, (20, 24, 3), dtype=np.uint8)).save(
                tmp_path / "images" / label / f"{number}.png"
            )
    return str(tmp_path / "images")


def test_a_text_classifier_learns_and_its_accuracy_is_that_of_its_predictions(bert, texts, tmp_path):
    torch.manual_seed(0)
    module = SequenceClassificationModule(bert, learning_rate=2e-2, schedule="constant")
    data = LabelledTextDataModule(texts, validation_share=0.3, batch_size=8)
    callback = LATACallback(output_dir=tmp_path / "lata", table=False)
    trainer = Trainer(max_epochs=3, callbacks=[callback], **QUIET)
    trainer.fit(module, datamodule=data)
    assert data.label_names == ["high", "low"]
    assert trainer.callback_metrics["val_accuracy"] > 0.9
    module.eval()
    right = total = 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            labels = batch.pop("labels")
            right, total = right + int((module.model(**batch).logits.argmax(-1) == labels).sum()), total + len(labels)
    assert 0 < total < 40
    assert trainer.callback_metrics["val_accuracy"].item() == pytest.approx(right / total)
    assert "classifier.weight" in TaskVector.open(tmp_path / "lata/task_vector")


def test_an_image_classifier_learns_from_a_folder_for_each_class(vit, images):
    torch.manual_seed(0)
    module = ImageClassificationModule(vit, learning_rate=5e-3, schedule="constant")
    data = ImageDataModule(images, validation_share=0.25, batch_size=4)
    trainer = Trainer(max_epochs=3, **QUIET)
    trainer.fit(module, datamodule=data)
    batch = next(iter(data.train_dataloader()))
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    assert trainer.callback_metrics["val_accuracy"] == 1.0


def test_a_head_is_kept_unless_another_number_of_classes_is_asked_for(bert):
    kept, same, new = (SequenceClassificationModule(bert, num_labels=number).model for number in (None, 3, 5))
    assert kept.classifier.weight.shape == (3, 16)
    assert torch.equal(kept.classifier.weight, same.classifier.weight)
    assert new.classifier.weight.shape == (5, 16)
    assert torch.equal(kept.bert.embeddings.word_embeddings.weight, new.bert.embeddings.word_embeddings.weight)


def test_rows_held_out_are_the_same_whatever_the_order_of_files(bert, texts, tmp_path):
    def held(data):
        made = LabelledTextDataModule(data, validation_share=0.3, preprocessor=bert)
        made.setup("fit")
        return {tuple(token for token in row if token != 257) for batch in made.val_dataloader() for row in batch["input_ids"].tolist()}

    lines = Path(texts).read_text().splitlines()
    (tmp_path / "backwards.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert held(texts) == held(str(tmp_path / "backwards.csv"))


def test_numbers_are_labels_as_they_are_and_words_are_numbered_as_told(bert, texts, tmp_path):
    (tmp_path / "numbers.csv").write_text("said,kind\nabc,2\nxyz,0\n")
    data = LabelledTextDataModule(str(tmp_path / "numbers.csv"), column="said", label_column="kind", preprocessor=bert)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(batch["labels"].tolist()) == [0, 2]
    assert data.val_dataloader() == []
    data = LabelledTextDataModule(texts, label_names=["low", "middle", "high"], validation=texts, preprocessor=bert, batch_size=80)
    data.setup("fit")
    (batch,) = data.val_dataloader()
    assert batch["labels"].tolist() == [0, 2] * 40
    assert batch["attention_mask"].sum(1).tolist() == [4 + number % 3 for number in range(40) for _ in range(2)]


def refused(message, bert, path, content, **settings):
    path.write_text(content)
    data = LabelledTextDataModule(str(path), preprocessor=bert, **settings)
    with pytest.raises(LataError, match=message):
        data.setup("fit")


def test_labels_that_are_missing_unknown_or_no_labels_are_refused(bert, tmp_path):
    refused("no column 'label'; its columns are 'text', 'kind'", bert, tmp_path / "column.csv", "text,kind\na,b\n")
    refused("column 'label' must have a value in every row; 1 of 2 have none", bert, tmp_path / "hole.csv", "text,label\na,b\nc,\n")
    refused(r"not among the 1 label_names, 1: \['c'\]", bert, tmp_path / "unknown.csv", "text,label\na,b\na,c\n", label_names=["b"])
    refused(r"whole numbers from 0, or words; 2 are neither, the first is 0\.5", bert, tmp_path / "real.csv", "text,label\na,0.5\na,1.5\n")
    refused("labels run from -1 to 1", bert, tmp_path / "negative.csv", "text,label\na,-1\na,1\n")


def test_more_classes_than_the_model_has_are_refused(bert, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,3\nb,0\n")
    with pytest.raises(LataError, match="labels run from 0 to 3, the model has 3 classes"):
        Trainer(max_epochs=1, **QUIET).fit(
            SequenceClassificationModule(bert), datamodule=LabelledTextDataModule(str(tmp_path / "rows.csv"))
        )


def test_settings_and_sources_that_make_no_sense_are_refused(bert, vit, texts, images, tmp_path):
    with pytest.raises(LataError, match="batch_size must be at least 1"):
        LabelledTextDataModule(texts, batch_size=0)
    with pytest.raises(LataError, match="does not go with validation"):
        ImageDataModule(images, validation=images, validation_share=0.1)
    with pytest.raises(LataError, match=r"call setup\(\)"):
        ImageDataModule(images).train_dataloader()
    with pytest.raises(SourceError, match="holds no tokenizer that can be loaded"):
        LabelledTextDataModule(texts, preprocessor=str(tmp_path)).setup("fit")
    with pytest.raises(SourceError, match="cannot load an image processor"):
        ImageDataModule(images, preprocessor=str(tmp_path)).setup("fit")
    with pytest.raises(SourceError, match="as a classifier of images"):
        ImageClassificationModule(str(tmp_path))
    one = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=1, **SMALL))
    with pytest.raises(LataError, match="at least 2 classes, and a model in memory keeps its 1"):
        ImageClassificationModule(one)

"""The ViT that studies of methods for images start from."""

from pretrain_digits import pretrain
from transformers import AutoImageProcessor, AutoModelForImageClassification


def test_a_pretrained_vit_is_written_once(tmp_path, capsys):
    folder = tmp_path / "vit"
    pretrain(folder, 1, 16)
    assert "16 images of 5 classes" in capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert (model.config.num_labels, model.config.image_size) == (10, 32)
    AutoImageProcessor.from_pretrained(folder)
    pretrain(folder, 1, 16)
    assert "nothing to do" in capsys.readouterr().out

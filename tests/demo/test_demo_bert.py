"""The vocabulary of the demo's BERT covers every text of generated clips, and its recipe reproduces the shipped files."""

from pathlib import Path

from stm.config import Language, MovingShapesDataset
from stm.datasets.moving_shapes.generate import caption_of, draw_clip_spec, questions_of
from stm.demo.bert import make_demo_bert
from stm.models.text.split_bert import SplitBert

SHIPPED = Path(__file__).parents[2] / "stm" / "assets" / "demo-bert"


def test_the_shipped_bert_is_what_its_recipe_gives(tmp_path: Path) -> None:
    make_demo_bert(tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes(), name


def test_it_knows_every_word_of_captions_questions_and_answers() -> None:
    language = SplitBert.load(Language(model=str(SHIPPED), fusion_layer=2))
    dataset = MovingShapesDataset(source="moving-shapes")
    unknown = language.tokenizer.encode(["zebra"], 4)[0, 1]
    texts = []
    for index in range(60):
        spec = draw_clip_spec(0, "train", index, dataset)
        texts += [caption_of(spec), *(text for pair in questions_of(spec) for text in pair.values())]
    assert not (language.tokenizer.encode(texts, 40) == unknown).any()

"""The split BERT against transformers' own, in float64; its tokenizer; what it refuses."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from made_bert import FUSION, LAYERS, TEXTS, WIDTH, WORDS, ask, look, write_bert
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForPreTraining, BertModel, ViTConfig

from stm.datasets.video_text.cleaning import clean_text
from stm.models.text.small_bert import make_bert
from stm.models.text.split_bert import SplitBert, Tokenizer
from stm.pretrained.hub import ModelError


def read(folder: Path) -> tuple[SplitBert, Tensor]:
    """The split BERT in float64, eval mode, and the tokens of TEXTS."""
    torch.manual_seed(0)
    model = SplitBert.load(ask(folder)).double().eval()
    return model, model.tokenizer.encode(TEXTS, 12)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_the_text_layers_are_a_bert_that_ends_there(tmp_path: Path) -> None:
    write_bert(tmp_path)
    model, tokens = read(tmp_path)
    peer = BertModel.from_pretrained(tmp_path, num_hidden_layers=FUSION, add_pooling_layer=False).double().eval()
    mask = tokens != model.pad_id
    with torch.no_grad():
        found, expected = model(tokens), peer(tokens, attention_mask=mask.long()).last_hidden_state
    assert_same(found[mask], expected[mask])
    assert 0 < mask.sum() < mask.numel()


def test_the_fusion_layers_are_a_decoder_with_cross_attention_that_is_shown_the_whole_text(tmp_path: Path) -> None:
    write_bert(tmp_path)
    model, tokens = read(tmp_path)
    config = deepcopy(model.config)
    config.is_decoder = config.add_cross_attention = True
    config.num_hidden_layers, config._attn_implementation = LAYERS - FUSION, "eager"
    peer = BertModel(config, add_pooling_layer=False).double().eval()
    peer.encoder.layer.load_state_dict(model.fusion_layers.state_dict())
    states, seen = model(tokens).detach(), look(len(tokens))
    whole = torch.zeros(len(tokens), 1, 12, 12, dtype=torch.float64)
    whole = whole.masked_fill(~(tokens != model.pad_id)[:, None, None], torch.finfo(torch.float64).min)
    causal = whole.masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), torch.finfo(torch.float64).min)
    with torch.no_grad():
        found = model.fuse(states, tokens, seen)
        for mask, same in ((whole, True), (causal, False)):
            expected = peer.encoder(states, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
            assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10) == same


class PassBy(nn.Module):
    def forward(self, states: Tensor, *others: Tensor, **more: Tensor) -> tuple[Tensor, None]:
        return states, None


def test_without_the_cross_attention_the_words_predicted_are_the_whole_berts(tmp_path: Path) -> None:
    peer = write_bert(tmp_path).double()
    model, tokens = read(tmp_path)
    for layer in model.fusion_layers:
        layer.crossattention = PassBy()
    mask = tokens != model.pad_id
    with torch.no_grad():
        found = model.predict_words(model.fuse(model(tokens), tokens, look(len(tokens))))
        expected = peer(tokens, attention_mask=mask.long()).logits
    assert_same(found[mask], expected[mask])
    assert found.shape == (*tokens.shape, model.vocabulary)


def test_padding_changes_nothing_and_the_video_changes_all(tmp_path: Path) -> None:
    write_bert(tmp_path)
    model, tokens = read(tmp_path)
    tokens, longer = tokens[1:2], model.tokenizer.encode(TEXTS[1:2], 20)
    seen = look(1)
    with torch.no_grad():
        short = model.fuse(model(tokens), tokens, seen)[:, :3]
        assert_same(model.fuse(model(longer), longer, seen)[:, :3], short)
        other = model.fuse(model(tokens), tokens, seen.roll(1, dims=2))[:, :3]
    assert ((short - other).abs().amax(dim=2) > 1e-6).all()


@pytest.mark.parametrize("form", ["BertModel", "BertForMaskedLM", "BertForPreTraining", "no prefix", "gamma and beta"])
def test_all_forms_of_a_berts_file_are_read(tmp_path: Path, form: str) -> None:
    whole = write_bert(tmp_path)
    if form == "BertModel":
        whole.bert.save_pretrained(tmp_path)
    elif form == "BertForPreTraining":
        larger = BertForPreTraining(whole.config)
        larger.bert.load_state_dict(whole.bert.state_dict(), strict=False)
        larger.cls.predictions.load_state_dict(whole.cls.predictions.state_dict())
        larger.save_pretrained(tmp_path)
    elif form == "gamma and beta":  # of bert-base-uncased's file
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        state = load_file(tmp_path / "model.safetensors")
        for new, old in names.items():
            state = {name.replace(new, old): tensor for name, tensor in state.items()}
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    elif form == "no prefix":
        state = {n.removeprefix("bert."): t for n, t in load_file(tmp_path / "model.safetensors").items()}
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    model = SplitBert.load(ask(tmp_path))
    state = model.state_dict()
    assert torch.equal(state["embeddings.word_embeddings.weight"], whole.bert.embeddings.word_embeddings.weight)
    for number, layer in enumerate(whole.bert.encoder.layer):
        part = "text_layers" if number < FUSION else "fusion_layers"
        place = number if number < FUSION else number - FUSION
        for name, tensor in layer.state_dict().items():
            assert torch.equal(state[f"{part}.{place}.{name}"], tensor), name
    head = whole.cls.predictions.transform.dense.weight
    if form not in ("BertModel", "no prefix"):
        assert torch.equal(model.word_bias, whole.cls.predictions.bias)
    assert torch.equal(model.transform.dense.weight, head) == (form != "BertModel")


def test_the_cross_attentions_are_fresh_as_bert_makes_them_and_hang_on_the_seed(tmp_path: Path) -> None:
    make_bert(tmp_path, WORDS, width=96, layers=3, heads=4)
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(SplitBert.load(ask(tmp_path, fusion_layer=1)).state_dict())
    names = [name for name in states[0] if ".crossattention." in name]
    assert len(names) == 20
    for name in names:
        tensor = states[0][name]
        assert torch.equal(tensor, states[1][name])
        if "LayerNorm.weight" in name:
            assert (tensor == 1).all()
        elif name.endswith("bias"):
            assert (tensor == 0).all()
        else:
            assert not torch.equal(tensor, states[2][name])
            assert tensor.std().item() == pytest.approx(0.02 * 8**0.5, rel=0.05)  # 0.02 at BERT-base's width of 768
    fresh = SplitBert(BertConfig(vocab_size=2000, hidden_size=96, num_attention_heads=4, num_hidden_layers=2), 1)
    words = fresh.embeddings.word_embeddings.weight
    assert (words[0] == 0).all() and words[1:].std().item() == pytest.approx(0.02, rel=0.02)


def test_tokens_are_those_of_transformers_padded_and_cut_to_one_length(tmp_path: Path) -> None:
    write_bert(tmp_path)
    model, _ = read(tmp_path)
    peer = AutoTokenizer.from_pretrained(tmp_path)
    for length in (4, 12, 30):
        cleaned = [clean_text(text) for text in TEXTS]
        expected = peer(
            cleaned, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        found = model.tokenizer.encode(TEXTS, length)
        assert torch.equal(found, expected) and found.dtype == torch.int64
        assert (found[:, 0] == model.cls_id).all() and ((found == model.sep_id).sum(dim=1) == 1).all()
    ids = (model.pad_id, model.cls_id, model.sep_id, model.mask_id)
    assert ids == (peer.pad_token_id, peer.cls_token_id, peer.sep_token_id, peer.mask_token_id)
    assert model.tokenizer.vocabulary == model.vocabulary == len(peer)
    assert model.tokenizer.encode([], 6).shape == (0, 6)
    assert not any("tokenizer" in name for name in model.state_dict())


def test_a_tokenizer_is_rebuilt_from_json_values(tmp_path: Path) -> None:
    write_bert(tmp_path)
    model, tokens = read(tmp_path)
    before = model.tokenizer.describe()
    model.tokenizer.encode(TEXTS, 5)
    values = model.tokenizer.describe()
    assert before == values == json.loads(json.dumps(values))
    assert torch.equal(Tokenizer(**values).encode(TEXTS, 12), tokens)


def test_an_old_vocabulary_file_will_do(tmp_path: Path) -> None:
    write_bert(tmp_path)
    _, tokens = read(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(words, key=words.__getitem__)) + "\n")
    assert torch.equal(SplitBert.load(ask(tmp_path)).tokenizer.encode(TEXTS, 12), tokens)


def test_what_make_bert_writes_is_a_bert_for_transformers_and_the_same_each_time(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_bert(tmp_path / name, WORDS, width=32, layers=2, heads=2, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "abc"]
    name = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(weights[0][name], weights[1][name]) and not torch.equal(weights[0][name], weights[2][name])
    peer = BertForMaskedLM.from_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    pieces = [
        "a",
        "red",
        "square",
        "moves",
        "left",
        "two",
        "-",
        "tone",
        "circle",
        "over",
        "the",
        "grass",
        ",",
        "slowly",
    ]
    assert peer.config.vocab_size == len(tokenizer) == 5 + len(pieces)
    assert tokenizer.convert_ids_to_tokens(list(range(5, len(tokenizer)))) == pieces
    assert tokenizer.tokenize("Two-tone SQUARE zebra") == ["two", "-", "tone", "square", "[UNK]"]
    with pytest.raises(ValueError, match="needs words"):
        make_bert(tmp_path / "d", [" "], width=32, layers=2, heads=2)


def test_mistakes_are_errors_that_say_what_to_do(tmp_path: Path) -> None:
    write_bert(tmp_path / "bert")
    for layer in (LAYERS, LAYERS + 4):
        with pytest.raises(
            ModelError,
            match=rf"fusion_layer is {layer}, and must be between 1 and {LAYERS - 1}: of the BERT's {LAYERS} layers",
        ):
            SplitBert.load(ask(tmp_path / "bert", fusion_layer=layer))
    with pytest.raises(ModelError, match=r"max_tokens 512: .* reads at most 64 tokens"):
        config = json.loads((tmp_path / "bert/config.json").read_text()) | {"max_position_embeddings": 64}
        (tmp_path / "short").mkdir()
        (tmp_path / "short/config.json").write_text(json.dumps(config))
        SplitBert.load(ask(tmp_path / "short", max_tokens=512))
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(ModelError, match=r"is a vit model, not a BERT; for example, use bert-base-uncased"):
        SplitBert.load(ask(tmp_path / "vit"))
    with pytest.raises(ModelError, match="no such folder"):
        SplitBert.load(ask(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded from the folder"):
        SplitBert.load(ask(tmp_path / "empty"))
    with pytest.raises(ModelError, match="this BERT has no tokenizer"):
        _ = SplitBert(BertConfig(hidden_size=24, num_hidden_layers=2, vocab_size=9), 1).mask_id


def test_files_that_lack_weights_or_words_are_errors(tmp_path: Path) -> None:
    write_bert(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    for lacking, message in [
        (
            "bert.encoder.layer.4.output.dense.bias",
            "not a complete BERT: 1 weights are missing, for instance bert.encoder.layer.4",
        ),
        (
            "cls.predictions.transform.dense.bias",
            "not a complete BERT: 1 weights are missing, for instance cls.predictions",
        ),
        ("cls.predictions.bias", "not a complete BERT: .* for instance cls.predictions.bias"),
    ]:
        part = {name: tensor for name, tensor in whole.items() if name != lacking}
        save_file(part, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=message):
            SplitBert.load(ask(tmp_path))
    torn = (tmp_path / "model.safetensors").read_bytes()[:-100]
    (tmp_path / "model.safetensors").write_bytes(torn)
    with pytest.raises(ModelError, match="cannot be loaded from the folder"):
        SplitBert.load(ask(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.save(whole, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded from the folder"):
        SplitBert.load(ask(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer files: a BERT needs tokenizer\.json or vocab\.txt"):
        SplitBert.load(ask(tmp_path))


def test_tokenizers_without_words_or_marks_are_errors(tmp_path: Path) -> None:
    write_bert(tmp_path)
    values = read(tmp_path)[0].tokenizer.describe()
    with pytest.raises(ModelError, match=r"lacks the mask token '\[HIDE\]'"):
        Tokenizer(values["text"], values["special"] | {"mask": "[HIDE]"})
    with pytest.raises(ModelError, match="the tokenizer cannot be read"):
        Tokenizer("{}", values["special"])
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(ModelError, match="a tokenizer with an empty vocabulary"):
        SplitBert.load(ask(tmp_path))


def test_a_tokenizer_with_more_words_than_the_bert_is_refused(tmp_path: Path) -> None:
    write_bert(tmp_path)
    tokenizer = read(tmp_path)[0].tokenizer
    with pytest.raises(ModelError, match=rf"has {tokenizer.vocabulary} tokens and the BERT 9"):
        SplitBert(BertConfig(hidden_size=24, num_hidden_layers=2, vocab_size=9), 1, tokenizer)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A Man, riding (his) Horse!", "a man riding his horse"),
        ("slow-motion  close/up:\n#dog*", "slow motion close up dog"),
        ('<PERSON> isn\'t "here"; is <person>?', "person isnt here is person"),
        ("so~ what? ...", "so what"),
        ("café [x] 3 & 4%", "café [x] 3 & 4%"),
        (" ,. ", ""),
    ],
)
def test_captions_are_cleaned_as_umt_cleans_them(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned
    assert clean_text(cleaned) == cleaned


def test_the_width_is_berts(tmp_path: Path) -> None:
    write_bert(tmp_path)
    model, _ = read(tmp_path)
    assert model.width == WIDTH and model.identity is not None and model.identity["weights_sha256"]


def test_umt_s_tokens_have_no_end_and_its_answers_lose_theirs_if_they_are_too_long(tmp_path: Path) -> None:
    """As UMT's tokenizer was seen to do: [CLS] and the words, and for answers a [SEP] that is written as a word."""
    make_bert(tmp_path, ["a red circle moves"], width=8, layers=LAYERS, heads=2)
    settings = ask(tmp_path, tokenization="umt")
    tokenizer = SplitBert.load(settings).tokenizer
    pad, cls, sep = tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id
    a, red, circle, moves = range(5, 9)
    texts = ["A red circle!", "a red circle moves a red circle", ""]
    expected = [[cls, a, red, circle, pad], [cls, a, red, circle, moves], [cls, pad, pad, pad, pad]]
    assert tokenizer.encode(texts, 5).tolist() == expected
    answers = tokenizer.encode_targets(["red", "a red circle", "a red circle moves"], 5)
    assert answers.tolist() == [[cls, red, sep, pad, pad], [cls, a, red, circle, sep], [cls, a, red, circle, moves]]
    again = Tokenizer(**tokenizer.describe())
    assert torch.equal(again.encode_targets(texts[:2], 4), tokenizer.encode_targets(texts[:2], 4))
    usual = SplitBert.load(ask(tmp_path)).tokenizer
    assert usual.encode_targets(["a red circle moves"], 4).tolist() == [[cls, a, red, sep]]
    with pytest.raises(ModelError, match="unknown tokenization 'other'"):
        Tokenizer(**{**usual.describe(), "scheme": "other"})

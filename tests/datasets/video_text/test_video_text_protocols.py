"""The protocols of config/datasets, against published numbers, and the protocols that are refused."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from stm.config import ConfigError, CorpusSource, LanguageDataset, ProtocolSource, parse_config
from stm.datasets.folder import DatasetError
from stm.datasets.video_text import CORPORA, official_counts, protocol_names, read_protocol, typical
from stm.datasets.video_text import protocol as module
from stm.datasets.video_text.protocol import Protocol
from stm.plan.clips import count_clips


def test_the_config_names_exactly_the_protocols_and_corpora_there_are() -> None:
    assert sorted(get_args(ProtocolSource)) == protocol_names()
    assert set(get_args(CorpusSource)) == set(CORPORA)


def test_sizes_agree_with_totals_that_the_datasets_state() -> None:
    sizes = {name: read_protocol(name) for name in protocol_names()}
    assert sum(official_counts("msrvtt").values()) == sum(official_counts("msrvtt-qa").values()) == 10_000
    assert sum(official_counts("msrvtt-mc").values()) == 10_000 and official_counts("msrvtt-7k")["train"] == 6_513 + 497
    assert sum(n or 0 for n in sizes["msrvtt-captioning"].texts.values()) == 20 * 10_000
    assert sum(n or 0 for n in sizes["msrvtt-qa"].texts.values()) == 243_680  # Xu et al. 2017: 243k
    assert sum(n or 0 for n in sizes["msvd-qa"].texts.values()) == 50_505
    assert sum(n or 0 for n in sizes["activitynet-qa"].texts.values()) == 58_000
    assert sum(official_counts("msvd").values()) == 1_970 == sum(official_counts("msvd-captioning").values())
    assert official_counts("ssv2-template") == official_counts("ssv2-label") == {"train": 168_913, "test": 174 * 12}
    assert official_counts("didemo") == {"train": 8_395, "val": 1_065, "test": 1_004}
    assert list(official_counts("lsmdc")) == ["train", "val", "test"]  # roughly known ones too


def test_paragraphs_trims_and_lengths_are_those_of_umt() -> None:
    protocols = {name: read_protocol(name) for name in protocol_names()}
    assert {name for name, one in protocols.items() if one.paragraph} == {"didemo", "activitynet"}  # and not msvd
    assert {name: one.trim_seconds for name, one in protocols.items() if one.trim_seconds} == {"didemo": 30}
    assert {name for name, one in protocols.items() if one.several_videos_per_text} == {"ssv2-label", "ssv2-template"}
    tokens = {name: one.fine_tuned.max_text_tokens for name, one in protocols.items() if one.task == "retrieval"}
    assert tokens == {"msrvtt": 32, "msrvtt-7k": 32, "didemo": 64, "activitynet": 150, "lsmdc": 96, "msvd": 64} | {
        "ssv2-label": 25,
        "ssv2-template": 25,
    }
    zero_shot = {name: one.zero_shot for name, one in protocols.items() if one.zero_shot}
    assert all(feed.test_frames == 4 and feed.train_frames is None for feed in zero_shot.values())
    assert {n for n, feed in zero_shot.items() if feed.max_text_tokens != tokens[n]} == {"lsmdc"}
    questions = [one for one in protocols.values() if one.task == "question_answering"]
    assert [(one.fine_tuned.max_text_tokens, one.max_answer_tokens) for one in questions] == [(25, 5)] * 3
    assert all(one.fine_tuned.train_frames == one.fine_tuned.test_frames == 12 for one in protocols.values())


def test_no_checkpoint_is_chosen_on_the_test_split() -> None:
    for name in protocol_names():
        protocol = read_protocol(name)
        assert protocol.validation != protocol.test
        assert (protocol.checkpoint == "last") == (protocol.validation is None) == ("val" not in protocol.files)


def test_every_size_has_a_comment_that_says_how_sure_it_is() -> None:
    for name in protocol_names():
        lines = (module.protocol_folder() / f"{name}.yaml").read_text().splitlines()
        above = lines[: next(n for n, line in enumerate(lines) if line.startswith("videos:"))]
        comment = " ".join(line for line in above[-3:] if line.startswith("#"))
        assert "idely published" in comment or "own README" in comment or "not checked" in comment
        protocol = read_protocol(name)
        unknown = [size for size in (*protocol.videos.values(), *protocol.texts.values()) if size is None]
        assert not unknown or "not checked" in "\n".join(lines) or "as the videos" in "\n".join(lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trim": 30}, "Extra inputs"),
        ({"videos": {"train": 9000}}, "videos must have the splits"),
        ({"texts": {"train": 1, "test": 2, "val": 3}}, "texts must have the splits"),
        ({"paragraph": True}, "rule `join`"),
        ({"several_captions": {"train": "join", "test": "join"}}, "rule `join`"),
        ({"several_captions": {"train": "explode"}}, "splits with captions: test, train"),
        ({"validation": "test", "checkpoint": "best"}, "another split than test"),
        ({"validation": "val", "checkpoint": "best"}, "another split than test"),
        ({"checkpoint": "best"}, "`last` where there is none"),
        ({"answers": "a.json"}, "belong to question_answering"),
        ({"task": "question_answering", "several_captions": {}}, "needs both"),
        ({"about": {"train": 5}}, r"about\.train"),
        ({"test": "exam"}, "files has: train, test"),
        ({"files": {"train": ["../a.json"], "test": ["b.json"]}}, "pattern"),
        ({"files": {"train": ["/etc/a.json"], "test": ["b.json"]}}, "pattern"),
    ],
)
def test_a_protocol_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    values = read_protocol("msrvtt").model_dump(mode="json") | changes
    with pytest.raises(ValidationError, match=message):
        Protocol.model_validate(values)


def test_a_missing_folder_or_protocol_is_a_readable_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match=r"no protocol '\.\./demo'; config/datasets has: activitynet"):
        read_protocol("../demo")
    monkeypatch.setattr("stm.storage.shipped._FOLDER", tmp_path / "site" / "stm")
    with pytest.raises(DatasetError, match="Install it with pip"):
        module.protocol_folder()
    folder = tmp_path / "site" / "config" / "datasets"
    folder.mkdir(parents=True)
    (folder / "broken.yaml").write_text(yaml.safe_dump({"title": "x"}))
    with pytest.raises(DatasetError, match=r"broken\.yaml: is not a valid protocol"):
        read_protocol("broken")


def test_a_config_cannot_change_a_protocol() -> None:
    dataset = {"source": "msvd", "root": "a", "annotations": "b"}
    assert isinstance(parse_config({"name": "x", "dataset": dataset}).dataset, LanguageDataset)
    for flag in ("paragraph", "trim_seconds", "max_text_tokens"):
        with pytest.raises(ConfigError, match=flag):
            parse_config({"name": "x", "dataset": dataset | {flag: 1}})
    with pytest.raises(ConfigError, match="source"):
        parse_config({"name": "x", "dataset": dataset | {"source": "msvd-9k"}})


def test_a_plan_can_be_made_before_there_is_a_copy(tmp_path: Path) -> None:
    for source in (*protocol_names(), *CORPORA):
        dataset = {"source": source, "root": str(tmp_path), "annotations": str(tmp_path)}
        clips = count_clips(parse_config({"name": "x", "results": str(tmp_path), "dataset": dataset}))
        assert clips.per_split == official_counts(source) and clips.total >= 1_910
        assert clips.frames == typical(source).frames >= 1 and typical(source).basis


def test_the_table_in_the_docs_says_what_the_protocols_say() -> None:
    lines = (Path(__file__).parents[3] / "docs/datasets.md").read_text().splitlines()
    for name in protocol_names():
        protocol = read_protocol(name)
        (row,) = [line for line in lines if line.startswith(f"| `{name}` |")]
        _, _, videos, texts, captions, tokens, frames, zero_shot, checkpoint, _ = (
            cell.strip() for cell in row.split("|")
        )
        assert (frames, checkpoint) == (str(protocol.fine_tuned.test_frames), protocol.checkpoint)
        assert tokens.split(",")[0] == str(protocol.fine_tuned.max_text_tokens)
        assert (zero_shot != "-") == (protocol.zero_shot is not None)
        assert ("paragraph" in captions, "first 30 s" in captions) == (protocol.paragraph, bool(protocol.trim_seconds))
        for split, shown, counted in zip(
            ("train", "val", "test"), videos.split(" / "), texts.split(" / "), strict=True
        ):
            if split not in protocol.files:
                assert shown == counted == "-"
                continue
            sizes = [f"{size:,}" for size in protocol.sizes(split)]
            assert shown == (" or ".join(sizes) if sizes else f"about {protocol.about[split]:,}")
            assert counted == ("?" if protocol.texts[split] is None else f"{protocol.texts[split]:,}")
    for name, corpus in CORPORA.items():
        (row,) = [line for line in lines if line.startswith(f"| `{name}` |")]
        assert all(f"`{one}`" in row for one in corpus.names)

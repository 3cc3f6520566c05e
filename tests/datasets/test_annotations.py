"""Annotation files: every kind says the same, a bad file is an error, a bad row is only a row."""

import json
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stm.datasets.annotations import AnnotatedClip, AnnotationError, parse_row, read_annotations
from stm.datasets.text_files import BadRow
from stm.manifest import Question

ROWS: list[dict[str, Any]] = [
    {
        "path": "a/one.mp4",
        "video_id": "first",
        "split": "test",
        "label": "drift",
        "captions": ["a red one", "one, still \u201cred\u201d"],
        "start": 1.5,
        "end": 4.0,
        "questions": [{"question": "what?", "answer": "that"}],
    },
    {"path": "two.mp4", "captions": ["only one"]},
]
CLIPS = [
    AnnotatedClip(
        "a/one.mp4", "test", "first", "drift", tuple(ROWS[0]["captions"]), 1.5, 4.0, (Question("what?", "that"),)
    ),
    AnnotatedClip("two.mp4", "train", captions=("only one",)),
]


def clips_in(file: Path) -> list[AnnotatedClip]:
    return [parse_row(row, "train") for _, row in read_annotations(file)]


def write_csv(file: Path) -> None:
    file.write_text(
        "path,video_id,split,label,caption_2,caption_1,start,end,questions\n"
        'a/one.mp4,first,test,drift,"one, still \u201cred\u201d",a red one,1.5,4,'
        '"[{""question"": ""what?"", ""answer"": ""that""}]"\n'
        "two.mp4,,,,,only one,,,\n",
        encoding="utf-8-sig",  # as spreadsheets write it
    )


def write_tsv(file: Path) -> None:
    lines = ["path\tvideo_id\tsplit\tlabel\tcaptions\tstart\tend\tquestions"]
    questions = json.dumps(ROWS[0]["questions"]).replace('"', '""')
    lines += [f'a/one.mp4\tfirst\ttest\tdrift\ta red one|one, still \u201cred\u201d\t1.5\t4.0\t"{questions}"']
    file.write_text("\n".join([*lines, "two.mp4\t\t\t\tonly one\t\t\t"]), encoding="utf-8")


WRITERS = {
    "a.csv": write_csv,
    "a.tsv": write_tsv,
    "list.json": lambda file: file.write_text(json.dumps(ROWS)),
    "clips.json": lambda file: file.write_text(json.dumps({"version": 1, "clips": ROWS})),
    "lines.json": lambda file: file.write_text("\n".join(map(json.dumps, ROWS))),
    "a.jsonl": lambda file: file.write_text("\n\n".join(map(json.dumps, ROWS)) + "\n"),
    "a.parquet": lambda file: pq.write_table(pa.Table.from_pylist(ROWS), file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_says_the_same(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert clips_in(tmp_path / name) == CLIPS


@pytest.mark.parametrize(
    ("row", "captions"),
    [
        ({"caption": "one"}, ("one",)),
        ({"captions": "one|two"}, ("one", "two")),
        ({"captions": '["one | two", "three"]'}, ("one | two", "three")),
        ({"captions": ["b"], "caption": "a", "caption_10": "d", "caption_2": "c"}, ("b", "a", "c", "d")),
        ({"captions": ["", "one", None]}, ("", "one")),
        ({"captions": None}, ()),
        ({"captions": "[]"}, ()),
        ({"captions": "[Music] a man plays the guitar"}, ("[Music] a man plays the guitar",)),
        ({"captions": " [laughter]"}, ("[laughter]",)),
        ({"captions": "[Music]|[1] a dog"}, ("[Music]", "[1] a dog")),
    ],
)
def test_captions_come_in_many_forms(row: dict[str, Any], captions: tuple[str, ...]) -> None:
    assert parse_row({"path": "a.mp4", **row}, "train").captions == captions


def test_a_multiple_choice_has_choices_and_an_open_question_none() -> None:
    asked = [
        {"question": "", "answer": "b", "choices": ["a", "b"]},
        {"question": "what?", "answer": "c", "choices": None},
    ]
    clip = parse_row({"path": "a.mp4", "questions": asked}, "train")
    assert clip.questions == (Question("", "b", ("a", "b")), Question("what?", "c"))


def test_numbers_as_ids_and_labels_are_text() -> None:
    clip = parse_row({"path": "a.mp4", "video_id": 12, "label": 3.0}, "train")
    assert (clip.video_id, clip.label) == ("12", "3")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"path": ""}, "path"),
        ({"path": "   "}, "path"),
        ({"path": None}, "path"),
        ({"path": 3}, "path"),
        ({"path": "a\x00.mp4"}, "path"),
        ({"split": "no/slash"}, "split"),
        ({"split": "../x"}, "split"),
        ({"split": "x" * 65}, "split"),
        ({"start": "soon"}, "start.*seconds.*'soon'"),
        ({"start": float("nan")}, "start"),
        ({"end": "inf"}, "end"),
        ({"start": 2, "end": 2}, "start < end"),
        ({"start": 5, "end": 2}, "start < end"),
        ({"start": -1}, "start < end"),
        ({"end": 0}, "start < end"),
        ({"start": True}, "start"),
        ({"label": ["a"]}, "label"),
        ({"label": "\ud800"}, "Unicode"),
        ({"captions": [1]}, "captions"),
        ({"captions": "[1"}, "JSON"),
        ({"captions": '["a", "b"'}, "JSON"),
        ({"captions": "['a', 'b']"}, r'write a list as \["a dog", "a cat"\]'),
        ({"questions": "what?"}, "JSON"),
        ({"questions": [{"question": "what?"}]}, "questions"),
        ({"questions": 3}, "questions"),
        ({"questions": [{"question": "", "answer": "a", "choices": "ab"}]}, "choices must be a list"),
        ({"questions": [{"question": "", "answer": "c", "choices": ["a", "b"]}]}, "not among the choices"),
    ],
)
def test_a_bad_value_names_its_column(row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow, match=message):
        parse_row({"path": "a.mp4", **row}, "train")


def test_a_row_that_is_no_object_or_no_json_is_a_bad_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"path": "a.mp4"}\nnot json\n[1]\n"text"\n')
    rows = read_annotations(file)
    assert parse_row(rows[0][1], "train").path == "a.mp4"
    for where, row in rows[1:]:
        assert where.startswith("line ")
        with pytest.raises(BadRow):
            parse_row(row, "train")


def test_a_csv_row_with_too_many_fields_is_a_bad_row(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("path,caption\na.mp4,a dog, a cat\nb.mp4\n")
    rows = read_annotations(file)
    with pytest.raises(BadRow, match="more fields"):
        parse_row(rows[0][1], "train")
    assert parse_row(rows[1][1], "train") == AnnotatedClip("b.mp4", "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"file,label\na.mp4,x\n", "no column `path`: file, label"),
        ("a.csv", b"", "no column `path`"),
        ("a.csv", b"path,label,label\na.mp4,x,y\n", "twice"),
        ("a.csv", b"path\n\xff\xfe\n", "cannot be read as csv"),
        ("a.json", b'[{"file": "a.mp4"}]', "no column `path`.*file"),
        ("a.json", b'{"videos": []}', "must hold a list"),
        ("a.json", b"[{", "cannot be read as json"),
        ("a.json", b"[" * 100_000, "cannot be read as json"),
        ("a.parquet", b"PAR1 not really", "cannot be read as parquet"),
        ("a.xlsx", b"", "unknown format"),
        ("a.jsonl", b'[{"path": "a.mp4"}]', "no row can be used; the first, line 1: must be an object"),
        ("a.jsonl", b'{"path": "a.mp4"} {"path": "b.mp4"}', "no row can be used; the first, line 1: not JSON"),
        (
            "a.csv",
            ",".join(f"c{i}" for i in range(10_000)).encode(),
            "no column `path`: c0, c1, c2,.{,150}, and 9,980 more$",
        ),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AnnotationError, match=message) as caught:
        read_annotations(tmp_path / name)
    assert name in str(caught.value)


def test_parquet_without_a_path_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"video": ["a.mp4"]}), tmp_path / "a.parquet")
    with pytest.raises(AnnotationError, match="no column `path`; the columns are: video"):
        read_annotations(tmp_path / "a.parquet")


@pytest.mark.filterwarnings("ignore:.*unused columns")
def test_unused_columns_of_parquet_are_not_read(tmp_path: Path) -> None:
    nanoseconds = pa.array([1, 2], pa.timestamp("ns", tz="Europe/Nowhere"))
    offsets, invalid = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")
    columns = {"path": ["a.mp4", "b.mp4"], "when": nanoseconds, "caption_2": ["x", "y"]}
    columns["notes"] = pa.StringArray.from_buffers(2, offsets, invalid)
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert [(clip.path, clip.captions) for clip in clips_in(tmp_path / "a.parquet")] == [
        ("a.mp4", ("x",)),
        ("b.mp4", ("y",)),
    ]


@pytest.mark.filterwarnings("ignore:.*unused columns")
def test_a_column_with_a_huge_number_is_unused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"path,caption_{'1' * 5000}\na.mp4,x\n")
    assert clips_in(tmp_path / "a.csv") == [AnnotatedClip("a.mp4", "train")]


def test_unknown_columns_are_ignored_with_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("path,weather,caption_1\na.mp4,rain,x\n")
    with pytest.warns(UserWarning, match="unused columns: weather$"):
        assert clips_in(file) == [AnnotatedClip("a.mp4", "train", captions=("x",))]
    file.write_text("path,caption_1\na.mp4,x\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_annotations(file)


@pytest.mark.parametrize(
    ("rows", "line", "words"),
    [
        ('a.mp4,a 5" screen\nb.mp4,"a ""b"" c"\nc.mp4,"unclosed\nd.mp4,x\n', 4, "up to line 5"),
        ('a.mp4,"unclosed\nb.mp4,"x"\nc.mp4,y\n', 2, "up to line 3"),  # closed by accident, and text follows
        ('a.mp4,"unclosed\nb.mp4,"\nc.mp4,y\n', 2, "second line looks like a row: 'b.mp4,'"),
        ('a.mp4,"one\ntwo\nB.MP4,"\n', 2, "third line looks like a row"),
        ('a.mp4,"one\r\nb.mp4,"\r\n', 2, "looks like a row"),
        ('a.mp4,"one\rb.mp4,"\r', 2, "looks like a row"),
        ('a.bin,"one\nb.bin,"\n', 2, "looks like a row"),  # the ending of the row's own path
        ('video1,"one\nvideo2,"\n', 2, "looks like a row"),  # no ending at all
        ('"a.mp4,one\nb.mp4",x\n', 2, "looks like a row"),
        ('a.mp4,x\nb.mp4,"unclosed', 3, "it is the last line"),
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_quote_that_swallows_rows_is_an_error_at_its_line(
    rows: str, line: int, words: str, delimiter: str, tmp_path: Path
) -> None:
    file = tmp_path / ("a.tsv" if delimiter == "\t" else "a.csv")
    file.write_bytes(f"path,caption\n{rows}".replace(",", delimiter).encode())
    with pytest.raises(AnnotationError, match=rf"{file.name}: line {line}: ") as caught:
        read_annotations(file)
    assert words.replace("b.mp4,", f"b.mp4{delimiter}".encode("unicode_escape").decode()) in str(caught.value)


def test_captions_may_have_line_breaks_and_quotes_of_one_line_cost_one_row(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(
        'path,label,caption\na.mp4,x,"First, a man, walking.\nThen, he, sits: see b.mp4"\n'
        'b.mp4,x,"a" dog\nc.mp4,x,a 5" screen\n,,\n\nd.mp4,x,"a ""b"" c"\n'
    )
    rows = read_annotations(file)
    assert [where for where, _ in rows] == ["line 2", "line 4", "line 5", "line 8"]
    with pytest.raises(BadRow, match=r'quotation marks do not match.*as two: "a 5"" screen"'):
        parse_row(rows[1][1], "train")
    captions = [parse_row(rows[number][1], "train").captions for number in (0, 2, 3)]
    assert captions == [("First, a man, walking.\nThen, he, sits: see b.mp4",), ('a 5" screen',), ('a "b" c',)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "list.json", "a.jsonl"])
def test_text_files_are_read_in_every_unicode_encoding_that_is_marked(name: str, encoding: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    text = (tmp_path / name).read_text(encoding="utf-8-sig")
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert clips_in(tmp_path / name) == CLIPS


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "latin-1"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_other_encodings_are_refused_with_the_remedy(name: str, encoding: str, tmp_path: Path) -> None:
    text = "path,label\né.mp4,x\n" if name == "a.csv" else '{"path": "é.mp4"}\n'
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(AnnotationError, match=rf"{name}: cannot be read as .*save it as UTF-8"):
        read_annotations(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "path;label\na,b.mp4;run\n",
        "sep=;\npath;label\na,b.mp4;run\n",
        "path\tlabel\na,b.mp4\trun\n",
        '\n  \n path , label \n"a,b.mp4", run \n',
        "path;label\r\na,b.mp4;run\r\n",
        "path;label\ra,b.mp4;run\r",
        "path;label;;\na,b.mp4;run;;\n;;;\n",
    ],
)
def test_spreadsheets_write_csv_in_many_ways(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(text.encode())
    with warnings.catch_warnings(action="error"):
        assert clips_in(tmp_path / "a.csv") == [AnnotatedClip("a,b.mp4", "train", label="run")]


def test_labels_that_look_the_same_are_one_class() -> None:
    labels = ["run café", "run café ", " run café", "run  café", "run\u00a0café", "run cafe\u0301"]
    clips = [parse_row({"path": "a.mp4", "label": label}, "train") for label in labels]
    assert {clip.label for clip in clips} == {"run café"}
    blank = parse_row({"path": "a.mp4", "label": " ", "split": " test ", "video_id": " a "}, "train")
    assert (blank.label, blank.split, blank.video_id) == (None, "test", "a")


@pytest.mark.parametrize("column", ["path", "video_id", "label", "start", "captions", "questions"])
@pytest.mark.parametrize("name", ["list.json", "a.jsonl"])
def test_a_number_of_thousands_of_digits_is_a_bad_row(name: str, column: str, tmp_path: Path) -> None:
    rows = [{"path": "a.mp4", column: 0}, {"path": "b.mp4"}]
    text = "\n".join(map(json.dumps, rows)) if name == "a.jsonl" else json.dumps(rows)
    (tmp_path / name).write_text(text.replace(": 0", f": -{'1' * 5000}"))
    first, second = (row for _, row in read_annotations(tmp_path / name))
    with pytest.raises(BadRow, match=rf"{column}.*a number of 5,000 digits"):
        parse_row(first, "train")
    assert parse_row(second, "train").path == "b.mp4"


def test_a_key_that_is_given_twice_is_a_bad_row(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[{"path": "a.mp4", "caption": "x", "caption": "y"}, {"path": "b.mp4"}]')
    first, second = (row for _, row in read_annotations(file))
    with pytest.raises(BadRow, match="`caption` is given twice"):
        parse_row(first, "train")
    assert parse_row(second, "train").path == "b.mp4"
    file.write_text('{"clips": [{"path": "a.mp4"}], "clips": []}')
    with pytest.raises(AnnotationError, match=r"a\.json: the key `clips` is given twice"):
        read_annotations(file)

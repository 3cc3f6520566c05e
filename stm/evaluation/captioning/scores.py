"""Standard scores of generated captions against reference captions: BLEU-4, METEOR, ROUGE-L and CIDEr.

All scores come from pycocoevalcap, the reference implementation (installed by the extra `captions`). Its tokenizer and
METEOR are Java programs shipped in the package. They are started here directly instead of by pycocoevalcap's classes,
which wait forever if a program hangs or dies, and which write into the installed package. SPICE is omitted because it
downloads a parser.
"""

import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from stm.jobs.progress import track

NAMES = ("bleu4", "meteor", "rouge_l", "cider")

TIME_LIMIT = 1800.0
"""Time limit of each Java program, in seconds. METEOR takes 10 to 20 seconds to start, and several times longer on a
busy machine."""


class CaptionScoreError(RuntimeError):
    """Captions cannot be scored; the message names the missing dependency or the failed program."""


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a split: CIDEr is in [0, 10], the others are in [0, 1]. Papers report them multiplied by 100."""

    figures: dict[str, float]  # by `NAMES`: BLEU-4 and METEOR are corpus-level, the others are means over clips
    clips: dict[
        str, NDArray[np.float64]
    ]  # by `NAMES`, [clips]; for BLEU-4 and METEOR, the mean differs from the corpus score


@dataclass(frozen=True)
class _Programs:
    java: str
    tokenizer: Path
    meteor: Path
    punctuation: frozenset[str]


def score_captions(
    predicted: Sequence[str], references: Sequence[Sequence[str]], time_limit: float = TIME_LIMIT
) -> CaptionScores:
    """Scores one caption per clip against the clip's references.

    CIDEr weights n-grams by their rarity among the references of the scored clips, so it is 0 for a single clip and if
    all clips have the same references.

    Args:
        predicted: one caption per clip; an empty caption scores 0.
        references: the reference captions of each clip (at least one), in the same order.
        time_limit: seconds after which a Java program is killed.

    Raises:
        CaptionScoreError: pycocoevalcap or Java is missing, or a program failed or exceeded the time limit.
        ValueError: there are no clips, the numbers of captions and clips differ, or a clip has no reference.
    """
    if not predicted or len(predicted) != len(references):
        raise ValueError(
            f"{len(predicted)} captions for {len(references)} clips: need one caption per clip and at least one clip"
        )
    if missing := sum(not own for own in references):
        raise ValueError(f"{missing} clips have no reference caption: leave them out")
    programs = find_programs()
    # Tokenize all captions in one call: starting Java takes longer than tokenizing.
    texts = _tokenize([*predicted, *(text for own in references for text in own)], programs, time_limit)
    bounds = accumulate((len(own) for own in references), initial=len(predicted))
    clips = range(len(predicted))
    generated = {clip: [texts[clip]] for clip in clips}
    expected = {clip: texts[start:stop] for clip, (start, stop) in zip(clips, pairwise(bounds), strict=True)}

    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    bleu, clip_bleu = Bleu(4).compute_score(expected, generated, verbose=0)  # BLEU-1 to BLEU-4; BLEU-4 is the last
    rouge, clip_rouge = Rouge().compute_score(expected, generated)
    cider, clip_cider = Cider().compute_score(expected, generated)
    meteor, clip_meteor = _meteor(texts[: len(predicted)], list(expected.values()), programs, time_limit)
    split_scores = (bleu[3], meteor, rouge, cider)
    clip_scores = (clip_bleu[3], clip_meteor, clip_rouge, clip_cider)
    return CaptionScores(
        {name: float(value) for name, value in zip(NAMES, split_scores, strict=True)},
        {name: np.asarray(values, dtype=np.float64) for name, values in zip(NAMES, clip_scores, strict=True)},
    )


def find_programs() -> _Programs:
    """Locates Java and the Java programs. Call this first, to fail before hours are spent on captions.

    Raises:
        CaptionScoreError: Java, pycocoevalcap or one of its programs is missing; the message lists what is missing.
    """
    java = shutil.which("java")
    missing = []
    if java is None:
        missing.append("Java (8 or later; `openjdk-17-jre-headless` on Debian, `openjdk` on conda-forge)")
    try:
        from pycocoevalcap.meteor import meteor
        from pycocoevalcap.tokenizer import ptbtokenizer
    except ImportError:
        missing.append("the package pycocoevalcap (the extra `captions`: pip install 'stm-video[captions]')")
    if java is None or missing:
        raise CaptionScoreError(f"scoring captions needs {' and '.join(missing)}")
    jars = (
        Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR,
        Path(meteor.__file__).parent / meteor.METEOR_JAR,
    )
    for jar in jars:
        if not jar.is_file():
            raise CaptionScoreError(f"{jar} is missing: reinstall pycocoevalcap")
    return _Programs(java, *jars, frozenset(ptbtokenizer.PUNCTUATIONS))


def _tokenize(captions: Sequence[str], programs: _Programs, time_limit: float) -> list[str]:
    """Tokenizes captions by Penn Treebank rules: lower-case words separated by spaces, without punctuation."""
    # The program processes its input line by line, so a caption must not contain any kind of line break.
    lines = "".join(" ".join(caption.replace("\0", " ").split()) + "\n" for caption in captions)
    # Without an explicit encoding, Java uses the locale's, which is often ASCII in batch jobs.
    command = [programs.java, "-Dfile.encoding=UTF-8", "-cp", str(programs.tokenizer)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    try:
        done = subprocess.run(  # noqa: S603
            command, input=lines.encode("utf-8", "replace"), capture_output=True, check=False, timeout=time_limit
        )
    except subprocess.TimeoutExpired as error:
        raise CaptionScoreError(f"the caption tokenizer took more than {time_limit:g} seconds") from error
    tokenized = done.stdout.decode("utf-8", "replace").removesuffix("\n").split("\n")
    if done.returncode or len(tokenized) != len(captions):
        log = done.stderr.decode("utf-8", "replace").strip()[-500:]
        raise CaptionScoreError(
            f"the caption tokenizer returned {len(tokenized)} lines for {len(captions)} captions and exited with status "
            f"{done.returncode}: {log}"
        )
    return [" ".join(word for word in line.split() if word not in programs.punctuation) for line in tokenized]


def _meteor(
    generated: Sequence[str], references: Sequence[Sequence[str]], programs: _Programs, time_limit: float
) -> tuple[float, list[float]]:
    """METEOR 1.5 at corpus level and per clip.

    Protocol: a SCORE request returns the match counts of a caption; an EVAL request with all counts returns one line
    per caption, then the corpus score.
    """
    with _running_meteor(programs, time_limit) as (requests, answers):

        def ask(*parts: str) -> str:
            requests.write(" ||| ".join(parts) + "\n")
            requests.flush()
            return answer()

        def answer() -> str:
            if line := answers.readline().strip():
                return line
            raise BrokenPipeError("the program ended")

        pairs = zip(generated, references, strict=True)
        counts = [
            ask("SCORE", *(_field(text) for text in own), _field(caption))
            for caption, own in track(pairs, "METEOR", total=len(generated), unit="captions")
        ]
        first = float(ask("EVAL", *counts))
        *others, corpus = [float(answer()) for _ in counts]
        return corpus, [first, *others]


def _field(text: str) -> str:
    """The text without `|||`, which separates the fields of a request."""
    return " ".join(text.replace("|||", " ").split())


@contextmanager
def _running_meteor(programs: _Programs, time_limit: float) -> Iterator[tuple[IO[str], IO[str]]]:
    """Starts METEOR and yields its standard input and output.

    The process is killed when the block ends or the time limit expires; in the latter case, reads in the block fail.
    """
    command = [programs.java, "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(programs.meteor)]
    command += ["-", "-", "-stdio", "-l", "en", "-norm"]
    # Standard error goes to a file: nothing reads it in the meantime, and a full pipe would block the program.
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            encoding="utf-8",
            errors="replace",
            cwd=programs.meteor.parent,  # METEOR reads its paraphrase tables from here
        )
        assert process.stdin and process.stdout
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        # Reading a pipe has no timeout; killing the program ends the read.
        timer = threading.Timer(time_limit, expire)
        timer.start()
        try:
            yield process.stdin, process.stdout
        except (OSError, ValueError) as error:
            process.kill()
            process.wait()
            log.seek(0)
            message = log.read().decode("utf-8", "replace").strip()[-500:]
            reason = f"it took more than {time_limit:g} seconds" if expired.is_set() else message or str(error)
            raise CaptionScoreError(f"METEOR failed: {reason}") from error
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
            with suppress(OSError):  # closing flushes, which fails if the program has exited
                process.stdin.close()

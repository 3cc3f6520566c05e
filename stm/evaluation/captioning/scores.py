"""Scores of generated captions against written ones: BLEU-4, METEOR, ROUGE-L and CIDEr, as the field computes them.

All come from pycocoevalcap, the reference (the extra `captions`). Its tokenizer and METEOR are Java programs inside it.
They are started here and not by its classes: those wait for ever for a program that hangs or has died, and write into
the installed package. SPICE is left out: it downloads a parser.
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
"""Seconds that each Java program may take. METEOR needs 10 to 20 to start, several times that on a busy machine."""


class CaptionScoreError(RuntimeError):
    """Captions cannot be scored; the message says what is missing or what failed."""


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a split; all but CIDEr are in [0, 1], CIDEr in [0, 10]. Papers print them times 100."""

    figures: dict[str, float]  # by `NAMES`; BLEU-4 and METEOR of the whole split, the others means over clips
    clips: dict[str, NDArray[np.float64]]  # by `NAMES`, [clips]; the mean of BLEU-4 and METEOR is not the figure


@dataclass(frozen=True)
class _Programs:
    java: str
    tokenizer: Path
    meteor: Path
    punctuation: frozenset[str]


def score_captions(
    predicted: Sequence[str], references: Sequence[Sequence[str]], time_limit: float = TIME_LIMIT
) -> CaptionScores:
    """Scores one caption a clip against the clip's references.

    CIDEr weighs n-grams by how rare they are among the references of these very clips: it is 0 for a single clip, and
    where all clips have the same references.

    Args:
        predicted: a caption of each clip; may be empty, which scores 0.
        references: one or more of each clip, in the same order.
        time_limit: seconds that each Java program may take; it is ended after that.

    Raises:
        CaptionScoreError: pycocoevalcap or Java is missing, or a program failed or took too long.
        ValueError: there are no clips, not as many captions as clips, or a clip has no reference.
    """
    if not predicted or len(predicted) != len(references):
        raise ValueError(f"{len(predicted)} captions for {len(references)} clips: one each is needed")
    if lacking := sum(not own for own in references):
        raise ValueError(f"{lacking} clips have no reference caption: leave them out")
    programs = find_programs()
    words = _tokenize([*predicted, *(text for own in references for text in own)], programs, time_limit)
    bounds = accumulate((len(own) for own in references), initial=len(predicted))
    clips = range(len(predicted))
    generated = {clip: [words[clip]] for clip in clips}
    written = {clip: words[start:stop] for clip, (start, stop) in zip(clips, pairwise(bounds), strict=True)}

    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    bleu, each_bleu = Bleu(4).compute_score(written, generated, verbose=0)
    rouge, each_rouge = Rouge().compute_score(written, generated)
    cider, each_cider = Cider().compute_score(written, generated)
    meteor, each_meteor = _meteor(words[: len(predicted)], list(written.values()), programs, time_limit)
    whole = (bleu[3], meteor, rouge, cider)
    each = (each_bleu[3], each_meteor, each_rouge, each_cider)
    return CaptionScores(
        {name: float(value) for name, value in zip(NAMES, whole, strict=True)},
        {name: np.asarray(values, dtype=np.float64) for name, values in zip(NAMES, each, strict=True)},
    )


def find_programs() -> _Programs:
    """Where Java and the programs are; to be asked before hours are spent on captions that cannot be scored.

    Raises:
        CaptionScoreError: something is missing; all of it is listed.
    """
    java, missing = shutil.which("java"), []
    if java is None:
        missing.append("Java (8 or later; `openjdk-17-jre-headless` on Debian, `openjdk` on conda-forge)")
    try:
        from pycocoevalcap.meteor import meteor
        from pycocoevalcap.tokenizer import ptbtokenizer
    except ImportError:
        missing.append("the package pycocoevalcap (the extra `captions`: pip install 'stm-video[captions]')")
    if java is None or missing:
        raise CaptionScoreError(f"scores of captions need {' and '.join(missing)}")
    jars = (
        Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR,
        Path(meteor.__file__).parent / meteor.METEOR_JAR,
    )
    for jar in jars:
        if not jar.is_file():
            raise CaptionScoreError(f"{jar} is missing: install pycocoevalcap again")
    return _Programs(java, *jars, frozenset(ptbtokenizer.PUNCTUATIONS))


def _tokenize(captions: Sequence[str], programs: _Programs, time_limit: float) -> list[str]:
    """Each caption in lower case as words with spaces between, without punctuation, by the Penn Treebank's rules."""
    # A line a caption: no character at which anything breaks lines may stay.
    lines = "".join(" ".join(caption.replace("\0", " ").split()) + "\n" for caption in captions)
    command = [programs.java, "-Dfile.encoding=UTF-8", "-cp", str(programs.tokenizer)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    try:
        done = subprocess.run(  # noqa: S603
            command, input=lines.encode("utf-8", "replace"), capture_output=True, check=False, timeout=time_limit
        )
    except subprocess.TimeoutExpired as error:
        raise CaptionScoreError(f"the tokenizer of captions took more than {time_limit:g} seconds") from error
    found = done.stdout.decode("utf-8", "replace").removesuffix("\n").split("\n")
    if done.returncode or len(found) != len(captions):
        said = done.stderr.decode("utf-8", "replace").strip()[-500:]
        raise CaptionScoreError(
            f"the tokenizer of captions made {len(found)} lines of {len(captions)} and ended with {done.returncode}: {said}"
        )
    return [" ".join(word for word in line.split() if word not in programs.punctuation) for line in found]


def _meteor(
    generated: Sequence[str], written: Sequence[Sequence[str]], programs: _Programs, time_limit: float
) -> tuple[float, list[float]]:
    """METEOR 1.5 of the whole and of each clip."""
    with _running_meteor(programs, time_limit) as (requests, answers):

        def ask(*parts: str) -> str:
            requests.write(" ||| ".join(parts) + "\n")
            requests.flush()
            return answer()

        def answer() -> str:
            if line := answers.readline().strip():
                return line
            raise BrokenPipeError("it ended")

        pairs = zip(generated, written, strict=True)
        counts = [
            ask("SCORE", *(_field(text) for text in own), _field(caption))
            for caption, own in track(pairs, "METEOR", total=len(generated), unit="captions")
        ]
        first = float(ask("EVAL", *counts))
        *others, whole = [float(answer()) for _ in counts]
        return whole, [first, *others]


def _field(text: str) -> str:
    """Without three bars in a row, which part the fields of a request."""
    return " ".join(text.replace("|||", " ").split())


@contextmanager
def _running_meteor(programs: _Programs, time_limit: float) -> Iterator[tuple[IO[str], IO[str]]]:
    """METEOR's input and output. It is ended with the block, or when its time is up, which fails the block's reading."""
    command = [programs.java, "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(programs.meteor)]
    command += ["-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            encoding="utf-8",
            errors="replace",
            cwd=programs.meteor.parent,  # it looks for its paraphrases there
        )
        assert process.stdin and process.stdout
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(time_limit, expire)
        timer.start()
        try:
            yield process.stdin, process.stdout
        except (OSError, ValueError) as error:
            process.kill()
            process.wait()
            complaints.seek(0)
            said = complaints.read().decode("utf-8", "replace").strip()[-500:]
            why = f"it took more than {time_limit:g} seconds" if expired.is_set() else said or str(error)
            raise CaptionScoreError(f"METEOR failed: {why}") from error
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
            with suppress(OSError):  # what the ended program has not read cannot be flushed
                process.stdin.close()

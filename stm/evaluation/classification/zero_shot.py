"""Zero-shot classification: predicts the label whose sentence is nearest to the clip in the text embedding space.

Nothing is trained. As in CLIP, a label is embedded with all templates, and the vectors are normalised, averaged, and
normalised again. A clip's vector is the contrastive head's embedding of the mean over all its tokens.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stm.config import Run, ZeroShot
from stm.distributed.process import Process
from stm.evaluation.classification.clips import clips_to_test
from stm.evaluation.features import average_probabilities, average_vectors
from stm.evaluation.inputs import EvaluationInputs
from stm.evaluation.results import check_labels, write_classification
from stm.evaluation.retrieval.embed import check_encoder, check_width, embed_clips, load_checked_embedder
from stm.pretrained.text_encoder import TextEncoder

_INNER_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def classify_by_sentences(task: ZeroShot, run: Run, inputs: EvaluationInputs, process: Process) -> None:
    """Classifies the test split's clips into the split's labels; see `stm.evaluation.evaluate`."""
    if inputs.text is None:
        raise ValueError("zero-shot classification requires the text encoder used for the captions (config: text)")
    test = clips_to_test(task, run, inputs.test, inputs.seed)
    check_labels(test)
    embedder = load_checked_embedder(inputs.weights, run)
    encoder = TextEncoder.load(inputs.text, process.device.type)
    check_encoder(embedder, encoder.identity, "the labels' sentences are encoded by")
    labels = embed_labels(test.classes, task.templates, encoder)
    check_width(embedder, labels.shape[1], f"{inputs.text.model}: its vectors have")
    # Use the training temperature: it leaves the ranking within a view unchanged but weights the views in their mean.
    temperature = float(embedder.branch.temperature)
    cosines = embed_clips(embedder, run, test, process) @ labels.T
    if not process.first:
        return
    probabilities = average_probabilities(cosines / temperature)
    spelt = {label: spell(label) for label in test.classes}
    extra = {"temperature": temperature, "text_model": inputs.text.model, "spelt": spelt}
    write_classification(task, run, inputs, test, probabilities, text=inputs.text, extra=extra)


def embed_labels(labels: Sequence[str], templates: Sequence[str], encoder: TextEncoder) -> NDArray[np.float32]:
    """One unit vector per label, float32 [labels, D]: the mean over the templates."""
    sentences = [template.replace("{}", spell(label)) for label in labels for template in templates]
    return average_vectors(encoder.encode(sentences).reshape(len(labels), len(templates), -1))


def spell(label: str) -> str:
    """Spells a label as words: `brushing_teeth` (HMDB51) becomes `brushing teeth`, `ApplyEyeMakeup` (UCF101)
    becomes `Apply Eye Makeup`."""
    words = label.replace("_", " ").strip()
    # A label with spaces is already written as words; its capitals are proper names.
    return words if " " in words else _INNER_CAPITAL.sub(" ", words)

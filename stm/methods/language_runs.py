"""Building the methods with text, and what of them is saved."""

from typing import Any

from torch import Tensor, nn

from stm.config import LanguageRun
from stm.methods.video_language import VideoLanguage, VideoOnly
from stm.models.teachers.frame_teacher import FrameTeacher
from stm.models.text.split_bert import SplitBert
from stm.models.video_language import EXTRA, VideoLanguageModel
from stm.models.vit import Architecture, VideoEncoder
from stm.models.weights import zoo


def build_language_method(run: LanguageRun, text_width: int | None = None) -> VideoLanguage:
    """UMT, STM or ClusterSTM with a fresh student; seed torch before for the same one.

    Args:
        run: the settings.
        text_width: of the captions' vectors, which ClusterSTM compares tokens with.

    Raises:
        ValueError: a model cannot be loaded, or widths do not fit each other.
    """
    architecture = zoo.describe(run)
    encoder = VideoEncoder(architecture)
    model: VideoLanguageModel | VideoOnly = VideoOnly(encoder)
    if run.language is not None:
        language = SplitBert.load(run.language)
        model = VideoLanguageModel(encoder, language, run.language.embedding, run.language.temperature)
    teacher = FrameTeacher.load(run.teacher, architecture.image_size // architecture.patch_size)
    if run.method != "clusterstm" and teacher.layers > architecture.depth:
        raise ValueError(
            f"teacher.layers {teacher.layers} is more than the {architecture.depth} blocks of the student (model: {run.model}), "
            f"whose last layers are aligned with the teacher's; set it to {architecture.depth} or less"
        )
    if run.method == "clusterstm" and text_width not in (None, teacher.feature_width):
        raise ValueError(
            f"the captions' vectors have {text_width} numbers and the teacher {run.teacher.model} makes {teacher.feature_width}: "
            "encode the captions by the teacher's own text tower (config: text.model)"
        )
    return VideoLanguage(model, _build_branch(run, architecture, teacher), teacher, run)


def _build_branch(run: LanguageRun, architecture: Architecture, teacher: FrameTeacher) -> nn.Module:
    # Each imports what the others do without.
    if run.method == "umt":
        from stm.methods.umt import UnmaskedTeacher

        return UnmaskedTeacher(run, architecture, teacher)
    if run.method == "stm":
        from stm.methods.stm import SpatioTemporalBranch

        return SpatioTemporalBranch(run, architecture, teacher)
    from stm.methods.clusterstm import ClusterWise

    return ClusterWise(run, architecture, teacher)


def language_parts(method: VideoLanguage) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What is saved beside the encoder: state dicts by name, and what is needed to build each (see `zoo.save`).

    The branch (mask predictor, decoders) is saved for pictures; evaluation reads the encoder and the text side.
    """
    parts: dict[str, dict[str, Tensor]] = {"branch": method.branch.state_dict()}
    about: dict[str, Any] = {"branch": {}}
    if isinstance(method.model, VideoLanguageModel):
        parts[EXTRA] = method.model.language_state()
        about[EXTRA] = method.model.describe()
    return parts, about

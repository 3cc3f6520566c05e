"""The config: every key of `config/*.yaml`, with its type, unit, bounds and default.

From these classes, `stm schema` generates `config/schema.json`, the JSON schema with which the workflow validates
configs. Unknown keys are errors and are never ignored.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stm.config.base import ConfigError, Fraction, Name, Section, merge
from stm.config.data import (
    BadInput,
    BenchmarkDataset,
    BenchmarkSource,
    CorpusSource,
    Dataset,
    FolderDataset,
    LanguageDataset,
    MovingShapesDataset,
    ProtocolSource,
)
from stm.config.errors import explain_problem
from stm.config.evaluation import (
    CropComparison,
    FineTune,
    FineTuneAugmentation,
    FineTuneOptimisation,
    LinearProbe,
    MaskPersistence,
    MaskQuality,
    Retrieval,
    VideoRetrieval,
    ZeroShot,
)
from stm.config.files import inherit, read_files, read_values, resolve_config
from stm.config.language import (
    Cluster,
    FrameTeacher,
    Images,
    Language,
    LanguageRun,
    Objectives,
    PairSettings,
    SpatioTemporal,
)
from stm.config.language_tasks import (
    Captioning,
    EvaluationTask,
    LanguageAugmentation,
    LanguageOptimisation,
    LanguageTask,
    MultipleChoice,
    QuestionAnswering,
    VideoTextRetrieval,
)
from stm.config.report import Certainty, FigureSpec, Prices, Report, TableColumn, TableRow, TableSpec
from stm.config.stages import (
    Blip2Captions,
    CaptionSource,
    Flow,
    Frames,
    HumanCaptions,
    LabelCaptions,
    LanguageModelCaptions,
    Motion,
    Pack,
    Similarity,
    Text,
    VisionLanguageCaptions,
)
from stm.config.study import AnyRun, Config, Corpus, instance_name, is_language_run, parse_run
from stm.config.training import (
    Augmentation,
    CaptionChoice,
    Checkpointing,
    Contrast,
    Interpolation,
    Mask,
    MediumSettings,
    ModelSize,
    Optimisation,
    PretrainRun,
    Reconstruction,
    Run,
    Sampling,
    Teacher,
)

__all__ = [
    "AnyRun",
    "Augmentation",
    "BadInput",
    "BenchmarkDataset",
    "BenchmarkSource",
    "Blip2Captions",
    "CaptionChoice",
    "CaptionSource",
    "Captioning",
    "Certainty",
    "Checkpointing",
    "Cluster",
    "Config",
    "ConfigError",
    "Contrast",
    "Corpus",
    "CorpusSource",
    "CropComparison",
    "Dataset",
    "EvaluationTask",
    "FigureSpec",
    "FineTune",
    "FineTuneAugmentation",
    "FineTuneOptimisation",
    "Flow",
    "FolderDataset",
    "Fraction",
    "FrameTeacher",
    "Frames",
    "HumanCaptions",
    "Images",
    "Interpolation",
    "LabelCaptions",
    "Language",
    "LanguageAugmentation",
    "LanguageDataset",
    "LanguageModelCaptions",
    "LanguageOptimisation",
    "LanguageRun",
    "LanguageTask",
    "LinearProbe",
    "Mask",
    "MaskPersistence",
    "MaskQuality",
    "MediumSettings",
    "ModelSize",
    "Motion",
    "MovingShapesDataset",
    "MultipleChoice",
    "Name",
    "Objectives",
    "Optimisation",
    "Pack",
    "PairSettings",
    "PretrainRun",
    "Prices",
    "ProtocolSource",
    "QuestionAnswering",
    "Reconstruction",
    "Report",
    "Retrieval",
    "Run",
    "Sampling",
    "Section",
    "Similarity",
    "SpatioTemporal",
    "TableColumn",
    "TableRow",
    "TableSpec",
    "Teacher",
    "Text",
    "VideoRetrieval",
    "VideoTextRetrieval",
    "VisionLanguageCaptions",
    "ZeroShot",
    "inherit",
    "instance_name",
    "is_language_run",
    "json_schema",
    "load_config",
    "merge",
    "parse_config",
    "parse_run",
    "read_files",
    "read_values",
    "resolve_config",
]


def parse_config(values: Any, origin: str = "config") -> Config:
    """Validate a mapping and return it as a config.

    Args:
        values: a parsed YAML file, already merged over the files that it extends.
        origin: source of the values, for error messages.

    Raises:
        ConfigError: one line per mistake, with the key, the value and the allowed values.
    """
    try:
        return Config.model_validate(inherit(values))
    except ConfigError as error:
        raise ConfigError(f"{origin}:\n  {error}") from None
    except ValidationError as error:
        schema = Config.model_json_schema()
        lines = [explain_problem(problem, schema) for problem in error.errors()]
        raise ConfigError(f"{origin}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def load_config(path: str | Path) -> Config:
    """Read a YAML config and the files that it extends.

    Raises:
        ConfigError: a file is missing or not valid YAML, or the result is not a valid config.
    """
    return parse_config(read_values(path), str(path))


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a config."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}

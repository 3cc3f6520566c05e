"""What a run may say: every key of `config/*.yaml`, with its type, unit, bounds and default.

The JSON schema that the workflow validates against (`config/schema.json`) is generated from these classes by
`stm schema`. A key that is not here is an error, never ignored.
"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stm.config.base import ConfigError, Fraction, Name, Section
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
    FineTune,
    FineTuneAugmentation,
    FineTuneOptimisation,
    LinearProbe,
    MaskQuality,
    Retrieval,
    ZeroShot,
)
from stm.config.language import (
    Cluster,
    FrameTeacher,
    Images,
    Language,
    LanguageRun,
    Objectives,
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
from stm.config.showing import FigureSpec, Prices, Report, TableColumn, TableRow, TableSpec
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
)
from stm.config.study import AnyRun, Config, Corpus, instance_name, is_language_run, merge, parse_run
from stm.config.training import (
    Augmentation,
    CaptionChoice,
    Contrast,
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
    "Cluster",
    "Config",
    "ConfigError",
    "Contrast",
    "Corpus",
    "CorpusSource",
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
    "VideoTextRetrieval",
    "ZeroShot",
    "instance_name",
    "is_language_run",
    "json_schema",
    "load_config",
    "merge",
    "parse_config",
    "parse_run",
    "read_values",
]


def parse_config(values: Any, origin: str = "config") -> Config:
    """Checks a mapping (a parsed YAML file) and returns the config.

    Raises:
        ConfigError: one line per mistake, with the key, the value and what is allowed.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        schema = Config.model_json_schema()
        lines = [explain_problem(problem, schema) for problem in error.errors()]
        raise ConfigError(f"{origin}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def load_config(path: str | Path) -> Config:
    """Reads a YAML config.

    Raises:
        ConfigError: the file is missing, no YAML, or not a valid config.
    """
    return parse_config(read_values(path), str(path))


def read_values(path: str | Path) -> dict[str, Any]:
    """The mapping of a YAML file, unchecked.

    Raises:
        ConfigError: the file is missing, no YAML, no mapping, or far too large for a config.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date that is none
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested far too deeply") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    if _is_huge(values):
        raise ConfigError(f"{path}: has more than {_MOST_VALUES} values, counting what its aliases (`*name`) repeat")
    return values


_MOST_VALUES = 100_000


def _is_huge(values: Any) -> bool:
    """Whether there are too many values: with aliases of aliases a short file holds more than a memory."""
    waiting, count = [values], 0
    while waiting and count <= _MOST_VALUES:
        value = waiting.pop()
        count += 1
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
    return count > _MOST_VALUES


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a config."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}

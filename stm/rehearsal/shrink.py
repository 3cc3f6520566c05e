"""Makes a config of the same structure with small models, images, batches and few steps.

A rule per section of the config says which of its fields become smaller. Whatever decides what is done is kept: splits,
sampling, masks, ratios, objectives, tasks, views, frames, seeds, tables and figures.
"""

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any, TypeVar

from stm.config import (
    BenchmarkDataset,
    Blip2Captions,
    Captioning,
    Cluster,
    Config,
    Contrast,
    CropComparison,
    EvaluationTask,
    FineTune,
    Flow,
    FolderDataset,
    Frames,
    Language,
    LanguageDataset,
    LanguageModelCaptions,
    LanguageTask,
    LinearProbe,
    MaskQuality,
    MovingShapesDataset,
    Optimisation,
    PairSettings,
    Run,
    Section,
    Similarity,
    SpatioTemporal,
    Teacher,
    Text,
    VisionLanguageCaptions,
    parse_config,
)
from stm.config.evaluation import TaskSettings
from stm.config.stages import Stages
from stm.datasets.video_text import is_corpus
from stm.layout import Layout
from stm.pretrained.local_files import ACTION_CLIP
from stm.storage.shipped import PACKAGE

STAND_INS = "stand-ins"  # where a model or file goes whose own path is not a relative one
SIDE = 4  # tokens per side of a frame, and cells per side of a map
SHORT_SIDE = 64  # pixels of a stored frame
CLIPS = 8  # clips per split of a generated dataset
WIDTH = 64  # features of heads and of the models of others
LAYERS = 4  # the depth of the student `tiny`
TOKENS = 8  # new tokens of a generated caption

_T = TypeVar("_T", bound=Section)


def shrink(config: Config) -> Config:
    """Return the config at rehearsal size; its paths are relative, for a working directory of its own."""
    small = _shrink_section(config.model_copy(update={"evaluate": _divide_one_of_each(config)}))
    runs = {name: _place_init(run, config) for name, run in small.pretrain.items()}
    # Trackers of others are for results, of which a rehearsal has none.
    small = small.model_copy(
        update={"results": place(config.results), "pretrain": runs, "trackers": Config.model_fields["trackers"].default}
    )
    return parse_config(small.model_dump(mode="json"), f"the rehearsal of {config.name}")


def place(path: str) -> str:
    """Return where the rehearsal keeps a file or folder: at the same relative path, or among the stand-ins."""
    parts = PurePosixPath(path).parts
    if PurePosixPath(path).is_absolute() or ".." in parts or "~" in path:
        return f"{STAND_INS}/{'-'.join(part for part in parts if part.strip('/.~'))}"
    return path


def place_clip(model: str) -> str:
    """Return the open_clip model that takes the place of another, in the syntax of `similarity.model`."""
    if model.startswith(PACKAGE):
        return model
    prefix, colon, folder = model.partition(":")
    if colon and prefix == "local-dir":
        return f"local-dir:{place(folder)}"
    name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in model)
    return f"local-dir:{STAND_INS}/{name}"


def place_model(model: str) -> str:
    """Return the model that takes the place of one of any kind; that of a hub id is a folder of the same name."""
    for prefix in ("transformers:", ACTION_CLIP):
        if model.startswith(prefix):
            return f"{prefix}{place(model.removeprefix(prefix))}"
    return place_clip(model)


# ------------------------------------------------------------------------------------------------------- sections


def _shrink_section(section: _T) -> _T:
    """Shrink the sections inside a section first, then the section by the rules of its classes."""
    inside = {name: _shrink_value(getattr(section, name)) for name in type(section).model_fields}
    small = section.model_copy(update=inside)
    for kind, rule in _RULES.items():
        if isinstance(small, kind):
            small = small.model_copy(update=rule(small))
    return small


def _shrink_value(value: Any) -> Any:
    if isinstance(value, Section):
        return _shrink_section(value)
    if isinstance(value, Mapping):
        return {key: _shrink_value(part) for key, part in value.items()}
    return value


def _stages(stages: Stages) -> dict[str, Any]:
    window = min(stages.similarity.window, SIDE // 2)
    return {"grid": min(stages.grid, SIDE), "similarity": stages.similarity.model_copy(update={"window": window})}


def _frames(frames: Frames) -> dict[str, Any]:
    return {"short_side": min(frames.short_side, SHORT_SIDE)}


def _generated(dataset: MovingShapesDataset) -> dict[str, Any]:
    clips = {split: min(count, CLIPS) for split, count in dataset.clips.items()}
    return {"clips": clips, "height": min(dataset.height, SHORT_SIDE), "width": min(dataset.width, SHORT_SIDE)}


def _folder(dataset: FolderDataset) -> dict[str, Any]:
    annotations = dataset.annotations and str(PurePosixPath(place(dataset.annotations)).with_suffix(".json"))
    return {"root": place(dataset.root), "annotations": annotations}


def _benchmark(dataset: BenchmarkDataset) -> dict[str, Any]:
    # The lists have their full length, and only a few of the listed files exist.
    return {"root": place(dataset.root), "annotations": place(dataset.annotations), "partial": True}


def _language_dataset(dataset: LanguageDataset) -> dict[str, Any]:
    partial = dataset.partial or not is_corpus(dataset.source)
    return {"root": place(dataset.root), "annotations": place(dataset.annotations), "partial": partial}


def _blip2(captions: Blip2Captions) -> dict[str, Any]:
    return {
        "model": place(captions.model),
        "batch_size": min(captions.batch_size, 8),
        "max_new_tokens": min(captions.max_new_tokens, TOKENS),
        "beams": min(captions.beams, 2),
    }


def _language_model(captions: LanguageModelCaptions) -> dict[str, Any]:
    return {
        "model": place(captions.model),
        "batch_size": min(captions.batch_size, 8),
        "max_new_tokens": min(captions.max_new_tokens, TOKENS),
    }


def _vision_language_model(captions: VisionLanguageCaptions) -> dict[str, Any]:
    return {
        "model": place(captions.model),
        "revision": None,  # a folder has none
        "batch_size": min(captions.batch_size, 8),
        "max_new_tokens": min(captions.max_new_tokens, TOKENS),
        "processor": {},  # what the processor of the small model takes is another matter
    }


def _similarity(similarity: Similarity) -> dict[str, Any]:
    return {"model": place_clip(similarity.model), "batch_size": min(similarity.batch_size, 256), "compile": False}


def _text(text: Text) -> dict[str, Any]:
    return {"model": place_model(text.model)}


def _flow(flow: Flow) -> dict[str, Any]:
    weights = None if flow.weights is None else place(flow.weights)
    return {"weights": weights, "iterations": min(flow.iterations, 2)}


def _crops(comparison: MaskQuality | CropComparison) -> dict[str, Any]:
    return {"crops": min(comparison.crops, 4), "image_size": _image_size(comparison)}


def _image_size(sized: Any) -> int:
    """Return a multiple of the patch size that gives at most SIDE tokens per side, and at least 32 pixels."""
    fewest = -(-32 // sized.patch_size)
    return int(min(sized.image_size, sized.patch_size * max(SIDE, fewest)))


def _run(run: Run) -> dict[str, Any]:
    small = run.model_copy(update={"processes": min(run.processes, 2), "nodes": 1})
    changes: dict[str, Any] = {
        "model": "tiny",
        "image_size": _image_size(run),
        "decoder_depth": run.decoder_depth and min(run.decoder_depth, 2),
        "compile": False,
        "workers": min(run.workers, 1),
        "kept_gigabytes": min(run.kept_gigabytes, 0.1),
        "processes": small.processes,
        "nodes": 1,
        "optimisation": _with_batch(run.optimisation, small.world_size * run.repeats),
        "init": run.init and _place_weights(run.init),
        "release": run.release and place(run.release),
    }
    images = getattr(run, "images", None)
    if images is not None:
        batch = changes["optimisation"].batch_size
        changes["images"] = images.model_copy(update={"batch_size": min(images.batch_size, batch)})
    teacher = getattr(run, "teacher", None)
    if teacher is not None and teacher.image_size is not None:
        side = teacher.image_size * changes["image_size"] // run.image_size
        changes["teacher"] = teacher.model_copy(update={"image_size": side})
    return changes


def _with_batch(optimisation: Optimisation, shares: int, samples: int = 2) -> Optimisation:
    """Give each process `samples` samples per forward pass; `shares` is the number of processes times repeats."""
    batch = samples * optimisation.accumulate * shares
    return optimisation.model_copy(update={"batch_size": min(optimisation.batch_size, batch)})


def _optimisation(optimisation: Optimisation) -> dict[str, Any]:
    epochs = min(optimisation.epochs, 1)
    return {
        "epochs": epochs,
        "warmup_epochs": min(optimisation.warmup_epochs, epochs / 2),
        "accumulate": min(optimisation.accumulate, 2),
    }


def _place_weights(init: str) -> str:
    return f"clip:{place_clip(init.removeprefix('clip:'))}" if init.startswith("clip:") else place(init)


def _place_init(run: Run, config: Config) -> Run:
    """Let a run that starts from another run of the config start from the rehearsed one."""
    weights = {Layout.of(config, config.dataset_of(name)).weights(name).as_posix(): name for name in config.runs}
    original = next((init for init in weights if run.init == place(init)), None)
    if original is None:
        return run
    small = config.model_copy(update={"results": place(config.results)})
    name = weights[original]
    return run.model_copy(update={"init": Layout.of(small, small.dataset_of(name)).weights(name).as_posix()})


def _contrast(contrast: Contrast) -> dict[str, Any]:
    return {"hidden": min(contrast.hidden, WIDTH)}


def _teacher(teacher: Teacher) -> dict[str, Any]:
    changes: dict[str, Any] = {"model": place_model(teacher.model)}
    if hasattr(teacher, "layers"):
        changes["layers"] = min(teacher.layers, LAYERS)
    if getattr(teacher, "temporal_fusion", None) is not None:
        changes["temporal_fusion"] = place(teacher.temporal_fusion)  # type: ignore[attr-defined]
    return changes


def _language(language: Language) -> dict[str, Any]:
    return {"model": place(language.model), "embedding": min(language.embedding, WIDTH)}


def _spatio_temporal(mask: SpatioTemporal) -> dict[str, Any]:
    return {"width": min(mask.width, WIDTH), "features": min(mask.features, WIDTH // 2)}


def _cluster(cluster: Cluster) -> dict[str, Any]:
    return {"decoder_depth": min(cluster.decoder_depth, 2), "neighbours": min(cluster.neighbours, SIDE)}


def _pairs(pairs: PairSettings) -> dict[str, Any]:
    return {"negatives_among": pairs.negatives_among and min(pairs.negatives_among, 2)}


def _linear(task: LinearProbe) -> dict[str, Any]:
    return {"epochs": min(task.epochs, 2), "batch_size": min(task.batch_size, 4)}


def _finetune(task: FineTune) -> dict[str, Any]:
    classes = None if task.classes is None else place(task.classes)
    shares = min(task.processes, 2) * task.repeats
    return {"optimisation": _with_batch(task.optimisation, shares), "classes": classes}


def _language_task(task: LanguageTask) -> dict[str, Any]:
    processes = min(task.processes, 2)
    return {"optimisation": task.optimisation and _with_batch(task.optimisation, processes, samples=4 // processes)}


def _divide_one_of_each(config: Config) -> dict[str, EvaluationTask]:
    """Leave several processes to the first evaluation of each task: starting them takes longer than their small work."""
    divided = set[str]()
    tasks: dict[str, EvaluationTask] = {}
    for name, task in config.evaluate.items():
        again = task.processes * task.nodes > 1 and task.task in divided
        tasks[name] = task.model_copy(update={"processes": 1, "nodes": 1}) if again else task
        if task.processes * task.nodes > 1:
            divided.add(task.task)
    return tasks


def _task(task: TaskSettings) -> dict[str, Any]:
    return {"processes": min(task.processes, 2), "nodes": 1}


def _captioning(task: Captioning) -> dict[str, Any]:
    return {"max_caption_tokens": min(task.max_caption_tokens, TOKENS), "beams": min(task.beams, 2)}


# Applied in this order to a section that is an instance of several classes.
_RULES: dict[Any, Callable[[Any], dict[str, Any]]] = {
    Stages: _stages,
    Frames: _frames,
    MovingShapesDataset: _generated,
    FolderDataset: _folder,
    BenchmarkDataset: _benchmark,
    LanguageDataset: _language_dataset,
    Blip2Captions: _blip2,
    LanguageModelCaptions: _language_model,
    VisionLanguageCaptions: _vision_language_model,
    Similarity: _similarity,
    Text: _text,
    Flow: _flow,
    MaskQuality: _crops,
    CropComparison: _crops,
    Optimisation: _optimisation,
    Contrast: _contrast,
    Teacher: _teacher,
    Language: _language,
    SpatioTemporal: _spatio_temporal,
    Cluster: _cluster,
    PairSettings: _pairs,
    LinearProbe: _linear,
    FineTune: _finetune,
    LanguageTask: _language_task,
    Captioning: _captioning,
    TaskSettings: _task,
    Run: _run,
}

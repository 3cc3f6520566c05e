"""What is known about weights from the files of the run beside them: its receipt, data and measured numbers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stm.layout import Layout
from stm.models.weights.checks import WeightsError
from stm.storage.files import read_json, sha256_file
from stm.storage.tables import read_receipt

OWN_NAME = "weights.safetensors"  # in the folder of a run
CLASSIFIER_NAME = "classifier.safetensors"  # in that of a fine-tuning
VIDEOMAE_LICENSE = "cc-by-nc-4.0"  # of VideoMAE's published weights
_VIDEOMAE_OWNER = "MCG-NJU/"  # on the hub


@dataclass(frozen=True)
class Provenance:
    """Empty values are unknown. Files are named without their folders, since the values are for other machines."""

    source: str  # the file's or folder's name, or the hub id
    receipt: Mapping[str, Any] = field(default_factory=dict)  # of the pretraining
    tuning: Mapping[str, Any] = field(default_factory=dict)  # settings of the evaluation that trained a classifier
    dataset: str = ""  # of the pretraining: the config's `dataset.source`
    clips: int = 0  # of the pretraining's split
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # each one's metrics.json, by name
    origin: str = ""  # the file or hub id of others that the weights started from, or were converted from
    origin_license: str = ""  # VideoMAE's, if the origin is one of its published weights
    rehearsal: bool = False  # whether the run was made from stand-in data by `stm rehearse`

    def setting(self, *keys: str) -> Any:
        """A value of the run's settings; None if it is not there."""
        return get_nested(self.receipt, "settings", *keys)


def get_nested(values: Any, *keys: str) -> Any:
    """The value at the end of a path of keys; None if it is not there."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def own_file(source: str | Path) -> Path | None:
    """The safetensors file that a source names, such as the folder of a run or of a fine-tuning; None for other formats."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / (OWN_NAME if (path / OWN_NAME).is_file() else CLASSIFIER_NAME)
    return path if path.suffix == ".safetensors" and path.is_file() else None


def find_provenance(source: str | Path) -> Provenance:
    """Read what lies beside a run's weights, a fine-tuned classifier, or an exported folder of stm's own format.

    Raises:
        WeightsError: a file beside the weights is damaged.
    """
    path = Path(source).expanduser()
    name = path.name if path.exists() else str(source)
    file = own_file(source)
    if file is None:
        known = VIDEOMAE_LICENSE if str(source).startswith(_VIDEOMAE_OWNER) else ""
        return Provenance(name, origin=strip_folders(str(source)), origin_license=known)
    folder = file.absolute().parent  # not resolved: in a cache of the hub, files are links to elsewhere
    if folder.parent.name == "pretrain":
        return _of_run(name, Layout(folder.parent.parent), folder.name, file)
    if folder.parent.parent.name == "evaluate":
        return _of_classifier(name, Layout(folder.parent.parent.parent), folder.parent.name, folder)
    record = _read(folder / "config.json")
    kinds = {"receipt": dict, "dataset": str, "clips": int, "origin": str, "origin_license": str}
    parts: dict[str, Any] = {key: record[key] for key, kind in kinds.items() if isinstance(record.get(key), kind)}
    return Provenance(name, **parts)


def _of_run(name: str, layout: Layout, run: str, file: Path) -> Provenance:
    sha256 = sha256_file(file)
    paths = sorted(layout.evaluate(run, "*").parent.glob("*/metrics.json"))
    evaluations = {path.parent.name: _read(path) for path in paths}
    # Numbers of earlier weights of the run may still lie there.
    measured = {key: e for key, e in evaluations.items() if get_nested(e, "receipt", "weights") == sha256}
    return _with_data(name, layout, run, evaluations=measured)


def _of_classifier(name: str, layout: Layout, run: str, folder: Path) -> Provenance:
    metrics = _read(folder / "metrics.json")
    parts: dict[str, Any] = {
        "tuning": metrics.get("settings", {}),
        "evaluations": {folder.name: metrics} if metrics else {},
    }
    pretrained = layout.weights(run)
    # The run may have been repeated since, with other settings.
    if not pretrained.is_file() or sha256_file(pretrained) != get_nested(metrics, "receipt", "weights"):
        return Provenance(name, **parts)
    return _with_data(name, layout, run, **parts)


def _with_data(name: str, layout: Layout, run: str, **parts: Any) -> Provenance:
    receipt = _read(layout.pretrain(run) / "config.json").get("receipt", {})
    origin = _find_origin(receipt)
    # Names are all there is to go by; docs and configs name such files videomae.
    known = VIDEOMAE_LICENSE if origin.startswith(_VIDEOMAE_OWNER) or "videomae" in origin.lower() else ""
    parts |= {"origin": strip_folders(origin), "origin_license": known}
    receipt = strip_folders(receipt)
    if layout.manifest.is_file() and is_trained(receipt):
        parts["dataset"] = get_nested(read_receipt(layout.manifest), "settings", "dataset", "source") or ""
        shards = (_read(layout.shard_index).get("shards") or {}).values()
        split = get_nested(receipt, "settings", "split")
        parts["clips"] = sum(shard["clips"] for shard in shards if shard["split"] == split)
    return Provenance(name, receipt=receipt, rehearsal="rehearsal" in layout.root.parts, **parts)


def _find_origin(receipt: Mapping[str, Any], depth: int = 10) -> str:
    """What a run started from: a release or initial weights, through at most `depth` runs; empty for random weights."""
    settings = receipt.get("settings")
    first = str(get_nested(settings, "release") or get_nested(settings, "init") or "")
    before = _read(Path(first).parent / "config.json").get("receipt") if Path(first).name == OWN_NAME else None
    return _find_origin(before, depth - 1) if isinstance(before, Mapping) and depth else first


def is_trained(receipt: Mapping[str, Any]) -> bool:
    """Whether a run trained on its dataset, rather than taking a release or initial weights as they are."""
    settings = receipt.get("settings")
    return get_nested(settings, "release") is None and get_nested(settings, "optimisation", "epochs") != 0


_LOCAL = re.compile(r"[/.~].*|.*/.*/.*|.*/.*\.(safetensors|pth|pt|bin|ckpt|py)")


def strip_folders(value: Any) -> Any:
    """Copy JSON values, with local paths reduced to their last part: in `local-dir:/data/clip`, `clip:ViT-B-16@/data/b16.pt`
    and `masks/rows.py:name`, but not in `owner/name`, an id of the hub."""
    if isinstance(value, Mapping):
        return {key: strip_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [strip_folders(part) for part in value]
    if not isinstance(value, str):
        return value
    parts = re.split("([:@])", value)
    for place, part in enumerate(parts):
        if _LOCAL.fullmatch(part) or parts[max(place - 2, 0)] == "local-dir":
            parts[place] = Path(part).name
    return "".join(parts)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except ValueError as error:
        raise WeightsError(f"{path}: is not valid JSON ({error}); it describes the weights beside it") from error
    return content if isinstance(content, dict) else {}

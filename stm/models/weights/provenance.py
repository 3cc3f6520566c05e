"""What is known about weights from the files of the run beside them: its receipt, data and measured numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stm.layout import Layout
from stm.models.weights.checks import WeightsError
from stm.storage.files import read_json, sha256_file
from stm.storage.tables import read_receipt

OWN_NAME = "weights.safetensors"


@dataclass(frozen=True)
class Provenance:
    """Empty values are unknown."""

    source: str  # the file's or folder's name, or the hub id
    receipt: Mapping[str, Any] = field(default_factory=dict)  # of the pretraining
    tuning: Mapping[str, Any] = field(default_factory=dict)  # settings of the evaluation that trained a classifier
    dataset: Mapping[str, Any] = field(default_factory=dict)  # the config's `dataset`
    clips: Mapping[str, int] = field(default_factory=dict)  # by split
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # each one's metrics.json, by name
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
    """The safetensors file that a source names; None for other formats."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / OWN_NAME
    return path if path.suffix == ".safetensors" and path.is_file() else None


def find_provenance(source: str | Path) -> Provenance:
    """Read what lies beside a run's weights, a fine-tuned classifier, or an exported folder of stm's own format.

    Raises:
        WeightsError: a file beside the weights is damaged.
    """
    name = str(source) if own_file(source) is None and not Path(source).exists() else Path(source).name
    file = own_file(source)
    if file is None:
        return Provenance(name)
    folder = file.resolve().parent
    if folder.parent.name == "pretrain":
        return _of_run(name, Layout(folder.parent.parent), folder.name, file)
    if folder.parent.parent.name == "evaluate":
        return _of_classifier(name, Layout(folder.parent.parent.parent), folder.parent.name, folder)
    return Provenance(name, receipt=_read(folder / "config.json").get("receipt", {}))


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
    clips: dict[str, int] = {}
    for shard in (_read(layout.shard_index).get("shards") or {}).values():
        clips[shard["split"]] = clips.get(shard["split"], 0) + shard["clips"]
    receipt = read_receipt(layout.manifest) if layout.manifest.is_file() else {}
    return Provenance(
        name,
        receipt=_read(layout.pretrain(run) / "config.json").get("receipt", {}),
        dataset=get_nested(receipt, "settings", "dataset") or {},
        clips=clips,
        rehearsal="rehearsal" in layout.root.parts,
        **parts,
    )


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except ValueError as error:
        raise WeightsError(f"{path}: is not valid JSON ({error}); it describes the weights beside it") from error
    return content if isinstance(content, dict) else {}

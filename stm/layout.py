"""Paths of all files under `results/{name}/`. Stages use them to declare files; no other code constructs paths.

With a single dataset, its results are stored in the config's folder. With several, each dataset has a folder named
after it, which also contains the runs trained on it; the config's folder contains the plan, tables, figures and report.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stm.config import BenchmarkDataset, Config, ConfigError, FolderDataset, LanguageDataset
from stm.manifest import split_of


@dataclass(frozen=True)
class Layout:
    """Paths of one dataset's results, or of the joint results of several datasets."""

    root: Path

    @classmethod
    def of(cls, config: Config, dataset: str | None = None) -> "Layout":
        """Return the layout of the config's folder, or of one of its datasets."""
        return cls(Path(config.results) / (dataset or config.name))

    @property
    def generated(self) -> Path:
        """Folder with `videos/`, `annotations.parquet` and `truth.parquet`; used only for moving-shapes."""
        return self.root / "generated"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.parquet"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine.parquet"

    @property
    def shard_index(self) -> Path:
        return self.root / "slices.json"

    @property
    def slices(self) -> Path:
        """Folder of the slices, which are tables of clips, one per shard."""
        return self.root / "slices"

    def slice(self, shard: str) -> Path:
        return self.slices / f"{shard}.parquet"

    def frames_tar(self, shard: str) -> Path:
        return self.root / "frames" / f"{shard}.tar"

    def frames(self, shard: str) -> Path:
        return self.root / "frames" / f"{shard}.parquet"

    def table(self, stage: str, shard: str, source: str = "") -> Path:
        """Return the path of a stage's table for one shard and, if `source` is given, for one caption source."""
        return self.root / stage / source / f"{shard}.parquet"

    def captions(self, source: str, shard: str) -> Path:
        return self.table("captions", shard, source)

    def embeddings(self, shard: str) -> Path:
        return self.table("embeddings", shard)

    def joint_similarity(self, shard: str) -> Path:
        """Return the path of the maps of all caption sources of a shard, from which `similarity` takes those of each source."""
        return self.table("joint_similarity", shard)

    def similarity(self, source: str, shard: str) -> Path:
        return self.table("similarity", shard, source)

    def text(self, source: str, shard: str) -> Path:
        return self.table("text", shard, source)

    def motion(self, shard: str) -> Path:
        return self.table("motion", shard)

    def flow(self, shard: str) -> Path:
        return self.table("flow", shard)

    def shard_tar(self, shard: str, split: str | None = None) -> Path:
        return self.root / "shards" / (split or split_of(shard)) / f"{shard}.tar"

    def shard(self, shard: str, split: str | None = None) -> Path:
        """Return the path of a packed shard's index; `split` defaults to the split in the shard's name."""
        return self.root / "shards" / (split or split_of(shard)) / f"{shard}.parquet"

    def pretrain(self, run: str) -> Path:
        """Folder with `weights.safetensors`, `config.json`, `metrics.jsonl`."""
        return self.root / "pretrain" / run

    def weights(self, run: str) -> Path:
        return self.pretrain(run) / "weights.safetensors"

    def evaluate(self, run: str, task: str) -> Path:
        """Folder with `metrics.json` and `predictions.parquet`."""
        return self.root / "evaluate" / run / task

    def metrics(self, run: str, task: str) -> Path:
        return self.evaluate(run, task) / "metrics.json"

    @property
    def mask_quality(self) -> Path:
        return self.root / "evaluate" / "mask_quality.json"

    @property
    def crop_agreement(self) -> Path:
        return self.root / "evaluate" / "crop_agreement.json"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def provenance(self) -> Path:
        """Config, code, machine and library versions behind the tables and figures; see `stm.report.reference`."""
        return self.root / "provenance.json"

    @property
    def rehearsal(self) -> Path:
        """Folder in which the workflow is rehearsed, with data, models and results of its own."""
        return self.root / "rehearsal"

    @property
    def tables(self) -> Path:
        return self.root / "tables"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def benchmarks(self) -> Path:
        """Snakemake's `benchmark:` files, one per job: `{rule}/{wildcards}.tsv`."""
        return self.root / "benchmarks"

    @property
    def logs(self) -> Path:
        """Standard error of each job: `{rule}/{wildcards}.log`."""
        return self.root / "logs"


def dataset_root(config: Config) -> Path:
    """Return the folder to which the paths in the manifest are relative."""
    if isinstance(config.dataset, FolderDataset | BenchmarkDataset | LanguageDataset):
        return Path(config.dataset.root)
    return Layout.of(config).generated


def check_results(config: Config) -> None:
    """Check that the folder of the results is not a file; it need not exist yet.

    Raises:
        ConfigError: a file is in its place.
    """
    folder = Layout.of(config).root
    with suppress(OSError):  # a folder that may not be read is reported where something is read from it
        for place in (folder, *folder.parents):
            if place.exists():
                if not place.is_dir():
                    raise ConfigError(f"results = {config.results!r}: {place} is a file, and results need a folder")
                return

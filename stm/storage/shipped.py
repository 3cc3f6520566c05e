"""Files that come with the package: the workflow, the configs, the benchmarks' protocols, reference results, small models.

In a checkout, `workflow/`, `config/` and `results/reference/` lie beside the package; a wheel has them inside it, in
`stm/shipped/` (`setup.py`).
"""

from pathlib import Path

PACKAGE = "package:"  # precedes the name of a shipped config or model in place of a path
_FOLDER = Path(__file__).parents[1]
_MODELS = _FOLDER / "assets"


class NotShippedError(ValueError):
    """The package was copied without the files that come with it, or they have no such file."""


def shipped(name: str = "") -> Path:
    """Return the path of a shipped file or folder, for example `workflow/Snakefile`; by default, of the folder that has them.

    Raises:
        NotShippedError: it is not there.
    """
    installed = _FOLDER / "shipped"
    path = (installed if installed.is_dir() else _FOLDER.parent) / name
    if not path.exists():
        raise NotShippedError(
            f"there is no {path}: it comes with the package, which seems to have been copied without its workflow and configs. "
            "Install it with pip, from a wheel or a checkout"
        )
    return path


def shipped_configs() -> list[str]:
    """Return the sorted names of the shipped configs that can be run: `demo`, `folder`, `tgm`, ..."""
    return sorted(path.stem for path in shipped("config").glob("*.yaml"))


def shipped_models() -> list[str]:
    """Return the sorted names of the shipped models: `demo-bert`, ..."""
    return sorted(path.name for path in _MODELS.iterdir() if path.is_dir())


def model_path(name: str) -> Path:
    """Return the path that a model's name stands for: `package:NAME` for a shipped model, else a local path.

    It need not exist.
    """
    if not name.startswith(PACKAGE):
        return Path(name).expanduser()
    plain = name.removeprefix(PACKAGE)
    # A path, such as `package:../../models` or `package:/models`, would lead out of the package.
    return _MODELS / (plain if plain in shipped_models() else "none")

"""Which extra of the package installs a library that is missing."""

# By the name that is imported; pyproject.toml lists the libraries of each extra.
EXTRAS = {
    "decord": "decord",
    "ffmpeg": "workflow",
    "imageio_ffmpeg": "workflow",
    "jsonschema": "workflow",
    "mlflow": "trackers",
    "open_clip": "language",
    "pycocoevalcap": "captions",
    "pygments": "workflow",
    "s3fs": "s3",
    "snakemake": "workflow",
    "tokenizers": "language",
    "transformers": "language",
    "wandb": "trackers",
}


def explain_missing_library(error: ModuleNotFoundError) -> str | None:
    """Return which library is missing and the command that installs it; None if it belongs to no extra."""
    library = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(library)
    return extra and f"the library {library} is not installed: pip install 'stm-video[{extra}]'"

"""Tables, figures and the page.

The names of what a report writes follow from the config alone, so that the workflow can declare them. This
module stays light: the workflow imports it to read the names.
"""

from stm.config import Config
from stm.layout import Layout


def table_names(config: Config) -> list[str]:
    """File names under `tables/` that `build_report` writes for this config: each table as CSV and Markdown."""
    stems = ["results"] if config.pretrain else []
    stems += ["per_class"] if config.pretrain and config.evaluate else []
    stems += ["mask_quality"] if config.mask_quality is not None else []
    stems += ["quarantine"]
    return [f"{stem}.{ending}" for stem in stems for ending in ("csv", "md")]


def figure_names(config: Config) -> list[str]:
    """File names under `figures/` that `build_report` writes for this config, whatever results there are."""
    names = ["loss_curves.png"] if config.pretrain else []
    names += ["mask_quality.png"] if config.mask_quality is not None else []
    return names + [f"clip_{number}.png" for number in range(1, config.report.clips + 1)]


def build_report(config: Config, layout: Layout) -> None:
    """Reads all results and writes `tables/*`, `figures/*` and the page `report.html`.

    Parts without results are named on the page; they never stop it.
    """
    from stm.report.page import write_report

    write_report(config, layout)

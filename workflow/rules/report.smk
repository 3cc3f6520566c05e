# Stage 9: tables, figures and the report page. Each table and figure of the config is also a target by its name.


TABLE = declared("table")


rule table:
    """Write one table of the config, as CSV and Markdown."""
    input:
        unpack(TABLE.inputs),  # metrics of its entries
    output:
        csv=report(
            TABLE.output.csv,
            caption="../report/tables.rst",
            category="Tables",
        ),
        markdown=TABLE.output.markdown,  # tables/{table}.md
    log:
        TABLE.log,
    conda:
        "../../environment.yml"
    params:
        settings=TABLE.settings,
    script:
        "../scripts/stage.py"


FIGURE = declared("figure")


rule figure:
    """Draw one figure of the config."""
    input:
        unpack(FIGURE.inputs),  # weights, metrics, shards
    output:
        png=report(
            FIGURE.output.png,
            caption="../report/figures.rst",
            category="Figures",
        ),
    log:
        FIGURE.log,
    conda:
        "../../environment.yml"
    params:
        settings=FIGURE.settings,
    script:
        "../scripts/stage.py"


REPORT = declared("report")


rule report:
    """Write the report page, with the tables and figures of all datasets and runs."""
    input:
        unpack(REPORT.inputs),  # all results that the page shows
    output:
        page=report(
            REPORT.output.page,
            caption="../report/page.rst",
            category="Report",
        ),
        provenance=REPORT.output.provenance,  # provenance.json
        figures=report(
            REPORT.output.figures,
            caption="../report/figures.rst",
            category="Figures",
        ),
        tables=report(
            REPORT.output.tables,
            caption="../report/tables.rst",
            category="Tables",
        ),
    log:
        REPORT.log,
    conda:
        "../../environment.yml"
    threads: REPORT.threads
    params:
        settings=REPORT.settings,
    script:
        "../scripts/stage.py"


# Targets such as tgm_table1. The parts of a figure, tgm_figure3a to tgm_figure3c, are also one target, tgm_figure3, even where
# they are tables.
TARGETS = {
    **{name: [TABLE.output.csv.format(table=name)] for name in CONFIG.tables},
    **{name: [FIGURE.output.png.format(figure=name)] for name in CONFIG.figures},
}
for name in [*CONFIG.tables, *CONFIG.figures]:
    if name[-1] in "abcdefgh" and name[-2:-1].isdigit():
        TARGETS.setdefault(name[:-1], []).extend(TARGETS[name])

TITLES = {
    name: spec.title for name, spec in {**CONFIG.tables, **CONFIG.figures}.items()
}

for name, files in TARGETS.items():

    rule:
        name:
            name
        input:
            files,

    # The line of `--list-rules`: a docstring would be the same for all.
    workflow.get_rule(name).docstring = TITLES.get(
        name, f"All parts of {name}, and everything they need."
    )

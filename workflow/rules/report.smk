# Stage 9: tables, figures and the page. Each of a config's tables and figures is also a target by its name.


TABLE = declared("table")


rule table:
    """One of the config's tables, as CSV and Markdown."""
    input:
        unpack(TABLE.inputs),  # metrics of its cells
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
    """One of the config's figures."""
    input:
        unpack(FIGURE.inputs),  # weights, metrics of its cells, shards
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
    """The page, with what it shows of all datasets and runs."""
    input:
        unpack(REPORT.inputs),  # everything that it shows
    output:
        page=report(
            REPORT.output.page,
            caption="../report/page.rst",
            category="Report",
        ),
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


# `snakemake tgm_table1`; a figure in several parts, tgm_figure5a and tgm_figure5b, is one target too: tgm_figure5.
TARGETS = {
    **{name: [TABLE.output.csv.format(table=name)] for name in CONFIG.tables},
    **{name: [FIGURE.output.png.format(figure=name)] for name in CONFIG.figures},
}
for name in CONFIG.figures:
    if name[-1] in "abcdefgh" and name[-2:-1].isdigit():
        TARGETS.setdefault(name[:-1], []).append(FIGURE.output.png.format(figure=name))

for name, files in TARGETS.items():

    rule:
        name:
            name
        input:
            files,

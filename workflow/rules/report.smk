# Stage 9: tables, figures and the page. Each of a config's tables and figures is also a target by its name.


rule table:
    input:
        lambda wildcards: cells(CONFIG.tables[wildcards.table]),
    output:
        csv=report(
            f"{SHOWN}/tables/{{table}}.csv",
            caption="../report/tables.rst",
            category="Tables",
        ),
        markdown=f"{SHOWN}/tables/{{table}}.md",
    log:
        f"{SHOWN}/logs/table/{{table}}.log",
    conda:
        "../../environment.yml"
    params:
        table=lambda wildcards: dump(CONFIG.tables[wildcards.table]),
    script:
        "../scripts/table.py"


rule figure:
    input:
        unpack(figure_inputs),
    output:
        png=report(
            f"{SHOWN}/figures/{{figure}}.png",
            caption="../report/figures.rst",
            category="Figures",
        ),
    log:
        f"{SHOWN}/logs/figure/{{figure}}.log",
    conda:
        "../../environment.yml"
    params:
        figure=lambda wildcards: dump(CONFIG.figures[wildcards.figure]),
    script:
        "../scripts/figure.py"


rule report:
    input:
        unpack(report_inputs),
    output:
        page=report(
            f"{SHOWN}/report.html", caption="../report/page.rst", category="Report"
        ),
        figures=report(
            expand(f"{SHOWN}/figures/{{name}}", name=figure_names(CONFIG)),
            caption="../report/figures.rst",
            category="Figures",
        ),
        tables=report(
            expand(f"{SHOWN}/tables/{{name}}", name=table_names(CONFIG)),
            caption="../report/tables.rst",
            category="Tables",
        ),
    log:
        f"{SHOWN}/logs/report.log",
    conda:
        "../../environment.yml"
    threads: 2
    params:
        config=dump(CONFIG),
    script:
        "../scripts/report.py"


# `snakemake tgm_table1`; a figure in several parts, tgm_figure5a and tgm_figure5b, is one target too: tgm_figure5.
TARGETS = {
    **{name: [f"{SHOWN}/tables/{name}.csv"] for name in CONFIG.tables},
    **{name: [f"{SHOWN}/figures/{name}.png"] for name in CONFIG.figures},
}
for name in CONFIG.figures:
    if name[-1] in "abcdefgh" and name[-2:-1].isdigit():
        TARGETS.setdefault(name[:-1], []).append(f"{SHOWN}/figures/{name}.png")

for name, files in TARGETS.items():

    rule:
        name:
            name
        input:
            files,

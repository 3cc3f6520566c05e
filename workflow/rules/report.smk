# Stage 9: tables, figures and the page.


rule report:
    input:
        unpack(report_inputs),
    output:
        page=report(
            f"{ROOT}/report.html", caption="../report/page.rst", category="Report"
        ),
        figures=report(
            expand(f"{ROOT}/figures/{{name}}", name=figure_names(CONFIG)),
            caption="../report/figures.rst",
            category="Figures",
        ),
        tables=report(
            expand(f"{ROOT}/tables/{{name}}", name=table_names(CONFIG)),
            caption="../report/tables.rst",
            category="Tables",
        ),
    log:
        f"{ROOT}/logs/report.log",
    conda:
        "../../environment.yml"
    threads: 2
    params:
        config=dump(CONFIG),
    script:
        "../scripts/report.py"

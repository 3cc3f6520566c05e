"""Rule `evaluate`: see stm.evaluation.evaluate."""

from pathlib import Path

from stm.config import parse_config
from stm.datasets.video_text.tasks import has_shared_texts
from stm.evaluation import EvaluationInputs, evaluate
from stm.jobs.progress import log_to

config = parse_config(snakemake.config)
run = config.runs[snakemake.wildcards.run]

with log_to(snakemake.log[0]):
    inputs = EvaluationInputs(
        weights=Path(snakemake.input.weights),
        train=[Path(path) for path in snakemake.input.get("train", [])],
        validation=[Path(path) for path in snakemake.input.get("validation", [])],
        test=[Path(path) for path in snakemake.input.test],
        output=Path(snakemake.output.metrics).parent,
        seed=config.seed if run.seed is None else run.seed,
        shared_texts=has_shared_texts(config, snakemake.wildcards.run, snakemake.wildcards.task),
        text=config.of(snakemake.wildcards.dataset).text,
    )
    evaluate(config.evaluate[snakemake.wildcards.task], run, inputs)

"""Rule `evaluate`: see stm.evaluation.evaluate."""

from pathlib import Path

from pydantic import TypeAdapter

from stm.config import EvaluationTask, PretrainRun
from stm.evaluation import evaluate
from stm.progress import log_to

with log_to(snakemake.log[0]):
    evaluate(
        TypeAdapter(EvaluationTask).validate_python(snakemake.params.task),
        PretrainRun.model_validate(snakemake.params.run),
        weights=Path(snakemake.input.weights),
        train_indexes=[Path(path) for path in snakemake.input.train],
        test_indexes=[Path(path) for path in snakemake.input.test],
        output=Path(snakemake.output.metrics).parent,
        seed=snakemake.params.seed,
    )

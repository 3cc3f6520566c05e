"""The evaluate stage: one evaluation of one run's weights."""

from pathlib import Path
from typing import Any

from stm.config import EvaluationTask
from stm.datasets.moving_shapes.stage import GENERATE
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job
from stm.training.launch import request_gpus


def _splits(job: Job) -> Files:
    """The run's weights, the packed shards of its dataset or of the dataset named by the evaluation, and the benchmark's
    list of answers, if it has one."""
    from stm.datasets.video_text.tasks import answers_file, has_own_answers

    task = job.study.evaluate[job.task]
    data = job.on(task.dataset)
    own = has_own_answers(job.study, job.run, job.task)
    splits = {use: data.packed(split) for use, split in task.splits_for(own).items()}
    answers = answers_file(job.study, job.run, job.task)
    files = [Path(file) for file in task.user_files]
    given = {**splits, "weights": job.layout.weights(job.run), "files": files, **_boxes(data, task)}
    return given | ({} if answers is None else {"answers": answers})


def _boxes(data: Job, task: EvaluationTask) -> Files:
    """The true boxes of the test split's objects, and which frames are stored, for a task that reads them."""
    if not task.reads_boxes:
        return {}
    frames = [data.layout.frames(shard) for shard in data.shards(task.test_split)]
    return {"truth": GENERATE.outputs(data)["truth"], "frames": frames}


def _hashed(job: Job) -> Files:
    """The inputs that the receipt names by their hashes; the validation split only selects a checkpoint."""
    return {name: files for name, files in _splits(job).items() if name in ("train", "test", "weights")}


def _protocol(job: Job) -> dict[str, Any]:
    """What the benchmark's protocol says and the config does not; empty where it says nothing."""
    from stm.datasets.video_text.tasks import has_shared_texts

    return {"shared_texts": True} if has_shared_texts(job.study, job.run, job.task) else {}


def _task(job: Job) -> EvaluationTask:
    return job.study.evaluate[job.task]


def _run(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.datasets.video_text.tasks import candidate_answers, check_tasks, has_shared_texts
    from stm.evaluation.inputs import EvaluationInputs
    from stm.evaluation.launch import run_evaluation

    check_tasks(job.study)
    run = job.study.runs[job.run]
    given = EvaluationInputs(
        weights=inputs["weights"],
        train=inputs.get("train", []),
        validation=inputs.get("validation", []),
        test=inputs["test"],
        output=outputs["metrics"].parent,
        seed=job.study.seed if run.seed is None else run.seed,
        shared_texts=has_shared_texts(job.study, job.run, job.task),
        answers=candidate_answers(job.study, job.run, job.task),
        truth=inputs.get("truth"),
        frames=inputs.get("frames", []),
        text=job.config.text,
        trackers=job.study.trackers,
    )
    run_evaluation(job.study.evaluate[job.task], run, given)


EVALUATE = Stage(
    name="evaluate",
    title="evaluate the pretrained weights",
    per=("dataset", "run", "task"),
    inputs=_splits,
    runs=lambda job: [job.run],
    # Label sentences need the captions' text encoder: the contrastive head maps clips to its embedding space.
    models=lambda job: {"text_model": [job.config.text.model] if job.study.evaluate[job.task].encodes_text else []},
    outputs=lambda job: {"metrics": job.layout.metrics(job.run, job.task)},
    settings=("runs.{run}", "evaluate.{task}", "seed"),
    facts=_protocol,
    # As in pretraining, threads and memory are per node.
    resources={
        "mem_mb": lambda job: 16000 * (1 + _task(job).processes),
        "runtime": 1440,
        **request_gpus(_task),
    },
    threads=lambda job, cores: max(1, cores // max(1, len(job.study.evaluations())), _task(job).processes),
    receipt="metrics",
    records={
        "settings.task": "evaluate.{task}",
        "settings.run": "runs.{run}",
        "settings.text": "text",
        "seed": "runs.{run}.seed",
    },
    hashed=_hashed,
    otherwise="no evaluation of the config applies to these runs (`runs`, `contrast`)",
    run=_run,
)

"""The demo_models stage, which retrains the demo's small models; the package ships a copy in `stm/assets`."""

from pathlib import Path

from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job

FOLDER = Path("results/demo-models")  # the same for every config, because the models depend only on its seed


def _run(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.demo.bert import make_demo_bert
    from stm.demo.fusion import make_demo_fusion
    from stm.demo.train import train_demo_models

    train_demo_models(outputs["clip"], outputs["blip2"], outputs["card"], seed=job.study.seed, threads=processes)
    make_demo_bert(outputs["bert"], job.study.seed)
    make_demo_fusion(outputs["fusion"], f"local-dir:{outputs['clip']}", job.study.seed)


DEMO_MODELS = Stage(
    name="demo_models",
    title="retrain the demo's small models",
    per=(),
    outputs=lambda job: {
        "clip": FOLDER / "demo-clip",
        "blip2": FOLDER / "demo-blip2",
        "bert": FOLDER / "demo-bert",
        "fusion": FOLDER / "demo-fusion",
        "card": FOLDER / "README.md",
    },
    settings=("seed",),
    processes=True,
    run=_run,
)

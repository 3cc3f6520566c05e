"""The captions stage: captions of each clip, by source."""

from stm.config import Blip2Captions, CaptionSource, LanguageModelCaptions, VisionLanguageCaptions
from stm.preprocess.frames.stage import frames_of
from stm.pretrained.sizes import answer_flops, caption_flops, count_weights
from stm.stages.costs import Cost, Workload, clips_to_process
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job

# Assumed time for a language model on a GPU to generate one token for a whole batch, regardless of the batch size; it
# is dominated by reading the weights and launching kernels rather than by arithmetic.
TOKEN_SECONDS = 0.025


def _run(job: Job, inputs: Files, outputs: Files, processes: int) -> None:
    from stm.preprocess.captions.write import write_captions
    from stm.preprocess.frames.removal import restore_frames

    source = job.config.captions[job.source]
    if isinstance(source, Blip2Captions | VisionLanguageCaptions):  # the others do not look at frames
        restore_frames(job, processes)
    write_captions(inputs["slice"], inputs["tar"], inputs["frames"], outputs["captions"], source, job.config.bad_input)


def captions_per_clip(source: CaptionSource) -> int:
    """Return a source's maximum number of captions per clip; 1 for manifest captions, whose number is unknown."""
    if isinstance(source, Blip2Captions):
        return source.key_frames
    if isinstance(source, VisionLanguageCaptions):
        return len(source.prompts) * source.images_per_prompt
    return len(source.prompts if isinstance(source, LanguageModelCaptions) else getattr(source, "templates", [1]))


def _cost(job: Job, load: Workload) -> Cost | None:
    captioned = clips_to_process(job, load, packed=job.source in job.config.pack.sources)
    if captioned is None:
        return None
    source = job.config.captions[job.source]
    texts, flops, tokens = captioned.clips * captions_per_clip(source), 0.0, 0.0
    if isinstance(source, Blip2Captions):
        # Beams share the passes through the weights, which determine the time of a token.
        flops, tokens = (
            texts * caption_flops(source.model, source.beams),
            texts / source.batch_size * source.max_new_tokens,
        )
    elif isinstance(source, LanguageModelCaptions):
        # An upper bound, reached if all clips of a shard have different labels: the model is run once per label.
        flops = texts * 2 * count_weights(source.model) * source.max_new_tokens
        tokens = texts / source.batch_size * source.max_new_tokens
    elif isinstance(source, VisionLanguageCaptions):
        shown = 1 if source.input == "key_frames" else min(source.frames, captioned.stored_frames)
        flops = texts * answer_flops(
            source.model, shown, captioned.stored_pixels, source.input == "video", source.max_new_tokens
        )
        tokens = texts / source.batch_size * source.max_new_tokens
    precision = getattr(source, "precision", "float32")
    return Cost(captioned.shards, flops=flops, precision=precision, gpu_seconds=tokens * TOKEN_SECONDS)


CAPTIONS = Stage(
    name="captions",
    title="captions, by source",
    per=("dataset", "source", "shard"),
    inputs=lambda job: {"slice": job.slice, **frames_of(job)},
    models=lambda job: {"model": [getattr(job.config.captions[job.source], "model", None)]},
    outputs=lambda job: {"captions": job.layout.captions(job.source, job.shard)},
    settings=("captions.{source}", "bad_input"),
    resources={"mem_mb": 16000, "runtime": 480, "gpu": 1},
    shared=True,
    receipt="captions",
    records={"settings": "captions.{source}", "policy": "bad_input.policy"},
    cost=_cost,
    run=_run,
)

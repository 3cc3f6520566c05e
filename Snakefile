# From raw videos to a report. Results are written to {results}/{name}/, by these keys of the config; with several datasets,
# the results of each dataset are written to {results}/{dataset}/:
#
#   manifest.parquet, quarantine.parquet   the clips of the dataset; the rejected clips with reasons
#   slices/{shard}.parquet                 the clips of each shard, the unit of every later job
#   frames/{shard}.tar                     sampled frames as JPEGs
#   captions/{source}/{shard}.parquet      captions
#   similarity/{source}/{shard}.parquet    patch-text similarity maps
#   text/{source}/{shard}.parquet          text embeddings of the captions
#   motion/{shard}.parquet                 motion maps
#   flow/{shard}.parquet                   optical flow
#   shards/{split}/{shard}.tar             WebDataset shards and their index
#   pretrain/{run}/                        weights, resolved config, metrics
#   evaluate/{run}/{task}/                 metrics and predictions
#   tables/, figures/, report.html         results for readers
#
#   snakemake --cores 2                                             the demo
#   snakemake --cores 8 --configfile config/folder.yaml             your own videos
#   snakemake plan --cores 1 --configfile config/folder.yaml        estimates what the run will cost
#   snakemake rehearse --cores 2 --configfile config/tgm.yaml       everything in it, with small models and a few clips
#   snakemake tgm_table1 --cores 64 --configfile config/tgm.yaml    one table of a paper, and everything it needs
#   snakemake --workflow-profile workflow/profiles/slurm ...        the same on a cluster
#
# Targets go before `--configfile`, which takes every word after it as a file. Jobs of one machine share its GPUs, each on its own;
# `--resources gpu=1` uses one at a time, and CUDA_VISIBLE_DEVICES says which.

from snakemake.utils import min_version

min_version("9.22")

if not workflow.overwrite_configfiles:

    configfile: "config/demo.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/plan.smk"
include: "workflow/rules/rehearse.smk"
include: "workflow/rules/manifest.smk"
include: "workflow/rules/split.smk"
include: "workflow/rules/frames.smk"
include: "workflow/rules/captions.smk"
include: "workflow/rules/similarity.smk"
include: "workflow/rules/text.smk"
include: "workflow/rules/motion.smk"
include: "workflow/rules/flow.smk"
include: "workflow/rules/shards.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/demo_models.smk"


# Snakemake rejects a benchmark of a rule whose outputs may come from a shared cache, since such outputs take no time.
for cached in workflow.rules:
    if cached.cache and cached.cache.output:
        cached._benchmark = None


# Training resumes from its checkpoints: a run that takes longer than the longest job of the cluster is started again, as often as
# that takes, besides the retries for failures.
onstart:
    if REQUESTS and workflow.is_main_process and "runtime" in LIMITS:
        for stage in ("pretrain", "evaluate"):
            workflow.get_rule(stage).restart_times += REQUESTS.further_attempts(
                all_stages()[stage],
                LIMITS["runtime"],
                workflow.resource_settings.max_threads,
            )


report: "workflow/report/workflow.rst"


rule all:
    """Everything of the config: the plan, and the report page with all that it shows."""
    default_target: True
    input:
        PLAN.output.plan,
        REPORT.output.page,
        # A job learns of one unfinished checkpoint at a time: without these, datasets would be listed one after the other.
        expand(SPLIT.output.index, dataset=CONFIG.dataset_names),

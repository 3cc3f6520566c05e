# From raw videos to a report. Results go to {results}/{name}/ as the config says; with several datasets, what is made of
# each goes to {results}/{dataset}/:
#
#   manifest.parquet, quarantine.parquet   what is in the dataset, what was refused and why
#   slices/{shard}.parquet                 the clips of each shard; a shard is the unit of every later job
#   frames/{shard}.tar                     JPEGs on the frame grid
#   captions/{source}/{shard}.parquet      captions
#   similarity/{source}/{shard}.parquet    patch-text similarity maps
#   text/{source}/{shard}.parquet          captions' vectors
#   motion/{shard}.parquet                 motion maps
#   flow/{shard}.parquet                   optical flow
#   shards/{split}/{shard}.tar             WebDataset shards and their index
#   pretrain/{run}/                        weights, resolved config, metrics
#   evaluate/{run}/{task}/                 metrics and predictions
#   tables/, figures/, report.html         what to read
#
#   snakemake --cores 2                                             the demo
#   snakemake --cores 8 --configfile config/folder.yaml             your own videos
#   snakemake plan --cores 1 --configfile config/folder.yaml        what a run will cost, before it runs
#   snakemake tgm_table1 --cores 64 --configfile config/tgm.yaml    one table of a paper, and all that it needs
#   snakemake --workflow-profile workflow/profiles/slurm ...        the same on a cluster
#
# Targets stand before `--configfile`, which takes all words after it for files. `--resources gpu=1`: one job at a time on the GPUs.

from snakemake.utils import min_version

min_version("9.16")

if not workflow.overwrite_configfiles:

    configfile: "config/demo.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/plan.smk"
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


# What comes from a shared cache took no time, and Snakemake refuses to time rules whose results may.
for found in workflow.rules:
    if found.cache and found.cache.output:
        found._benchmark = None


report: "workflow/report/workflow.rst"


rule all:
    default_target: True
    input:
        PLAN.output.plan,
        REPORT.output.page,

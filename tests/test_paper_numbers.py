"""The papers' numbers, written down from the papers and releases themselves, against what the configs resolve to.

Each line says where its number stands. A default of `stm/config` counts as much as a key of a file: what is asked is the whole
config, as a run gets it. Settings that are our own choice, or known at second hand only, are not here. Published results are,
with where each was read.
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from stm.config import (
    Config,
    FineTune,
    LanguageRun,
    MultipleChoice,
    PretrainRun,
    QuestionAnswering,
    VideoTextRetrieval,
    load_config,
)

FOLDER = Path(__file__).parents[1] / "config"

Line = tuple[str, Any, str]  # key below the section, number, where it stands

# Text-Guided Video Masked Autoencoder: what all of its pretraining runs share.
TGM_RUN: list[Line] = [
    ("model", "base", "TGM 4.2: ViT-B"),
    ("image_size", 224, "VideoMAE's scripts, which TGM 4.2 follows; the number in its text is lost"),
    ("patch_size", 16, "VideoMAE's scripts, which TGM 4.2 follows; the number in its text is lost"),
    ("tubelet", 2, "VideoMAE's scripts, which TGM 4.2 follows; the number in its text is lost"),
    ("frames", 16, "TGM 4.2"),
    ("sampling", "dense", "VideoMAE 4.2: consecutive frames of the stride"),
    ("optimisation.batch_size", 512, "TGM Table 8"),
    ("optimisation.learning_rate", 1.5e-4, "TGM Table 8"),
    ("optimisation.scale_by_batch", True, "VideoMAE: rate x batch / 256"),
    ("optimisation.warmup_epochs", 40, "TGM Table 8"),
    (
        "optimisation.warmup_learning_rate",
        0,
        "VideoMAE's cosine_scheduler: start_warmup_value, not given by the scripts",
    ),
    ("optimisation.schedule", "interpolated", "VideoMAE's cosine_scheduler"),
    ("optimisation.min_learning_rate", 1e-5, "VideoMAE's scripts"),
    ("drop_path", 0.0, "VideoMAE's scripts for pretraining"),
    ("optimisation.weight_decay", 0.05, "TGM Table 8"),
    ("optimisation.betas", (0.9, 0.95), "VideoMAE's scripts"),
    ("optimisation.clip_grad", None, "VideoMAE's scripts: none"),
    ("augmentation.crop", "multi_scale", "TGM Table 8"),
    ("positions", "joint", "VideoMAE: one table over all cubes"),
    ("position_period", 10000.0, "VideoMAE: the usual sine-cosine table"),
    ("decoder_depth", None, "VideoMAE's scripts: 4 for B, the default by size"),
    ("reconstruction.target", "normalised", "VideoMAE: normalised pixels"),
    ("decode_ratio", 1.0, "VideoMAE: all hidden cubes are decoded"),
]
TUBE, MGM, TGM = (("tube", 0.9), ("motion", 0.75), ("text_top", 0.6))  # TGM 4.6: the best ratio of each
ABLATIONS: list[tuple[str, str, float, int, float | None, float]] = [
    # run, mask, ratio, epochs (TGM 4.6: 200; Table 7), weight of the contrast (none: not there), of the reconstruction
    ("tube-k400", *TUBE, 200, None, 1),
    ("mgm-k400", *MGM, 200, None, 1),
    ("tgm-k400", *TGM, 200, None, 1),
    ("mgm-k400-contrast", *MGM, 200, 1, 1),
    ("tgm-k400-contrast", *TGM, 200, 1, 1),
    ("tgm-k400-contrast-400", *TGM, 400, 1, 1),
    ("tgm-k400-contrast-800", *TGM, 800, 1, 1),
    ("tube-ssv2", *TUBE, 200, 0, 1),
    ("mgm-ssv2", *MGM, 200, 0, 1),
    ("tgm-ssv2", *TGM, 200, 0, 1),
    ("tube-ssv2-contrast", *TUBE, 200, 1, 1),
    ("mgm-ssv2-contrast", *MGM, 200, 1, 1),
    ("tgm-ssv2-contrast", *TGM, 200, 1, 1),
    # The controls of Figure 4: nothing trains the encoder.
    ("tube-ssv2-random", *TUBE, 200, 0, 0),
    ("mgm-ssv2-random", *MGM, 200, 0, 0),
    ("tgm-ssv2-random", *TGM, 200, 0, 0),
    ("tube-ssv2-contrast-only", *TUBE, 200, 1, 0),
    ("mgm-ssv2-contrast-only", *MGM, 200, 1, 0),
    ("tgm-ssv2-055", "text_top", 0.55, 200, 1, 1),
    ("tgm-ssv2-075", "text_top", 0.75, 200, 1, 1),
    ("bottom-ssv2", "text_bottom", 0.6, 200, 1, 1),
    ("tgm-ssv2-1-caption", *TGM, 200, 1, 1),
    ("tgm-ssv2-label", *TGM, 200, 1, 1),
    ("tgm-ssv2-llm", *TGM, 200, 1, 1),
    ("tgm-ssv2-blip2-llm", *TGM, 200, 1, 1),
]
TGM_TUNING: list[Line] = [
    ("repeats", 2, "TGM Table 9"),
    ("layer_decay", 0.75, "TGM Table 9"),
    ("drop_path", 0.1, "TGM Table 9"),
    ("crops", 3, "TGM 4.2"),
    ("head_dropout", 0.0, "VideoMAE's scripts for B"),
    ("label_smoothing", 0.1, "VideoMAE's defaults"),
    ("optimisation.weight_decay", 0.05, "TGM Table 9"),
    ("optimisation.warmup_epochs", 5, "TGM Table 9"),
    (
        "optimisation.warmup_learning_rate",
        0,
        "VideoMAE's cosine_scheduler: start_warmup_value, not given by the scripts",
    ),
    ("optimisation.schedule", "interpolated", "VideoMAE's cosine_scheduler"),
    ("optimisation.betas", (0.9, 0.999), "VideoMAE's defaults"),
    ("augmentation.crop", "random_resized", "VideoMAE's defaults"),
    ("augmentation.scale", (0.08, 1.0), "VideoMAE's defaults"),
    ("augmentation.auto_augment", "rand-m7-n4-mstd0.5-inc1", "VideoMAE's defaults"),
    ("augmentation.erasing", 0.25, "VideoMAE's defaults"),
    ("augmentation.mixup", 0.8, "VideoMAE's defaults"),
    ("augmentation.cutmix", 1.0, "VideoMAE's defaults"),
    ("augmentation.mix_probability", 1.0, "VideoMAE's defaults"),
    ("augmentation.mix_switch", 0.5, "VideoMAE's defaults"),
]

# UMT's second stage (exp/pretraining/b16_5m), which STM and ClusterSTM follow.
UMT_RUN: list[Line] = [
    ("model", "base", "UMT b16_5m"),
    ("image_size", 224, "UMT b16_5m"),
    ("patch_size", 16, "UMT b16_5m"),
    ("tubelet", 1, "UMT b16_5m"),
    ("frames", 4, "UMT b16_5m"),
    ("sampling", "tsn", "UMT b16_5m: a random frame of each of 4 intervals"),
    ("drop_path", 0.1, "UMT b16_5m"),
    ("positions", "joint", "UMT's vit.py: one table over all tokens"),
    ("position_frames", None, "UMT b16_5m: ckpt_num_frame is not set"),
    ("teacher.layers", 6, "UMT: the last 6 blocks"),
    ("language.model", "bert-base-uncased", "UMT b16_5m"),
    ("language.fusion_layer", 9, "UMT b16_5m"),
    ("language.max_tokens", 32, "UMT b16_5m"),
    ("language.embedding", 512, "UMT b16_5m"),
    ("language.temperature", 0.07, "UMT b16_5m"),
    ("gradient_checkpointing", "text", "UMT b16_5m: of the BERT; use_checkpoint=False"),
    ("language.tokenization", "umt", "UMT's tokenization_bert.py: no [SEP] after a single text"),
    ("objectives.contrastive", 1.0, "UMT b16_5m: all losses weigh 1"),
    ("objectives.matching", 1.0, "UMT b16_5m: all losses weigh 1"),
    ("objectives.masked_language", 1.0, "UMT b16_5m: all losses weigh 1"),
    ("objectives.mask_probability", 0.5, "UMT b16_5m: half of the words are hidden"),
    ("objectives.shared_texts", False, "UMT's pretraining: positives by sample, not by caption"),
    ("optimisation.scale_by_batch", False, "UMT: the rate is taken as it is"),
    ("optimisation.schedule", "clamped", "UMT's scheduler.py: max(min_lr_multi, cosine)"),
    ("optimisation.warmup_learning_rate", 0, "UMT's scheduler.py: current_step / num_warmup_steps"),
    ("optimisation.learning_rate", 1e-4, "UMT b16_5m"),
    ("optimisation.weight_decay", 0.02, "UMT b16_5m"),
    ("optimisation.betas", (0.9, 0.999), "UMT b16_5m"),
    ("optimisation.clip_grad", None, "UMT b16_5m: none"),
    ("augmentation.crop", "random_resized", "UMT b16_5m"),
    ("augmentation.scale", (0.5, 1.0), "UMT b16_5m"),
    ("augmentation.interpolation", "bicubic", "UMT's create_dataset, on tensors"),
    ("augmentation.flip", True, "UMT b16_5m"),
    ("augmentation.auto_augment", None, "UMT b16_5m: no RandAugment"),
    ("augmentation.erasing", 0.0, "UMT b16_5m: none"),
    ("seed", None, "UMT b16_5m: that of the config, 42"),
    ("images.datasets", ("cc3m",), "UMT: 5M is WebVid-2.5M and CC3M"),
    ("dataset", "webvid", "UMT: 5M is WebVid-2.5M and CC3M"),
]
UMT_OWN: list[Line] = [
    ("mask.strategy", "attention", "UMT b16_5m"),
    ("mask.ratio", 0.8, "UMT b16_5m"),
    ("images.mask.strategy", "attention", "UMT b16_5m"),
    ("images.mask.ratio", 0.5, "UMT b16_5m"),
    ("objectives.alignment", 1.0, "UMT b16_5m: all losses weigh 1"),
    ("teacher.normalisation", "imagenet", "UMT: no statistics of CLIP's own"),
    ("optimisation.epochs", 10, "UMT b16_5m"),
    ("optimisation.warmup_epochs", 1, "UMT b16_5m"),
    ("optimisation.min_learning_rate", 1e-6, "UMT b16_5m: 0.01 of the peak"),
]
STM_OWN: list[Line] = [
    ("mask.strategy", "spatiotemporal", "STM b16_5m: temporal"),
    ("mask.ratio", 0.7, "STM b16_5m"),
    ("images.mask.strategy", "attention_hidden", "STM's stm.py: what the teacher looks at is hidden"),
    ("images.mask.ratio", 0.5, "STM b16_5m"),
    ("images.batch_size", 1024, "STM b16_5m: 8 x 128"),
    ("objectives.alignment", 1.0, "STM b16_5m: all losses weigh 1"),
    ("optimisation.batch_size", 256, "STM b16_5m: 8 x 32"),
    ("optimisation.epochs", 15, "STM b16_5m"),
    ("optimisation.warmup_epochs", 2, "STM b16_5m"),
    ("optimisation.min_learning_rate", 1e-6, "STM b16_5m: 0.01 of the peak"),
    ("spatio_temporal.temperature", 0.05, "STM's stm.py: tau"),
    ("spatio_temporal.mix", 0.5, "STM's stm.py: lambda's first value"),
    ("spatio_temporal.mix_learning_rate", 500.0, "STM's optimiser: 5e-2 where the rest has 1e-4"),
    ("spatio_temporal.width", 512, "STM's align.py: 768 to 512 channels"),
    ("spatio_temporal.features", 256, "STM's align.py: 256 channels of a pair"),
    ("spatio_temporal.points_spread", 0.2, "STM's align.py: 0.2 x {-1, 0, 1}"),
    ("spatio_temporal.text", "invisible", "STM's stm.py: texts meet the hidden tokens"),
]
ACTION_CLIP = "weights/actionclip_vit-b-16-8f.pt"
STM_CODE: list[Line] = [
    (
        "teacher.model",
        f"actionclip:{ACTION_CLIP}",
        "STM's actionclip.py: the tower `visual.*` of the same file as the fusion",
    ),
    ("teacher.temporal_fusion", ACTION_CLIP, "STM's actionclip.py: fusion_model_state_dict"),
    ("teacher.normalisation", "imagenet", "STM: the student's pixels, as in UMT"),
    (
        "spatio_temporal.mask_gradient",
        "as_released",
        "STM's vit.py: AdaptiveMaxPool1d over x.reshape(B, C, -1), in both passes",
    ),
    ("spatio_temporal.decoder", "as_released", "STM's vit.py: _init_weights over the zeros; - tmp.detach() + tmp"),
]
CLUSTERSTM_OWN: list[Line] = [
    ("mask.strategy", "cluster", "ClusterSTM's abstract"),
    ("objectives.relevance", 1.0, "ClusterSTM: no weights are mentioned"),
    ("objectives.alignment", 0.0, "ClusterSTM: the note mentions no loss on features"),
    ("cluster.scaling", "frame", "ours: docs/language.md"),
    ("teacher.model", "ViT-B-16-SigLIP@webli", "ClusterSTM: SigLIP, at UMT's patches of 16"),
    ("optimisation.epochs", 10, "ClusterSTM: UMT's set-up"),
    ("optimisation.warmup_epochs", 1, "ClusterSTM: UMT's set-up"),
]
# What is of the release's machines, which a config must say and no default can.
UMT_MACHINES: list[Line] = [
    ("optimisation.batch_size", 2048, "UMT b16_5m: 2 x 8 x 128"),
    ("images.batch_size", 2048, "UMT b16_5m: 2 x 8 x 128"),
    ("objectives.contrastive_divisor", 16, "UMT's allgather_wgrad on 2 x 8 GPUs"),
    ("objectives.negatives_among", 128, "UMT's vtm_loss: the batch of one GPU"),
    ("objectives.hard_negatives", True, "UMT b16_5m: vtm_hard_neg"),
    ("objectives.word_average", "group", "UMT's xbert.py: CrossEntropyLoss on each GPU, whose gradients DDP averages"),
]
STM_MACHINES: list[Line] = [
    ("objectives.contrastive_divisor", 8, "STM b16_5m: UMT's allgather_wgrad on 8 GPUs"),
    ("processes", 8, "STM b16_5m: 8 GPUs, each of which draws negatives from its own batch"),
    ("objectives.negatives_among", None, "STM b16_5m: the batch of one GPU"),
    ("objectives.word_average", "group", "STM b16_5m: UMT's loss, averaged over the GPUs"),
]
# UMT's second stage with L/16 (exp/pretraining/l16_5m): what differs from B/16.
UMT_LARGE: list[Line] = [
    ("model", "large", "UMT l16_5m"),
    ("drop_path", 0.2, "UMT l16_5m"),
    ("teacher.model", "ViT-L-14-quickgelu@openai", "UMT l16_5m: clip_l14"),
    ("teacher.image_size", 196, "UMT l16_5m: clip_img_size"),
    ("language.model", "bert-large-uncased", "UMT l16_5m"),
    ("language.fusion_layer", 19, "UMT's config_bert_large.json"),
    ("language.embedding", 768, "UMT l16_5m"),
    ("optimisation.batch_size", 4096, "UMT l16_5m: 4 x 8 x 128"),
    ("images.batch_size", 4096, "UMT l16_5m: 4 x 8 x 128"),
    ("objectives.contrastive_divisor", 32, "UMT's allgather_wgrad on 4 x 8 GPUs"),
    ("objectives.word_average", "group", "UMT's xbert.py, as for B/16"),
    ("objectives.negatives_among", 128, "UMT's vtm_loss: the batch of one GPU"),
    ("objectives.hard_negatives", True, "UMT b16_5m: vtm_hard_neg"),
    ("objectives.word_average", "group", "UMT's xbert.py: CrossEntropyLoss on each GPU, whose gradients DDP averages"),
]
LARGE = {key for key, *_ in UMT_LARGE}
LANGUAGE_RUNS: list[tuple[str, str, list[Line]]] = [
    ("stm.yaml", "umt", UMT_RUN + UMT_OWN + UMT_MACHINES),
    (
        "stm.yaml",
        "stm",
        UMT_RUN
        + STM_OWN
        + STM_CODE
        + STM_MACHINES
        + [("spatio_temporal.sampling", "log_probability", "STM's intention")],
    ),
    (
        "stm.yaml",
        "stm-released",
        UMT_RUN + STM_OWN + STM_CODE + STM_MACHINES + [("spatio_temporal.sampling", "as_released", "STM's stm.py")],
    ),
    ("clusterstm.yaml", "umt", UMT_RUN + UMT_OWN + UMT_MACHINES),
    ("clusterstm.yaml", "clusterstm", UMT_RUN + CLUSTERSTM_OWN + UMT_MACHINES),
    ("umt-large.yaml", "umt", [line for line in UMT_RUN + UMT_OWN if line[0] not in LARGE] + UMT_LARGE),
]
# UMT's first stage (single_modality/exp/pretraining, {b16,l16}_ptk710_f8_res224.sh).
UMT_FIRST: list[Line] = [
    ("method", "umt", "UMT"),
    ("language", None, "UMT's first stage: video alone"),
    ("dataset", "k710", "UMT's scripts"),
    ("image_size", 224, "UMT's scripts"),
    ("patch_size", 16, "UMT's scripts"),
    ("tubelet", 1, "UMT's scripts"),
    ("frames", 8, "UMT's scripts: num_frames"),
    ("sampling", "tsn", "UMT's scripts: num_segments 8"),
    ("positions", "joint", "UMT's modeling_pretrain_umt.py: one table over all tokens"),
    ("position_frames", None, "UMT's scripts: 8 frames from the start"),
    ("mask.strategy", "attention", "UMT's scripts"),
    ("mask.ratio", 0.8, "UMT's scripts"),
    ("teacher.layers", 6, "UMT's scripts: clip_return_layer"),
    ("teacher.normalisation", "imagenet", "UMT's datasets/build.py: no statistics of CLIP's own"),
    ("objectives.alignment", 1.0, "UMT's scripts: clip_loss_ratio"),
    ("objectives.text", False, "UMT's first stage: video alone"),
    ("optimisation.epochs", 201, "UMT's scripts"),
    ("optimisation.batch_size", 2048, "UMT's scripts: 32 x 64"),
    ("optimisation.scale_by_batch", True, "UMT's run_umt_pretraining.py: rate x batch / 256"),
    ("optimisation.learning_rate", 1.5e-4, "UMT's scripts"),
    ("optimisation.warmup_epochs", 40, "UMT's scripts"),
    ("optimisation.warmup_learning_rate", 0, "UMT's run_umt_pretraining.py: start_warmup_value is not given"),
    ("optimisation.min_learning_rate", 1e-5, "UMT's run_umt_pretraining.py"),
    ("optimisation.schedule", "interpolated", "UMT's cosine_scheduler"),
    ("optimisation.weight_decay", 0.05, "UMT's run_umt_pretraining.py"),
    ("optimisation.betas", (0.9, 0.95), "UMT's scripts"),
    ("optimisation.clip_grad", None, "UMT's scripts: none"),
    ("augmentation.crop", "multi_scale", "UMT's datasets/build.py"),
    ("augmentation.flip", True, "UMT's scripts"),
    ("augmentation.auto_augment", None, "UMT's datasets/build.py: none"),
]
FIRST_STAGE: list[tuple[str, str, float, str, int | None]] = [  # run, model, drop path, teacher, side of its frames
    ("umt-b16", "base", 0.1, "ViT-B-16-quickgelu@openai", None),
    ("umt-l16", "large", 0.2, "ViT-L-14-quickgelu@openai", 196),
]
# Its fine-tuning (single_modality/exp/finetuning/{k710,k400,ssv2}): task, rate, epochs, warm-up, layer decay, drop path,
# sampling, and where the head starts.
UMT_ACTIONS: list[tuple[str, float, int, float, float, float, str, str]] = [
    ("k710-b16", 2e-4, 35, 2, 0.75, 0.1, "sparse", "fresh"),
    ("k710-l16", 1e-4, 20, 2, 0.85, 0.2, "sparse", "fresh"),
    ("k400-b16", 2e-5, 5, 1, 0.75, 0.1, "sparse", "release"),
    ("k400-l16", 1e-5, 5, 1, 0.85, 0.2, "sparse", "release"),
    ("ssv2-b16", 2e-4, 30, 5, 0.75, 0.1, "tsn", "fresh"),
    ("ssv2-l16", 4e-4, 14, 4, 0.85, 0.2, "tsn", "fresh"),
]
UMT_TUNING: list[Line] = [
    ("repeats", 2, "UMT's scripts, and its default: num_sample"),
    ("optimisation.batch_size", 512, "UMT's scripts: 16 x 16, by num_sample 2"),
    ("optimisation.scale_by_batch", True, "UMT's run_class_finetuning.py: rate x batch x num_sample / 256"),
    ("optimisation.warmup_learning_rate", 1e-6, "UMT's run_class_finetuning.py: start_warmup_value=args.warmup_lr"),
    ("optimisation.min_learning_rate", 1e-6, "UMT's run_class_finetuning.py"),
    ("optimisation.schedule", "interpolated", "UMT's cosine_scheduler"),
    ("optimisation.weight_decay", 0.05, "UMT's scripts"),
    ("optimisation.betas", (0.9, 0.999), "UMT's scripts"),
    ("views", 4, "UMT's MODEL_ZOO: 8 x 3 x 4"),
    ("crops", 3, "UMT's MODEL_ZOO: 8 x 3 x 4"),
    ("head_dropout", 0.0, "UMT's run_class_finetuning.py: fc_drop_rate"),
    ("label_smoothing", 0.1, "UMT's run_class_finetuning.py"),
]
# Fine-tuning on texts: UMT's B/16, 5M (its MODEL_ZOO and configs), on 8 GPUs of 32; STM's release has its own batches for three.
# Task, rate, epochs, warm-up, drop path, longest text (none: pretraining's 32; questions: 25), batch
Tuning = tuple[str, float, float, float, float, int | None, int]
RETRIEVAL: list[Tuning] = [
    ("msrvtt", 2e-5, 10, 0, 0.2, None, 256),
    ("didemo", 2e-5, 15, 1, 0.1, 64, 256),
    ("activitynet", 4e-5, 20, 1, 0.1, 150, 256),
    ("msvd", 1e-5, 5, 0, 0.2, 64, 256),
    ("lsmdc", 2e-5, 10, 1, 0.2, 96, 256),
    ("ssv2-label", 5e-5, 10, 0, 0.1, 25, 256),
    ("ssv2-template", 1e-4, 10, 1, 0.1, 25, 256),
]
CHOICES: list[Tuning] = [("msrvtt-mc", 8e-5, 5, 0, 0.2, None, 256)]
QUESTIONS: list[Tuning] = [
    ("msrvtt-qa", 2e-5, 8, 1, 0.2, 25, 256),
    ("msvd-qa", 2e-5, 15, 1, 0.2, 25, 256),
    ("activitynet-qa", 4e-5, 12, 1, 0.2, 25, 256),
]
STM_TUNING: list[Tuning] = [
    ("msrvtt-stm", 2e-5, 10, 0, 0.2, None, 224),
    ("didemo-stm", 2e-5, 15, 1, 0.1, 64, 128),
    ("msrvtt-qa-stm", 2e-5, 8, 1, 0.2, 25, 192),
]
LARGE_TUNING: list[Tuning] = [  # L/16, 5M: exp/finetuning/*/l16_5m.py
    ("msrvtt", 2e-5, 7, 1, 0.3, None, 256),
    ("didemo", 4e-5, 5, 1, 0.3, 64, 256),
    ("activitynet", 4e-5, 20, 1, 0.2, 150, 256),
    ("msvd", 1e-5, 3, 0, 0.3, 64, 256),
    ("lsmdc", 2e-5, 8, 1, 0.2, 96, 256),
    ("ssv2-label", 5e-5, 10, 0, 0.2, 25, 256),
    ("ssv2-template", 1e-4, 10, 1, 0.2, 25, 256),
    ("msrvtt-mc", 4e-5, 5, 0, 0.3, None, 256),
    ("msrvtt-qa", 2e-5, 8, 1, 0.4, 25, 256),
    ("msvd-qa", 6e-5, 6, 1, 0.4, 25, 256),
    ("activitynet-qa", 4e-5, 10, 1, 0.3, 25, 256),
]
TUNINGS = [(file, *tuning) for file in ("stm.yaml", "clusterstm.yaml") for tuning in RETRIEVAL + CHOICES + QUESTIONS]
TUNINGS += [("stm.yaml", *tuning) for tuning in STM_TUNING]
TUNINGS += [("umt-large.yaml", *tuning) for tuning in LARGE_TUNING]
ZERO_SHOT = [
    ("msrvtt-zero", None),
    ("didemo-zero", 64),
    ("activitynet-zero", 150),
    ("msvd-zero", 64),
    ("lsmdc-zero", 64),
]

# What a run says that gives nothing but what it must.
DEFAULTS: list[tuple[type, dict[str, Any], list[Line]]] = [
    (
        PretrainRun,
        {},
        [
            *(line for line in TGM_RUN if line[0] != "optimisation.scale_by_batch"),
            ("mask.strategy", "tube", "VideoMAE"),
            ("mask.ratio", 0.9, "VideoMAE"),
            ("reconstruction.weight", 1.0, "VideoMAE: the only loss"),
        ],
    ),
    (
        LanguageRun,
        {"method": "umt", "teacher": {"model": "any"}, "language": {}},
        [line for line in UMT_RUN + UMT_OWN if line[0].split(".")[0] in ("frames", "sampling", "mask", "objectives")]
        + [
            ("teacher.layers", 6, "UMT"),
            ("language.fusion_layer", 9, "UMT b16_5m"),
            ("language.max_tokens", 32, "UMT b16_5m"),
            ("language.embedding", 512, "UMT b16_5m"),
            ("language.temperature", 0.07, "UMT b16_5m"),
        ],
    ),
    (
        LanguageRun,
        {"method": "stm", "teacher": {"model": "any"}, "language": {}, "spatio_temporal": {}},
        [line for line in STM_OWN if line[0].split(".")[0] in ("mask", "spatio_temporal", "objectives")]
        + [("spatio_temporal.mask_gradient", "by_token", "STM's intention")],
    ),
    (
        LanguageRun,
        {"method": "umt", "teacher": {"model": "any"}, "language": {}, "images": {"datasets": ["any"]}},
        [line for line in UMT_OWN if line[0].startswith("images.mask")],
    ),
    (
        FineTune,
        {"task": "finetune"},
        [line for line in TGM_TUNING if line[0] not in ("repeats", "crops")]
        + [("optimisation.min_learning_rate", 1e-6, "VideoMAE's defaults")],
    ),
    (
        VideoTextRetrieval,
        {"task": "video_text_retrieval", "optimisation": {}},
        [
            ("depth", 128, "UMT: k_test"),
            ("optimisation.scale_by_batch", False, "UMT"),
            ("optimisation.weight_decay", 0.02, "UMT's fine-tuning"),
            ("optimisation.betas", (0.9, 0.999), "UMT's fine-tuning"),
            ("optimisation.batch_size", 256, "UMT's fine-tuning: 8 x 32"),
            ("optimisation.learning_rate", 2e-5, "UMT's MSR-VTT, 5M"),
            ("optimisation.epochs", 10, "UMT's MSR-VTT, 5M"),
            ("optimisation.warmup_epochs", 0, "UMT's MSR-VTT, 5M"),
            ("optimisation.min_learning_rate", 2e-7, "UMT: 0.01 of the peak"),
            ("optimisation.schedule", "clamped", "UMT's scheduler.py"),
            ("test_crop", "whole", "UMT's test_transform: Resize to 224 x 224"),
            ("augmentation.interpolation", "bicubic", "UMT's create_dataset, on tensors"),
            ("augmentation.crop", "random_resized", "UMT's fine-tuning"),
            ("augmentation.scale", (0.5, 1.0), "UMT's fine-tuning"),
            ("augmentation.flip", True, "UMT's fine-tuning"),
        ],
    ),
    (
        QuestionAnswering,
        {"task": "question_answering"},
        [
            ("max_tokens", 25, "UMT: max_q_len"),
            ("max_answer_tokens", 5, "UMT: max_a_len"),
            ("depth", 128, "UMT: k_test"),
        ],
    ),
    (MultipleChoice, {"task": "multiple_choice"}, [("matching_weight", 0.7, "UMT's retrieval_mc.py: 0.7 and 0.3")]),
]


@cache
def read(file: str) -> Config:
    return load_config(FOLDER / file)


def differences(section: Any, lines: Iterable[Line]) -> list[str]:
    """A sentence for each number that is another; all are said at once."""
    found = []
    for key, number, source in lines:
        value = section
        for part in key.split("."):
            value = getattr(value, part)
        if value != number:
            found.append(f"{key} is {value}, {source} has {number}")
    return found


def test_the_runs_of_tgm_are_those_of_its_tables() -> None:
    ours = {"random-k400"}  # no pretraining
    expected = {name for name, *_ in ABLATIONS} | ours
    assert expected == set(read("tgm.yaml").pretrain), "a run without its numbers in ABLATIONS"


def test_the_untrained_run_beside_tgms_table_3_is_its_tube_run_without_training() -> None:
    random, tube = (read("tgm.yaml").pretrain[name] for name in ("random-k400", "tube-k400"))
    optimisation = tube.optimisation.model_copy(update={"epochs": 0, "warmup_epochs": 0})
    assert random == tube.model_copy(update={"optimisation": optimisation})


@pytest.mark.parametrize(("name", "mask", "ratio", "epochs", "contrast", "pixels"), ABLATIONS)
def test_tgms_pretraining(
    name: str, mask: str, ratio: float, epochs: int, contrast: float | None, pixels: float
) -> None:
    run = read("tgm.yaml").pretrain[name]
    assert isinstance(run, PretrainRun)
    dataset = name.split("-")[1]
    own: list[Line] = [
        ("mask.strategy", mask, "TGM 4.6"),
        ("mask.ratio", ratio, "TGM 4.6"),
        ("optimisation.epochs", epochs, "TGM 4.6 and Table 7"),
        ("reconstruction.weight", pixels, "TGM Table 2"),
        ("dataset", dataset, "TGM 4.1"),
        ("augmentation.flip", dataset == "k400", "TGM Table 8"),
        ("captions.count", 1 if name == "tgm-ssv2-1-caption" else None, "TGM: 3 captions, or 1"),
    ]
    assert differences(run, [*TGM_RUN, *own]) == []
    assert (run.contrast and run.contrast.weight) == contrast, "TGM Table 2: which losses there are"


def test_tgms_frames_and_captions() -> None:
    config = read("tgm.yaml")
    strides = {(run.dataset, run.stride * config.of(str(run.dataset)).frames.every) for run in config.pretrain.values()}
    assert strides == {("k400", 4), ("ssv2", 2)}, "TGM 4.2"
    for name, task in config.evaluate.items():
        if task.sampling == "tsn":
            runs = [config.pretrain[run] for run in task.runs or config.pretrain]
            grids = {config.of(str(task.dataset or run.dataset)).frames.every for run in runs}
            assert grids == {1}, f"{name}: TSN samples from all frames of the file (VideoMAE's ssv2.py)"
    for name in ("k400", "ssv2"):
        corpus = config.datasets[name]
        assert corpus.captions["blip2"].kind == "blip2" and corpus.captions["blip2"].key_frames == 3, "TGM 3.2"
        assert corpus.similarity.model.startswith("ViT-B-32"), "TGM 3.3: CLIP's ViT-B/32"
        assert corpus.grid == 14, "TGM 3.3: 224 / 16 tokens on a side"
        assert corpus.similarity.window == 1, "TGM 3.3: a patch is a token"
    prompts = ("Describe the action {}.", "What does a person {} look like?", "What does the act of {} look like?")
    assert config.datasets["ssv2"].captions["llm"].prompts == prompts, "TGM Figure 5b"
    assert {config.datasets[name].dataset.fold for name in ("ucf101", "hmdb51")} == {1}, "TGM 4.1: split 1"


@pytest.mark.parametrize(
    ("name", "epochs", "rate", "flip", "sampling", "views"),
    [
        ("finetune-ssv2", 30, 5e-4, False, "tsn", 2),
        ("finetune-k400", 75, 1e-3, True, "dense", 5),
    ],
)
def test_tgms_fine_tuning(name: str, epochs: int, rate: float, flip: bool, sampling: str, views: int) -> None:
    task = read("tgm.yaml").evaluate[name]
    assert isinstance(task, FineTune)
    own: list[Line] = [
        ("optimisation.epochs", epochs, "TGM Table 9"),
        ("augmentation.flip", flip, "TGM Table 9"),
        ("sampling", sampling, "TGM 4.2"),
        ("views", views, "TGM 4.2"),
    ]
    assert differences(task, [*TGM_TUNING, *own]) == []
    # Clips in a step, without their repeats, and the rate of that step: TGM Table 9 has 384 and `rate` for 256 of them.
    chosen = task.optimisation
    assert chosen.batch_size / task.repeats == 384
    assert chosen.learning_rate * chosen.batch_size / 256 == pytest.approx(rate * 384 / 256)


# TGM's published numbers, read in its text (section 4.6, Table 7) or in notes on the paper: table, row, numbers per column.
# The tables of section 4.6 have no number there; the text calls them Figures 3(a) to 3(c).
SOURCE, NOTES = "source", "second_hand"
PUBLISHED: list[tuple[str, str, list[tuple[float, str] | None]]] = [
    ("tgm_table1", "Tube", [(66.6, NOTES), (25.7, NOTES), (78.4, NOTES), (38.1, NOTES)]),
    ("tgm_table1", "MGM", [(67.3, NOTES), (33.0, NOTES), None, (32.1, NOTES)]),
    ("tgm_table1", "TGM", [(67.1, NOTES), (26.2, NOTES), (79.9, NOTES), (33.8, NOTES)]),
    ("tgm_table2", "Tube, MAE", [(64.9, NOTES), (20.8, NOTES)]),
    ("tgm_table2", "Tube, MAE + contrast", [(65.5, SOURCE), (33.3, SOURCE)]),
    ("tgm_table2", "MGM, MAE", [(67.3, NOTES), (33.0, NOTES)]),
    ("tgm_table2", "MGM, MAE + contrast", [(67.0, NOTES), (37.1, NOTES)]),
    ("tgm_table2", "TGM, MAE", [(67.1, NOTES), (26.2, NOTES)]),
    ("tgm_table2", "TGM, MAE + contrast", [(67.5, NOTES), (33.4, NOTES)]),
    ("tgm_table3", "TGM, MAE", [(67.7, NOTES), None, None, (41.6, NOTES), None, None, (11.3, NOTES), None, None]),
    (
        *("tgm_table3", "TGM, MAE + contrast"),
        [(87.1, NOTES), None, None, (64.3, NOTES), None, None, (19.9, NOTES), None, None],
    ),
    ("tgm_table4", "TGM, MAE", [None, (14.4, NOTES)]),
    ("tgm_table4", "TGM, MAE + contrast", [None, (20.1, NOTES)]),
    ("tgm_figure3a", "Ratio 0.55", [(67.1, NOTES), None]),
    ("tgm_figure3a", "Ratio 0.60", [(67.5, NOTES), None]),
    ("tgm_figure3a", "Ratio 0.75", [(66.4, NOTES), None]),
    ("tgm_figure3b", "Bottom-k", [(67.2, SOURCE), (33.0, SOURCE)]),
    ("tgm_figure3b", "Tube", [(65.5, SOURCE), (33.3, SOURCE)]),
    ("tgm_figure3b", "Top-k", [(67.5, NOTES), (33.4, NOTES)]),
    ("tgm_figure3c", "1 caption", [(66.5, SOURCE), (31.3, SOURCE)]),
    ("tgm_figure3c", "3 captions", [(67.5, NOTES), (33.4, NOTES)]),
    ("tgm_figure5b", "BLIP-2", [(67.5, NOTES), (33.4, NOTES)]),
    ("tgm_figure5b", "Qwen2.5-7B (the paper's number: GPT-3.5)", [None, (54.0, NOTES)]),
    ("tgm_table7", "200 epochs", [(79.6, SOURCE), (59.4, SOURCE)]),
    ("tgm_table7", "400 epochs", [(80.2, SOURCE), (62.4, SOURCE)]),
    ("tgm_table7", "800 epochs", [(80.3, SOURCE), (63.4, SOURCE)]),
]


def test_tgms_published_numbers_stand_in_the_tables_of_their_names() -> None:
    found = []
    for name, table in read("tgm.yaml").tables.items():
        for row in table.rows:
            cells = [table.published(row, column) for column in range(len(table.columns))]
            if any(number is not None for number, _ in cells):
                found.append((name, row.label, [None if number is None else (number, c) for number, c in cells]))
    assert sorted(found, key=str) == sorted(PUBLISHED, key=str)


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("*.yaml")))
def test_every_published_number_says_where_it_was_read(file: str) -> None:
    tables = read(file).tables
    unstated = [
        f"{name}, {row.label}, {column.title}"
        for name, table in tables.items()
        for row in table.rows
        for place, column in enumerate(table.columns)
        if (cell := table.published(row, place))[0] is not None and cell[1] is None
    ]
    assert not unstated, "give these tables or rows a `certainty`"


@pytest.mark.parametrize("file", ["tgm.yaml", "tgm-small.yaml"])
def test_figure_4_has_a_control_for_each_mask(file: str) -> None:
    """What a head learns from a random encoder: same mask, head and captions, and no objective that trains the encoder."""
    config = read(file)
    figure = config.figures["tgm_figure4"]
    assert "control" in figure.title
    for mask in ("Tube", "MGM", "TGM"):
        logged, control = (config.pretrain[figure.runs[f"{mask}, {what}"]] for what in ("MAE", "random encoder"))
        assert isinstance(logged, PretrainRun) and isinstance(control, PretrainRun)
        assert logged.trains_encoder and not control.trains_encoder
        assert control.contrast == logged.contrast and control.contrast is not None and control.contrast.weight == 0
        for key in ("mask", "captions", "optimisation", "augmentation", "dataset", "model", "frames"):
            assert getattr(control, key) == getattr(logged, key), key


@pytest.mark.parametrize(("file", "runs"), [("tgm.yaml", 5), ("tgm-small.yaml", 5)])
def test_table_3_retrieves_with_every_run_by_class_and_by_clip(file: str, runs: int) -> None:
    config = read(file)
    table = config.tables["tgm_table3"]
    tasks = [config.evaluate[column.task] for column in table.columns]
    assert {getattr(task, "hit", None) for task in tasks} == {None, "class", "clip"}
    assert all(isinstance(row.runs, str) for row in table.rows) and len(table.rows) == runs, "no empty cells"


@pytest.mark.parametrize(
    ("name", "views"),
    [("linear-ssv2", 2), ("linear-k400", 5), ("linear-ucf101", 5), ("linear-epic55", 5), ("class-ucf101", 5)],
)
def test_tgms_tests_of_frozen_features(name: str, views: int) -> None:
    assert differences(read("tgm.yaml").evaluate[name], [("views", views, "TGM 4.2"), ("crops", 3, "TGM 4.2")]) == []


@pytest.mark.parametrize(
    ("file", "name", "lines"), LANGUAGE_RUNS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_pretraining_with_text(file: str, name: str, lines: list[Line]) -> None:
    assert differences(read(file).pretrain[name], lines) == []
    assert read(file).seed == 42, "UMT b16_5m"


@pytest.mark.parametrize(("file", "name", "rate", "epochs", "warmup", "drop_path", "tokens", "batch"), TUNINGS)
def test_fine_tuning_with_text(
    file: str, name: str, rate: float, epochs: float, warmup: float, drop_path: float, tokens: int | None, batch: int
) -> None:
    task = read(file).evaluate[name]
    lines: list[Line] = [
        ("dataset", name.removesuffix("-stm"), "the task's name"),
        ("frames", 12, "UMT's fine-tuning"),
        ("drop_path", drop_path, "UMT's B/16, 5M"),
        (
            "gradient_checkpointing",
            "all",
            "UMT's fine-tuning: use_checkpoint, of all blocks; gradient_checkpointing, of the BERT",
        ),
        ("max_tokens", tokens, "UMT's B/16, 5M"),
        ("optimisation.learning_rate", rate, "UMT's B/16, 5M"),
        ("optimisation.epochs", epochs, "UMT's B/16, 5M"),
        ("optimisation.warmup_epochs", warmup, "UMT's B/16, 5M"),
        ("optimisation.batch_size", batch, "UMT's 8 x 32, or STM's release"),
        ("optimisation.weight_decay", 0.02, "UMT's fine-tuning"),
        ("optimisation.betas", (0.9, 0.999), "UMT's fine-tuning"),
        ("optimisation.scale_by_batch", False, "UMT: the rate is taken as it is"),
        ("optimisation.schedule", "clamped", "UMT's scheduler.py: max(min_lr_multi, cosine)"),
        ("optimisation.warmup_learning_rate", 0, "UMT's scheduler.py: current_step / num_warmup_steps"),
        (
            "optimisation.min_learning_rate",
            pytest.approx(0.01 * rate, rel=1e-9),
            "UMT: min_lr_multi of the run's own peak",
        ),
        ("test_crop", "whole", "UMT's test_transform: Resize to 224 x 224"),
        ("augmentation.interpolation", "bicubic", "UMT's create_dataset, on tensors"),
    ]
    every = "intervals" if name.startswith("ssv2") else None
    lines.append(("sampling", every, "UMT's get_frame_indices, where all frames are stored"))
    pairs: list[Line] = [
        ("contrastive_divisor", 8, "UMT's allgather_wgrad on 8 GPUs"),
        ("negatives_among", batch // 8, "UMT's vtm_loss: the batch of one of 8 GPUs"),
    ]
    counting: Line = ("ranking", "albef", "UMT's rank_answer adds the first word's probability to the sum that has it")
    depth: Line = ("depth", 128, "UMT: k_test")
    lines += {
        "video_text_retrieval": [*pairs, depth],
        "multiple_choice": [*pairs, ("matching_weight", 0.7, "UMT's retrieval_mc.py")],
        "question_answering": [counting, depth],
    }[task.task]
    assert differences(task, lines) == []


def test_frames_are_stored_densely_enough_for_what_samples_them() -> None:
    """Something-Something V2 has 48 frames at 12 per second, LSMDC 4.8 seconds of 24; others more than 60."""
    config = read("clusterstm.yaml")
    frames = {name: corpus.frames for name, corpus in config.datasets.items()}
    assert [frames.pop(name).every for name in ("ssv2-label", "ssv2-template", "cc3m")] == [1, 1, 1]
    # Pretraining takes 4 frames, one of 4 each; fine-tuning 12, one of 5 each, and of an odd number tests take the middle one.
    assert config.pretrain["umt"].frames == 4 and frames.pop("webvid").count == 4 * 4
    sampled = {task.frames for task in config.evaluate.values() if isinstance(task, VideoTextRetrieval)}
    assert sampled == {4, 12} and all(60 % (2 * taken) == taken for taken in sampled), "an odd multiple"
    assert {name: each.count for name, each in frames.items()} == dict.fromkeys(frames, 60)


def test_the_numbers_beside_umt_s_own_rows_are_those_of_its_model_zoo() -> None:
    zero = {"MSR-VTT": 29.6, "DiDeMo": 33.4, "ActivityNet": 28.3, "MSVD": 36.2, "LSMDC": 16.8}
    tuned = {"MSR-VTT": 46.3, "DiDeMo": 54.8, "ActivityNet": 52.1, "MSVD": 47.4, "LSMDC": 30.3, "SSv2-label": 63.1}
    tuned |= {"SSv2-template": 87.3, "MSRVTT-QA": 44.3, "MSVD-QA": 49.1, "ActivityNet-QA": 43.5, "MSRVTT-MC": 95.9}
    tables = {"stm.yaml": ("stm_table1", "stm_table3"), "clusterstm.yaml": ("clusterstm_table1", "clusterstm_table2")}
    for file, names in tables.items():
        for name, expected in zip(names, (zero, tuned), strict=True):
            table = read(file).tables[name]
            row = next(row for row in table.rows if row.runs == "umt")
            assert dict(zip((column.title for column in table.columns), row.paper, strict=True)) == expected
            # At UMT's own batch of 256 everywhere.
            tasks = [read(file).evaluate[column.task] for column in table.columns]
            assert all(
                getattr(task, "optimisation", None) is None or task.optimisation.batch_size == 256 for task in tasks
            )
    # Those beside the columns with STM's batches would be another experiment's.
    assert not any(row.paper for row in read("stm.yaml").tables["stm_table2"].rows)


def test_captioning_is_evaluated_where_clusterstm_is() -> None:
    config = read("clusterstm.yaml")
    tasks = [config.evaluate[name] for name in ("msrvtt-captioning", "msvd-captioning")]
    assert [task.task for task in tasks] == ["captioning"] * 2 and [task.frames for task in tasks] == [12, 12]
    assert config.tables["clusterstm_table3"].rows[1].paper == (64.4, 145.6)


@pytest.mark.parametrize(("name", "model", "drop_path", "teacher", "side"), FIRST_STAGE)
def test_umts_first_stage(name: str, model: str, drop_path: float, teacher: str, side: int | None) -> None:
    config = read("umt.yaml")
    own: list[Line] = [
        ("model", model, "UMT's scripts"),
        ("drop_path", drop_path, "UMT's scripts"),
        ("teacher.model", teacher, "UMT's scripts: clip_teacher"),
        ("teacher.image_size", side, "UMT's scripts: clip_input_resolution"),
    ]
    assert differences(config.pretrain[name], UMT_FIRST + own) == []
    assert config.seed == 0, "UMT's run_umt_pretraining.py"


@pytest.mark.parametrize(
    ("name", "rate", "epochs", "warmup", "layer_decay", "drop_path", "sampling", "head"), UMT_ACTIONS
)
def test_umts_classifiers(
    name: str, rate: float, epochs: int, warmup: float, layer_decay: float, drop_path: float, sampling: str, head: str
) -> None:
    config = read("umt.yaml")
    task = config.evaluate[name]
    assert isinstance(task, FineTune) and task.runs is not None
    own: list[Line] = [
        ("optimisation.learning_rate", rate, "UMT's scripts"),
        ("optimisation.epochs", epochs, "UMT's scripts"),
        ("optimisation.warmup_epochs", warmup, "UMT's scripts"),
        ("layer_decay", layer_decay, "UMT's scripts"),
        ("drop_path", drop_path, "UMT's scripts"),
        ("sampling", sampling, "UMT's datasets/build.py: kinetics_sparse.py and ssv2.py"),
        ("initial_head", head, "UMT's run_class_finetuning.py: head.weight[:400] of 710"),
        ("augmentation.flip", not name.startswith("ssv2"), "UMT's datasets: not on SSV2"),
    ]
    mixing = [line for line in TGM_TUNING if line[0].startswith("augmentation.")]  # UMT's defaults are VideoMAE's
    assert differences(task, UMT_TUNING + mixing + own) == []
    dataset, size = name.split("-")
    run = config.pretrain[task.runs[0]]
    assert config.dataset_of(task.runs[0], name) == dataset
    assert (run.frames, run.model, run.tubelet) == (8, {"b16": "base", "l16": "large"}[size], 1)
    assert (run.release is not None) == (dataset == "k400"), "UMT: Kinetics-400 after Kinetics-710"


def test_umts_published_numbers_are_those_of_its_model_zoo() -> None:
    """Top-1 of stage 1; L/16, 5M of stage 2: zero-shot and fine-tuned."""
    actions = {"K400, B/16": 87.4, "K400, L/16": 90.3, "SSv2, B/16": 70.8, "SSv2, L/16": 74.7}
    zero = {"MSR-VTT": 33.3, "DiDeMo": 34.0, "ActivityNet": 31.9, "MSVD": 44.4, "LSMDC": 20.0}
    tuned = {"MSR-VTT": 53.3, "DiDeMo": 59.7, "ActivityNet": 58.1, "LSMDC": 37.7, "MSVD": 53.7, "SSv2-label": 70.5}
    tuned |= {"SSv2-template": 90.2, "ActivityNet-QA": 45.1, "MSRVTT-QA": 45.5, "MSRVTT-MC": 96.8, "MSVD-QA": 51.3}
    expected = {
        ("umt.yaml", "umt_actions"): actions,
        ("umt.yaml", "umt_k710"): {"B/16": 81.9, "L/16": 86.0},
        ("umt-large.yaml", "umt_large_table1"): zero,
        ("umt-large.yaml", "umt_large_table2"): tuned,
    }
    for (file, name), numbers in expected.items():
        table = read(file).tables[name]
        assert dict(zip((column.title for column in table.columns), table.rows[0].paper, strict=True)) == numbers


def test_released_classifiers_are_tested_on_umts_own_views() -> None:
    tasks = read("released.yaml").evaluate
    sampling = {name: tasks[name].sampling for name in ("umt-k400", "umt-ssv2", "k400", "ssv2")}
    # None: as in pretraining, which is VideoMAE's for its runs.
    assert sampling == {"umt-k400": "sparse", "umt-ssv2": "tsn", "k400": None, "ssv2": None}
    assert {tasks[name].sampling for name in ("ssv2-label", "ssv2-template")} == {"intervals"}, (
        "UMT's get_frame_indices"
    )


@pytest.mark.parametrize("file", ["stm.yaml", "clusterstm.yaml", "umt-large.yaml"])
@pytest.mark.parametrize(("name", "tokens"), ZERO_SHOT)
def test_zero_shot_retrieval(file: str, name: str, tokens: int | None) -> None:
    lines: list[Line] = [
        ("frames", 4, "UMT: zero-shot takes 4 frames"),
        ("max_tokens", tokens, "UMT: as in fine-tuning"),
        ("optimisation", None, "zero-shot"),
        ("test_crop", "whole", "UMT's test_transform: Resize to 224 x 224"),
        ("depth", 128, "UMT: k_test"),
    ]
    assert differences(read(file).evaluate[name], lines) == []


@pytest.mark.parametrize(("section", "given", "lines"), DEFAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_defaults_are_the_papers(section: Any, given: dict[str, Any], lines: list[Line]) -> None:
    assert differences(section.model_validate(given), lines) == []

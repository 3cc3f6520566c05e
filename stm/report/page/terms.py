"""One-line explanations of the page's terms, shown in the sections that use them."""

from collections.abc import Iterable

from stm.report.figures import title_objective

# Evaluation tasks, by their names in the config.
TASKS = {
    "linear": ("Linear probe", "a linear classifier is trained on the frozen encoder's features."),
    "finetune": ("Fine-tuning", "the whole encoder is trained further, with a classifier, on labelled clips."),
    "zero_shot": (
        "Zero-shot",
        "each clip gets the class whose sentence is the most similar to it; nothing is trained on labels.",
    ),
    "retrieval": ("Retrieval", "for each caption, all clips are ranked by similarity."),
    "video_retrieval": (
        "Video retrieval",
        "for each clip, all others are ranked by the similarity of frozen features; nothing is trained.",
    ),
    "video_text_retrieval": (
        "Retrieval",
        "for each caption, all clips are ranked; the best are re-ranked by matching.",
    ),
    "question_answering": ("Questions", "the model answers questions about a clip."),
    "multiple_choice": ("Multiple choice", "the model chooses the caption of a clip among several."),
    "mask_persistence": (
        "Mask persistence",
        "the run's masks are drawn on clips whose objects are known: how long they keep the captioned one; nothing is trained.",
    ),
    "captioning": ("Captions", "the model writes a caption, which is compared with those of people."),
}

METRICS = {
    "top-1": ("Top-1", "share of clips whose highest-scoring class is the right one."),
    "text-to-video R@1": ("R@1", "recall at 1: share of captions for which the right clip is ranked first."),
    "video-to-video R@1": (
        "R@1",
        "recall at 1: share of clips whose nearest neighbour is right: of the same class, or another window of the same clip.",
    ),
    "accuracy": ("Accuracy", "share of right answers."),
    "object kept": ("Object kept", "share of the slots that show the object in which a kept patch lies on it."),
    "CIDEr": ("CIDEr", "agreement of words and phrases with the reference captions; rare words count more."),
}

RESULTS = {
    "chance": ("Chance", "what guessing would reach."),
    "untrained": (
        "Untrained network",
        "a run with 0 epochs: the same architecture with random weights, evaluated in the same way.",
    ),
    "interval": ("95 % interval", "the range of values that the number of test clips, or the seeds, cannot rule out."),
    "final_loss": (
        "Final loss",
        "mean over the last 5 % of the steps; masks hide different patches, so losses of different masks do not compare.",
    ),
}

# Masking strategies, by their names.
STRATEGIES = {
    "tube": ("tube", "random positions, the same in all frames (VideoMAE)."),
    "random": ("random", "random positions, new in each slot (MAE)."),
    "flow": ("flow", "all but random tracks that follow the optical flow (MGMAE)."),
    "motion": ("motion", "the patches that move most (MGM, motion-guided masking)."),
    "motion_box": ("motion_box", "a box that follows the motion (MGM)."),
    "motion_compensated": ("motion_compensated", "the patches that move most relative to the camera."),
    "motion_compensated_box": ("motion_compensated_box", "a box that follows the motion relative to the camera."),
    "text_top": ("text_top", "the patches most similar to the caption (TGM, text-guided masking)."),
    "text_bottom": ("text_bottom", "the patches least similar to the caption (TGM)."),
    "attention": ("attention", "patches sampled away from what a frozen teacher attends to (UMT)."),
    "attention_hidden": ("attention_hidden", "patches sampled by what a frozen teacher attends to (STM, for images)."),
    "cluster": ("cluster", "all but one patch of each cluster of a teacher's features (ClusterSTM)."),
    "spatiotemporal": ("spatiotemporal", "what moves and what the teacher attends to; learned (STM)."),
}

MASKS = {
    "ratio": ("Mask ratio", "share of the tokens of each slot that is hidden."),
    "token": ("Token", "a patch of one time slot, the unit that a mask hides or keeps."),
    "slot": ("Slot", "the frames that tokens span, usually two."),
}

QUALITY = {
    "hidden share": ("Hidden share", "the part of the captioned object's true box that a mask hides."),
    "text_top": STRATEGIES["text_top"],
    "motion": STRATEGIES["motion"],
    "motion_minus_camera": ("motion_minus_camera", "the same, after subtracting each frame's median motion."),
    "random": ("random", "random positions."),
}

OBJECTIVES = {
    "reconstruction": "squared error of the predicted pixels of hidden patches, normalised per patch by default.",
    "contrast": "clips are matched with their own caption's vector among those of the batch.",
    "contrastive": "clips and captions are matched within the batch by their embeddings.",
    "matching": "the model tells true pairs of clip and caption from wrong ones.",
    "masked_language": "hidden words of the caption are predicted from the others and the clip.",
    "alignment": "features of visible tokens are compared with those of a frozen teacher.",
    "relevance": "the relevance of hidden tokens to the caption is predicted.",
    "loss": "the weighted sum of a run's objectives.",
}

Terms = list[tuple[str, str]]


def pick(terms: dict[str, tuple[str, str]], keys: Iterable[str]) -> Terms:
    """Return the terms and explanations of the given keys, in their order; keys without a term are omitted."""
    return list(dict.fromkeys(terms[key] for key in keys if key in terms))


def explain_objectives(names: Iterable[str]) -> Terms:
    """Return the titles of objectives and what each compares."""
    return [(title_objective(name), OBJECTIVES[name]) for name in names if name in OBJECTIVES]

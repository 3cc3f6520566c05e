"""Shapes of a run's BERT, its number of weights, and what it keeps for a backward pass."""

import json
from dataclasses import dataclass
from pathlib import Path

from stm.config import LanguageRun
from stm.plan.phases import Phase
from stm.pretrained.local_files import local_model_files

# BERT layers per student size: UMT pairs ViT-B with bert-base and ViT-L with bert-large, which have equal widths.
_DEPTH = {"tiny": 4, "small": 12, "base": 12, "large": 24, "huge": 24}
_VOCABULARY = 30522
_POSITIONS = 512


@dataclass(frozen=True)
class BertShape:
    """The layers and the vocabulary of a split BERT; its hidden layers are four times as wide as its tokens."""

    text_layers: int
    fusion_layers: int
    vocabulary: int

    def weights(self, width: int) -> float:
        """Number of weights: embeddings, layers, cross-attention of the fusion layers, and the head of masked words."""
        layers = (self.text_layers + self.fusion_layers) * _layer_weights(width)
        return self._ends(width) + layers + self.fusion_layers * _cross_weights(width)

    def decoder_weights(self, width: int) -> float:
        """Number of weights of a decoder of answers or captions, a copy of the fusion layers and both ends."""
        return self._ends(width) + self.fusion_layers * (_layer_weights(width) + _cross_weights(width))

    def _ends(self, width: int) -> float:
        embeddings = (self.vocabulary + _POSITIONS + 2) * width + 2 * width
        return embeddings + width**2 + width + 2 * width + self.vocabulary

    def read(self, width: int, tokens: int, value: int, checkpointed: bool) -> Phase:
        """One pass of a text of `tokens` tokens through the text layers."""
        return _stack(self.text_layers, _layer(tokens, width, value), tokens * width * 4, checkpointed)

    def fuse(self, width: int, tokens: int, memory: int, value: int, checkpointed: bool) -> Phase:
        """One pass through the fusion layers, which attend to the `memory` tokens of a clip."""
        layer = _layer(tokens, width, value)
        cross = _cross(tokens, memory, width, value)
        both = Phase(layer.kept + cross.kept, max(layer.passing, cross.passing))
        return _stack(self.fusion_layers, both, tokens * width * 4, checkpointed)

    def predict(self, width: int, tokens: int, value: int) -> Phase:
        """The logits of all words for `tokens` tokens, and their loss, which is computed in float32."""
        # The head's inputs and its norm's; log-probabilities, and, in passing, two tensors of their size.
        return Phase(tokens * width * (2 * value + 4) + 4 * tokens * self.vocabulary, 8 * tokens * self.vocabulary)


def read_bert(run: LanguageRun) -> BertShape:
    """Return the shape of a run's BERT; a local BERT's is read from its `config.json`."""
    assert run.language is not None
    layers = _DEPTH[run.model]
    vocabulary = _VOCABULARY
    for path in local_model_files(run.language.model):
        if Path(path).name == "config.json":
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            layers = int(values["num_hidden_layers"])
            vocabulary = int(values["vocab_size"])
    fusion_layer = run.language.fusion_layer
    return BertShape(fusion_layer, max(1, layers - fusion_layer), vocabulary)


def _layer_weights(width: int) -> float:
    return 12 * width**2 + 9 * width + 4 * width  # four matrices and two of the MLP, their biases, two norms


def _cross_weights(width: int) -> float:
    return 4 * width**2 + 4 * width + 2 * width


def _stack(layers: int, layer: Phase, states: float, checkpointed: bool) -> Phase:
    """Layers that keep their activations, or the `states` that they start from and one layer's activations at a time."""
    return (
        Phase(layers * states, layer.kept + layer.passing)
        if checkpointed
        else Phase(layers * layer.kept, layer.passing)
    )


def _layer(tokens: int, width: int, value: int) -> Phase:
    """What a layer keeps: as a vision block, and dropout's masks; in 16 bits, three copies of its input, one per projection."""
    inputs = 1 if value == 4 else 3
    kept = tokens * ((5 * width + inputs * width + 2 * 4 * width) * value + 2 * width * 4 + 2 * width)
    return Phase(kept, tokens * 5 * width * value)


def _cross(tokens: int, memory: int, width: int, value: int) -> Phase:
    """What cross-attention keeps: queries, their input and the weighted mean, a norm's input; keys and values of the memory."""
    copies = 0 if value == 4 else 2  # of the memory, for the keys and for the values
    of_text = tokens * (3 * width * value + width * 4 + width)
    # The gradients of keys and values, and of the memory: one of this layer and the sum of the later ones.
    return Phase(of_text + memory * (2 + copies) * width * value, memory * width * (2 * value + 2 * 4))

"""The offline stages by hand."""

import argparse

from stm.cli.common import corpora, each_shard, each_source
from stm.config import ConfigError, MovingShapesDataset
from stm.layout import dataset_root
from stm.manifest import write_slices

# The stages import their libraries when they run: `stm --help` answers at once.


def generate(arguments: argparse.Namespace) -> None:
    from stm.datasets.moving_shapes.generate import generate as generate_clips

    generated = [
        (config, layout) for config, layout in corpora(arguments) if isinstance(config.dataset, MovingShapesDataset)
    ]
    if not generated:
        raise ConfigError("dataset.source is not moving-shapes: there is nothing to generate")
    for config, layout in generated:
        assert isinstance(config.dataset, MovingShapesDataset)
        generate_clips(config.dataset, config.seed, layout.generated, arguments.processes)


def manifest(arguments: argparse.Namespace) -> None:
    from stm.datasets import build_manifest

    for config, layout in corpora(arguments):
        generated = layout.generated if isinstance(config.dataset, MovingShapesDataset) else None
        build_manifest(config, generated, layout.manifest, layout.quarantine, arguments.processes)


def split(arguments: argparse.Namespace) -> None:
    for config, layout in corpora(arguments):
        shards = write_slices(layout.manifest, layout.slice("x").parent, layout.shard_index, config.shard_size)
        print("\n".join(shards))


def frames(arguments: argparse.Namespace) -> None:
    from stm.preprocess.frames.extract import extract_frames

    for config, layout, shard in each_shard(arguments):
        extract_frames(
            layout.slice(shard),
            dataset_root(config),
            layout.frames_tar(shard),
            layout.frames(shard),
            config.frames,
            config.bad_input,
            arguments.processes,
        )


def captions(arguments: argparse.Namespace) -> None:
    from stm.preprocess.captions.write import write_captions

    for config, layout, source, shard in each_source(arguments):
        write_captions(
            layout.slice(shard),
            layout.frames_tar(shard),
            layout.frames(shard),
            layout.captions(source, shard),
            config.captions[source],
            config.bad_input,
        )


def embeddings(arguments: argparse.Namespace) -> None:
    from stm.preprocess.similarity.score import write_embeddings

    for config, layout, shard in each_shard(arguments):
        write_embeddings(
            layout.frames_tar(shard),
            layout.frames(shard),
            layout.embeddings(shard),
            config.similarity,
            config.grid,
        )


def similarity(arguments: argparse.Namespace) -> None:
    from stm.preprocess.similarity.score import write_similarity

    for config, layout, source, shard in each_source(arguments):
        write_similarity(
            layout.frames_tar(shard),
            layout.frames(shard),
            layout.captions(source, shard),
            layout.similarity(source, shard),
            config.similarity,
            config.grid,
            config.bad_input,
            embeddings=layout.embeddings(shard) if config.similarity.keep_embeddings else None,
        )


def motion(arguments: argparse.Namespace) -> None:
    from stm.preprocess.motion.measure import extract_motion

    for config, layout, shard in each_shard(arguments):
        extract_motion(
            layout.slice(shard),
            dataset_root(config),
            layout.frames(shard),
            layout.motion(shard),
            config.motion,
            config.grid,
            config.bad_input,
            arguments.processes,
        )


def text(arguments: argparse.Namespace) -> None:
    from stm.preprocess.text.encode import write_text

    for config, layout, source, shard in each_source(arguments):
        write_text(layout.captions(source, shard), layout.text(source, shard), config.text, config.bad_input)


def flow(arguments: argparse.Namespace) -> None:
    from stm.preprocess.flow.estimate import write_flow

    for config, layout, shard in each_shard(arguments):
        write_flow(
            layout.frames_tar(shard),
            layout.frames(shard),
            layout.flow(shard),
            config.flow,
            config.grid,
            config.bad_input,
            arguments.processes,
        )


def shards(arguments: argparse.Namespace) -> None:
    from stm.preprocess.packing.pack import pack_shard

    for config, layout, shard in each_shard(arguments):
        pack, sources = config.pack, config.pack.sources
        pack_shard(
            layout.slice(shard),
            layout.frames_tar(shard),
            layout.frames(shard),
            {source: layout.captions(source, shard) for source in sources},
            {
                array.name: {source: getattr(layout, array.name)(source, shard) for source in sources}
                if array.per_source
                else getattr(layout, array.name)(shard)
                for array in pack.arrays
            },
            layout.shard_tar(shard),
            layout.shard(shard),
            pack,
            config.grid,
            config.bad_input,
        )


def verify(arguments: argparse.Namespace) -> None:
    from stm.preprocess.packing.pack import verify_shard

    for _, layout, shard in each_shard(arguments):
        verify_shard(layout.shard_tar(shard), layout.shard(shard))
        print(f"{layout.shard_tar(shard)}: every member has the size and hash of its index")

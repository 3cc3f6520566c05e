"""A method is found by its name in the config; every one that a config may name is there, and does what training asks."""

from typing import get_args

import pytest
import torch
from language_runs import make_run, make_small_bert
from made_batches import make_run as make_mae_run

from stm.config import LanguageRun, PretrainRun
from stm.methods import Method, build_method, load_method
from stm.models.vit import VideoEncoder, VideoMAE

NAMES = [name for section in (PretrainRun, LanguageRun) for name in get_args(section.model_fields["method"].annotation)]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_that_a_config_may_name_is_built_by_the_file_of_its_name(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = make_mae_run() if name == "mae" else make_run(name, make_small_bert(tmp_path_factory.mktemp("bert")))
    assert run.method == name
    method = build_method(run)
    assert isinstance(method, Method) and isinstance(method.student, VideoMAE | VideoEncoder)
    assert all(isinstance(part.state, dict) and isinstance(part.about, dict) for part in method.parts().values())
    assert set(method.prepare({"caption": ["a red star"]})) == {"caption"} | ({"tokens"} if run.has_text else set())


def test_a_teacher_is_named_by_its_model_and_weights_and_absent_otherwise() -> None:
    identity = build_method(make_run("umt", None)).teacher_identity
    assert identity is not None and identity["model"] == "local-dir:demo-clip" and len(identity["weights_sha256"]) == 64
    assert build_method(make_mae_run()).teacher_identity is None


def test_a_teacher_is_no_part_of_the_module_but_moves_with_it() -> None:
    class Plain(Method):
        @property
        def student(self) -> VideoEncoder:
            raise AssertionError("not asked for")

    teacher = torch.nn.Linear(2, 2)
    method = Plain(teacher)
    assert not list(method.parameters()) and not method.state_dict()
    assert method.double().teacher is teacher and teacher.weight.dtype == torch.float64


def test_only_methods_that_predict_pixels_can_be_loaded_for_their_reconstructions(tmp_path) -> None:
    with pytest.raises(ValueError, match="method umt do not predict pixels"):
        load_method(make_run("umt", None), tmp_path / "weights.safetensors")

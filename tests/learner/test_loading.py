"""Which weights a policy starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.engine.source import LocalModel, resolve
from shoal.errors import ModelError
from shoal.learner.loading import load_policy
from tiny import make_tiny_model


def test_a_named_file_is_trained_and_not_what_else_its_directory_holds(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    name = "model.norm.weight"
    save_file({**tensors, name: tensors[name] + 1}, directory / "other.safetensors")
    usual = load_policy(LocalModel("usual", directory), "fp32", "cpu").state_dict()
    other = load_policy(resolve(str(directory / "other.safetensors"), tmp_path / "cache"), "fp32", "cpu").state_dict()
    assert usual.keys() == other.keys()
    assert {key for key in usual if not torch.equal(usual[key], other[key])} == {name}


def test_a_named_file_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "other.safetensors")
    with pytest.raises(ModelError, match="model.norm.weight"):
        load_policy(LocalModel("other", directory, directory / "other.safetensors"), "fp32", "cpu")

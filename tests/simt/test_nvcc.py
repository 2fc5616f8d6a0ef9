"""The device side: every wrapper assembles for sm_80 and sm_90a, and the machine code is as intended."""

import pathlib
import shutil
import subprocess
import sys

import pytest

import emulated
import sass

needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
SOURCES = ("golden_kernels.cu", "golden_kernels_sm90.cu")

SASS_TEXT = """
Fatbin elf code:
arch = sm_80
\tcode for sm_80
\t\tFunction : _ZN4simt6detail12kernel_entryIN6probes3FooEEEvNT_6ParamsE
        /*0000*/                   MOV R1, c[0x0][0x28] ;                /* 0x00000a0000017a02 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R1], [R2.64] ;   /* 0x00000a0000017a02 */
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R6, R4 ;  /* 0x00000a0000017a02 */
        /*0030*/                   STL [R1], R4 ;                        /* 0x00000a0000017a02 */
        /*0040*/                   EXIT ;                                /* 0x000000000000794d */
\t\tFunction : _ZN4simt6detail12kernel_entryIN6probes3BarEEEvNT_6ParamsE
        /*0000*/                   MOV R1, c[0x0][0x28] ;                /* 0x00000a0000017a02 */
        /*0010*/                   EXIT ;                                /* 0x000000000000794d */
"""
RESOURCE_TEXT = """
arch = sm_80
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN4simt6detail12kernel_entryIN6probes3FooEEEvNT_6ParamsE:
  REG:27 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:368 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def parsed():
    opcodes, resources = sass.parse_sass(SASS_TEXT), sass.parse_resources(RESOURCE_TEXT)
    names = sass.demangle({name for _, name in opcodes})
    return [sass.Kernel(names[n], arch, ops, resources.get((arch, n), {})) for (arch, n), ops in opcodes.items()]


def test_facts_are_parsed():
    foo, bar = parsed()
    assert "Foo" in foo.name and foo.arch == "sm_80" and not foo.is_stub
    assert foo.opcodes["LDGSTS.E.BYPASS.128"] == 1 and foo.count("registers") == 27
    assert bar.is_stub
    sass.assert_facts([foo, bar], {"Foo": {"LDGSTS.*128": ">0", "HMMA": 1, "registers": "<=32", "BAR": 0}})


@pytest.mark.parametrize(
    "expectations,words",
    [
        ({"Foo": {"LDL|STL": 0}}, "LDL|STL is 1, expected 0 (1 STL)"),
        ({"Foo": {"registers": "<27"}}, "registers is 27, expected <27"),
        ({"Foo": {"HGMMA": ">0"}}, "HGMMA is 0, expected >0"),
        ({"Bar": {"HMMA": ">0"}}, "no kernel matches 'Bar'"),
        ({"Baz": {}}, "no kernel matches 'Baz'; there are: "),
    ],
)
def test_violations_are_explained(expectations, words):
    with pytest.raises(AssertionError) as caught:
        sass.assert_facts(parsed(), expectations)
    assert words in str(caught.value)


def compile_object(tmp, source, arch):
    target = tmp / f"{pathlib.Path(source).stem}_{arch}.o"
    command = ["nvcc", "-std=c++17", f"-arch={arch}", "-I", emulated.ROOT / "csrc", "-Werror", "all-warnings"]
    done = subprocess.run([*command, "-c", emulated.HERE / source, "-o", target], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    """Compiled once for all tests of this file."""
    tmp = tmp_path_factory.mktemp("nvcc")
    return {(source, arch): compile_object(tmp, source, arch) for source in SOURCES for arch in ("sm_80", "sm_90a")}


@needs_nvcc
def test_every_wrapper_assembles(objects):
    assert all(path.stat().st_size > 0 for path in objects.values())


@needs_nvcc
def test_instructions_are_the_intended_ones(objects):
    try:
        sass.find_cuobjdump()
    except sass.ToolMissing as missing:
        pytest.skip(str(missing))
    for arch in ("sm_80", "sm_90a"):
        facts = sass.read(objects["golden_kernels.cu", arch])
        expected = {
            "ScalarProbe": {"MUFU.EX2": ">0", "MUFU.TANH": ">0", "HFMA2": ">0", "LDL|STL": 0},
            "WarpProbe": {
                r"HMMA.16816.F32.BF16": ">0",
                r"HMMA.1688.F32.TF32": ">0",
                r"HMMA.SP.16832.F32.BF16": 2,
                r"HMMA.16816.F16": ">0",
                r"IMMA.16832.S8": ">0",
                r"LDSM.16.M88.4": ">0",
                r"LDSM.16.MT88.4": ">0",
                "REDUX": ">0",
                "SHFL": ">0",
                "MATCH.ANY": ">0",
            },
            "MemoryProbe": {"LDGSTS.E.BYPASS.128": ">0", "LDGSTS.E.64": ">0", "LDG.*128": ">0", "STG.*128": ">0"},
        }
        sass.assert_facts(facts, expected, arch)
    facts = sass.read(objects["golden_kernels_sm90.cu", "sm_90a"])
    expected = {
        "WgmmaProbe": {"HGMMA": 4, "UTMALDG": ">0", "LDL|STL": 0},
        "TmaProbe": {"UTMALDG": 4, "UTMASTG": 4},
        "BulkProbe": {"UBLKCP": 2},
        "StoreMatrixProbe": {"STSM": 2},
    }
    sass.assert_facts(facts, expected, "sm_90a")


def test_generated_wgmma_header_is_current():
    generator = emulated.ROOT / "csrc" / "simt" / "gen_wgmma.py"
    assert subprocess.run([sys.executable, generator, "--check"]).returncode == 0, "run gen_wgmma.py"

"""The binding and the core's runtime: array exchange, errors, threads, instruction sets."""

import ctypes
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy
import pytest
import torch

import tilewise
import tilewise.speculative as spec
from tilewise import _C


def links(nodes=3):
    return [torch.empty(1, nodes, dtype=torch.int32) for _ in range(3)] + [torch.empty(1, nodes, 1, dtype=torch.int64)]


PARENT = torch.tensor([[-1, 0, 1]], dtype=torch.int32)
COUNT = torch.tensor([3], dtype=torch.int32)


@pytest.mark.parametrize("declarations", ["dlpack_layout", "torch_abi"])
def test_declarations_match_the_headers_that_torch_ships(declarations):
    source = Path(__file__).parent / "cpp" / f"{declarations}.cpp"
    include = Path(torch.__file__).parent / "include"
    csrc = Path(__file__).parents[1] / "csrc"
    compile_ = ["g++", "-std=c++17", "-fsyntax-only", f"-I{include}", f"-I{csrc}", str(source)]
    subprocess.run(compile_, check=True)


def test_numpy_arrays_pass_through_the_slow_path():
    out = [t.numpy() for t in links()]
    _C.tree_finalize(PARENT.numpy(), COUNT.numpy(), COUNT.numpy(), *out)
    assert out[0].tolist() == [[3, 4, 5]]


def test_things_that_are_no_arrays_are_refused():
    with pytest.raises(TypeError):
        _C.tree_finalize(PARENT, COUNT, "three", *links())
    with pytest.raises(TypeError, match="tree_finalize: seq_lens is a int, expected a torch.Tensor"):
        spec.tree_finalize(PARENT, COUNT, 3)


def test_tensors_without_memory_are_refused():
    with pytest.raises((ValueError, RuntimeError, TypeError, BufferError)):
        _C.tree_finalize(PARENT.to("meta"), COUNT, COUNT, *links())


def test_more_dimensions_than_a_view_holds():
    with pytest.raises(ValueError, match="expected at most 8"):
        _C.tree_finalize(torch.zeros([1] * 9, dtype=torch.int32), COUNT, COUNT, *links())


def test_messages_name_operation_argument_got_and_expected():
    with pytest.raises(TypeError, match="tree_finalize: parent has dtype int64, expected int32"):
        spec.tree_finalize(PARENT.long(), COUNT, COUNT)
    with pytest.raises(ValueError, match=r"tree_finalize: n_nodes has shape \(2,\), expected \(1,\)"):
        spec.tree_finalize(PARENT, COUNT.repeat(2), COUNT)


@pytest.mark.parametrize("isa", _C.isa_levels())
def test_every_instruction_set_can_be_chosen(isa):
    before = _C.isa()
    _C.set_isa(isa)
    assert tilewise.info()["isa"] == isa
    _C.set_isa(before)


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="set_isa: name is 'mmx', expected one of generic"):
        _C.set_isa("mmx")


def test_threads_follow_torch():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert _C.num_threads() == 1 and _C.thread_backend() == "torch"
    torch.set_num_threads(before)
    assert _C.num_threads() == before


def run_python(code, **environment):
    path = os.pathsep.join([str(Path(tilewise.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


MANY_TREES = """
import os, torch, tilewise
import tilewise.speculative as spec
parent = torch.full((5000, 64), -2, dtype=torch.int32)
parent[:, 0] = -1
parent[:, 1:] = torch.arange(63, dtype=torch.int32)
count = torch.full((5000,), 64, dtype=torch.int32)
def right():
    positions = spec.tree_finalize(parent, count, count).positions
    return positions[0].tolist() == positions[-1].tolist() == list(range(64, 128))
"""


@pytest.mark.parametrize("backend", ["torch", "pool", "serial"])
def test_thread_backends_agree(backend):
    done = run_python(MANY_TREES + "print(right(), tilewise.info()['threads'])", TILEWISE_THREADS=backend)
    assert done.stdout.startswith("True") and backend in done.stdout, done.stdout + done.stderr


def test_a_forked_child_works():
    """torch's own team hangs after fork() (so do torch's parallel ops); the child must run on a fresh pool."""
    code = """
assert right()
child = os.fork()
if child == 0:
    os._exit(0 if right() and "pool" in tilewise.info()["threads"] else 1)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = run_python(MANY_TREES + code)
    assert done.stdout.strip() == "child 0", done.stdout + done.stderr


def test_environment_chooses_the_instruction_set():
    done = run_python("import tilewise; print(tilewise.info()['isa'])", TILEWISE_ISA="generic")
    assert done.stdout.strip() == "generic"


def test_info_command():
    done = run_python("import tilewise.__main__ as m, sys; sys.argv = ['tilewise', 'info']; m.main()")
    assert f"version: {tilewise.__version__}" in done.stdout and "isa: " in done.stdout, done.stderr


def test_a_program_links_the_core_without_python_or_torch(tmp_path):
    root, package = Path(__file__).parents[1], Path(tilewise.__file__).parent
    program = tmp_path / "program"
    source = root / "examples" / "cpp" / "tree.cpp"
    link = [f"-L{package}", "-ltilewise", f"-Wl,-rpath,{package}"]
    subprocess.run(["g++", "-std=c++17", f"-I{root / 'include'}", str(source), *link, "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    assert "positions: 7 8 8 9" in done.stdout


def test_strided_views_arrive_with_their_strides():
    wide = torch.zeros(1, 6, dtype=torch.int32)
    with pytest.raises(ValueError, match="parent is not contiguous"):
        _C.tree_finalize(wide[:, ::2], COUNT, COUNT, *links())
    assert numpy.array_equal(wide.numpy(), numpy.zeros((1, 6)))


OPERATORS = ["attention_out", "cache_append", "cache_rotate", "append_kv", "compact_kv", "table_update"]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("key", ["CPU", "CUDA"])
def test_operators_without_results_have_kernels_that_run_no_python(name, key):
    lines = torch._C._dispatch_dump(f"tilewise::{name}").splitlines()
    assert [line for line in lines if line.startswith(f"{key}:") and "operator.cpp" in line], lines


def test_only_functions_bound_as_operators_can_be_kernels():
    assert not _C.register_operator("tree_finalize", "CPU", torch.Tensor)


def test_operators_work_where_torch_lacks_the_interface():
    code = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
import tilewise.speculative as spec
table = torch.zeros(4, 2, dtype=torch.int32)
spec.table_update(table, torch.ones(1, 1, dtype=torch.int32), torch.tensor([[[5, 6]]], dtype=torch.int32))
print(table[1].tolist(), "operator.cpp" in torch._C._dispatch_dump("tilewise::table_update"))
"""
    done = run_python(code)
    assert done.stdout.strip() == "[5, 6] False", done.stdout + done.stderr


def caches(layers, dtype=torch.float32):
    return [(torch.randn(2, 4, 1, 8).to(dtype), torch.randn(2, 4, 1, 8).to(dtype)) for _ in range(layers)]


# A call whose last argument is a list, an optional tensor, or neither; right, and with a wrong dtype.
CALLS = {
    "table_update": lambda good: (
        torch.zeros(4, 2, dtype=torch.int32 if good else torch.int64),
        torch.ones(1, 1, dtype=torch.int32),
        torch.ones(1, 1, 2, dtype=torch.int32),
        torch.ones(1, dtype=torch.int32),
    ),
    "compact_kv": lambda good: (
        [k for k, _ in caches(3)],
        [v for _, v in caches(3, torch.float32 if good else torch.float16)],
        torch.zeros(1, 2, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        torch.tensor([[0, 1]], dtype=torch.int32),
        torch.ones(1, dtype=torch.int32),
    ),
}


@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_kernels_release_their_arguments(name, good):
    """A tensor that C++ still holds would keep its Python object alive."""
    arguments = CALLS[name](good)
    tensors = [t for a in arguments for t in (a if isinstance(a, list) else [a])]
    operator = getattr(torch.ops.tilewise, name).default
    if good:
        operator(*arguments)
    else:
        with pytest.raises(TypeError, match=f"{name}: .* has dtype "):
            operator(*arguments)
    watched = [weakref.ref(t) for t in tensors]
    del arguments, tensors
    assert [t() for t in watched] == [None] * len(watched)


def beats_during(work):
    """How often this thread ran Python while another did the work, which keeps the interpreter unless it lets it go."""
    beats, gained, before = [], [], sys.getswitchinterval()

    def run():
        begin = len(beats)
        work()
        gained.append(len(beats) - begin)

    sys.setswitchinterval(100)
    try:
        worker = threading.Thread(target=run)
        worker.start()
        while worker.is_alive():
            beats.append(None)
            time.sleep(1e-4)
    finally:
        sys.setswitchinterval(before)
    return gained[0]


def test_operators_run_while_other_python_threads_do():
    q = torch.randn(1, 4, 2048, 64)
    out, lse = torch.empty_like(q), torch.empty(1, 4, 2048)
    assert beats_during(lambda: torch.ops.tilewise.attention_out.default(q, q, q, out, lse)) > 1
    assert beats_during(lambda: _C.attention_out(q, q, q, out, lse)) > 1
    assert beats_during(lambda: ctypes.PyDLL(None).usleep(30_000)) == 0, "what keeps the interpreter is told apart"

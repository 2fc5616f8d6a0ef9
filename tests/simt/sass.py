"""Facts about compiled kernels, read from their machine code: no GPU needed.

    python tests/simt/sass.py OBJECT [--kernel REGEX] [--arch sm_90a] [--opcodes]

In a test:

    facts = sass.read("build/launch.o")
    sass.assert_facts(facts, {
        "FlashForward<.*64>": {"LDL|STL": 0, "LDGSTS.*128": ">0", "HMMA": ">=64", "registers": "<=128"},
    }, arch="sm_80")

A key is a regular expression for the start of opcodes, whose instructions are counted, or one of registers, shared,
stack, local, instructions. A value is a number or a comparison. Every kernel that the regular expression of the outer
key finds must satisfy the table, and there must be one.
"""

import argparse
import collections
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field

RESOURCES = {"registers": "REG", "shared": "SHARED", "stack": "STACK", "local": "LOCAL"}
SUMMARY = {
    "HMMA": "HMMA",
    "HGMMA": "HGMMA",
    "LDSM": "LDSM",
    "LDGSTS.128": r"LDGSTS.*128",
    "UTMALDG": "UTMALDG",
    "LDG.128": r"LDG\..*128",
    "STG.128": r"STG\..*128",
    "LDL/STL": "LDL|STL",
    "BAR": "BAR",
    "MUFU": "MUFU",
}
STUB_OPCODES = {"MOV", "LDC", "EXIT", "BRA", "NOP"}
COMPARISONS = {
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
}


@dataclass
class Kernel:
    name: str
    arch: str
    opcodes: collections.Counter = field(default_factory=collections.Counter)
    resources: dict = field(default_factory=dict)

    def count(self, key):
        """The value of a key of the tables: a resource, or how many instructions match."""
        if key == "instructions":
            return sum(self.opcodes.values())
        if key in RESOURCES:
            return self.resources[RESOURCES[key]]
        return sum(n for opcode, n in self.opcodes.items() if re.match(key, opcode))

    @property
    def is_stub(self):
        """Compiled for an architecture below its kMinArch: launch() refuses to run it."""
        return {opcode.split(".")[0] for opcode in self.opcodes} <= STUB_OPCODES


class ToolMissing(RuntimeError):
    pass


def tool_directories():
    """Where cuobjdump may live besides PATH: a toolkit, or the wheels of the tools."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    yield from (pathlib.Path(home) / "bin" for home in homes if home)
    for scheme in ("purelib", "platlib"):
        yield from sorted(pathlib.Path(sysconfig.get_path(scheme)).glob("nvidia/*/bin"))


def find_cuobjdump():
    search = os.pathsep.join([os.environ.get("PATH", ""), *map(str, tool_directories())])
    tool = shutil.which("cuobjdump", path=search)
    if not tool:
        raise ToolMissing("cuobjdump not found: install nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm")
    return pathlib.Path(tool)


def dump(tool, option, path):
    # cuobjdump calls nvdisasm, which lies beside it.
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [str(tool), option, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def parse_sass(text):
    """{(arch, mangled name): opcodes}"""
    found, arch, opcodes = {}, None, collections.Counter()
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\S+)", line) or re.match(r"\s*code for (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            opcodes = found[arch, match[1]] = collections.Counter()
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            opcodes[match[1]] += 1
    return found


def parse_resources(text):
    """{(arch, mangled name): {"REG": 40, ...}}"""
    found, arch, name = {}, None, None
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif name and (numbers := re.findall(r"\b([A-Z]+)(?:\[\d+\])?:(\d+)", line)):
            found[arch, name] = {key: int(value) for key, value in numbers}
            name = None
    return found


def demangle(names):
    """Readable names; of the simt entry point only the kernel struct, without anonymous namespaces."""
    names = list(names)
    if not shutil.which("c++filt"):
        return dict(zip(names, names, strict=True))
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    readable = {}
    for mangled, name in zip(names, done.stdout.splitlines(), strict=True):
        entry = re.search(r"simt::detail::kernel_entry<(.*)>\(", name)
        short = (entry[1] if entry else name).strip()
        readable[mangled] = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", short)
    return readable


def read(path):
    """The kernels of an object file, library or cubin."""
    tool = find_cuobjdump()
    opcodes, resources = parse_sass(dump(tool, "-sass", path)), parse_resources(dump(tool, "-res-usage", path))
    names = demangle({name for _, name in opcodes})
    return [Kernel(names[n], arch, ops, resources.get((arch, n), {})) for (arch, n), ops in sorted(opcodes.items())]


def read_all(paths):
    return [kernel for path in paths for kernel in read(path)]


def loops(path):
    """{kernel: the instructions of each of its loops, without predicates, in order}"""
    found = {}
    for block in dump(find_cuobjdump(), "-sass", path).split("Function : ")[1:]:
        name = block.split("\n")[0].strip()
        code = [
            (int(m[1], 16), re.sub(r"^@!?U?P\w+ ", "", m[2].strip()))
            for m in re.finditer(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", block, re.M)
        ]
        place = {address: i for i, (address, _) in enumerate(code)}
        bodies = found.setdefault(demangle([name])[name], [])
        for i, (address, text) in enumerate(code):
            target = re.match(r"BRA (?:U?!?P\w+, )?0x([0-9a-f]+)", text)
            if target and int(target[1], 16) < address:
                bodies.append([text for _, text in code[place[int(target[1], 16)] : i + 1]])
    return found


def satisfied(value, wanted):
    if isinstance(wanted, int):
        return value == wanted
    match = re.fullmatch(r"\s*(<=|>=|==|<|>)\s*(\d+)\s*", wanted)
    if not match:
        raise ValueError(f"{wanted!r} is neither a number nor a comparison such as '>0'")
    return COMPARISONS[match[1]](value, int(match[2]))


def violations(kernel, table):
    for key, wanted in table.items():
        value = kernel.count(key)
        if not satisfied(value, wanted):
            matching = {op: n for op, n in sorted(kernel.opcodes.items()) if re.match(key, op)}
            detail = f" ({', '.join(f'{n} {op}' for op, n in matching.items())})" if matching else ""
            yield f"{kernel.name} [{kernel.arch}]: {key} is {value}, expected {wanted}{detail}"


def assert_facts(facts, expectations, arch=None):
    """Raises AssertionError with one line per violated expectation."""
    problems = []
    candidates = [k for k in facts if not k.is_stub and (arch is None or k.arch == arch)]
    for pattern, table in expectations.items():
        chosen = [k for k in candidates if re.search(pattern, k.name)]
        if not chosen:
            known = ", ".join(sorted({k.name for k in candidates})) or "none"
            problems.append(f"no kernel matches {pattern!r}{f' for {arch}' if arch else ''}; there are: {known}")
        for kernel in chosen:
            problems.extend(violations(kernel, table))
    if problems:
        raise AssertionError("\n".join(problems))


def print_table(kernels, with_opcodes):
    columns = [*SUMMARY, "regs", "smem", "stack"]
    print(f"{'kernel':60} {'arch':8} {'instr':>6} " + " ".join(f"{c:>10}" for c in columns))
    for k in kernels:
        numbers = [k.count(pattern) for pattern in SUMMARY.values()]
        numbers += [k.resources.get(key, 0) for key in ("REG", "SHARED", "STACK")]
        print(f"{k.name[-60:]:60} {k.arch:8} {k.count('instructions'):6} " + " ".join(f"{n:10}" for n in numbers))
        if with_opcodes:
            print("    " + ", ".join(f"{n} {op}" for op, n in k.opcodes.most_common()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("object", type=pathlib.Path)
    parser.add_argument("--kernel", default="", help="only kernels whose name matches this regular expression")
    parser.add_argument("--arch", help="only this architecture, such as sm_90a")
    parser.add_argument("--opcodes", action="store_true", help="list all opcodes")
    args = parser.parse_args()
    kernels = [k for k in read(args.object) if re.search(args.kernel, k.name) and args.arch in (None, k.arch)]
    print_table([k for k in kernels if not k.is_stub], args.opcodes)


if __name__ == "__main__":
    sys.exit(main())

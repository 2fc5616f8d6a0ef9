"""What kernels may not contain, so that one source serves both machines (csrc/simt/README.md gives the reasons).

python tests/simt/rules.py [FILE ...]      without arguments: every file of csrc/**/cuda
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
SUFFIXES = {".h", ".cuh", ".cu"}

RULES = {  # what is wrong: pattern
    "inline assembly": r"\basm\b",
    "CUDA builtin or attribute; simt has a name for it": r"\b__(?!restrict__\b|attribute__\b|FILE__\b|LINE__\b)\w+",
    "CUDA index variable; use thread_id() and its kin": r"\b(threadIdx|blockIdx|blockDim|gridDim|warpSize)\b",
    "CUDA runtime or driver; use simt::launch and its kin": r"\b(cuda[A-Z]\w*|cu[A-Z]\w*|CUtensorMap|CUresult)\b",
    "CUDA atomic; use simt::atomic_*": r"\batomic[A-Z]\w*",
    "CUDA launch; use simt::launch": r"<<<",
    "CUDA header": r"#\s*include\s*<(cuda|cooperative_groups|mma)",
    "volatile; threads communicate through barriers and atomics": r"\bvolatile\b",
    "thread-local variable": r"\bthread_local\b",
    "mutable static variable": (
        r"\bstatic\s+(?!constexpr\b|const\b|inline\b|SIMT_DEVICE\b|SIMT_HD\b)"
        r"[\w:<>,\s*&]+?[\s*&]\w+\s*(=|;|\[|\{)"
    ),
    "code for one of the two machines only": r"\bSIMT_EMULATED\b",
    "printing": r"\bprintf\b",
}
# Host code in launch.cu may copy bytes; in a kernel the race checker would not see it.
HEADER_RULES = {"memcpy, memset or memmove, which the race checker does not see": r"\bmem(cpy|set|move)\b"}


def without_comments_and_strings(text):
    """The same lines with comments and the contents of string literals blanked."""

    def blank(match):
        return re.sub(r"[^\n]", " ", match[0])

    kept = r'"(?:\\.|[^"\\\n])*"'
    return re.sub(rf"//[^\n]*|/\*.*?\*/|(?<!include ){kept}", blank, text, flags=re.S)


def check_text(text, is_header=True):
    """[(line number, what is wrong, the line)]"""
    code = without_comments_and_strings(text)
    rules = {**RULES, **(HEADER_RULES if is_header else {})}
    found = []
    for what, pattern in rules.items():
        for match in re.finditer(pattern, code):
            number = code.count("\n", 0, match.start()) + 1
            found.append((number, what, text.splitlines()[number - 1].strip()))
    return sorted(found)


def kernel_files(root=ROOT):
    families = (d for d in root.glob("csrc/**/cuda") if d.parent.name != "simt")
    return sorted(f for d in families for f in d.rglob("*") if f.suffix in SUFFIXES)


def check_files(files):
    problems = []
    for path in files:
        for number, what, line in check_text(path.read_text(), path.suffix != ".cu"):
            problems.append(f"{path}:{number}: {what}: {line}")
    return problems


if __name__ == "__main__":
    found = check_files(map(pathlib.Path, sys.argv[1:]) if len(sys.argv) > 1 else kernel_files())
    print("\n".join(found))
    sys.exit(bool(found))

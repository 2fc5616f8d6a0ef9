"""The build backend: scikit-build-core, plus the pinned CUDA toolkit wheels where no nvcc is on PATH.

They are exact, mutually consistent versions: nvcc's own dependencies are unpinned, and mixed releases fail to compile.
TILEWISE_CUDA=OFF in the environment skips them and builds for the CPU only.
"""

import os
import platform
import shutil

from scikit_build_core import build as _backend
from scikit_build_core.build import *  # noqa: F403

TOOLKIT = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]


def _toolkit():
    wanted = os.environ.get("TILEWISE_CUDA", "AUTO").upper() != "OFF"
    missing = shutil.which("nvcc") is None and "CUDACXX" not in os.environ
    supported = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")
    return TOOLKIT if wanted and missing and supported else []


def get_requires_for_build_wheel(config_settings=None):
    return _backend.get_requires_for_build_wheel(config_settings) + _toolkit()


def get_requires_for_build_editable(config_settings=None):
    return _backend.get_requires_for_build_editable(config_settings) + _toolkit()

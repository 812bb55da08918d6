"""Build the native kernels, a plain shared library: no Python or torch headers, no import of it.

One file therefore serves every Python and torch version of a platform. Where it cannot be built,
the installation succeeds all the same and the library runs in pure PyTorch.
"""

import os
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

_FOLDER = Path("src/onsphere/optim/kernels/cpu")
_FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden"]
_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
# The first that works: threads as a compiler offers them, then one thread.
_THREADS = (["-fopenmp"], ["-Xpreprocessor", "-fopenmp", "-lomp"], [])


class BuildKernel(build_ext):
    """Compile ``kernel.c`` with the C compiler at hand, or go on without."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return a name that Python does not take for an extension module."""
        return os.path.join(*fullname.split(".")[:-1], "libonsphere.so.1")

    def build_extension(self, ext: Extension) -> None:
        """Try every compiler with and without threads; the first that works is used."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
        said = ""
        for command in dict.fromkeys([compiler[0], "cc", "gcc", "clang"]):
            for threads in _THREADS:
                said = _compile([command, *_FLAGS, *threads], ext.sources[0], target)
                if not said:
                    return
        print(f"onsphere: no native kernels, steps on spheres will be slower: {said}")

    def copy_extensions_to_source(self) -> None:
        """Leave the library beside the sources for an editable install, where there is one."""
        if Path(self.get_ext_fullpath_in_build()).exists():
            super().copy_extensions_to_source()

    def get_ext_fullpath_in_build(self) -> str:
        """Return where the library lies before it is copied beside the sources."""
        return os.path.join(self.build_lib, self.get_ext_filename(self.extensions[0].name))

    def get_outputs(self) -> list[str]:
        """Return the files that were made."""
        return [name for name in super().get_outputs() if Path(name).exists()]


class AnyPython(bdist_wheel):
    """A wheel for one platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag: the library does not care which Python loads it."""
        return "py3", "none", super().get_tag()[2]


def _compile(command: list[str], source: str, target: Path) -> str:
    """Compile next to the target and move it there; return what went wrong."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "kernel.so"
        try:
            subprocess.run(
                [*command, source, "-o", str(made), "-lm"], check=True, capture_output=True
            )
        except FileNotFoundError:
            return f"no compiler {command[0]}"
        except subprocess.CalledProcessError as error:
            return error.stderr.decode(errors="replace").strip()
        made.replace(target)
    return ""


setup(
    ext_modules=[
        Extension(
            "onsphere.optim.kernels.cpu.kernel_library",
            sources=[str(_FOLDER / "kernel.c")],
            depends=[str(path) for path in sorted(_FOLDER.glob("*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": AnyPython},
)

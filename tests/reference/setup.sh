#!/usr/bin/env bash
# Makes the virtual environment .venv, in which make_fixtures.py runs. Does nothing where all is there already.
#
# PyTorch's wheel for Linux asks for several GB of CUDA packages. On a CPU nothing calls them, but the libraries that
# the wheel is linked with must load. So torch is installed without the packages it asks for, then its Python
# dependencies, then those libraries that the system does not have.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=.venv
python=$venv/bin/python
requirements=tests/reference/requirements.txt

say() { echo "setup: $*"; }

pip_install() { "$python" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts "$@"; }

torch_loads() { "$python" -c 'import torch' 2>/dev/null; }

complete() {
    [ -e $venv/ready ] && torch_loads && "$python" - $requirements <<'PY'
import importlib.metadata, sys
for line in open(sys.argv[1]):
    name, version = line.split("==")
    if importlib.metadata.version(name).split("+")[0] != version.strip():  # torch 2.11.0+cu126 will do
        sys.exit(1)
PY
}

# Prints what torch's own metadata asks for: without arguments its Python dependencies, else the packages that provide
# the shared libraries named.
torch_packages() {
    "$python" - "$@" <<'PY'
import importlib.metadata, re, sys
from packaging.requirements import Requirement

requires = [Requirement(r) for r in importlib.metadata.requires("torch")]
requires = [r for r in requires if not r.marker or r.marker.evaluate({"extra": ""})]
cuda = {r.name: r for r in requires if re.match("cuda-|nvidia-|triton$", r.name)}
if len(sys.argv) == 1:
    print(*(f"{r.name}{r.specifier}" for r in requires if r.name not in cuda), sep="\n")
toolkit = cuda.get("cuda-toolkit")
for library in sys.argv[1:]:
    stem = re.match(r"lib(.+?)(_host)?\.so", library)[1].lower()
    own = [r for name, r in cuda.items() if name.startswith(f"nvidia-{stem}-")]
    part = [e for e in toolkit.extras if stem.startswith(e)] if toolkit else []
    if own:
        print(f"{own[0].name}{own[0].specifier}")
    elif part:
        print(f"cuda-toolkit[{part[0]}]{toolkit.specifier}")
    else:
        sys.exit(f"setup: torch needs {library}, and none of its packages seems to provide it")
PY
}

missing_libraries() {
    local torch
    torch=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
    ldd "$torch/lib/libtorch_python.so" | awk '/not found/ { print $1 }' | sort -u
}

if complete; then
    say "$venv is complete"
    exit 0
fi

# The first Python here that numpy's version works with.
find_python() {
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$candidate" && return
    done
    say "Python 3.11 or newer is needed; PYTHON=PROGRAM says where it is" >&2
    return 1
}

if [ ! -x "$python" ]; then
    found=$(find_python)
    say "creating $venv with $found"
    "$found" -m venv $venv
fi
rm -f $venv/ready

say "installing $(grep -v '^torch==' $requirements | xargs)"
grep -v '^torch==' $requirements | pip_install -r /dev/stdin

torch=$(grep '^torch==' $requirements)
say "installing $torch"
pip_install --no-deps "$torch"
mapfile -t packages < <(torch_packages)
pip_install "${packages[@]}"

if ! torch_loads && command -v ldd >/dev/null; then
    mapfile -t libraries < <(missing_libraries)
    if [ ${#libraries[@]} -gt 0 ]; then
        packages=$(torch_packages "${libraries[@]}" | sort -u)
        say "installing libraries that torch is linked with: $(echo $packages)"
        pip_install $packages
    fi
fi
if ! torch_loads; then
    say "installing $torch with all that it asks for"
    pip_install "$torch"
fi
"$python" -c 'import torch, transformers as t; print(f"setup: torch {torch.__version__}, transformers {t.__version__}")'
touch $venv/ready
say "$venv is complete"

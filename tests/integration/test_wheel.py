"""The built wheel, in an environment of its own, trains from the settings inside it."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import QUICK, ROOT, environment


@pytest.mark.slow
def test_wheel_trains_from_packaged_settings(catch_store: Path, tmp_path: Path) -> None:
    env = environment()
    del env["PYTHONPATH"]

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    # The dependencies are lent by this environment, without what it has installed of this project itself: a path
    # named in a .pth file is searched, but the .pth files in it are not read.
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    found = run(python, "-c", "import worldmodels.config as c; print(c.conf_dir())").strip()
    assert Path(found) == site.resolve() / "worldmodels" / "conf"
    program = tmp_path / "env" / "bin" / "worldmodels"
    assert "train" in run(program)
    out = tmp_path / "run"
    run(program, "train", "experiment=catch", f"store={catch_store}", f"out={out}", *QUICK, "trainer.max_steps=2")
    assert (out / "best.ckpt").exists()
